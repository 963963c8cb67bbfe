"""Convolution and max-pooling that are fast at every order of derivative, forward and reverse.

A convolution y = conv(x, w), its input gradient and its weight gradient are the derivatives of one trilinear form, the
sum of y x w over all pixels, in y, x and w. So there is one primitive, `conv`, which computes one of the three tensors
from the two others. Its derivatives of every order are the same primitive. On an accelerator it uses XLA's
convolutions. On a CPU, XLA's weight gradient is many times slower than a matrix product, and its forward pass uses one
core only. There the primitive uses C++ kernels (`native.py`) or, in float64 or without a compiler, matrix products of
patches, in groups of images whose patches stay in the cache.
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
# The axes of the three tensors in the primitive. The leading t counts convolutions, each with its own x, w and y.
AXES = {"x": "tnhwi", "w": "thwio", "y": "tnhwo"}
# If only two of the three are batched, the batch is merged into the axis that the third does not have.
SHARED = {"xy": "n", "wy": "o", "xw": "i", "xwy": "t"}
# Bytes of patches above which a CPU uses groups of images, and bytes of one group's patches.
CACHE, GROUP = 2**24, 2**23


class Geometry(NamedTuple):
    """The geometry of a convolution.

    Attributes:
        image: (height, width) of the images.
        kernel: (height, width) of the kernel.
        stride: Stride of both axes.
        pads: Padding (low, high) of height and width.
    """

    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: int
    pads: tuple[tuple[int, int], tuple[int, int]]

    @property
    def output(self) -> tuple[int, int]:
        """(height, width) of the outputs."""
        sides = zip(self.image, self.kernel, self.pads, strict=True)
        height, width = (max((side + sum(pad) - k) // self.stride + 1, 0) for side, k, pad in sides)
        return height, width


def geometry(x: Array, kernel: tuple[int, int], stride: int, padding: str) -> Geometry:
    """Computes the geometry of a convolution.

    SAME padding gives ceil(side / stride) outputs, with the odd pixel of padding at the end. VALID has no padding.

    Args:
        x: Images [n, h, w, c].
        kernel: (height, width) of the kernel.
        stride: Stride of both axes.
        padding: "SAME" or "VALID".
    """
    image = x.shape[1], x.shape[2]
    rows, columns = lax.padtype_to_pads(image, kernel, (stride, stride), padding)
    return Geometry(image, kernel, stride, ((rows[0], rows[1]), (columns[0], columns[1])))


def patches(x: Float[Array, "n h w c"], size: tuple[int, int], stride: int = 1) -> Float[Array, "n h2 w2 k"]:
    """Returns the inputs of each output of a same-padded convolution, in the order of its weights [kh, kw, c].

    Args:
        x: Images [n, h, w, c].
        size: (height, width) of the kernel.
        stride: Stride of both axes.

    Returns:
        Patches [n, h2, w2, kh kw c].
    """
    return _patches(x, geometry(x, size, stride, "SAME"))


def conv2d(
    x: Float[Array, "n h w i"], w: Float[Array, "kh kw i o"], stride: int = 1, padding: str = "SAME"
) -> Float[Array, "n h2 w2 o"]:
    """Computes a convolution (a correlation, as usual in deep learning).

    It is differentiable any number of times, in forward and reverse mode. Under vmap each task may have its own w.

    Args:
        x: Images [n, h, w, i].
        w: Weights [kh, kw, i, o].
        stride: Stride of both axes.
        padding: "SAME" or "VALID".

    Raises:
        ValueError: x or w does not have four axes, they differ in the number of input channels, or the padding is
            unknown.
    """
    if x.ndim != 4 or w.ndim != 4 or x.shape[-1] != w.shape[2]:
        raise ValueError(
            f"x and w must have shapes [n, h, w, i] and [kh, kw, i, o] with the same i, got {x.shape} and {w.shape}."
        )
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding must be 'SAME' or 'VALID', got {padding!r}.")
    dtype = jnp.result_type(x, w)
    shape = geometry(x, (w.shape[0], w.shape[1]), stride, padding)
    return _bind("y", shape, x=x.astype(dtype)[None], w=w.astype(dtype)[None])[0]


# ---------------------------------------------------------------------------------------- the primitive and its rules

conv_p = Primitive("conv")


def _operands(out: str) -> str:
    return "xwy".replace(out, "")


def _bind(out: str, shape: Geometry, **tensors: Array) -> Array:
    """Computes the tensor named `out` from the two others."""
    return conv_p.bind(*(tensors[name] for name in _operands(out)), out=out, shape=shape)


def _abstract(*avals: ShapedArray | Array, out: str, shape: Geometry) -> ShapedArray:
    sizes: dict[str, int] = {}
    for name, aval in zip(_operands(out), avals, strict=True):
        sizes |= dict(zip(AXES[name], aval.shape, strict=True))
    sizes["h"], sizes["w"] = {"x": shape.image, "w": shape.kernel, "y": shape.output}[out]
    return ShapedArray(tuple(sizes[axis] for axis in AXES[out]), avals[0].dtype)


def _transpose(side: int, cotangent: Array, *operands: Array, out: str, shape: Geometry) -> Array:
    """Transposes the map in one operand: its derivative of the same trilinear form in that operand."""
    wanted, other = _operands(out)[side], _operands(out)[1 - side]
    return _bind(wanted, shape, **{out: cotangent, other: operands[1 - side]})


def _batch(args: tuple[Array, ...], dims: tuple[int | None, ...], *, out: str, shape: Geometry) -> tuple[Array, int]:
    """Merges the new axis into an old one, so that a vmapped convolution is still a single one."""
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
    """Uses XLA's convolution and its transposes. Several convolutions become a grouped one."""
    if out == "y":
        return jax.vmap(lambda x, w: _native(x, w, shape))(a, b)
    wanted = _abstract(a, b, out=out, shape=shape)
    one = jax.ShapeDtypeStruct(wanted.shape[1:], wanted.dtype)
    if out == "x":
        return jax.vmap(lambda w, y: jax.linear_transpose(lambda x: _native(x, w, shape), one)(y)[0])(a, b)
    return jax.vmap(lambda x, y: jax.linear_transpose(lambda w: _native(x, w, shape), one)(y)[0])(a, b)


