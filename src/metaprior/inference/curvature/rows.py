"""The Gauss-Newton matrix by its rows: H = J' L L' J of the summed nll, whitened by a diagonal prior scale S.

J [n c, P] are the outputs' derivatives in phi and L [n, c, r] the likelihood's curvature root, so the rows R = L' J S
[n r, P] hold all of S H S = R' R. Every curvature starts from these rows, or from products with them.
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

CHUNK = 32  # rows (vector-Jacobian products) that are computed at once, at most: what bounds the memory they need
CACHE = 2**20  # bytes of the network's intermediates that a processor's core keeps near
TOGETHER = 256  # outputs whose variances are taken through all queries together, also where examples are independent
Outputs = Callable[..., Array]


class Curvature(Protocol):
    """A Gauss-Newton matrix H of the summed support nll beside a prior N(., S^2): a pytree with three methods."""

    def log_det(self) -> Scalar:
        """log det(I + S H S); with S^2 = 1/tau this is log det(H + tau I) - P log tau. Differentiable."""
        ...

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """A draw, shaped as phi, from N(0, C) with C = S (I + S H S)^-1 S."""
        ...

    def quadratic(self, row: PyTree) -> Scalar:
        """row C row' for a `row` shaped as phi, without its leading axes if it has any."""
        ...


def as_scale(scale: PyTree, phi: PyTree) -> PyTree:
    """A prior scale shaped as phi, from a scalar or from a pytree of arrays that broadcast to phi's leaves."""
    if jax.tree.structure(scale) == jax.tree.structure(phi):
        return jax.tree.map(lambda s, p: jnp.broadcast_to(jnp.asarray(s, p.dtype), p.shape), scale, phi)
    if jnp.ndim(scale) == 0 and not isinstance(scale, (dict, list, tuple)):
        return jax.tree.map(lambda p: jnp.full(p.shape, scale, p.dtype), phi)
    raise ValueError(
        f"scale: came a pytree of structure {jax.tree.structure(scale)}, needs a scalar or phi's own structure "
        f"{jax.tree.structure(phi)}"
    )


def inner(a: PyTree, b: PyTree) -> Scalar:
    """The inner product of two pytrees of the same structure."""
    return jnp.asarray(sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))


def scaled(scale: PyTree, tree: PyTree) -> PyTree:
    """Leaf by leaf product."""
    return jax.tree.map(jnp.multiply, scale, tree)


def against(rows: PyTree, vector: PyTree) -> Float[Array, " r"]:
    """Inner products of r rows (leaves [r, ...]) with one vector shaped as phi."""
    leaves = zip(jax.tree.leaves(rows), jax.tree.leaves(vector), strict=True)
    return jnp.asarray(sum(jnp.tensordot(r, v, axes=v.ndim) for r, v in leaves))


def combine(weights: Float[Array, " r"], rows: PyTree) -> PyTree:
    """sum_i weights_i rows_i, shaped as phi."""
    return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, axes=1), rows)


