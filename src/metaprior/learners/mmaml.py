"""Multimodal MAML (MMAML, first MUMOMAML; Vuorio, Sun, Hu & Lim 2019): MAML from a start that depends on the task.

Algorithm 1: a task encoder reads the support. A linear map of its code modulates each hidden layer of the network,
before the inner steps and constant in them (lines 5-7). The inner steps then change the network's parameters alone
(lines 8-9). The outer gradient of the query's loss flows to the network, the encoder and the linear maps through those
steps.

* FiLM (the default):  s -> (1 + gamma) s + delta
* sigmoid gates:       s -> 2 sigmoid(z) s
* softmax attention:   s -> c softmax(z) s, for the c units (channels) of a layer

The factors 2 and c are constants that the next layer's weights could also have. With them all three start as MAML.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Categorical, Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count
from metaprior.core.types import PLAIN, Batch, Call, Learner, Model, Task, counted, weighted_mean, weights
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.learners.builders.amortised import as_inputs, embedding, modulated_layers, output_width
from metaprior.learners.builders.gradient import Adaptation, query_learner
from metaprior.learners.traits import five_steps, traits
from metaprior.networks.layers import dense, dense_init
from metaprior.networks.lstm import lstm_init, run_lstm


class Encoder(NamedTuple):
    """The task encoder's parameters.

    Attributes:
        embedding: The network whose features of the inputs it reads. None if it reads inputs of numbers as they are.
        layers: The two directions of each LSTM layer; for classes, the dense layer after the mean.
    """

    embedding: PyTree
    layers: Any


class Modulated(NamedTuple):
    """What MMAML meta-learns.

    Attributes:
        theta: The initialisation of the network.
        encoder: The task encoder.
        maps: The linear map from a task's code to the modulation of each hidden layer, by the layer's name.
        modulation: A task's modulation of each hidden layer. None outside a task.
    """

    theta: PyTree
    encoder: Encoder
    maps: dict[str, dict[str, Array]]
    modulation: dict[str, Array] | None = None


@traits(ordered=True, on_table=five_steps, small={"rate": 0.02, "units": 8})
@passes_options_to(InnerLoop)
def mmaml(
    model: Model,
    likelihood: Likelihood,
    *,
    modulation: Literal["film", "sigmoid", "softmax"] = "film",
    units: Count = 40,
    layers: Count = 2,
    sort: bool = False,
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns a task encoder that modulates each hidden layer before MAML's inner steps.

    The encoder of numbers is a bidirectional LSTM over the pairs (x, y) of the support. That of classes takes the mean
    of the inputs' features in a copy of the network, and a dense layer; it reads no labels, so renaming the classes
    does not matter.

    Args:
        model: The network. One without hidden layers has nothing to modulate, which leaves MAML.
        likelihood: Likelihood of the support and the query.
        modulation: What the code does to a hidden layer, after its norm and before its activation.
        units: Units of each direction of an LSTM; a code has 2 units numbers.
        layers: Number of LSTM layers.
        sort: Whether the LSTM reads the pairs sorted by the first input, instead of in the support's order.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`.

    References:
        Vuorio, Sun, Hu & Lim (2019), Algorithm 1.
    """
    loop = InnerLoop(**inner)
    optimizer, embed = loop.transformation(), embedding(model)
    of_classes, numbers = isinstance(likelihood, Categorical), 2 if modulation == "film" else 1

    def init(key: PRNGKeyArray, task: Task) -> Modulated:
        key_theta, key_embedding, key_layers = jax.random.split(key, 3)
        x = task.support.x
        theta, own = model.init(key_theta, x), None if plain(x) and not of_classes else model.init(key_embedding, x)
        widths = modulated_layers(model, theta, x)
        maps = {n: {"w": jnp.zeros((2 * units, numbers * w)), "b": jnp.zeros(numbers * w)} for n, w in widths.items()}
        read = inputs(theta, Encoder(own, None), task.support).shape[1]
        if of_classes:
            return Modulated(theta, Encoder(own, dense_init(key_layers, read, 2 * units)), maps)
        sizes = [read, *[2 * units] * (layers - 1)]
        keys = jax.random.split(key_layers, (layers, 2))
        cells = [tuple(lstm_init(k, size, units) for k in pair) for size, pair in zip(sizes, keys, strict=True)]
        return Modulated(theta, Encoder(own, cells), maps)

    def inputs(theta: PyTree, encoder: Encoder, support: Batch) -> Float[Array, "n d"]:
        """Returns what the encoder reads of each example."""
        x = support.x
        if encoder.embedding is not None:  # normalised by the support, as the network may have other statistics
            x = embed(encoder.embedding, x, Call(by=weights(support)) if model.calls else PLAIN)
        if of_classes:
            return x
        y = as_inputs(likelihood, counted(support).y, output_width(model, theta, support.x))
        return jnp.concatenate([x, y], -1)

    def code(theta: PyTree, encoder: Encoder, support: Batch) -> Float[Array, " d"]:
        read, weight = inputs(theta, encoder, support), weights(support)
        if of_classes:
            mean = jax.vmap(lambda column: weighted_mean(column, support), 1)(read)
            return jax.nn.relu(dense("code", encoder.layers, mean[None])[0])
        there = weight > 0
        read = jnp.where(there[:, None], read, 0)
        if sort:
            order = jnp.argsort(jnp.where(there, read[:, 0], jnp.inf))
            read, there = read[order], there[order]
        for forward, backward in encoder.layers:
            read = jnp.concatenate([run_lstm(forward, read, there), run_lstm(backward, read, there, reverse=True)], -1)
        ends = jnp.concatenate([read[-1:, :units], read[:1, units:]], -1)  # each direction has read all pairs there
        return ends.sum(0)  # 0 of an empty support

    def local(params: Modulated, support: Batch, key: PRNGKeyArray) -> Modulated:
        told = code(params.theta, params.encoder, support)
        return params._replace(modulation={name: told @ m["w"] + m["b"] for name, m in params.maps.items()})

    def network(params: Modulated, theta: PyTree, x: PyTree, call: Call) -> Array:
        if not params.modulation:
            return model.outputs(theta, x, call)
        by_layer = params.modulation

        def modulate(name: str, s: Array) -> Array:
            z = by_layer[name]
            s = s if call.modulate is None else call.modulate(name, s)
            if modulation == "film":
                gamma, delta = jnp.split(z, 2)
                return (1 + gamma) * s + delta
            return (2 * jax.nn.sigmoid(z) if modulation == "sigmoid" else z.size * jax.nn.softmax(z)) * s

        return model.outputs(theta, x, call._replace(modulate=modulate))

    adaptation = Adaptation(model, init, lambda params: params.theta, network, lambda params: optimizer, local=local)
    return query_learner(adaptation, likelihood, loop, posterior)


def plain(x: PyTree) -> bool:
    """Whether inputs are vectors of real numbers, which an encoder reads as they are."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact) and x.ndim == 2