def _on_cpu(a: Array, b: Array, *, out: str, shape: Geometry) -> Array:
    """Uses the C++ kernels if they were compiled, else matrix products, one convolution after another."""
    if a.dtype == jnp.float32 and registered():
        wanted = _abstract(a, b, out=out, shape=shape)
        call = jax.ffi.ffi_call(f"metaprior_conv_{out}", jax.ShapeDtypeStruct(wanted.shape, wanted.dtype))
        (low_h, _), (low_w, _) = shape.pads
        return call(a, b, stride=np.int64(shape.stride), low_h=np.int64(low_h), low_w=np.int64(low_w))
    kernel = partial({"y": _forward, "x": _input_gradient, "w": _weight_gradient}[out], shape=shape)
    return kernel(a[0], b[0])[None] if a.shape[0] == 1 else lax.map(lambda pair: kernel(*pair), (a, b))


def _slices(x: Array, shape: Geometry, rows: int = 1) -> list[Array]:
    """Returns the padded image shifted to each position of the kernel. `rows` is the axis of rows, before columns."""
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
    """Returns the number of equal groups of images such that a group's patches stay in the cache."""
    n = x.shape[0]
    size = n * prod(shape.output) * prod(shape.kernel) * x.shape[-1] * x.dtype.itemsize
    return 1 if size <= CACHE else next(k for k in range(1, n + 1) if n % k == 0 and (size // k <= GROUP or k == n))


def _product(x: Array, w: Array, shape: Geometry) -> Array:
    return _patches(x, shape) @ w.reshape(-1, w.shape[-1])


def _forward(x: Array, w: Array, shape: Geometry) -> Array:
    """Multiplies patches by weights. XLA's packed convolution is 20 % faster on one core, but uses only one."""
    groups = _groups(x, shape)
    if groups == 1:
        return _product(x, w, shape)
    y = lax.map(lambda group: _product(group, w, shape), x.reshape(groups, -1, *x.shape[1:]))
    return y.reshape(-1, *y.shape[2:])


def _input_gradient(w: Array, y: Array, shape: Geometry) -> Array:
    """Convolves y with the reversed kernel if the stride is 1; otherwise adds up the gradients of all patches."""
    turned = w[::-1, ::-1].swapaxes(2, 3)
    if shape.stride == 1:
        sides = zip(shape.image, shape.output, shape.kernel, shape.pads, strict=True)
        pads = tuple((k - 1 - low, image - output + low) for image, output, k, (low, _) in sides)
        return _forward(y, turned, Geometry(shape.output, shape.kernel, 1, (pads[0], pads[1])))
    image = jax.ShapeDtypeStruct((y.shape[0], *shape.image, w.shape[2]), y.dtype)
    return jax.linear_transpose(lambda x: _product(x, w, shape), image)(y)[0]


def _weight_gradient(x: Array, y: Array, shape: Geometry) -> Array:
    """Computes one product if the patches fit in the cache, else a sum of products over groups of images."""
    groups = _groups(x, shape)
    if groups == 1:
        return _weight_product(x, y, shape)

    def add(total: Array, group: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _weight_product(*group, shape), None

    zero = jnp.zeros((*shape.kernel, x.shape[-1], y.shape[-1]), x.dtype)
    return lax.scan(add, zero, (x.reshape(groups, -1, *x.shape[1:]), y.reshape(groups, -1, *y.shape[1:])))[0]


def _weight_product(x: Array, y: Array, shape: Geometry) -> Array:
    """Computes the product with the pixels innermost, so that the long sum over them is contiguous in memory."""
    channels, filters = x.shape[-1], y.shape[-1]
    seen = jnp.stack(_slices(jnp.moveaxis(x, -1, 0), shape, rows=2))
    # Without the barrier XLA fuses the layout into the product, whose memory accesses are then not contiguous.
    seen = lax.optimization_barrier(seen.reshape(len(seen) * channels, -1))
    return (seen @ y.reshape(-1, filters)).reshape(*shape.kernel, channels, filters)


mlir.register_lowering(conv_p, mlir.lower_fun(_by_xla, multiple_results=False))
mlir.register_lowering(conv_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")


# --------------------------------------------------------------------------------------------------------- max-pooling


def max_pool(x: Float[Array, "n h w c"], window: int = 2) -> Float[Array, "n h2 w2 c"]:
    """Computes the maximum of each window x window square.

    The last rows and columns are dropped if they do not fill a square. Equal maxima share the derivative evenly, as in
    `jnp.max`.

    Args:
        x: Images [n, h, w, c].
        window: Side of a square.

    Raises:
        ValueError: x does not have four axes, or is smaller than the window.
    """
    if x.ndim != 4 or not 1 <= window <= min(x.shape[1:3]):
        raise ValueError(
            f"x must have shape [n, h, w, c] with h and w at least the window {window}, and the window at least 1, got "
            f"{x.shape}."
        )
    return _pool(x, window)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _pool(x: Array, window: int) -> Array:
    # The comparison of shifted slices is vectorised along the channels; a reduction over a window is not.
    return reduce(jnp.maximum, _corners(x, window))


@_pool.defjvp
def _pool_jvp(window: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The transpose is a broadcast and a selection, in one pass over the image. With slices it would be a sum of pads.
    (x,), (dx,) = primals, tangents
    top = _pool(x, window)
    share = 1 / sum((corner == top).astype(x.dtype) for corner in _corners(x, window))
    chosen = _only(_squares(x, window) == top[:, :, None, :, None], _squares(dx, window))
    return top, chosen.sum((2, 4)) * share


@partial(jax.checkpoint, prevent_cse=False)
def _only(there: Bool[Array, "*n"], dx: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns dx where `there`, else 0. A product: the transpose of `where` has an image of zeros that loops carry."""
    return there.astype(dx.dtype) * dx


def _corners(x: Array, window: int) -> list[Array]:
    h, w = (side // window * window for side in x.shape[1:3])
    return [x[:, i:h:window, j:w:window] for i in range(window) for j in range(window)]


def _squares(x: Array, window: int) -> Float[Array, "n h2 window w2 window c"]:
    n, h, w, c = x.shape
    rows, columns = h // window, w // window
    return x[:, : rows * window, : columns * window].reshape(n, rows, window, columns, window, c)
