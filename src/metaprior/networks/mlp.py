"""Multilayer perceptrons: MAML's sinusoid network (1-40-40-1) and its non-convolutional Omniglot network."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from metaprior.core.options import Count, NonNegative, Whole, checked
from metaprior.core.types import PLAIN, Call, Model
from metaprior.kernels.product import product
from metaprior.networks.layers import dense, dense_init, flat, modulated, shown
from metaprior.networks.norm import batch_norm

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu, "leaky_relu": jax.nn.leaky_relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu, "elu": jax.nn.elu,
}  # fmt: skip


@checked
def mlp(
    outputs: Count = 1,
    hidden: Sequence[Count] = (40, 40),
    activation: str = "relu",
    norm: bool = False,
    init_scale: NonNegative | None = None,
    bias_inputs: Whole = 0,
) -> Model:
    """Makes a fully connected network on inputs [n, ...], which are flattened.

    Args:
        outputs: Number of outputs.
        hidden: Widths of the hidden layers.
        activation: "relu", "leaky_relu", "tanh", "sigmoid", "gelu" or "elu".
        norm: Whether batch norm follows each hidden layer.
        init_scale: Standard deviation of normal initial weights, truncated at two standard deviations (0.01 in MAML's
            code). None draws weights from Glorot's uniform distribution.
        bias_inputs: Number of further inputs that are parameters, 0 at first: the bias transformation of Finn & Levine
            2018. Its gradient passes through the weights, so one inner step can carry more of a task than a bias can.

    Raises:
        ValueError: The activation is unknown.

    References:
        Finn & Levine (2018), Meta-learning and universality, for the bias transformation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    act = ACTIVATIONS[activation]
    names = [*(f"layer{i + 1}" for i in range(len(hidden))), "head"]

    def init(key: PRNGKeyArray, x: Array) -> dict:
        width = [flat(x).shape[1] + bias_inputs, *hidden, outputs]
        keys = jax.random.split(key, len(names))
        params = {n: dense_init(k, i, o, init_scale) for n, k, (i, o) in zip(names, keys, pairwise(width), strict=True)}
        if norm:
            for name in names[:-1]:
                # The norm's shift replaces the layer's bias, which the normalisation would cancel.
                params[name]["shift"] = params[name].pop("b")
        if bias_inputs:
            params[names[0]]["inputs"] = jnp.zeros(bias_inputs)
        return params

    def read(params: dict, x: Array) -> Array:
        if not bias_inputs:
            return flat(x)
        x, own = flat(x), params[names[0]]["inputs"]
        return jnp.concatenate([x.astype(own.dtype), jnp.broadcast_to(own, (x.shape[0], bias_inputs))], -1)

    def features(params: dict, x: Array, call: Call = PLAIN) -> Array:
        x = read(params, x)
        for name in names[:-1]:
            layer = params[name]
            if norm:
                s = product(x, layer["w"])
                s = batch_norm(s if call.tap is None else call.tap(name, x, s), layer["shift"])
            else:
                s = dense(name, layer, x, call)
            x = shown(name, act(modulated(name, s, call)), call)
        return x

    def apply(params: dict, x: Array, call: Call = PLAIN) -> Array:
        return shown("head", dense("head", params["head"], features(params, x, call), call), call)

    return Model(init, apply, features, calls=True)
