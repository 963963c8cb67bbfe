"""Layers of the networks. The `tap` of a `Call` is called at each linear map, its `layer` after each layer."""

from collections.abc import Mapping
from math import prod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.types import PLAIN, Call
from metaprior.kernels.conv import conv2d, patches
from metaprior.kernels.product import product, rows


def modulated(name: str, s: Float[Array, "n *space c"], call: Call) -> Float[Array, "n *space c"]:
    """Applies the call's modulation to a hidden layer.

    Args:
        name: The layer's name.
        s: Its outputs [n, ..., c].
        call: The call; without `modulate` the outputs stay as they are.
    """
    return s if call.modulate is None else call.modulate(name, s)


def shown(name: str, s: Float[Array, "n *rest"], call: Call) -> Float[Array, "n *rest"]:
    """Applies the call's `layer` to the outputs of a layer.

    Args:
        name: The layer's name.
        s: Its outputs [n, ...].
        call: The call; without `layer` the outputs stay as they are.
    """
    return s if call.layer is None else call.layer(name, s)


def flat(x: Float[Array, "n *rest"]) -> Float[Array, "n d"]:
    """Flattens x to one row per example, also if there are no examples.

    Args:
        x: Array [n, ...].
    """
    return x.reshape(x.shape[0], prod(x.shape[1:]))


def dense_init(key: PRNGKeyArray, inputs: int, outputs: int, scale: float | None = None) -> dict[str, Array]:
    """Initialises a dense layer with a bias of 0.

    Args:
        key: Random key.
        inputs: Number of inputs.
        outputs: Number of outputs.
        scale: Standard deviation of normal weights, truncated at two standard deviations. None draws weights from
            Glorot's uniform distribution.
    """
    if scale is None:
        w = jax.nn.initializers.glorot_uniform()(key, (inputs, outputs))
    else:
        w = scale * jax.random.truncated_normal(key, -2, 2, (inputs, outputs))
    return {"w": w, "b": jnp.zeros(outputs)}


def dense(name: str, layer: dict[str, Array], x: Float[Array, "n i"], call: Call = PLAIN) -> Float[Array, "n o"]:
    """Computes x w + b, and calls the tap.

    Args:
        name: The layer's name.
        layer: Its parameters {"w": [i, o], "b": [o]}.
        x: Inputs [n, i].
        call: The call, whose tap may replace the result.
    """
    s = product(x, layer["w"]) + rows(layer["b"], x.shape[0])
    return s if call.tap is None else call.tap(name, x, s)


def convolve(
    name: str, layer: Mapping[str, Array], x: Float[Array, "n h w i"], call: Call = PLAIN, stride: int = 1
) -> Float[Array, "n h2 w2 o"]:
    """Computes a convolution with same padding and without a bias, and calls the tap with patches as inputs.

    Args:
        name: The layer's name.
        layer: Its parameters {"w": [kh, kw, i, o], ...}.
        x: Images [n, h, w, i].
        call: The call, whose tap may replace the result.
        stride: Stride of both axes.
    """
    w = layer["w"]
    s = conv2d(x, w, stride)
    return s if call.tap is None else call.tap(name, patches(x, (w.shape[0], w.shape[1]), stride), s)


def check_images(x: Array) -> None:
    """Checks that x is a batch of images.

    Args:
        x: The batch.

    Raises:
        ValueError: It is not of shape [n, height, width, channels].
    """
    if x.ndim != 4:
        raise ValueError(f"x must be images [n, height, width, channels], got shape {x.shape}.")
