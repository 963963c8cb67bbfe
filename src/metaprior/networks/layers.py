"""The layers our networks are made of. The `tap` of a `Call` sees each linear map."""

from collections.abc import Mapping
from math import prod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.types import PLAIN, Call
from metaprior.kernels.conv import conv2d, patches
from metaprior.kernels.product import product, rows


def modulated(name: str, s: Float[Array, "n *space c"], call: Call) -> Float[Array, "n *space c"]:
    """A hidden layer's outputs as a learner modulates them."""
    return s if call.modulate is None else call.modulate(name, s)


def flat(x: Float[Array, "n *rest"]) -> Float[Array, "n d"]:
    """One row an example, also where there are none."""
    return x.reshape(x.shape[0], prod(x.shape[1:]))


def dense_init(key: PRNGKeyArray, inputs: int, outputs: int, scale: float | None = None) -> dict[str, Array]:
    """A dense layer's weights: Glorot uniform, or a normal of sd `scale` cut at two; zero bias."""
    if scale is None:
        w = jax.nn.initializers.glorot_uniform()(key, (inputs, outputs))
    else:
        w = scale * jax.random.truncated_normal(key, -2, 2, (inputs, outputs))
    return {"w": w, "b": jnp.zeros(outputs)}


def dense(name: str, layer: dict[str, Array], x: Float[Array, "n i"], call: Call = PLAIN) -> Float[Array, "n o"]:
    """x w + b, seen by the tap."""
    s = product(x, layer["w"]) + rows(layer["b"], x.shape[0])
    return s if call.tap is None else call.tap(name, x, s)


def convolve(
    name: str, layer: Mapping[str, Array], x: Float[Array, "n h w i"], call: Call = PLAIN, stride: int = 1
) -> Float[Array, "n h2 w2 o"]:
    """The convolution with the layer's weights, same padding and no bias, seen by the tap."""
    w = layer["w"]
    s = conv2d(x, w, stride)
    return s if call.tap is None else call.tap(name, patches(x, (w.shape[0], w.shape[1]), stride), s)


def check_images(x: Array) -> None:
    """A ValueError unless x is a batch of images."""
    if x.ndim != 4:
        raise ValueError(f"x: came shape {x.shape}, needs images [n, height, width, channels]")
