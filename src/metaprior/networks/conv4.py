"""Four convolution blocks: the embedding of most few-shot image papers (Vinyals et al. 2016; Finn et al. 2017)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.networks.conv import conv2d, max_pool, patches
from metaprior.networks.layers import Tap, batch_norm, dense, dense_init, flat
from metaprior.types import Model


def conv4(
    outputs: int = 5,
    filters: int = 64,
    blocks: int = 4,
    downsample: str = "max_pool",
    readout: str = "flatten",
    gain: bool = False,
    head: bool = True,
) -> Model:
    """`blocks` x [3x3 convolution, batch norm, ReLU, halving], then a linear head, on images [n, h, w, c].

    downsample: "max_pool" (2x2) or "stride" (MAML's Omniglot network: stride 2, same padding). readout: "flatten", or
    "mean" over space. gain: learn the norm's stretch besides its shift (MAML's code learns the shift alone).
    head=False ends at the embedding. Batch norm uses the statistics of the batch at hand.
    """
    if downsample not in ("max_pool", "stride"):
        raise ValueError(f"downsample: came {downsample!r}, needs 'max_pool' or 'stride'")
    if readout not in ("flatten", "mean"):
        raise ValueError(f"readout: came {readout!r}, needs 'flatten' or 'mean'")
    names = [f"block{i + 1}" for i in range(blocks)]
    stride = 2 if downsample == "stride" else 1

    def block(name: str, layer: dict[str, Array], x: Array, tap: Tap | None) -> Array:
        s = conv2d(x, layer["w"], stride)
        if tap is not None:
            s = tap(name, patches(x, (3, 3), stride), s)
        s = jax.nn.relu(batch_norm(s, layer["shift"], layer.get("gain")))
        return max_pool(s) if downsample == "max_pool" else s

    def features(params: dict, x: Array, tap: Tap | None = None) -> Float[Array, "n d"]:
        if x.ndim != 4:
            raise ValueError(f"x: came shape {x.shape}, needs images [n, height, width, channels]")
        for name in names:
            x = block(name, params[name], x, tap)
        return x.mean((1, 2)) if readout == "mean" else flat(x)

    def apply(params: dict, x: Array, tap: Tap | None = None) -> Array:
        f = features(params, x, tap)
        return dense("head", params["head"], f, tap) if head else f

    def init(key: PRNGKeyArray, x: Array) -> dict:
        keys = jax.random.split(key, blocks + 1)
        width, params = x.shape[-1], {}
        for name, k in zip(names, keys[:-1], strict=True):
            w = jax.nn.initializers.glorot_uniform()(k, (3, 3, width, filters))
            params[name] = {"w": w, "shift": jnp.zeros(filters)} | ({"gain": jnp.ones(filters)} if gain else {})
            width = filters
        if head:
            size = jax.eval_shape(features, params, x).shape[-1]
            params["head"] = dense_init(keys[-1], size, outputs)
        return params

    return Model(init, apply, features)