def normal_like(key: PRNGKeyArray, tree: PyTree) -> PyTree:
    """Standard normal draws shaped as the tree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, draws)


def chunked(f: Callable, xs: PyTree, pull: Callable) -> PyTree:
    """f over the leading axis of xs; f goes through `pull`, a vector-Jacobian product (a pytree of what it keeps).

    On a processor only as many entries are taken at once as their intermediates stay in its cache: rows of Conv4 at
    84x84 come five times faster one by one. Each is computed again in a backward pass, for the same reason.
    """
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    at_once = min(max(CACHE // max(kept, 1), 1), CHUNK) if jax.default_backend() == "cpu" else CHUNK
    if jax.tree.leaves(xs)[0].shape[0] <= at_once:
        return jax.vmap(f)(xs)
    return jax.lax.map(jax.checkpoint(f), xs, batch_size=at_once if at_once > 1 else None)


def pulled(outputs: Outputs, phi: PyTree, x: PyTree) -> tuple[Float[Array, "n c"], jax.tree_util.Partial]:
    """The outputs at phi and the function (a pytree) that pulls a cotangent [n, c] back to phi."""
    f, pull = jax.vjp(lambda p: outputs(p, x), phi)
    if f.ndim != 2:
        raise ValueError(f"outputs: came shape {f.shape}, needs [examples, outputs]; give a single output its own axis")
    return f, jax.tree_util.Partial(_first, pull)


def _first(pull: Callable, cotangent: Array) -> PyTree:
    return pull(cotangent)[0]


def curvature_root(likelihood: Likelihood, f: Float[Array, "n c"], batch: Batch) -> Float[Array, "n c r"]:
    """The likelihood's root L with each example's weight w taken in as sqrt(w)."""
    root = likelihood.hessian_root(f)
    return root if batch.weight is None else root * safe_sqrt(batch.weight)[:, None, None]


def safe_sqrt(x: Array) -> Array:
    """sqrt(max(x, 0)), with derivative 0 where x <= 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def map_rows(
    f: Callable[[PyTree], PyTree], outputs: Outputs, likelihood: Likelihood, phi: PyTree, batch: Batch, scale: PyTree
) -> PyTree:
    """f of each whitened row, stacked along a leading axis of n r; all rows never stand in memory at once.

    A batch norm ties the outputs of a batch together, so a row is one vector-Jacobian product through the whole batch.
    """
    out, pull = pulled(outputs, phi, batch.x)
    root = curvature_root(likelihood, out, batch)
    n, c, r = root.shape

    def one(entry: tuple[Array, Array]) -> PyTree:
        i, column = entry
        # By a product, not by an index: also right where there is no example.
        return f(scaled(scale, pull(jax.nn.one_hot(i, n, dtype=out.dtype)[:, None] * column)))

    return chunked(one, (jnp.repeat(jnp.arange(n), r), jnp.moveaxis(root, 2, 1).reshape(n * r, c)), pull)


def output_variance(outputs: Outputs, gaussian, x: PyTree) -> Float[Array, "n c"]:
    """diag(J* C J*'): variances of the linearised outputs at x under a Gaussian with `mean` and `quadratic(row)`.

    n c vector-Jacobian products, in chunks: through all of x, exact also where a batch norm ties the queries together;
    for more than 256 of them through one query each, where the network treats examples one by one.
    """
    shape = jax.eval_shape(outputs, gaussian.mean, x).shape
    if len(shape) == 2 and shape[0] * shape[1] > TOGETHER and one_by_one(outputs, gaussian.mean, x):
        return _each_alone(outputs, gaussian, x)
    f, pull = pulled(outputs, gaussian.mean, x)

    def one(index: Array) -> Scalar:
        return gaussian.quadratic(pull(jnp.zeros(f.size, f.dtype).at[index].set(1).reshape(f.shape)))

    # Cancellation between the prior's variance and what the data took away can end below zero in float32.
    return jnp.maximum(chunked(one, jnp.arange(f.size), pull), 0).reshape(f.shape)


def _each_alone(outputs: Outputs, gaussian, x: PyTree) -> Float[Array, "n c"]:
    def one(xi: PyTree) -> Float[Array, " c"]:
        f, pull = pulled(outputs, gaussian.mean, jax.tree.map(lambda leaf: leaf[None], xi))
        return jax.vmap(lambda e: gaussian.quadratic(pull(e[None])))(jnp.eye(f.shape[1], dtype=f.dtype))

    return jnp.maximum(jax.lax.map(one, x, batch_size=CHUNK), 0)


def one_by_one(outputs: Outputs, phi: PyTree, x: PyTree) -> bool:
    """Whether the network treats examples one by one, as all do but those with a batch norm or the like.

    Asked of the network itself, at random parameters, while it is traced. Of three examples the middle one is replaced,
    once by NaN, which passes through whatever saturates: the outputs of the others must stay as they are, to the bit.
    And they must be the same to rounding when an example comes alone.
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
