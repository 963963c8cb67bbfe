"""CAVIA (Zintgraf, Shiarlis, Kurin, Hofmann & Whiteson 2019): adapts a few context parameters, inputs of the network.

Algorithm 1: the context phi starts at 0 and takes k gradient steps on the support, while the shared theta is constant
(eq. 2). The outer gradient of the query's loss flows to theta through those steps (eq. 3). In fully connected networks
phi is concatenated to the inputs. In convolutional networks it modulates the channels of one layer, by gamma and beta
that are linear in phi (sec. 3.4, after FiLM, Perez et al. 2018).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count
from metaprior.core.types import Call, Learner, Model, Task
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.learners.builders.amortised import modulated_layers
from metaprior.learners.builders.gradient import Adaptation, query_learner
from metaprior.learners.traits import traits
from metaprior.networks.layers import flat


class Told(NamedTuple):
    """What CAVIA meta-learns.

    Attributes:
        theta: Parameters of the network.
        film: Linear map from phi to gamma - 1 and beta of the modulated layer. None where phi is an input.
    """

    theta: PyTree
    film: Float[Array, "k c2"] | None


@traits(reads_names=True, small={"rate": 0.3})
@passes_options_to(InnerLoop, rate=1.0)
def cavia(
    model: Model,
    likelihood: Likelihood,
    *,
    context: Count = 5,
    layer: str | None = None,
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns a network that reads a few context parameters phi, which alone are adapted.

    Args:
        model: The network. Where phi joins its inputs, these are flattened to [n, d].
        likelihood: Likelihood of the support and the query.
        context: Number of context parameters.
        layer: Name of the layer that phi modulates, after its norm (e.g. "block3" of `conv4`). None appends phi to the
            inputs.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`.

    References:
        Zintgraf et al. (2019), Algorithm 1.
    """
    loop = InnerLoop(**inner)
    optimizer = loop.transformation()

    def beside(phi: Float[Array, " k"], x: Array) -> Float[Array, "n d"]:
        x = flat(x).astype(phi.dtype)
        return jnp.concatenate([x, jnp.broadcast_to(phi, (x.shape[0], context))], -1)

    def network(params: Told, phi: Float[Array, " k"], x: PyTree, call: Call) -> Array:
        if params.film is None:
            return model.outputs(params.theta, beside(phi, x), call)
        gain, shift = jnp.split(phi @ params.film, 2)

        def modulate(name: str, s: Array) -> Array:
            return s * (1 + gain) + shift if name == layer else s

        return model.outputs(params.theta, x, call._replace(modulate=modulate))

    def init(key: PRNGKeyArray, task: Task) -> Told:
        x = task.support.x
        if layer is None:
            try:
                return Told(model.init(key, beside(jnp.zeros(context), x)), None)
            except ValueError as error:
                raise ValueError(
                    f"layer must be given for a network that does not take phi beside flat inputs ({error}); name the "
                    "layer that phi modulates, e.g. 'block3' of conv4."
                ) from error
        key_theta, key_film = jax.random.split(key)
        theta = model.init(key_theta, x)
        widths = modulated_layers(model, theta, x)
        if layer not in widths:
            known = ", ".join(widths) or "none: the model has no norm"
            raise ValueError(f"layer must be one of {known}, got {layer!r}.")
        return Told(theta, jax.nn.initializers.glorot_uniform()(key_film, (context, 2 * widths[layer])))

    def start(params: Told) -> Float[Array, " k"]:
        return jnp.zeros(context, jax.tree.leaves(params.theta)[0].dtype)

    adaptation = Adaptation(model, init, start, network, lambda params: optimizer)
    return query_learner(adaptation, likelihood, loop, posterior)
