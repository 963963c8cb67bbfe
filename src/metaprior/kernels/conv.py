"""Convolution and max-pooling that are fast at every order of derivative, forward and reverse.

A convolution y = conv(x, w) is one trilinear form, sum y x w over all pixels, seen from its output. Seen from x it is
the input gradient, from w the weight gradient. So there is one primitive, `conv`, that takes two of the three tensors
and gives the third, and its derivatives of every order are itself again. On an accelerator the three are XLA's own
convolutions. On a CPU, where XLA's weight gradient is many times slower than a matrix product and its forward pass
keeps to one core, they are kernels of our own in C++ (`native.py`), or, in float64 or without a compiler, matrix
products of patches, by groups of images that stay in cache.
"""

from functools import partial, reduce
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float

from metaprior.kernels.native import registered

LAYOUT = ("NHWC", "HWIO", "NHWC")
# The axes of the three tensors in the primitive. The leading t: so many convolutions, each of its own x, w and y.
AXES = {"x": "tnhwi", "w": "thwio", "y": "tnhwo"}
# Where just two of the three are batched, the batch joins the index that these share and the third lacks.
SHARED = {"xy": "n", "wy": "o", "xw": "i", "xwy": "t"}
# Bytes of patches above which a CPU goes by groups of images, and of one group's.
CACHE, GROUP = 2**24, 2**23


