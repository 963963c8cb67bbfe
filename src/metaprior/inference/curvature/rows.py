"""Rows of the Gauss-Newton matrix H = J' L L' J of the summed nll, whitened by a diagonal prior scale S.

J [n c, P] are the outputs' derivatives in phi, and L [n, c, r] is the likelihood's curvature root. The rows
R = L' J S [n r, P] determine S H S = R' R. Every curvature starts from these rows, or from products with them.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.types import Batch

CHUNK = 32  # at most this many rows (vector-Jacobian products) are computed at once, which bounds their memory
CACHE = 2**20  # bytes of a network's intermediates that stay in the cache of a processor's core
TOGETHER = 256  # up to this many outputs, variances are computed through all queries together in any case
Outputs = Callable[..., Array]


class Curvature(Protocol):
    """A Gauss-Newton matrix H of the summed support nll with a prior N(., S^2): a pytree with three methods."""

    def log_det(self) -> Scalar:
        """Computes log det(I + S H S). With S^2 = 1/tau this is log det(H + tau I) - P log tau. Differentiable."""
        ...

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws from N(0, C) with C = S (I + S H S)^-1 S, shaped as phi.

        Args:
            key: Random key.
        """
        ...

    def quadratic(self, row: PyTree) -> Scalar:
        """Computes row C row'.

        Args:
            row: A row, shaped as phi.
        """
        ...


def as_scale(scale: PyTree, phi: PyTree) -> PyTree:
    """Returns a prior scale shaped as phi.

    Args:
        scale: A scalar, or a pytree of arrays that broadcast to phi's leaves.
        phi: The parameters.

    Raises:
        ValueError: The pytree has another structure than phi.
    """
    if jax.tree.structure(scale) == jax.tree.structure(phi):
        return jax.tree.map(lambda s, p: jnp.broadcast_to(jnp.asarray(s, p.dtype), p.shape), scale, phi)
    if not isinstance(scale, (dict, list, tuple)) and jnp.ndim(scale) == 0:
        return jax.tree.map(lambda p: jnp.full(p.shape, scale, p.dtype), phi)
    raise ValueError(
        f"scale must be a scalar or have phi's structure {jax.tree.structure(phi)}, got a pytree of structure "
        f"{jax.tree.structure(scale)}."
    )


def inner(a: PyTree, b: PyTree) -> Scalar:
    """Computes the inner product of two pytrees.

    Args:
        a: A pytree.
        b: A pytree of the same structure.
    """
    return jnp.asarray(sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))


def scaled(scale: PyTree, tree: PyTree) -> PyTree:
    """Multiplies two pytrees leaf by leaf.

    Args:
        scale: A pytree.
        tree: A pytree of the same structure.
    """
    return jax.tree.map(jnp.multiply, scale, tree)


def against(rows: PyTree, vector: PyTree) -> Float[Array, " r"]:
    """Computes the inner products of r rows with one vector.

    Args:
        rows: The rows (leaves [r, ...]).
        vector: The vector, shaped as phi.
    """
    leaves = zip(jax.tree.leaves(rows), jax.tree.leaves(vector), strict=True)
    return jnp.asarray(sum(jnp.tensordot(r, v, axes=v.ndim) for r, v in leaves))


def combine(weights: Float[Array, " r"], rows: PyTree) -> PyTree:
    """Computes sum_i weights_i rows_i, shaped as phi.

    Args:
        weights: The weights [r].
        rows: The rows (leaves [r, ...]).
    """
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, axes=1), rows)


def normal_like(key: PRNGKeyArray, tree: PyTree) -> PyTree:
    """Draws standard normal numbers.

    Args:
        key: Random key.
        tree: A pytree with the shapes of the draws.
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, draws)


def chunked(f: Callable, xs: PyTree, pull: Callable) -> PyTree:
    """Maps f over the leading axis of xs in chunks.

    On a CPU, a chunk has only as many entries as have room for their intermediates in the cache: rows of Conv4 at 84x84
    are five times faster one by one. Each entry is recomputed in a backward pass, for the same reason.

    Args:
        f: Function of one entry, which calls `pull`.
        xs: A pytree whose leaves have one leading entry per call.
        pull: The vector-Jacobian product in f. As a pytree it contains the intermediates.
    """
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    at_once = min(max(CACHE // max(kept, 1), 1), CHUNK) if jax.default_backend() == "cpu" else CHUNK
    if jax.tree.leaves(xs)[0].shape[0] <= at_once:
        return jax.vmap(f)(xs)
    return jax.lax.map(jax.checkpoint(f), xs, batch_size=at_once if at_once > 1 else None)


def pulled(outputs: Outputs, phi: PyTree, x: PyTree) -> tuple[Float[Array, "n c"], jax.tree_util.Partial]:
    """Computes the outputs at phi and their vector-Jacobian product.

    Args:
        outputs: Function (phi, x) -> outputs [n, c].
        phi: The parameters.
        x: Inputs.

    Returns:
        The outputs [n, c], and a function (a pytree) from a cotangent [n, c] to a cotangent of phi.

    Raises:
        ValueError: The outputs do not have two axes.
    """
    f, pull = jax.vjp(lambda p: outputs(p, x), phi)
    if f.ndim != 2:
        raise ValueError(f"outputs must be [examples, outputs], got shape {f.shape}. Give a single output an axis.")
    return f, jax.tree_util.Partial(_first, pull)


def _first(pull: Callable, cotangent: Array) -> PyTree:
    return pull(cotangent)[0]


def curvature_root(likelihood: Likelihood, f: Float[Array, "n c"], batch: Batch) -> Float[Array, "n c r"]:
    """Computes the likelihood's root L, multiplied by sqrt(w) for each example's weight w.

    Args:
        likelihood: The likelihood.
        f: The outputs [n, c].
        batch: The n examples.
    """
    root = likelihood.hessian_root(f)
    return root if batch.weight is None else root * safe_sqrt(batch.weight)[:, None, None]


def safe_sqrt(x: Array) -> Array:
    """Computes sqrt(max(x, 0)), with derivative 0 where x <= 0.

    Args:
        x: An array of any shape.
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def map_rows(
    f: Callable[[PyTree], PyTree], outputs: Outputs, likelihood: Likelihood, phi: PyTree, batch: Batch, scale: PyTree
) -> PyTree:
    """Computes f of each whitened row, without holding all rows in memory.

    A batch norm couples the outputs of a batch, so a row is one vector-Jacobian product through the whole batch.

    Args:
        f: Function of a row, which is shaped as phi.
        outputs: Function (phi, x) -> outputs [n, c].
        likelihood: The likelihood.
        phi: The parameters.
        batch: The n examples.
        scale: The prior's scale S, shaped as phi.

    Returns:
        The results, stacked along a leading axis of n r.
    """
    out, pull = pulled(outputs, phi, batch.x)
    root = curvature_root(likelihood, out, batch)
    n, c, r = root.shape

    def one(entry: tuple[Array, Array]) -> PyTree:
        i, column = entry
        # A product instead of an index, so that it also works without examples.
        return f(scaled(scale, pull(jax.nn.one_hot(i, n, dtype=out.dtype)[:, None] * column)))

    return chunked(one, (jnp.repeat(jnp.arange(n), r), jnp.moveaxis(root, 2, 1).reshape(n * r, c)), pull)


