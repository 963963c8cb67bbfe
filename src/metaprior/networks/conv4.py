"""Conv4, the embedding of most few-shot papers (Vinyals et al. 2016; Finn et al. 2017), and Conv6."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.options import Count, Whole, checked
from metaprior.core.types import PLAIN, Call, Model
from metaprior.kernels.conv import max_pool
from metaprior.networks.layers import check_images, convolve, dense, dense_init, flat, modulated, shown
from metaprior.networks.norm import check_norm, norm_init, normalise, source_of


@checked
def conv4(
    outputs: Count = 5,
    filters: Count = 64,
    blocks: Count = 4,
    downsample: str = "max_pool",
    readout: str = "flatten",
    gain: bool = False,
    head: bool = True,
    norm: str = "batch",
    halvings: Whole | None = None,
) -> Model:
    """Applies `blocks` x [3x3 convolution, norm, ReLU, halving] and a linear head to images [n, h, w, c].

    Args:
        outputs: Number of outputs.
        filters: Number of channels of each block.
        blocks: Number of blocks.
        downsample: How a block halves the image: "max_pool" (2x2), or "stride" (stride 2 with same padding, as in
            MAML's Omniglot network).
        readout: "flatten", or "mean" over space.
        gain: Whether the norm has a learned scale besides its shift. MAML's code learns the shift alone.
        head: Whether the network has the linear head. False returns the embedding.
        norm: "batch" (statistics of the current batch), "running" (of training tasks), "task" (of the support),
            "layer", "group" or "none".
        halvings: Number of blocks, from the first on, that halve the image. None halves in all.

    Raises:
        ValueError: `downsample`, `readout` or `norm` has another value.
    """
    if downsample not in ("max_pool", "stride"):
        raise ValueError(f"downsample must be 'max_pool' or 'stride', got {downsample!r}.")
    if readout not in ("flatten", "mean"):
        raise ValueError(f"readout must be 'flatten' or 'mean', got {readout!r}.")
    check_norm(norm)
    names = [f"block{i + 1}" for i in range(blocks)]
    halving = names[: blocks if halvings is None else halvings]

    def block(name: str, layer: dict[str, Array], x: Array, call: Call) -> Array:
        stride = 2 if downsample == "stride" and name in halving else 1
        s = normalise(norm, name, layer, convolve(name, layer, x, call, stride), call.by)
        s = jax.nn.relu(modulated(name, s, call))
        return shown(name, max_pool(s) if downsample == "max_pool" and name in halving else s, call)

    def features(params: dict, x: Array, call: Call = PLAIN) -> Float[Array, "n d"]:
        check_images(x)
        for name in names:
            x = block(name, params[name], x, call)
        return x.mean((1, 2)) if readout == "mean" else flat(x)

    def apply(params: dict, x: Array, call: Call = PLAIN) -> Array:
        f = features(params, x, call)
        return shown("head", dense("head", params["head"], f, call), call) if head else f

    def init(key: PRNGKeyArray, x: Array) -> dict:
        keys = jax.random.split(key, blocks + 1)
        width, params = x.shape[-1], {}
        for name, k in zip(names, keys[:-1], strict=True):
            w = jax.nn.initializers.glorot_uniform()(k, (3, 3, width, filters))
            params[name] = {"w": w} | norm_init(filters, gain)
            width = filters
        if head:
            size = jax.eval_shape(features, params, x, Call(by=jnp.ones(x.shape[0]))).shape[-1]
            params["head"] = dense_init(keys[-1], size, outputs)
        return params

    return Model(init, apply, features, source_of(norm), calls=True)


@checked
def conv6(
    outputs: Count = 5,
    filters: Count = 64,
    readout: str = "flatten",
    gain: bool = False,
    head: bool = True,
    norm: str = "batch",
) -> Model:
    """Makes Conv4 with two more blocks that do not halve the image (Chen, Liu, Kira, Wang & Huang 2019).

    Args:
        outputs: Number of outputs.
        filters: Number of channels of each block.
        readout: "flatten", or "mean" over space.
        gain: Whether the norm has a learned scale besides its shift.
        head: Whether the network has the linear head. False returns the embedding.
        norm: As in `conv4`.
    """
    return conv4(outputs, filters, 6, readout=readout, gain=gain, head=head, norm=norm, halvings=4)
