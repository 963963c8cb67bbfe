"""ResNet-12, the large embedding of few-shot papers (Mishra et al. 2018; Oreshkin et al. 2018; Lee et al. 2019)."""

from collections.abc import Sequence
from functools import partial

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.options import Count, checked
from metaprior.core.types import PLAIN, Call, Model
from metaprior.kernels.conv import max_pool
from metaprior.networks.layers import check_images, convolve, dense, dense_init, modulated, shown
from metaprior.networks.norm import check_norm, norm_init, normalise, source_of

CONVOLUTIONS = ("conv1", "conv2", "conv3")


@checked
def resnet12(
    outputs: Count = 5,
    widths: Sequence[Count] = (64, 160, 320, 640),
    gain: bool = True,
    head: bool = True,
    norm: str = "batch",
) -> Model:
    """Applies residual blocks, the mean over space and a linear head to images [n, h, w, c] of 16 pixels or more.

    A block has three [3x3 convolution, norm], with a leaky ReLU (slope 0.1) after the first two. A [1x1 convolution,
    norm] of the block's input is added, followed by a leaky ReLU and 2x2 max-pooling. There is no DropBlock.

    Args:
        outputs: Number of outputs.
        widths: Number of channels of each block. The default is that of Lee et al. 2019; Oreshkin et al. 2018 have
            (64, 128, 256, 512).
        gain: Whether a norm has a learned scale besides its shift.
        head: Whether the network has the linear head. False returns the embedding.
        norm: As in `conv4`.

    Raises:
        ValueError: There are no widths, or the norm is unknown.
    """
    check_norm(norm)
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must have a number of channels for each block, got {tuple(widths)}.")
    blocks = [f"block{i + 1}" for i in range(len(widths))]
    leaky = partial(jax.nn.leaky_relu, negative_slope=0.1)

    def layer(params: dict, name: str, x: Array, call: Call) -> Array:
        s = convolve(name, params[name], x, call)
        return modulated(name, normalise(norm, name, params[name], s, call.by), call)

    def block(params: dict, name: str, x: Array, call: Call) -> Array:
        first, second, third = (f"{name}_{conv}" for conv in CONVOLUTIONS)
        y = leaky(layer(params, first, x, call))
        y = leaky(layer(params, second, y, call))
        y = layer(params, third, y, call) + layer(params, f"{name}_skip", x, call)
        return max_pool(leaky(y))

    def features(params: dict, x: Array, call: Call = PLAIN) -> Float[Array, "n d"]:
        check_images(x)
        for name in blocks:
            x = shown(name, block(params, name, x, call), call)
        return x.mean((1, 2))

    def apply(params: dict, x: Array, call: Call = PLAIN) -> Array:
        f = features(params, x, call)
        return shown("head", dense("head", params["head"], f, call), call) if head else f

    def init(key: PRNGKeyArray, x: Array) -> dict:
        check_images(x)
        he = jax.nn.initializers.variance_scaling(2 / 1.01, "fan_out", "normal")  # 1.01 = 1 + 0.1^2, for the leaky ReLU
        *keys_of_blocks, key_head = jax.random.split(key, len(widths) + 1)
        width, params = x.shape[-1], {}
        for name, after, key_block in zip(blocks, widths, keys_of_blocks, strict=True):
            keys = jax.random.split(key_block, 4)
            sides = dict(zip((*CONVOLUTIONS, "skip"), ((3, width), (3, after), (3, after), (1, width)), strict=True))
            for (part, (side, inputs)), k in zip(sides.items(), keys, strict=True):
                w = he(k, (side, side, inputs, after))
                params[f"{name}_{part}"] = {"w": w} | norm_init(after, gain)
            width = after
        if head:
            params["head"] = dense_init(key_head, width, outputs)
        return params

    return Model(init, apply, features, source_of(norm), calls=True)
