"""Meta networks (Munkhdalai & Yu 2017): fast weights from gradients of the loss, added layer by layer to slow weights.

Two networks of the same shape have slow weights: u makes keys (Q), and b classifies (W).

1. The support is split into groups of classes. Each group has the gradient of u's mean loss. A coordinatewise LSTM
   reads the groups' gradients one after another, and its last output is Q*. One LSTM serves the layers with a
   convolution, another the dense layers.
2. Keys: r = u(x; Q, Q*), where a layer of inputs h computes F(h; Q) + F(h; Q*), activation included.
3. Each support example i has the gradient of its loss under b. A coordinatewise network with two hidden layers makes
   the fast weights W*_i of it.
4. A query has the attention a_i = softmax_i cos(r, r_i), W* = sum_i a_i W*_i, and the logits b(x; W, W*).

Networks read a gradient g as (log|g| / 7, sign g), or (-1, e^7 g) if it is small. It is a constant: the meta-gradient
has no second derivatives. Two things are our choice: the last layers of the LSTMs and of the coordinatewise network
start near 0, and so do the fast weights; and the loss is the mean over queries, where the paper has the sum.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Likelihood, one_hot
from metaprior.core.options import Count, Positive, checked
from metaprior.core.types import Batch, Learner, Model, Task, counted, weighted_mean, weights
from metaprior.inference.learned_optimizers import log_sign
from metaprior.learners.builders.metric import check_classification, memberships, scored_by_query, unit
from metaprior.learners.traits import traits
from metaprior.networks.attention import shares
from metaprior.networks.augmented import (
    Layers,
    augmented,
    check_apart,
    convolutional,
    from_inputs,
    inputs_of,
    last_layers,
    weights_of,
    with_weights,
)
from metaprior.networks.layers import dense, dense_init, flat
from metaprior.networks.lstm import lstm_init, run_lstm
from metaprior.networks.mlp import mlp

Weights = dict[str, Array]  # by path; gradients and fast weights may have a leading axis of groups or examples
WRITER = mlp(1, (1, 1))  # applies networks of any width
P = 7.0  # of the encoding of gradients
NEAR_ZERO = 0.01


class MetaNetworks(NamedTuple):
    """theta.

    Attributes:
        base: W, the slow weights of b.
        keys: Q, the slow weights of u.
        readers: The LSTMs that make Q*, and their linear outputs, for layers with a convolution ("conv") and others.
        writer: The network that makes W*_i.
    """

    base: PyTree
    keys: PyTree
    readers: dict[str, dict[str, PyTree]]
    writer: PyTree


class Gradients(NamedTuple):
    """What the support's losses say.

    Attributes:
        groups: Gradients of u's loss on each group.
        there: Which groups have examples.
        examples: Gradients of b's loss on each example.
    """

    groups: Weights
    there: Array
    examples: Weights


class Fast(NamedTuple):
    """The posterior.

    Attributes:
        reading: Q*.
        keys: r_i.
        weights: W*_i.
        weight: Weights of the support's examples.
    """

    reading: Weights
    keys: Float[Array, "n k"]
    weights: Weights
    weight: Float[Array, " n"]


def read(reader: dict[str, PyTree], g: Float[Array, "groups *shape"], there: Array) -> Array:
    """Runs an LSTM over the groups' gradients, for each coordinate alone."""
    z = log_sign(g, P).reshape(g.shape[0], -1, 2)
    h = jax.vmap(run_lstm, (None, 1, None))(reader["cell"], z, there)[:, -1]
    return dense("out", reader["out"], h).reshape(g.shape[1:])


def written(writer: PyTree, g: Array) -> Array:
    """Makes a fast weight of each gradient."""
    return WRITER.apply(writer, log_sign(g, P).reshape(-1, 2)).reshape(g.shape)


def attention(fast: Fast, keys: Float[Array, "q k"], temperature: float) -> Float[Array, "q n"]:
    """Computes the attention of queries to the support's examples; one of weight 0 has none."""
    cosines = jnp.matmul(unit(keys), unit(fast.keys).T, precision="highest")
    return shares(cosines / temperature, fast.weight)


