"""A random code of the inputs in front of a network: what limits the information that is not read from the support.

The code z is read from an input x by a network whose weights are random, w ~ N(mu, sigma^2), or whose outputs are the
mean and the deviation of z. A task draws it once, and a divergence from N(0, I) enters the loss (Yin et al. 2020).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar, UInt32

from metaprior.core.options import Count, Range
from metaprior.core.types import PLAIN, Batch, Call, Learner, Model, Task, weighted_mean
from metaprior.inference.gaussian import DiagonalGaussian, around, kl
from metaprior.networks.conv4 import conv4
from metaprior.networks.mlp import mlp
from metaprior.networks.statistics import by_support

On = Literal["weights", "activations"]
Code = Sequence[Count] | None
LogSd = Annotated[float, Range(above=-60, below=10)]


class Coded(NamedTuple):
    """Parameters of a network that reads codes.

    Attributes:
        theta: Parameters of the network behind the code.
        bottleneck: q(w) for random weights, else the encoder's parameters; in a task, a `Drawn`.
    """

    theta: PyTree
    bottleneck: PyTree


class Drawn(NamedTuple):
    """An encoder as one task has drawn it.

    Attributes:
        params: Parameters of the encoder.
        key: The data of the random key of z, or None for random weights, which determine z.
    """

    params: PyTree
    key: UInt32[Array, " k"] | None


@dataclass(frozen=True)
class Bottleneck:
    """The map from inputs to codes.

    Attributes:
        on: What is random: the encoder's "weights", or its "activations" z.
        network: The encoder. It has as many outputs as the code has numbers, twice as many for activations. None: a
            network with one hidden layer of 100 units, or for images three convolutions of stride 2 with 32 filters and
            a linear layer.
        code: The shape of the code of one example, which the network behind it reads. None: what the encoder returns,
            or without one 5 numbers and for images (16, 16, 1).
        log_sd: Logarithm of the standard deviation of the random weights before training.
    """

    on: On
    network: Model | None
    code: Code
    log_sd: float

    def encoder(self, x: PyTree) -> tuple[Model, Code]:
        """Returns the encoder of inputs like x, and the shape of a code, None for all outputs.

        Raises:
            ValueError: There is no default encoder of such inputs.
        """
        if self.network is not None:
            return self.network, self.code
        if not hasattr(x, "dtype"):
            raise ValueError(
                f"bottleneck must be given for inputs that are not one array, got None for {type(x).__name__}. Give a "
                "network that reads such inputs."
            )
        images = x.ndim == 4
        code = self.code or ((16, 16, 1) if images else (5,))
        outputs = prod(code) * self._parts
        images = images and x.shape[1] >= 2 and x.shape[2] >= 2
        return conv4(outputs, 32, 3, downsample="stride", norm="none") if images else mlp(outputs, (100,)), code

    @property
    def _parts(self) -> int:
        return 2 if self.on == "activations" else 1

    def init(self, key: PRNGKeyArray, x: PyTree) -> PyTree:
        """Returns q(w), or the encoder's parameters where activations are random.

        Raises:
            ValueError: The encoder's outputs are not as many as the code needs.
        """
        network, code = self.encoder(x)
        params = network.init(key, x)
        outputs = jax.eval_shape(network.apply, params, x).shape
        if len(outputs) != 2 or outputs[1] % self._parts or (code and outputs[1] != prod(code) * self._parts):
            need = f"{prod(code) * self._parts} outputs" if code else "an even number of outputs"
            need += " (means and deviations)" if self._parts == 2 else ""
            raise ValueError(f"bottleneck must be a network with {need} for each example, got shape {outputs}.")
        return around(params, self.log_sd) if self.on == "weights" else params

    def draw(self, params: PyTree, key: PRNGKeyArray) -> Drawn:
        """Draws the encoder of a task: its weights, or the key of its activations."""
        return Drawn(params.sample(key), None) if self.on == "weights" else Drawn(params, jax.random.key_data(key))

    def codes(self, bottleneck: PyTree, x: PyTree) -> Float[Array, "n *code"]:
        """Computes the codes of inputs.

        Args:
            bottleneck: A `Drawn`, or what `init` returns for the codes at the mean.
            x: Inputs of n examples.
        """
        network, code = self.encoder(x)
        params = bottleneck.params if isinstance(bottleneck, Drawn) else bottleneck
        if self.on == "weights":
            z = network.apply(params.mean if isinstance(params, DiagonalGaussian) else params, x)
        else:
            q = self._activations(params, x)
            z = q.mean
            if isinstance(bottleneck, Drawn) and bottleneck.key is not None:
                z = z + jnp.exp(q.log_sd) * noise_of(jax.random.wrap_key_data(bottleneck.key), x, z)
        return z if code is None else z.reshape(z.shape[0], *code)

    def _activations(self, params: PyTree, x: PyTree) -> DiagonalGaussian:
        mean, raw = jnp.split(self.encoder(x)[0].apply(params, x), 2, -1)
        return DiagonalGaussian(mean, jnp.log(jax.nn.softplus(jnp.maximum(raw, -80))))

    def size(self, params: PyTree, x: PyTree) -> int:
        """Returns how many numbers a code has.

        Args:
            params: What `init` returns.
            x: Inputs.
        """
        return prod(jax.eval_shape(self.codes, params, x).shape[1:])

    def divergence(self, params: PyTree, batch: Batch) -> Scalar:
        """Computes KL(q || N(0, I)): of the weights, or the mean over the examples of that of their activations.

        Args:
            params: What `init` returns.
            batch: The examples, whose activations count.
        """
        if self.on == "weights":
            return kl(params, around(jax.tree.map(jnp.zeros_like, params.mean), 0.0))
        q = self._activations(params, batch.x)
        each = jax.vmap(lambda row: kl(row, around(jnp.zeros_like(row.mean), 0.0)))(q)
        return weighted_mean(each, batch)


def noise_of(key: PRNGKeyArray, x: PyTree, like: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Draws standard normal noise that is a function of the key and of each input.

    An input has the same noise in each inner step, and in whichever batch and place it stands. The noise of different
    inputs is independent, up to collisions of their 32-bit hashes.

    Args:
        key: Random key.
        x: Inputs of n examples.
        like: The shape and type of the noise.
    """

    def mixed(bits: Array) -> Array:  # murmur3's finaliser
        bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
        return bits ^ (bits >> 16)

    total = jnp.zeros(like.shape[0], jnp.uint32)
    for leaf in jax.tree.leaves(x):
        rows = leaf.reshape(leaf.shape[0], prod(leaf.shape[1:]))
        number = rows.astype(jnp.float32) + 0.0  # -0 is 0
        place = np.random.default_rng(0).integers(0, 2**32, rows.shape[1], np.uint32)
        total += mixed(jax.lax.bitcast_convert_type(number, jnp.uint32) ^ place).sum(1, dtype=jnp.uint32)
    return jax.vmap(lambda h: jax.random.normal(jax.random.fold_in(key, h), like.shape[1:], like.dtype))(total)