def output_variance(outputs: Outputs, gaussian: Any, x: PyTree) -> Float[Array, "n c"]:
    """Computes the variances diag(J* C J*') of the linearised outputs at x under a Gaussian.

    It takes n c vector-Jacobian products, in chunks. They go through all of x, which is exact also if a batch norm
    couples the queries. If there are more than 256, and the network treats examples one by one, each goes through one
    query.

    Args:
        outputs: Function (phi, x) -> outputs [n, c].
        gaussian: A Gaussian with `mean` and `quadratic(row)`.
        x: Inputs.
    """
    shape = jax.eval_shape(outputs, gaussian.mean, x).shape
    if len(shape) == 2 and shape[0] * shape[1] > TOGETHER and one_by_one(outputs, gaussian.mean, x):
        return _each_alone(outputs, gaussian, x)
    f, pull = pulled(outputs, gaussian.mean, x)

    def one(index: Array) -> Scalar:
        return gaussian.quadratic(pull(jnp.zeros(f.size, f.dtype).at[index].set(1).reshape(f.shape)))

    # The difference between the prior's variance and its reduction by the data can be below 0 in float32.
    return jnp.maximum(chunked(one, jnp.arange(f.size), pull), 0).reshape(f.shape)


def _each_alone(outputs: Outputs, gaussian: Any, x: PyTree) -> Float[Array, "n c"]:
    def one(xi: PyTree) -> Float[Array, " c"]:
        f, pull = pulled(outputs, gaussian.mean, jax.tree.map(lambda leaf: leaf[None], xi))
        return jax.vmap(lambda e: gaussian.quadratic(pull(e[None])))(jnp.eye(f.shape[1], dtype=f.dtype))

    return jnp.maximum(jax.lax.map(one, x, batch_size=CHUNK), 0)


def one_by_one(outputs: Outputs, phi: PyTree, x: PyTree) -> bool:
    """Returns whether the network treats examples one by one. Networks with a batch norm do not.

    This is tested with random parameters, while the network is traced. Of three examples, the middle one is replaced by
    another value and by NaN, which no saturating function hides. The other examples' outputs must be bitwise equal.
    They must also be equal up to rounding if an example is alone in its batch.

    Args:
        outputs: Function (phi, x) -> outputs [n, c].
        phi: The parameters; only their shapes matter.
        x: Inputs; only their shapes matter.
    """
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return rng.integers(0, 2 if leaf.dtype == bool else 8, leaf.shape).astype(leaf.dtype)
        if len(leaf.shape) < 2:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        return (rng.normal(size=leaf.shape) / max(int(np.prod(leaf.shape[:-1])), 1) ** 0.5).astype(leaf.dtype)

    def replaced(leaf: np.ndarray, value: float) -> np.ndarray:
        new = leaf.copy()
        new[1] = value if jnp.issubdtype(leaf.dtype, jnp.floating) else ~leaf[1] if leaf.dtype == bool else leaf[1] + 1
        return new

    def program(n: int) -> tuple[Callable, list[Any]]:
        spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype), x)
        closed = jax.make_jaxpr(outputs)(phi, spec)
        run = jax.jit(lambda consts, *args: eval_jaxpr(closed.jaxpr, consts, *args)[0])
        return lambda consts, xs: np.asarray(run(consts, *jax.tree.leaves((params, xs)))), closed.consts

    params = jax.tree.map(draw, phi)
    xs = jax.tree.map(lambda leaf: draw(jax.ShapeDtypeStruct((3, *leaf.shape[1:]), leaf.dtype)), x)
    together, closed_over = program(3)
    consts = [draw(c) for c in closed_over]
    alone = program(1)[0]
    with jax.ensure_compile_time_eval():
        f = together(consts, xs)
        others = [together(consts, jax.tree.map(lambda leaf, v=v: replaced(leaf, v), xs)) for v in (0.25, np.nan)]
        single = alone(consts, jax.tree.map(lambda leaf: leaf[:1], xs))
    untouched = all((other[::2] == f[::2]).all() for other in others)
    return untouched and np.allclose(single[0], f[0], rtol=1e-4, atol=1e-5)
