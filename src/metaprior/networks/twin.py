"""The twin network of Koch, Zemel & Salakhutdinov (2015, sec. 3.1); a siamese learner compares two of its outputs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.named import lookup
from metaprior.core.options import Count, checked
from metaprior.core.types import Model
from metaprior.kernels.conv import conv2d, max_pool
from metaprior.networks.layers import dense, dense_init, flat
from metaprior.networks.mlp import ACTIVATIONS


@checked
def twin(
    outputs: Count = 5,
    filters: Sequence[Count] = (64, 128, 128, 256),
    kernels: Sequence[Count] = (10, 7, 4, 4),
    width: Count = 4096,
    activation: str = "sigmoid",
    head: bool = True,
) -> Model:
    """Applies unpadded convolutions with ReLU, a dense layer and a linear head to images [n, h, w, c].

    2x2 max-pooling follows each convolution but the last. The default is the published network for images
    [n, 105, 105, 1]. Weights start at the scales of He and Glorot, and biases at 0. (The paper's normal weights with
    standard deviations 0.01 and 0.2 belong to its layer-wise learning rates.)

    Args:
        outputs: Number of outputs.
        filters: Number of channels of each convolution.
        kernels: Side of each convolution's kernel.
        width: Number of units of the dense layer.
        activation: Activation of the dense layer.
        head: Whether the network has the linear head. False returns the embedding.

    Raises:
        ValueError: There are not as many kernels as filters, or the images are too small for them.
    """
    if len(filters) != len(kernels) or not filters:
        came = f"{tuple(filters)} and {tuple(kernels)}"
        raise ValueError(f"filters and kernels must have one entry for each convolution, got {came}.")
    act = lookup("activation", activation, ACTIVATIONS)
    names = [f"conv{i + 1}" for i in range(len(filters))]

    def sides(side: int) -> int:
        """Returns the side of an image after the convolutions."""
        for i, kernel in enumerate(kernels):
            side = (side if i == 0 else side // 2) - kernel + 1
        return side

    def check(x: Array) -> None:
        if x.ndim != 4 or min(map(sides, x.shape[1:3])) < 1:
            raise ValueError(
                f"x must be images [n, height, width, channels], large enough for kernels {tuple(kernels)} with "
                f"halving between them, got shape {x.shape}. Give larger images or smaller kernels."
            )

    def features(params: dict, x: Array) -> Float[Array, "n d"]:
        check(x)
        for i, name in enumerate(names):
            x = x if i == 0 else max_pool(x)
            x = jax.nn.relu(conv2d(x, params[name]["w"], padding="VALID") + params[name]["b"])
        return act(dense("dense", params["dense"], flat(x)))

    def apply(params: dict, x: Array) -> Array:
        f = features(params, x)
        return dense("head", params["head"], f) if head else f

    def init(key: PRNGKeyArray, x: Array) -> dict:
        check(x)
        *keys, key_dense, key_head = jax.random.split(key, len(names) + 2)
        channels, params = x.shape[-1], {}
        for name, k, size, kernel in zip(names, keys, filters, kernels, strict=True):
            w = jax.nn.initializers.he_normal()(k, (kernel, kernel, channels, size))
            params[name] = {"w": w, "b": jnp.zeros(size)}
            channels = size
        params["dense"] = dense_init(key_dense, sides(x.shape[1]) * sides(x.shape[2]) * channels, width)
        if head:
            params["head"] = dense_init(key_head, width, outputs)
        return params

    return Model(init, apply, features)
