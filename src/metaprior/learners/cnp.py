"""Conditional neural processes (Garnelo et al. 2018), and their attentive form (Kim et al. 2019).

An encoder h maps each support example to r_i = h(x_i, y_i) (eq. 1). Their mean r represents the task (eq. 2). A decoder
g(x*, r) gives the outputs at x* (eq. 3). In the attentive form each query attends to the support, so r depends on x*:
r* = MultiHead(q(x*), k(x_i), r_i) (Kim et al. 2019, sec. 3; only the deterministic path, without a latent variable).
The loss is the query's nll; the paper's loss also has the support's examples among its targets.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Categorical, Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count, checked
from metaprior.core.types import Batch, Learner, Model, Task, counted, weights
from metaprior.learners.builders.amortised import amortised_learner, as_inputs, embedding, output_width
from metaprior.learners.traits import traits
from metaprior.networks.attention import attend
from metaprior.networks.mlp import mlp


class Process(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of the model, whose features of x are the inputs of h and g.
        encoder: Parameters of h.
        decoder: Parameters of g.
        address: Parameters of the map from inputs to queries and keys. None without attention.
    """

    embedding: PyTree
    encoder: PyTree
    decoder: PyTree
    address: PyTree


class Read(NamedTuple):
    """The posterior of the attentive form.

    Attributes:
        keys: k(x_i), split into heads.
        values: r_i, split into heads.
        weight: Weights of the support examples.
    """

    keys: Float[Array, "n h d"]
    values: Float[Array, "n h e"]
    weight: Float[Array, " n"]


@traits(reads_names=True, small={"width": 32, "encoder": (32,), "decoder": (32,)})
@checked
def cnp(
    model: Model,
    likelihood: Likelihood,
    *,
    width: Count = 128,
    encoder: Sequence[Count] = (128, 128),
    decoder: Sequence[Count] = (128, 128),
    by_class: bool = False,
    attention: bool = False,
    heads: Count = 8,
) -> Learner:
    """Meta-learns to summarise a support in `width` numbers and to predict from them.

    An empty support gives r = 0. The order of the support does not matter. Classes are encoded one-hot, so class names
    matter, except as far as training with random names teaches the network to ignore them.

    Args:
        model: The network; its features (its outputs where it has none) are the inputs of h and g.
        likelihood: Likelihood of the query.
        width: Length of r.
        encoder: Widths of h's hidden layers.
        decoder: Widths of g's hidden layers.
        by_class: Whether r holds one mean per class, concatenated (Garnelo et al. 2018, sec. 4.3, Omniglot).
        attention: Whether each query has its own r, by attention to the support.
        heads: Number of attention heads; it must divide `width`.

    Raises:
        ValueError: The number of heads does not divide `width`, or `by_class` has no classes or is combined with
            `attention`.

    References:
        Garnelo et al. (2018), eqs. 1-3.
    """
    if width < 1 or (attention and (heads < 1 or width % heads)):
        raise ValueError(f"width must be a multiple of heads, got {width} and {heads}.")
    if by_class and (attention or not isinstance(likelihood, Categorical)):
        raise ValueError(
            "by_class must be False with attention, or with a likelihood that is not Categorical, got True."
        )
    embed = embedding(model)
    h, g, address = mlp(width, encoder), mlp(hidden=decoder), mlp(width, encoder[:1])

    def init(key: PRNGKeyArray, task: Task) -> Process:
        keys = jax.random.split(key, 4)
        theta, x = model.init(keys[0], task.support.x), task.support.x
        outputs = output_width(model, theta, x)
        d, t = embed(theta, x).shape[1], as_inputs(likelihood, counted(task.support).y, outputs).shape[1]
        means = outputs if by_class else 1
        return Process(
            theta,
            h.init(keys[1], jnp.zeros((1, d + t))),
            mlp(outputs, decoder).init(keys[2], jnp.zeros((1, d + width * means))),
            address.init(keys[3], jnp.zeros((1, d))) if attention else None,
        )

    def by_heads(a: Float[Array, "n width"]) -> Float[Array, "n h e"]:
        return a.reshape(a.shape[0], heads, width // heads)

    def adapt(params: Process, support: Batch, key: PRNGKeyArray) -> Read | Float[Array, " r"]:
        x, weight = embed(params.embedding, support.x), weights(support)
        y = as_inputs(likelihood, counted(support).y, output_width(model, params.embedding, support.x))
        r = h.apply(params.encoder, jnp.concatenate([x, y], -1))
        if attention:
            return Read(by_heads(address.apply(params.address, x)), by_heads(r), weight)
        member = weight[:, None] * (y if by_class else 1)
        total = member.sum(0)[:, None]
        return (member.T @ r / jnp.where(total > 0, total, 1)).reshape(-1)

    def outputs(params: Process, read: Any, x: PyTree) -> Float[Array, "n c"]:
        f = embed(params.embedding, x)
        if attention:
            r = attend(by_heads(address.apply(params.address, f)), *read).reshape(f.shape[0], width)
        else:
            r = jnp.broadcast_to(read, (f.shape[0], *read.shape))
        return g.apply(params.decoder, jnp.concatenate([f, r], -1))

    return amortised_learner(init, adapt, outputs, likelihood)


@traits(reads_names=True, small={"width": 32, "encoder": (32,), "decoder": (32,), "heads": 4})
@passes_options_to(cnp, without=("attention",))
def anp(model: Model, likelihood: Likelihood, **options: Any) -> Learner:
    """Meta-learns to summarise a support for each query by attention: `cnp` with attention=True.

    Args:
        model: As in `cnp`.
        likelihood: As in `cnp`.
        options: As in `cnp`, without `attention`.

    References:
        Kim et al. (2019), sec. 3.
    """
    return cnp(model, likelihood, attention=True, **options)
