"""Products of small matrices, one a task, that are fast at every order of derivative.

y = x w is one trilinear form, sum y x w, seen from its output, as a convolution is (`conv.py`): one primitive takes two
of the three tensors and gives the third, and its derivatives of every order are itself again. On a CPU an inner loop
asks for hundreds of products of ten rows by forty, which XLA's calls take several times too long for: those are kernels
of our own (`native.py`), as are the sums over rows that a bias's derivative is.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from metaprior.networks.native import registered

# The axes in the primitive. The leading t: so many products; a factor that all of them share may have a single one.
AXES = {"x": "tni", "w": "tio", "y": "tno"}
# Multiplications, and numbers of the weights, of one product up to which our kernels, which keep no blocks, are used.
MULTIPLICATIONS, WEIGHTS = 2**21, 2**14


def product(x: Float[Array, "n i"], w: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """x w; under vmap each task may have its own w. Raises ValueError unless both have two axes and agree on i."""
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"x, w: came shapes {x.shape}, {w.shape}; needs [n, i], [i, o] with the same i")
    dtype = jnp.result_type(x, w)
    return _bind("y", x=x.astype(dtype)[None], w=w.astype(dtype)[None])[0]


def dots(a: Float[Array, "n o"], b: Float[Array, "i o"]) -> Float[Array, "n i"]:
    """Inner products of the rows of a with those of b, a b'. Raises ValueError unless both have rows of one length."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a, b: came shapes {a.shape}, {b.shape}; needs [n, o], [i, o] with the same o")
    dtype = jnp.result_type(a, b)
    return _bind("x", w=b.astype(dtype)[None], y=a.astype(dtype)[None])[0]


def rows(b: Float[Array, " o"], n: int) -> Float[Array, "n o"]:
    """b, n times: as a product with ones, so that the sum over rows that is its derivative has a kernel too."""
    return product(jnp.ones((n, 1), b.dtype), b[None])


# ---------------------------------------------------------------------------------------- the primitive and its rules

product_p = Primitive("product")


def _operands(out: str) -> str:
    return "xwy".replace(out, "")


def _bind(out: str, **tensors: Array) -> Array:
    """The tensor named `out`, from the two others."""
    return product_p.bind(*(tensors[name] for name in _operands(out)), out=out)


def _abstract(*avals: ShapedArray | Array, out: str) -> ShapedArray:
    sizes: dict[str, int] = {}
    for name, aval in zip(_operands(out), avals, strict=True):
        sizes |= dict(zip(AXES[name], aval.shape, strict=True))
    sizes["t"] = _together(*(aval.shape[0] for aval in avals))
    return ShapedArray(tuple(sizes[axis] for axis in AXES[out]), avals[0].dtype)


def _together(a: int, b: int) -> int:
    """How many products come of so many matrices and so many: a single one is shared."""
    return b if a == 1 else a


def _transpose(side: int, cotangent: Array, *operands: Array, out: str) -> Array:
    """The map is linear in each operand, and its transpose in one is the same trilinear form seen from that one."""
    wanted, other = _operands(out)[side], _operands(out)[1 - side]
    found = _bind(wanted, **{out: cotangent, other: operands[1 - side]})
    return found if operands[side].aval.shape[0] == found.shape[0] else found.sum(0, keepdims=True)


def _batch(args: tuple[Array, ...], dims: tuple[int | None, ...], *, out: str) -> tuple[Array, int]:
    """One product for all where they share w, its rows those of each; else products of their own."""
    moved = [a if dim is None else jnp.moveaxis(a, dim, 0) for a, dim in zip(args, dims, strict=True)]
    given = dict(zip(_operands(out), zip(moved, (dim is not None for dim in dims), strict=True), strict=True))
    size = next(a.shape[0] for a, batched in given.values() if batched)
    each = (ShapedArray(a.shape[1:] if batched else a.shape, a.dtype) for a, batched in given.values())
    one = _abstract(*each, out=out).shape

    def own(a: Array, batched: bool) -> Array:
        if not batched and a.shape[0] == 1:
            return a
        a = a if batched else a[None]
        return jnp.broadcast_to(a, (size, one[0], *a.shape[2:])).reshape(size * one[0], *a.shape[2:])

    def more_rows(a: Array, batched: bool) -> Array:
        return a.swapaxes(0, 1).reshape(a.shape[1], size * a.shape[2], a.shape[3]) if batched else a

    if {out} | {name for name, (_, batched) in given.items() if batched} == {"x", "y"}:
        result = _bind(out, **{name: more_rows(*pair) for name, pair in given.items()})
        return result.reshape(one[0], size, *one[1:]), 1
    result = _bind(out, **{name: own(*pair) for name, pair in given.items()})
    return result.reshape(size, *one), 0


product_p.def_impl(jax.jit(product_p.bind, static_argnames="out"))
product_p.def_abstract_eval(_abstract)
ad.defbilinear(product_p, partial(_transpose, 0), partial(_transpose, 1))
batching.primitive_batchers[product_p] = _batch


# ------------------------------------------------------------------------------------------------------- its kernels


def _by_xla(a: Array, b: Array, *, out: str) -> Array:
    """XLA's matrix product; where nothing is summed, a product of numbers, which XLA fuses with what comes next."""
    a, b = {"y": (a, b), "x": (b, a.mT), "w": (a.mT, b)}[out]
    return a * b if a.shape[2] == 1 else a @ b


def _on_cpu(a: Array, b: Array, *, out: str) -> Array:
    wanted = _abstract(a, b, out=out)
    first, second = _operands(out)
    sizes = dict(zip(AXES[first] + AXES[second], (*a.shape, *b.shape), strict=True))
    n, i, o = (sizes[axis] for axis in "nio")
    summed = {"y": i, "x": o, "w": n}[out]
    if summed > 1 and i * o <= WEIGHTS and n * i * o <= MULTIPLICATIONS and a.dtype == jnp.float32 and registered():
        return jax.ffi.ffi_call(f"metaprior_product_{out}", jax.ShapeDtypeStruct(wanted.shape, wanted.dtype))(a, b)
    return _by_xla(a, b, out=out)


mlir.register_lowering(product_p, mlir.lower_fun(_by_xla, multiple_results=False))
mlir.register_lowering(product_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")
