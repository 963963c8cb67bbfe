"""A convolution as one matrix product, and max-pooling as comparisons of slices: fast at every order of derivative.

XLA's own convolution on a CPU is slow where it is differentiated twice (its weight gradient has no good kernel), and so
is reduce-max's backward pass. Shifted slices joined and one matrix product have derivatives of the same kind.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def patches(x: Float[Array, "n h w c"], size: tuple[int, int], stride: int = 1) -> Float[Array, "n h2 w2 k"]:
    """What each output of a same-padded convolution sees, ordered as its weights [kh, kw, c] are."""
    (kh, kw), (h, w) = size, x.shape[1:3]
    out = -(-h // stride), -(-w // stride)
    total = [max((o - 1) * stride + k - side, 0) for o, k, side in zip(out, size, (h, w), strict=True)]
    x = jnp.pad(x, ((0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)))
    rows, columns = ((o - 1) * stride + 1 for o in out)
    seen = [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(kh) for j in range(kw)]
    return jnp.concatenate(seen, axis=-1)


def conv2d(
    x: Float[Array, "n h w i"], w: Float[Array, "kh kw i o"], stride: int = 1
) -> Float[Array, "n h2 w2 o"]:
    """Same-padded convolution (a correlation, as everywhere in deep learning)."""
    kh, kw, i, o = w.shape
    return patches(x, (kh, kw), stride) @ w.reshape(kh * kw * i, o)


def max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """The maximum of each 2 x 2 window; a last odd row or column is dropped."""
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    rows = jnp.maximum(x[:, 0:h:2], x[:, 1:h:2])
    return jnp.maximum(rows[:, :, 0:w:2], rows[:, :, 1:w:2])
