"""Products of small matrices, one per task, that are fast at every order of derivative.

As for a convolution (`conv.py`), y = x w and its derivatives come from one trilinear form, the sum of y x w. One
primitive computes one of the three tensors from the two others, and its derivatives of every order are the same
primitive. On a CPU, an inner loop has hundreds of products of ten rows by forty, for which XLA's calls are several
times slower than necessary. These use C++ kernels (`native.py`), and so do the sums over rows in the derivative of a
bias.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from metaprior.kernels.native import registered

# The last axes in the primitive. Before them are axes of tasks, which broadcast: a factor that tasks share has none.
AXES = {"x": "ni", "w": "io", "y": "no"}
# The largest numbers of multiplications and of weights for which the C++ kernels are used, as they have no blocking.
MULTIPLICATIONS, WEIGHTS = 2**21, 2**14


def product(x: Float[Array, "n i"], w: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """Computes x w. Under vmap each task may have its own w.

    Args:
        x: Matrix [n, i].
        w: Matrix [i, o].

    Raises:
        ValueError: x or w does not have two axes, or they differ in i.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"x and w must have shapes [n, i] and [i, o] with the same i, got {x.shape} and {w.shape}.")
    dtype = jnp.result_type(x, w)
    return _bind("y", x=x.astype(dtype), w=w.astype(dtype))


def dots(a: Float[Array, "n o"], b: Float[Array, "i o"]) -> Float[Array, "n i"]:
    """Computes the inner products a b' of the rows of a with those of b.

    Args:
        a: Matrix [n, o].
        b: Matrix [i, o].

    Raises:
        ValueError: a or b does not have two axes, or they differ in o.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have shapes [n, o] and [i, o] with the same o, got {a.shape} and {b.shape}.")
    dtype = jnp.result_type(a, b)
    return _bind("x", w=b.astype(dtype), y=a.astype(dtype))


def rows(b: Float[Array, " o"], n: int) -> Float[Array, "n o"]:
    """Repeats a row n times, by a product with ones, so that a kernel computes its derivative, a sum over rows.

    Args:
        b: The row [o].
        n: Number of rows.
    """
    return product(jnp.ones((n, 1), b.dtype), b[None])


# ---------------------------------------------------------------------------------------- the primitive and its rules

product_p = Primitive("product")


def _operands(out: str) -> str:
    return "xwy".replace(out, "")


def _bind(out: str, **tensors: Array) -> Array:
    """Computes the tensor named `out` from the two others."""
    return product_p.bind(*(tensors[name] for name in _operands(out)), out=out)


def _abstract(*avals: ShapedArray | Array, out: str) -> ShapedArray:
    sizes: dict[str, int] = {}
    for name, aval in zip(_operands(out), avals, strict=True):
        sizes |= dict(zip(AXES[name], aval.shape[-2:], strict=True))
    tasks = jnp.broadcast_shapes(*(aval.shape[:-2] for aval in avals))
    return ShapedArray((*tasks, *(sizes[axis] for axis in AXES[out])), avals[0].dtype)


def _transpose(side: int, cotangent: Array, *operands: Array, out: str) -> Array:
    """Transposes the map in one operand: its derivative of the same trilinear form in that operand."""
    wanted, other = _operands(out)[side], _operands(out)[1 - side]
    found = _bind(wanted, **{out: cotangent, other: operands[1 - side]})
    shape = operands[side].aval.shape
    found = found.sum(range(found.ndim - len(shape)))  # over the tasks that share the operand
    once = [axis for axis, size in enumerate(shape[:-2]) if size == 1 < found.shape[axis]]
    return found.sum(once, keepdims=True)


def _batch(args: tuple[Array, ...], dims: tuple[int | None, ...], *, out: str) -> tuple[Array, int]:
    """Makes one product with more rows if all tasks share w, else adds an axis of tasks.

    The tensors of tasks are not reshaped, because each copy would be kept for the backward pass.
    """
    moved = [a if dim is None else jnp.moveaxis(a, dim, 0) for a, dim in zip(args, dims, strict=True)]
    given = dict(zip(_operands(out), zip(moved, (dim is not None for dim in dims), strict=True), strict=True))
    size = next(a.shape[0] for a, batched in given.values() if batched)
    if {out} | {name for name, (_, batched) in given.items() if batched} == {"x", "y"}:
        n = next(a.shape[-2] for a, batched in given.values() if batched)
        result = _bind(out, **{name: _more_rows(a) if batched else a for name, (a, batched) in given.items()})
        return result.reshape(*result.shape[:-2], size, n, result.shape[-1]), result.ndim - 2
    most = max(a.ndim - batched for a, batched in given.values())

    def own(a: Array, batched: bool) -> Array:
        return jnp.expand_dims(a, range(1, 2 + most - a.ndim)) if batched else a

    return _bind(out, **{name: own(*pair) for name, pair in given.items()}), 0


def _more_rows(a: Float[Array, "size *t n k"]) -> Float[Array, "*t sizen k"]:
    *tasks, size, n, k = (a := jnp.moveaxis(a, 0, -3)).shape
    return a.reshape(*tasks, size * n, k)


product_p.def_impl(jax.jit(product_p.bind, static_argnames="out"))
product_p.def_abstract_eval(_abstract)
ad.defbilinear(product_p, partial(_transpose, 0), partial(_transpose, 1))
batching.primitive_batchers[product_p] = _batch


# ------------------------------------------------------------------------------------------------------- its kernels


def _by_xla(a: Array, b: Array, *, out: str) -> Array:
    """Uses XLA's matrix product. Without a sum it is an elementwise product, which XLA fuses with later operations."""
    a, b = {"y": (a, b), "x": (b, a.mT), "w": (a.mT, b)}[out]
    return a * b if a.shape[-1] == 1 else a @ b


def _on_cpu(a: Array, b: Array, *, out: str) -> Array:
    wanted = _abstract(a, b, out=out)
    first, second = _operands(out)
    sizes = dict(zip(AXES[first] + AXES[second], (*a.shape[-2:], *b.shape[-2:]), strict=True))
    n, i, o = (sizes[axis] for axis in "nio")
    summed = {"y": i, "x": o, "w": n}[out]
    small = i * o <= WEIGHTS and n * i * o <= MULTIPLICATIONS
    if not (summed > 1 and small and a.dtype == jnp.float32 and registered()):
        return _by_xla(a, b, out=out)
    tasks = wanted.shape[:-2]

    def in_a_row(a: Array) -> Array:
        """Returns the factor as the kernels read it: [t, ...], or [1, ...] if all tasks share it."""
        own = a.shape[:-2] if prod(a.shape[:-2]) == 1 else tasks
        return jnp.broadcast_to(a, (*own, *a.shape[-2:])).reshape(prod(own), *a.shape[-2:])

    shape = jax.ShapeDtypeStruct((prod(tasks), *wanted.shape[-2:]), wanted.dtype)
    return jax.ffi.ffi_call(f"metaprior_product_{out}", shape)(in_a_row(a), in_a_row(b)).reshape(wanted.shape)


mlir.register_lowering(product_p, mlir.lower_fun(_by_xla, multiple_results=False))
mlir.register_lowering(product_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")
