"""Conditional neural processes (Garnelo et al. 2018), and their attentive form (Kim et al. 2019).

An encoder h turns each support example into r_i = h(x_i, y_i) (eq. 1); their mean r is all that is kept of the task
(eq. 2); a decoder g(x*, r) gives the outputs at x* (eq. 3). Where each query attends to the support, r depends on x*:
r* = MultiHead(q(x*), k(x_i), r_i) (Kim et al. 2019, sec. 3, the deterministic path alone; no latent variable).
The loss is the query's nll; the paper's also has the support's examples among its targets.
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
        embedding: parameters of the embedding of x (the given model).
        encoder: parameters of h.
        decoder: parameters of g.
        address: parameters of the map from inputs to queries and keys; None without attention.
    """

    embedding: PyTree
    encoder: PyTree
    decoder: PyTree
    address: PyTree


class Read(NamedTuple):
    """The posterior of the attentive form: what was made of each support example."""

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

    An empty support is read as zeros. The order of the support does not matter. The answer depends on how classes are
    named, as far as training has not taught otherwise.

    Args:
        model: the network, whose features are the embedding.
        likelihood: of the support and the query.
        width: length of the summary r.
        encoder: widths of the hidden layers of h.
        decoder: widths of the hidden layers of g.
        by_class: whether each class has a mean of its own, side by side (section 4.3 of the paper, Omniglot). Otherwise
            classes are read one-hot into one mean.
        attention: whether each query has a summary of its own, by attention to the support.
        heads: number of heads of the attention; it must divide `width`.

    References:
        Garnelo et al. 2018, equations 1 to 3; Kim et al. 2019, section 3.
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
        model: as in `cnp`.
        likelihood: as in `cnp`.
        options: as in `cnp`, without `attention`.
    """
    return cnp(model, likelihood, attention=True, **options)