def gradients(
    model: Model, likelihood: Likelihood, params: MetaNetworks, support: Batch, how: Layers, groups: int
) -> Gradients:
    """Computes the gradients of steps 1 and 3 as constants."""
    y = counted(support).y

    def of_group(slow: Weights, w: Array) -> Array:
        outputs = model.outputs(with_weights(params.keys, slow), support.x)
        return weighted_mean(likelihood.nll(outputs, y), Batch(support.x, y, w))

    def of_example(slow: Weights, x: PyTree, h: Array | None, y: Array) -> Array:
        one = jax.tree.map(lambda leaf: leaf[None], (x, h))
        outputs = from_inputs(model.outputs, with_weights(params.base, slow), how, *one)
        return likelihood.nll(outputs, y[None])[0]

    way = jax.eval_shape(model.apply, params.base, support.x).shape[-1]
    groups = min(groups, way)
    member = memberships(support, way) @ one_hot(jnp.arange(way) * groups // way, groups)
    h = inputs_of(model.outputs, params.base, how, support.x)
    found = Gradients(
        jax.vmap(jax.grad(of_group), (None, 1))(weights_of(params.keys, how), member),
        member.sum(0) > 0,
        jax.vmap(jax.grad(of_example), (None, 0, 0, 0))(weights_of(params.base, how), support.x, h, y),
    )
    return jax.lax.stop_gradient(found)


@traits(of_classes=True, reads_names=True, estimates=True, small={"augment": 2}, distance="cosine")
@checked
def meta_networks(
    model: Model,
    likelihood: Likelihood,
    *,
    augment: Count | None = 1,
    on: Literal["outputs", "features"] = "outputs",
    groups: Count = 5,
    units: Count = 20,
    temperature: Positive = 1.0,
) -> Learner:
    """Meta-learns networks that turn gradients of the support's losses into fast weights of each query.

    Every support example has fast weights of the augmented layers, and every query has an average of them. Memory grows
    with the number of examples times the number of these weights, so that large networks augment their last layers
    alone, as the paper does on miniImageNet.

    Args:
        model: The network. It must call `layer` of its `Call`, as `mlp`, `conv4` and `resnet12` do.
        likelihood: Must be `Categorical`.
        augment: Number of last layers that have fast weights, the head included. None: all layers. Layers other than
            the head must have no batch norm.
        on: Whether a key r consists of u's outputs, or of its features, the inputs of its head. Fast weights of
            the head do not change features.
        groups: Number of groups. Classes 0..way-1 are split evenly in this order, at least one to a group.
        units: Hidden units of the LSTMs, and of both layers of the network that makes W*_i.
        temperature: Divides the cosines. The paper has 1.

    Raises:
        ValueError: The likelihood is not categorical, the network names no layers, or an augmented layer has a batch
            norm.

    References:
        Munkhdalai & Yu (2017), Algorithm 1. The groups and sizes are those of the published code.
    """
    check_classification("meta_networks", likelihood, None)
    if on == "features" and model.features is None:
        raise ValueError("on must be 'outputs' for a model without features, got 'features'.")
    source = model if on == "outputs" else model._replace(apply=model.features)

    def layers(params: MetaNetworks, x: PyTree) -> Layers:
        return last_layers(partial(model.outputs, params.base), x, augment)

    def keys_of(params: MetaNetworks, reading: Weights, x: PyTree) -> Float[Array, "n k"]:
        return flat(augmented(source.outputs, params.keys, reading, layers(params, x), x))

    def init(key: PRNGKeyArray, task: Task) -> MetaNetworks:
        key_base, key_keys, key_conv, key_dense, *key_writer = jax.random.split(key, 6)
        x = task.support.x
        base = model.init(key_base, x)
        how = last_layers(partial(model.outputs, base), x, augment)
        check_apart(model, how, x)
        conv = convolutional(base, how)
        keys = ({"conv": key_conv} if conv else {}) | (
            {"dense": key_dense} if weights_of(base, how).keys() - conv else {}
        )

        def reader(key: PRNGKeyArray) -> dict[str, PyTree]:
            key_cell, key_out = jax.random.split(key)
            return {"cell": lstm_init(key_cell, 2, units), "out": dense_init(key_out, units, 1, NEAR_ZERO)}

        writer = mlp(1, (units, units)).init(key_writer[0], jnp.zeros((1, 2)))
        writer["head"] = dense_init(key_writer[1], units, 1, NEAR_ZERO)
        return MetaNetworks(base, model.init(key_keys, x), jax.tree.map(reader, keys), writer)

    def adapt(params: MetaNetworks, support: Batch, key: PRNGKeyArray) -> Fast:
        how = layers(params, support.x)
        found = gradients(model, likelihood, params, support, how, groups)
        conv = convolutional(params.keys, how)
        reading = {
            path: read(params.readers["conv" if path in conv else "dense"], g, found.there)
            for path, g in found.groups.items()
        }
        fast = {path: written(params.writer, g) for path, g in found.examples.items()}
        return Fast(reading, keys_of(params, reading, support.x), fast, weights(support))

    def logits(params: MetaNetworks, fast: Fast, x: PyTree) -> Float[Array, "q way"]:
        how = layers(params, x)
        a = attention(fast, keys_of(params, fast.reading, x), temperature)
        mixed = {path: jnp.tensordot(a, each, 1) for path, each in fast.weights.items()}
        h = inputs_of(model.outputs, params.base, how, x)

        def one(own: Weights, x: PyTree, h: Array | None) -> Float[Array, " way"]:
            alone = jax.tree.map(lambda leaf: leaf[None], (x, h))
            return augmented(model.outputs, params.base, own, how, *alone)[0]

        return jax.vmap(one)(mixed, x, h)

    return scored_by_query(init, adapt, logits)
