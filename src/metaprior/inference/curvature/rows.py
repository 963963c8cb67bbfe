"""The Gauss-Newton matrix by its rows: H = J' L L' J of the summed nll, whitened by a diagonal prior scale S.

J [n c, P] are the outputs' derivatives in phi and L [n, c, r] the likelihood's curvature root, so the rows R = L' J S
[n r, P] hold all of S H S = R' R. Every curvature starts from these rows, or from products with them.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.likelihoods import Likelihood
from metaprior.types import Batch

CHUNK = 32  # rows (vector-Jacobian products) that are computed at once, at most: what bounds the memory they need
CACHE = 2**20  # bytes of the network's intermediates that a processor's core keeps near
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

    Exact also where a batch norm ties the queries together: n c vector-Jacobian products through all of x, in chunks.
    """
    f, pull = pulled(outputs, gaussian.mean, x)

    def one(index: Array) -> Scalar:
        return gaussian.quadratic(pull(jnp.zeros(f.size, f.dtype).at[index].set(1).reshape(f.shape)))

    # Cancellation between the prior's variance and what the data took away can end below zero in float32.
    return jnp.maximum(chunked(one, jnp.arange(f.size), pull), 0).reshape(f.shape)
