"""MT-nets and T-nets (Lee & Choi 2018): MAML with a learned metric, and learned choices of the units that adapt.

Each linear map of the network is followed by a square matrix, y = T (W x + b). T is the identity at first. It is
meta-learned, and constant in the inner loop (T-net, Algorithm 1). In terms of U = T W, a step of W at rate a is a step
of U that is preconditioned by T T'. An MT-net (Algorithm 2) also draws a mask for each task, with one binary value per
unit: a step changes a unit's weights and bias only where the mask is 1. A unit with the logit zeta is drawn with
probability sigmoid(zeta), by Gumbel-softmax with its straight-through gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Positive
from metaprior.core.types import Batch, Call, Learner, Model, Task
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.kernels.product import product
from metaprior.learners.builders.gradient import Adaptation, query_learner
from metaprior.learners.traits import five_steps, traits


class Warp(NamedTuple):
    """How inner steps are warped, by the layers' names.

    Attributes:
        transforms: T of each layer.
        logits: zeta of each layer's units. None for a T-net.
    """

    transforms: dict[str, Float[Array, "o o"]]
    logits: dict[str, Float[Array, " o"]] | None


class Warped(NamedTuple):
    """What MT-net meta-learns.

    Attributes:
        theta: The initialisation of W and b.
        rule: T and zeta.
        mask: The mask of a task, for each layer's units. None outside a task, and for a T-net.
    """

    theta: PyTree
    rule: Warp
    mask: dict[str, Float[Array, " o"]] | None = None


@traits(estimates=True, on_table=five_steps, small={"rate": 0.02}, silent={"mask": False})
@passes_options_to(InnerLoop)
def mt_net(
    model: Model,
    likelihood: Likelihood,
    *,
    mask: bool = True,
    temperature: Positive = 1.0,
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns an initialisation, a metric of the inner steps, and which units they change.

    The mask is drawn for each task, also for a new one, so predictions depend on the random key.

    Args:
        model: The network. Its parameters are a dictionary by the names of its layers, as in metaprior.networks.
        likelihood: Likelihood of the support and the query.
        mask: Whether to draw masks. False is the T-net.
        temperature: Temperature of the Gumbel-softmax.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`.

    References:
        Lee & Choi (2018), Algorithms 1 and 2.
    """
    loop = InnerLoop(**inner)
    steps = loop.transformation()

    def init(key: PRNGKeyArray, task: Task) -> Warped:
        theta = model.init(key, task.support.x)
        widths = linear_layers(model, theta, task.support.x)
        logits = {name: jnp.zeros(width) for name, width in widths.items()}
        return Warped(theta, Warp({name: jnp.eye(width) for name, width in widths.items()}, logits if mask else None))

    def drawn(params: Warped, support: Batch, key: PRNGKeyArray) -> Warped:
        """Draws the task's mask: 1 where zeta + g1 > g0 for two Gumbel variables, whose difference is logistic."""
        assert params.rule.logits is not None
        logits = sorted(params.rule.logits.items())  # in one order, in compiled code and outside
        masks = {}
        for k, (name, logit) in zip(jax.random.split(key, len(logits)), logits, strict=True):
            noisy = logit + jax.random.logistic(k, logit.shape, logit.dtype)
            soft = jax.nn.sigmoid(noisy / temperature)
            masks[name] = soft + jax.lax.stop_gradient((noisy > 0) - soft)
        return params._replace(mask=masks)

    def network(params: Warped, theta: PyTree, x: PyTree, call: Call) -> Array:
        def tap(name: str, inputs: Array, s: Array) -> Array:
            s = s if call.tap is None else call.tap(name, inputs, s)
            return product(s.reshape(-1, s.shape[-1]), params.rule.transforms[name]).reshape(s.shape)

        return model.outputs(theta, x, call._replace(tap=tap))

    def optimizer(params: Warped) -> optax.GradientTransformation:
        if params.mask is None:
            return steps
        return optax.chain(steps, optax.stateless(lambda updates, _: masked(updates, params.mask or {})))

    local: Callable | None = drawn if mask else None
    adaptation = Adaptation(model, init, lambda params: params.theta, network, optimizer, local=local)
    return query_learner(adaptation, likelihood, loop, posterior)


def linear_layers(model: Model, theta: PyTree, x: PyTree) -> dict[str, int]:
    """Returns the number of units (channels) of each linear map that a tap sees, by its name.

    Raises:
        ValueError: The model takes no `Call`.
    """
    widths: dict[str, int] = {}

    def tap(name: str, inputs: Array, s: Array) -> Array:
        widths[name] = s.shape[-1]
        return s

    by = jnp.ones(jax.tree.leaves(x)[0].shape[0])
    jax.eval_shape(lambda p, x: model.outputs(p, x, Call(tap, by)), theta, x)
    return widths


def masked(updates: Any, mask: dict[str, Float[Array, " o"]]) -> dict[str, PyTree]:
    """Multiplies the updates of each unit's weights, bias and norm by its mask.

    Args:
        updates: The updates by the layers' names; the last axis of each array is the layer's units.
        mask: The masks by the layers' names. Parameters without a mask stay as they are, and so do a layer's further
            inputs (`bias_inputs` of `mlp`), which are no units.
    """

    def of_layer(name: str, layer: PyTree) -> PyTree:
        def by_unit(path: tuple, leaf: Array) -> Array:
            return leaf if any(getattr(part, "key", None) == "inputs" for part in path) else leaf * mask[name]

        return jax.tree_util.tree_map_with_path(by_unit, layer) if name in mask else layer

    return {name: of_layer(name, layer) for name, layer in updates.items()}
