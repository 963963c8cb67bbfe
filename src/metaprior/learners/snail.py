"""SNAIL (Mishra, Rohaninejad, Chen & Abbeel 2018): temporal convolutions and causal attention over the support set.

The support is a sequence of pairs (x_i, y_i). A query is x* without a label at its end. The network is attention, a TC
block, attention, a TC block, attention, a linear layer:

* DenseBlock: concat(z, tanh(f) * sigmoid(g)), where f and g are causal convolutions of width 2 and dilation d.
* TCBlock: dense blocks of dilation 1, 2, 4, ... up to the length of the sequence. (The paper's pseudo-code starts at
  2, but sums of 2, 4, 8, ... reach every other example only.)
* AttentionBlock: concat(z, softmax(q k' / sqrt(K)) v) over z itself and all earlier steps.

Each query is predicted alone after the support. The network is causal, so all queries share the support's computation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.options import Count, checked
from metaprior.core.types import Batch, Learner, Model, Task, counted, examples, weights
from metaprior.inference.descent import drawn
from metaprior.learners.builders.amortised import amortised_learner, as_inputs, embedding, output_width
from metaprior.learners.traits import traits
from metaprior.networks.attention import attend
from metaprior.networks.layers import dense, dense_init


class Snail(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of the model, whose features of x are the inputs.
        attention: The attention blocks: linear maps to queries, keys and values.
        convolution: The TC blocks between them, each a list of dense blocks.
        head: The linear layer on top.
    """

    embedding: PyTree
    attention: list[dict[str, dict[str, Array]]]
    convolution: list[list[dict[str, Array]]]
    head: dict[str, Array]


class Past(NamedTuple):
    """The posterior: the support as a sequence, with padding first, where it has no effect.

    Attributes:
        pairs: Features of x_i concatenated with the encoded y_i.
        there: False for padding.
    """

    pairs: Float[Array, "n c"]
    there: Bool[Array, " n"]


class Steps(NamedTuple):
    """The time steps of the rows.

    Attributes:
        time: Time of each row.
        there: False for padding.
        sees: Element (i, j) is above 0 where row i may attend to row j.
    """

    time: Int[Array, " m"]
    there: Bool[Array, " m"]
    sees: Float[Array, "m m"]


def dense_block(layer: dict[str, Array], z: Float[Array, "m c"], steps: Steps, dilation: int) -> Float[Array, "m c2"]:
    """Concatenates the input and a gated causal convolution of it, of width 2."""
    before = steps.time - dilation
    past = jnp.where((before >= 0)[:, None], z[jnp.maximum(before, 0)], 0)
    f, g = jnp.split(dense("convolution", layer, jnp.concatenate([past, z], -1)), 2, -1)
    return _beside(z, jnp.tanh(f) * jax.nn.sigmoid(g), steps)


def attention_block(layer: dict[str, dict[str, Array]], z: Float[Array, "m c"], steps: Steps) -> Float[Array, "m c2"]:
    """Concatenates the input and the output of one head that attends to the present and the past."""
    q, k, v = (dense(name, layer[name], z)[:, None] for name in ("query", "key", "value"))
    return _beside(z, attend(q, k, v, steps.sees)[:, 0], steps)


def _beside(z: Array, new: Array, steps: Steps) -> Array:
    # In every layer the steps before the first example are zeros, and so is padding.
    return jnp.concatenate([z, jnp.where(steps.there[:, None], new, 0)], -1)


