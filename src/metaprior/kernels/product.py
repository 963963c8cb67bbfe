"""Products of small matrices, one a task, that are fast at every order of derivative.

y = x w is one trilinear form, sum y x w, seen from its output, as a convolution is (`conv.py`): one primitive takes two
of the three tensors and gives the third, and its derivatives of every order are itself again. On a CPU an inner loop
asks for hundreds of products of ten rows by forty, which XLA's calls take several times too long for: those are kernels
of our own (`native.py`), as are the sums over rows that a bias's derivative is.
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

# The last axes in the primitive. Before them any axes of tasks, which broadcast: a factor that tasks share has none.
AXES = {"x": "ni", "w": "io", "y": "no"}
# Multiplications, and numbers of the weights, of one product up to which our kernels, which keep no blocks, are used.
MULTIPLICATIONS, WEIGHTS = 2**21, 2**14


def product(x: Float[Array, "n i"], w: Float[Array, "i o"]) -> Float[Array, "n o"]:
    """x w; under vmap each task may have its own w. Raises ValueError unless both have two axes and agree on i."""
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"x, w: came shapes {x.shape}, {w.shape}; needs [n, i], [i, o] with the same i")
    dtype = jnp.result_type(x, w)
    return _bind("y", x=x.astype(dtype), w=w.astype(dtype))


def dots(a: Float[Array, "n o"], b: Float[Array, "i o"]) -> Float[Array, "n i"]:
    """Inner products of the rows of a with those of b, a b'. Raises ValueError unless both have rows of one length."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a, b: came shapes {a.shape}, {b.shape}; needs [n, o], [i, o] with the same o")
    dtype = jnp.result_type(a, b)
    return _bind("x", w=b.astype(dtype), y=a.astype(dtype))


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
        sizes |= dict(zip(AXES[name], aval.shape[-2:], strict=True))
    tasks = jnp.broadcast_shapes(*(aval.shape[:-2] for aval in avals))
    return ShapedArray((*tasks, *(sizes[axis] for axis in AXES[out])), avals[0].dtype)


def _transpose(side: int, cotangent: Array, *operands: Array, out: str) -> Array:
    """The map is linear in each operand, and its transpose in one is the same trilinear form seen from that one."""
    wanted, other = _operands(out)[side], _operands(out)[1 - side]
    found = _bind(wanted, **{out: cotangent, other: operands[1 - side]})
    shape = operands[side].aval.shape
    found = found.sum(range(found.ndim - len(shape)))  # over the tasks that shared it
    once = [axis for axis, size in enumerate(shape[:-2]) if size == 1 < found.shape[axis]]
    return found.sum(once, keepdims=True)


def _batch(args: tuple[Array, ...], dims: tuple[int | None, ...], *, out: str) -> tuple[Array, int]:
    """One product for all where they share w, its rows those of each; else one more axis of tasks.

    Tasks' own tensors are taken as they are: each reshaped copy would be kept for the backward pass beside them.
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
    """XLA's matrix product; where nothing is summed, a product of numbers, which XLA fuses with what comes next."""
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
        """[t, ...], where all tasks share it [1, ...]: what the kernels read."""
        own = a.shape[:-2] if prod(a.shape[:-2]) == 1 else tasks
        return jnp.broadcast_to(a, (*own, *a.shape[-2:])).reshape(prod(own), *a.shape[-2:])

    shape = jax.ShapeDtypeStruct((prod(tasks), *wanted.shape[-2:]), wanted.dtype)
    return jax.ffi.ffi_call(f"metaprior_product_{out}", shape)(in_a_row(a), in_a_row(b)).reshape(wanted.shape)


mlir.register_lowering(product_p, mlir.lower_fun(_by_xla, multiple_results=False))
mlir.register_lowering(product_p, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu")