class Geometry(NamedTuple):
    """Image (height, width), kernel (height, width), stride, and (low, high) padding of height and width."""

    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: int
    pads: tuple[tuple[int, int], tuple[int, int]]

    @property
    def output(self) -> tuple[int, int]:
        sides = zip(self.image, self.kernel, self.pads, strict=True)
        height, width = (max((side + sum(pad) - k) // self.stride + 1, 0) for side, k, pad in sides)
        return height, width


def geometry(x: Array, kernel: tuple[int, int], stride: int, padding: str) -> Geometry:
    """With SAME padding ceil(side / stride) outputs, an odd pixel of padding at the end; with VALID no padding."""
    image = x.shape[1], x.shape[2]
    rows, columns = lax.padtype_to_pads(image, kernel, (stride, stride), padding)
    return Geometry(image, kernel, stride, ((rows[0], rows[1]), (columns[0], columns[1])))


def patches(x: Float[Array, "n h w c"], size: tuple[int, int], stride: int = 1) -> Float[Array, "n h2 w2 k"]:
    """What each output of a same-padded convolution sees, ordered as its weights [kh, kw, c] are."""
    return _patches(x, geometry(x, size, stride, "SAME"))


def conv2d(
    x: Float[Array, "n h w i"], w: Float[Array, "kh kw i o"], stride: int = 1, padding: str = "SAME"
) -> Float[Array, "n h2 w2 o"]:
    """Convolution (a correlation, as everywhere in deep learning), padding "SAME" or "VALID".

    Differentiable any number of times, forward and reverse; under vmap each task may have its own w. Raises ValueError
    unless x and w have four axes and agree on the number of input channels.
    """
    if x.ndim != 4 or w.ndim != 4 or x.shape[-1] != w.shape[2]:
        raise ValueError(f"x, w: came shapes {x.shape}, {w.shape}; needs [n, h, w, i], [kh, kw, i, o] with the same i")
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding: came {padding!r}, needs 'SAME' or 'VALID'")
    dtype = jnp.result_type(x, w)
    shape = geometry(x, (w.shape[0], w.shape[1]), stride, padding)
    return _bind("y", shape, x=x.astype(dtype)[None], w=w.astype(dtype)[None])[0]


# ---------------------------------------------------------------------------------------- the primitive and its rules

conv_p = Primitive("conv")


def _operands(out: str) -> str:
    return "xwy".replace(out, "")


def _bind(out: str, shape: Geometry, **tensors: Array) -> Array:
    """The tensor named `out`, from the two others."""
    return conv_p.bind(*(tensors[name] for name in _operands(out)), out=out, shape=shape)


def _abstract(*avals: ShapedArray | Array, out: str, shape: Geometry) -> ShapedArray:
    sizes: dict[str, int] = {}
    for name, aval in zip(_operands(out), avals, strict=True):
        sizes |= dict(zip(AXES[name], aval.shape, strict=True))
    sizes["h"], sizes["w"] = {"x": shape.image, "w": shape.kernel, "y": shape.output}[out]
    return ShapedArray(tuple(sizes[axis] for axis in AXES[out]), avals[0].dtype)


def _transpose(side: int, cotangent: Array, *operands: Array, out: str, shape: Geometry) -> Array:
    """The map is linear in each operand, and its transpose in one is the same trilinear form seen from that one."""
    wanted, other = _operands(out)[side], _operands(out)[1 - side]
    return _bind(wanted, shape, **{out: cotangent, other: operands[1 - side]})


def _batch(args: tuple[Array, ...], dims: tuple[int | None, ...], *, out: str, shape: Geometry) -> tuple[Array, int]:
    """Fold the new axis into an old one, so that a vmapped convolution is still a single one."""
    given = dict(zip(_operands(out), zip(args, dims, strict=True), strict=True))
    batched = {out} | {name for name, (_, dim) in given.items() if dim is not None}
    size = next(a.shape[d] for a, d in given.values() if d is not None)
    axis = SHARED["".join(name for name in "xwy" if name in batched)]

    def fold(name: str, a: Array, dim: int | None) -> Array:
        if dim is None:
            return a
        place = AXES[name].index(axis)
        a = jnp.moveaxis(a, dim, place)
        return a.reshape(*a.shape[:place], -1, *a.shape[place + 2 :])

    result = _bind(out, shape, **{name: fold(name, a, dim) for name, (a, dim) in given.items()})
    place = AXES[out].index(axis)
    return result.reshape(*result.shape[:place], size, -1, *result.shape[place + 1 :]), place


conv_p.def_impl(jax.jit(conv_p.bind, static_argnames=("out", "shape")))
conv_p.def_abstract_eval(_abstract)
ad.defbilinear(conv_p, partial(_transpose, 0), partial(_transpose, 1))
batching.primitive_batchers[conv_p] = _batch


# ------------------------------------------------------------------------------------------------------- its kernels


def _native(x: Array, w: Array, shape: Geometry) -> Array:
    return lax.conv_general_dilated(x, w, (shape.stride,) * 2, shape.pads, dimension_numbers=LAYOUT)


def _by_xla(a: Array, b: Array, *, out: str, shape: Geometry) -> Array:
    """XLA's own convolution and its transposes; many at once are a grouped convolution."""
    if out == "y":
        return jax.vmap(lambda x, w: _native(x, w, shape))(a, b)
    wanted = _abstract(a, b, out=out, shape=shape)
    one = jax.ShapeDtypeStruct(wanted.shape[1:], wanted.dtype)
    if out == "x":
        return jax.vmap(lambda w, y: jax.linear_transpose(lambda x: _native(x, w, shape), one)(y)[0])(a, b)
    return jax.vmap(lambda x, y: jax.linear_transpose(lambda w: _native(x, w, shape), one)(y)[0])(a, b)


def _on_cpu(a: Array, b: Array, *, out: str, shape: Geometry) -> Array:
    """The CPU's kernels: in C++ where that was compiled, else products, one convolution after another."""
    if a.dtype == jnp.float32 and registered():
        wanted = _abstract(a, b, out=out, shape=shape)
        call = jax.ffi.ffi_call(f"metaprior_conv_{out}", jax.ShapeDtypeStruct(wanted.shape, wanted.dtype))
        (low_h, _), (low_w, _) = shape.pads
        return call(a, b, stride=np.int64(shape.stride), low_h=np.int64(low_h), low_w=np.int64(low_w))
    kernel = partial({"y": _forward, "x": _input_gradient, "w": _weight_gradient}[out], shape=shape)
    return kernel(a[0], b[0])[None] if a.shape[0] == 1 else lax.map(lambda pair: kernel(*pair), (a, b))


def _slices(x: Array, shape: Geometry, rows: int = 1) -> list[Array]:
    """The padded image shifted by each position of the kernel; `rows` is its axis of rows, columns come next."""
    pads = [(0, 0)] * rows + list(shape.pads) + [(0, 0)] * (x.ndim - rows - 2)
    x = jnp.pad(x, pads)

    def window(x: Array, start: int, axis: int) -> Array:
        last = start + (shape.output[axis - rows] - 1) * shape.stride
        return lax.slice_in_dim(x, start, last + 1, shape.stride, axis)

    kh, kw = shape.kernel
    return [window(window(x, j, rows + 1), i, rows) for i in range(kh) for j in range(kw)]


def _patches(x: Array, shape: Geometry) -> Array:
    return jnp.concatenate(_slices(x, shape), axis=-1)


def _groups(x: Array, shape: Geometry) -> int:
    """Into how many equal groups of images to go, so that a group's patches stay in cache."""
    n = x.shape[0]
    size = n * prod(shape.output) * prod(shape.kernel) * x.shape[-1] * x.dtype.itemsize
    return 1 if size <= CACHE else next(k for k in range(1, n + 1) if n % k == 0 and (size // k <= GROUP or k == n))


def _product(x: Array, w: Array, shape: Geometry) -> Array:
    return _patches(x, shape) @ w.reshape(-1, w.shape[-1])


def _forward(x: Array, w: Array, shape: Geometry) -> Array:
    """Patches times weights. XLA's packed convolution is a fifth faster on one core but uses no second one."""
    groups = _groups(x, shape)
    if groups == 1:
        return _product(x, w, shape)
    y = lax.map(lambda group: _product(group, w, shape), x.reshape(groups, -1, *x.shape[1:]))
    return y.reshape(-1, *y.shape[2:])


def _input_gradient(w: Array, y: Array, shape: Geometry) -> Array:
    """With stride 1 a convolution of y with the kernel turned round; else each patch's gradient, added up."""
    turned = w[::-1, ::-1].swapaxes(2, 3)
    if shape.stride == 1:
        sides = zip(shape.image, shape.output, shape.kernel, shape.pads, strict=True)
        pads = tuple((k - 1 - low, image - output + low) for image, output, k, (low, _) in sides)
        return _forward(y, turned, Geometry(shape.output, shape.kernel, 1, (pads[0], pads[1])))
    image = jax.ShapeDtypeStruct((y.shape[0], *shape.image, w.shape[2]), y.dtype)
    return jax.linear_transpose(lambda x: _product(x, w, shape), image)(y)[0]


def _weight_gradient(x: Array, y: Array, shape: Geometry) -> Array:
    """One product where the patches fit in cache, else a sum of such over groups of images."""
    groups = _groups(x, shape)
    if groups == 1:
        return _weight_product(x, y, shape)

    def add(total: Array, group: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _weight_product(*group, shape), None

    zero = jnp.zeros((*shape.kernel, x.shape[-1], y.shape[-1]), x.dtype)
    return lax.scan(add, zero, (x.reshape(groups, -1, *x.shape[1:]), y.reshape(groups, -1, *y.shape[1:])))[0]


def _weight_product(x: Array, y: Array, shape: Geometry) -> Array:
    """Patches with the pixels innermost, so that the long sum over them runs along memory."""
    channels, filters = x.shape[-1], y.shape[-1]
    seen = jnp.stack(_slices(jnp.moveaxis(x, -1, 0), shape, rows=2))
    # XLA would fold the layout into the product, which then walks across memory.
    seen = lax.optimization_barrier(seen.reshape(len(seen) * channels, -1))
    return (seen @ y.reshape(-1, filters)).reshape(*shape.kernel, channels, filters)


mlir.register_lowering(conv_p, mlir.lower_fun(_by_xla, multiple_results=False))
mlir.register_lowering(conv_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")


# --------------------------------------------------------------------------------------------------------- max-pooling


def max_pool(x: Float[Array, "n h w c"], window: int = 2) -> Float[Array, "n h2 w2 c"]:
    """The maximum of each window x window square; last rows and columns that fill no square are dropped.

    Entries that tie share the derivative evenly, as in `jnp.max`. Raises ValueError where no square fits.
    """
    if x.ndim != 4 or not 1 <= window <= min(x.shape[1:3]):
        raise ValueError(f"x, window: came {x.shape}, {window}; needs [n, h, w, c] with h and w at least the window")
    return _pool(x, window)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _pool(x: Array, window: int) -> Array:
    # Comparing shifted slices is vectorised along the channels, a reduction over a window is not.
    return reduce(jnp.maximum, _corners(x, window))


@_pool.defjvp
def _pool_jvp(window: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # Its transpose is a broadcast and a selection, one pass over the image; that of slices would be a sum of pads.
    (x,), (dx,) = primals, tangents
    top = _pool(x, window)
    share = 1 / sum((corner == top).astype(x.dtype) for corner in _corners(x, window))
    chosen = _only(_squares(x, window) == top[:, :, None, :, None], _squares(dx, window))
    return top, chosen.sum((2, 4)) * share


@partial(jax.checkpoint, prevent_cse=False)
def _only(there: Bool[Array, "*n"], dx: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """dx where it is there, else 0. A product, as the transpose of `where` has an image of zeros, which loops carry."""
    return there.astype(dx.dtype) * dx


def _corners(x: Array, window: int) -> list[Array]:
    h, w = (side // window * window for side in x.shape[1:3])
    return [x[:, i:h:window, j:w:window] for i in range(window) for j in range(window)]


def _squares(x: Array, window: int) -> Float[Array, "n h2 window w2 window c"]:
    n, h, w, c = x.shape
    rows, columns = h // window, w // window
    return x[:, : rows * window, : columns * window].reshape(n, rows, window, columns, window, c)