@traits(reads_names=True, ordered=True, small={"filters": 8, "attention": ((8, 8), (8, 8), (8, 8))})
@checked
def snail(
    model: Model,
    likelihood: Likelihood,
    *,
    filters: Count = 128,
    attention: Sequence[Sequence[Count]] = ((64, 32), (256, 128), (512, 256)),
    shuffle: bool = True,
) -> Learner:
    """Meta-learns to read the support as a sequence, by temporal convolutions and causal attention.

    The order of the support matters. So do class names, except as far as training with random names teaches the network
    to ignore them. A weight above 0 counts as 1.
    TC blocks span a support of the length that `init` saw; in a longer one only attention reaches the beginning.

    Args:
        model: The network; its features (its outputs where it has none) are the inputs.
        likelihood: Likelihood of the query.
        filters: Number of filters of each dense block.
        attention: Sizes (K, V) of the keys and values of each attention block. A TC block stands between two of them.
        shuffle: Whether the support is in random order in training, as in the paper.

    Raises:
        ValueError: A size is not positive, or `attention` holds no (K, V) pairs.

    References:
        Mishra, Rohaninejad, Chen & Abbeel (2018).
    """
    if filters < 1 or not attention or any(len(sizes) != 2 or min(sizes) < 1 for sizes in attention):
        raise ValueError(
            f"filters must be at least 1 and attention a list of pairs (K, V), got {filters} and {attention}."
        )
    embed = embedding(model)

    def init(key: PRNGKeyArray, task: Task) -> Snail:
        x, n = task.support.x, examples(task.support)
        key_model, key_head, *keys = jax.random.split(key, 2 + len(attention) * (n.bit_length() + 4))
        theta = model.init(key_model, x)
        outputs = output_width(model, theta, x)
        width = embed(theta, x).shape[1] + as_inputs(likelihood, counted(task.support).y, outputs).shape[1]
        attentions, convolutions = [], []
        for i, (k, v) in enumerate(attention):
            sizes = {"query": k, "key": k, "value": v}
            attentions.append({name: dense_init(keys.pop(), width, size) for name, size in sizes.items()})
            width += v
            if i < len(attention) - 1:
                convolutions.append([])
                for _ in range(max(n.bit_length(), 1)):  # ceil(log2(n + 1)): the support and a query
                    convolutions[i].append(dense_init(keys.pop(), 2 * width, 2 * filters))
                    width += filters
        return Snail(theta, attentions, convolutions, dense_init(key_head, width, outputs))

    def adapt(params: Snail, support: Batch, key: PRNGKeyArray) -> Past:
        x, there = embed(params.embedding, support.x), weights(support) > 0
        y = as_inputs(likelihood, counted(support).y, output_width(model, params.embedding, support.x))
        pairs = jnp.where(there[:, None], jnp.concatenate([x, y], -1), 0)
        padding_first = jnp.argsort(there, stable=True)
        return Past(pairs[padding_first], there[padding_first])

    def outputs(params: Snail, past: Past, x: PyTree) -> Float[Array, "m c"]:
        f, n = embed(params.embedding, x), past.there.shape[0]
        m = f.shape[0]
        query = jnp.pad(f, ((0, 0), (0, past.pairs.shape[1] - f.shape[1])))
        earlier = jnp.concatenate([jnp.tri(n), jnp.ones((m, n))]) * past.there
        itself = jnp.concatenate([jnp.zeros((n, m)), jnp.eye(m)])
        steps = Steps(
            jnp.concatenate([jnp.arange(n), jnp.full(m, n)]),
            jnp.concatenate([past.there, jnp.ones(m, bool)]),
            jnp.concatenate([earlier, itself], -1),
        )
        z = jnp.concatenate([past.pairs, query])
        for i, layer in enumerate(params.attention):
            z = attention_block(layer, z, steps)
            for d, convolution in enumerate(params.convolution[i] if i < len(params.convolution) else []):
                z = dense_block(convolution, z, steps, 2**d)
        return dense("head", params.head, z[n:])

    learner = amortised_learner(init, adapt, outputs, likelihood)

    def shuffled(params: Snail, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        order = jax.random.permutation(key, examples(task.support))
        adapt(params, task.support, key)  # for its checks: once the order is traced, no value is concrete
        return learner.loss(params, task._replace(support=drawn(task.support, order)), key)

    return learner._replace(loss=shuffled) if shuffle else learner