def behind(model: Model, bottleneck: Bottleneck) -> Model:
    """Returns the model behind a bottleneck, a network of x with parameters `Coded`.

    Args:
        model: The network that reads codes.
        bottleneck: What makes the codes.
    """

    def init(key: PRNGKeyArray, x: PyTree) -> Coded:
        key_code, key_theta = jax.random.split(key)
        encoder = bottleneck.init(key_code, x)
        return Coded(model.init(key_theta, bottleneck.codes(encoder, x)), encoder)

    def of_codes(see: Callable[[PyTree, PyTree, Call], Array]) -> Callable[..., Array]:
        def run(params: Coded, x: PyTree, call: Call = PLAIN) -> Array:
            def network(x: PyTree, call: Call) -> Array:
                return see(params.theta, bottleneck.codes(params.bottleneck, x), call)

            return by_support(network, model.support)(x, call)

        return run

    def features(theta: PyTree, z: PyTree, call: Call) -> Array:
        assert model.features is not None
        return model.features(theta, z, call) if model.calls else model.features(theta, z)

    seen = None if model.features is None else of_codes(features)
    return Model(init, of_codes(model.outputs), seen, model.statistics, model.calls)


class Begun(NamedTuple):
    """The posterior of a learner whose tasks draw a part of their parameters.

    Attributes:
        drawn: The part, one for each draw.
        posterior: The posterior for each draw.
    """

    drawn: PyTree
    posterior: PyTree


def regularised(
    learner: Learner,
    draw: Callable[[PyTree, PRNGKeyArray], PyTree],
    put: Callable[[PyTree, PyTree], PyTree],
    penalty: Callable[[PyTree, Task], tuple[Scalar, Scalar]],
    draws: int,
) -> Learner:
    """Returns a learner whose tasks draw a part of theta before anything else.

    In training a task draws it once and adds a penalty to its loss. A prediction averages several draws, each with the
    posterior of the learner that follows from it.

    Args:
        learner: The learner for a drawn part.
        draw: (params, key) -> the part.
        put: (params, part) -> params.
        penalty: (params, task) -> the penalty, and the divergence for the metric "kl".
        draws: Number of draws of a prediction. 0: it draws nothing, and the learner finds the part as theta has it.
    """

    def begin(params: PyTree, key: PRNGKeyArray) -> tuple[PyTree, PRNGKeyArray]:
        key_draw, key = jax.random.split(key)
        return draw(params, key_draw), key

    def with_each(run: Callable[..., PyTree]) -> Callable[..., Begun]:
        def start(params: PyTree, support: Batch, key: PRNGKeyArray) -> Begun:
            def one(key: PRNGKeyArray) -> Begun:
                drawn, key = begin(params, key)
                return Begun(drawn, run(put(params, drawn), support, key))

            return jax.vmap(one)(jax.random.split(key, draws))

        return start

    def path(params: PyTree, support: Batch, key: PRNGKeyArray) -> Begun:
        assert learner.path is not None
        drawn, course = with_each(learner.path)(params, support, key)
        course = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), course)
        steps = jax.tree.leaves(course)[0].shape[0]
        return Begun(jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (steps, *leaf.shape)), drawn), course)

    def predict(params: PyTree, begun: Begun, x: PyTree, key: PRNGKeyArray) -> Any:
        def one(begun: Begun, key: PRNGKeyArray) -> Any:
            return learner.predict(put(params, begun.drawn), begun.posterior, x, key)

        each = jax.vmap(one)(begun, jax.random.split(key, draws))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), each)  # one mixture of all draws

    def loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        drawn, key = begin(params, key)
        value, metrics = learner.loss(put(params, drawn), task, key)
        added, divergence = penalty(params, task)
        return value + added, metrics | {"kl": divergence}

    def network(params: PyTree, support: Batch, key: PRNGKeyArray) -> Callable[..., Array]:
        assert learner.network is not None
        drawn, key = begin(params, key)
        return learner.network(put(params, drawn), support, key)

    changed: dict[str, Any] = {"loss": loss}
    if draws:
        changed |= {"adapt": with_each(learner.adapt), "predict": predict}
        changed["path"] = None if learner.path is None else path
        changed["network"] = None if learner.network is None else network
    return learner.changed(lambda other: regularised(other, draw, put, penalty, draws), **changed)
