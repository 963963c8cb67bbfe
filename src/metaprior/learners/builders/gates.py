"""Shared parts of learners that gate the initialisation by a code of the task, then take MAML's inner steps.

The support is encoded as rows: its examples (x, y) in their order where targets are numbers, and the means of its
classes where targets are classes. A recurrent autoencoder turns rows into a code, and the gate multiplies each
parameter of theta by a number between 0 and 1 that depends on the code. Only the support determines the gate, and the
query's loss trains it through the inner steps.

References:
    Yao, Wei, Huang & Li (2019), secs. 4.1-4.3; Yao et al. (2020), sec. 3.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Likelihood
from metaprior.core.types import Batch, Learner, Model, Task, check_known, counted, weights
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule
from metaprior.learners.builders.amortised import as_inputs, embedding, output_width
from metaprior.learners.builders.gradient import adapt_all, gradient_learner, query_loss
from metaprior.learners.builders.metric import memberships
from metaprior.networks.gru import Coded, autoencode, autoencoder_init
from metaprior.networks.layers import dense_init, flat
from metaprior.networks.lrn import lrn

Aggregator = Literal["recurrent", "pooling"]


class Rows(NamedTuple):
    """A support as the encoder sees it.

    Attributes:
        values: One embedded example per row, or one class mean per row.
        labelled: The same as the autoencoder reads it: class means have their one-hot label appended.
        weight: The weight of each row; 0 marks padding, and classes without examples.
    """

    values: Float[Array, "m h"]
    labelled: Float[Array, "m l"]
    weight: Float[Array, " m"]

    @property
    def there(self) -> Bool[Array, " m"]:
        """Which rows exist."""
        return self.weight != 0  # not `> 0`: the code of NaN weights must be NaN


class Reading(NamedTuple):
    """What a learner reads from a support.

    Attributes:
        code: The code of the task, on which the gate depends.
        kinds: To which of the k learned kinds of tasks the task belongs: weights with a sum of 1.
        reconstruction: The loss of the autoencoders.
    """

    code: Float[Array, " d"]
    kinds: Float[Array, " k"]
    reconstruction: Scalar


class Gated(NamedTuple):
    """What these learners meta-learn.

    Attributes:
        theta: The initialisation of the network.
        encoder: Parameters of the embedding of examples.
        reader: Parameters of the learner's map from rows to a `Reading`.
        gate: One dense layer per tensor of theta.
    """

    theta: PyTree
    encoder: PyTree
    reader: PyTree
    gate: PyTree


class Start(NamedTuple):
    """What the inner steps of a task start from.

    Attributes:
        theta: The gated initialisation.
        kinds: As in `Reading`.
        reconstruction: As in `Reading`.
    """

    theta: PyTree
    kinds: Float[Array, " k"]
    reconstruction: Scalar


def gated(gate: PyTree, theta: PyTree, code: Float[Array, " d"]) -> PyTree:
    """Computes sigmoid(W code + b) * theta, elementwise.

    Args:
        gate: A dense layer {"w": [d, size], "b": [size]} for each tensor of theta.
        theta: The initialisation.
        code: The code of the task.
    """
    return jax.tree.map(
        lambda leaf, layer: leaf * jax.nn.sigmoid(code @ layer["w"] + layer["b"]).reshape(leaf.shape), theta, gate
    )


def gate_init(key: PRNGKeyArray, theta: PyTree, width: int, bias: float) -> PyTree:
    """Initialises the gate: Glorot's uniform weights and equal biases.

    Args:
        key: Random key.
        theta: The initialisation of the network.
        width: Length of the code.
        bias: The value of all biases. With 0 the gate is about 1/2, with 5 about 0.993.
    """
    leaves, structure = jax.tree.flatten(theta)
    keys = jax.random.split(key, len(leaves))
    layers = [dense_init(k, width, leaf.size) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, [layer | {"b": jnp.full_like(layer["b"], bias)} for layer in layers])


def summary_init(key: PRNGKeyArray, inputs: int, hidden: int, aggregator: Aggregator) -> dict:
    """Initialises the weights of `summary`.

    Args:
        key: Random key.
        inputs: Length of a row.
        hidden: Length of the code.
        aggregator: "recurrent" or "pooling".
    """
    if aggregator == "recurrent":
        return autoencoder_init(key, inputs, hidden)
    there, back = jax.random.split(key)
    return {"encoder": dense_init(there, inputs, hidden), "back": dense_init(back, hidden, inputs)}


def summary(params: dict, x: Float[Array, "m l"], weight: Float[Array, " m"], aggregator: Aggregator) -> Coded:
    """Computes the code of rows and the loss of their reconstruction.

    A recurrent autoencoder reads the rows in their order; a row exists or does not, whatever its weight. A pooling one
    encodes each row by tanh(W x + b), which a linear layer reconstructs. Its code is their weighted mean.

    Args:
        params: The weights.
        x: The rows.
        weight: Their weights; rows of weight 0 change nothing.
        aggregator: "recurrent" or "pooling".
    """
    if aggregator == "recurrent":
        return autoencode(params, x, weight != 0)
    codes = jnp.tanh(x @ params["encoder"]["w"] + params["encoder"]["b"])
    error = ((codes @ params["back"]["w"] + params["back"]["b"] - x) ** 2).mean(-1)
    total = weight.sum()
    share = weight / jnp.where(total == 0, 1, total)
    return Coded(share @ codes, share @ error)


def _seer(model: Model, x: PyTree) -> Model | None:
    """Returns the network that sees inputs: None for vectors of numbers, `lrn` for images, else a copy of the model."""
    shape, dtype = getattr(x, "shape", ()), getattr(x, "dtype", None)
    if len(shape) == 2 and dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        return None
    return lrn() if len(shape) == 4 else model


def read_rows(
    model: Model, likelihood: Likelihood, hidden: int
) -> tuple[Callable[[PRNGKeyArray, PyTree, Batch], PyTree], Callable[[PyTree, PyTree, Batch], Rows]]:
    """Returns the embedding of supports as two functions, init and read.

    Vectors of numbers enter a linear layer, beside y where targets are numbers. Images pass through `lrn` first, with a
    ReLU after the last layer. Other inputs, such as tokens, pass through the features of a second network like the
    model. All have their own parameters, apart from theta.

    Args:
        model: The network.
        likelihood: Likelihood of the support. The rows of a `Categorical` one are class means.
        hidden: Length of a row.

    Returns:
        init: (key, theta, support) -> encoder's params.
        read: (encoder's params, theta, support) -> `Rows`.
    """
    of_classes = isinstance(likelihood, Categorical)

    def seen(params: PyTree, x: PyTree) -> Float[Array, "n d"]:
        if params is None:
            return flat(x).astype(float)
        return embedding(_seer(model, x) or model)(params, x)

    def inputs(params: dict, theta: PyTree, support: Batch) -> Float[Array, "n d"]:
        """Returns what the last layer reads, with zeros for rows of weight 0."""
        weight = weights(support)

        def masked(leaf: Array) -> Array:
            return jnp.where(weight.reshape(-1, *[1] * (leaf.ndim - 1)) == 0, jnp.zeros((), leaf.dtype), leaf)

        f = seen(params["seer"], jax.tree.map(masked, support.x))
        if of_classes:
            return f
        y = as_inputs(likelihood, counted(support).y, output_width(model, theta, support.x))
        return jnp.concatenate([f, y], -1)

    def init(key: PRNGKeyArray, theta: PyTree, support: Batch) -> dict:
        of_seer, of_last = jax.random.split(key)
        seer = _seer(model, support.x)
        params = {"seer": None if seer is None else seer.init(of_seer, support.x)}
        width = jax.eval_shape(lambda: inputs(params, theta, support)).shape[1]
        return params | {"last": dense_init(of_last, width, hidden)}

    def read(params: dict, theta: PyTree, support: Batch) -> Rows:
        check_known(support)
        e = inputs(params, theta, support) @ params["last"]["w"] + params["last"]["b"]
        if len(getattr(support.x, "shape", ())) == 4:
            e = jax.nn.relu(e)
        weight = weights(support)
        if not of_classes:
            e = jnp.where((weight == 0)[:, None], 0, e)
            return Rows(e, e, weight)
        shares = memberships(support, output_width(model, theta, support.x))
        number = shares.sum(0)
        means = shares.T @ e / jnp.where(number == 0, 1, number)[:, None]
        named = jnp.where((number == 0)[:, None], 0, jnp.concatenate([means, jnp.eye(number.size, dtype=e.dtype)], -1))
        return Rows(means, named, number)

    return init, read


def gated_learner(
    model: Model,
    likelihood: Likelihood,
    loop: InnerLoop,
    posterior: PosteriorRule,
    init_reader: Callable[[PRNGKeyArray, Rows], PyTree],
    reader: Callable[[PyTree, Rows], Reading],
    *,
    hidden: int,
    reconstruction: float,
    gate_bias: float,
) -> Learner:
    """Builds MAML from an initialisation that a gate adjusts to the support.

    The loss is the query's mean nll after the inner steps plus `reconstruction` times the autoencoders' loss.

    Args:
        model: The network; all of its parameters are gated and adapted.
        likelihood: Likelihood of the support and the query.
        loop: The inner loop.
        posterior: Rule that forms the posterior at the last phi.
        init_reader: (key, rows) -> the reader's params.
        reader: (the reader's params, rows) -> `Reading`.
        hidden: Length of a row.
        reconstruction: Weight of the reconstruction loss.
        gate_bias: Bias of the gate before training.
    """
    init_rows, read = read_rows(model, likelihood, hidden)
    plain = adapt_all(model, loop.transformation())

    def init(key: PRNGKeyArray, task: Task) -> Gated:
        keys = jax.random.split(key, 4)
        theta = model.init(keys[0], task.support.x)
        encoder = init_rows(keys[1], theta, task.support)
        rows = read(encoder, theta, task.support)
        own = init_reader(keys[2], rows)
        width = jax.eval_shape(reader, own, rows).code.size
        return Gated(theta, encoder, own, gate_init(keys[3], theta, width, gate_bias))

    def local(params: Gated, support: Batch, key: PRNGKeyArray) -> Start:
        reading = reader(params.reader, read(params.encoder, params.theta, support))
        return Start(gated(params.gate, params.theta, reading.code), reading.kinds, reading.reconstruction)

    adaptation = plain._replace(
        init=init, start=lambda start: start.theta, local=local, kinds=lambda start: start.kinds
    )
    fit = query_loss(adaptation, likelihood, loop)

    def loss(start: Start, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Any]]:
        value, metrics = fit(start, task, key)
        return value + reconstruction * start.reconstruction, metrics | {"reconstruction": start.reconstruction}

    return gradient_learner(adaptation, likelihood, loss, loop, posterior=posterior)
