"""Exact Gauss-Newton curvature in the primal, for many rows and few parameters; and the choice between it and the dual.

S H S [P, P] is summed over examples and taken apart once: time n r P^2 + P^3, memory P^2, whatever the rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.types import Batch, examples
from metaprior.inference.curvature.dual import Dual, dual
from metaprior.inference.curvature.rows import Outputs, as_scale, map_rows, one_by_one
from metaprior.inference.curvature.spectral import SpectralGaussian, Spectrum, around, laplace_spectrum

FEW_ROWS = 512  # n r up to which the dual is taken
MOST_ROWS = 4096  # beyond them the dual takes minutes
MOST_PARAMETERS = 2048  # up to which S H S is formed
EXAMPLES = 128  # whose rows stand in memory at once


class Primal(NamedTuple):
    """The eigenvectors of S H S, each as long as the square root of its eigenvalue (leaves [P, ...]), and these."""

    scale: PyTree
    rows: PyTree
    values: Float[Array, " P"]

    def log_det(self) -> Scalar:
        """log det(I + S H S)."""
        return jnp.log1p(self.values).sum()

    def gaussian(self, mean: PyTree, spectrum: Spectrum, temperature: float | Array = 1.0) -> SpectralGaussian:
        """N(mean, temperature S s(S H S) S)."""
        return around(mean, self.scale, self.rows, self.values, spectrum, temperature)

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """A draw from N(0, S (I + S H S)^-1 S)."""
        return self.gaussian(jax.tree.map(jnp.zeros_like, self.scale), laplace_spectrum).sample(key)

    def quadratic(self, row: PyTree) -> Scalar:
        """row S (I + S H S)^-1 S row'."""
        return self.gaussian(jax.tree.map(jnp.zeros_like, self.scale), laplace_spectrum).quadratic(row)


def primal(
    outputs: Outputs,
    likelihood: Likelihood,
    phi: PyTree,
    batch: Batch,
    scale: PyTree,
    key: PRNGKeyArray | None = None,
) -> Primal:
    """The exact Gauss-Newton curvature of the batch's summed nll, for a network that treats examples one by one.

    `key` is not used.
    """
    whole = as_scale(scale, phi)
    flat, build = ravel_pytree(whole)

    n = examples(batch)
    weight = jnp.ones(n, flat.dtype) if batch.weight is None else batch.weight
    fill = -n % EXAMPLES

    def cut(leaf: Array, repeat: bool = True) -> Array:
        """Chunks of examples; the last is filled with copies of the first one, at weight 0."""
        more = jnp.broadcast_to(leaf[:1], (fill, *leaf.shape[1:])) if repeat else jnp.zeros(fill, leaf.dtype)
        return jnp.concatenate([leaf, more]).reshape(-1, EXAMPLES, *leaf.shape[1:])

    def add(total: Float[Array, "P P"], chunk: tuple[PyTree, Array]) -> tuple[Float[Array, "P P"], None]:
        def rows_of(x: PyTree, w: Array) -> Float[Array, "r P"]:
            single = Batch(jax.tree.map(lambda leaf: leaf[None], x), None, w[None])
            return map_rows(lambda row: ravel_pytree(row)[0], outputs, likelihood, phi, single, whole)

        rows = jax.vmap(rows_of)(*chunk).reshape(-1, flat.size)
        return total + rows.T @ rows, None

    chunks = (jax.tree.map(cut, batch.x), cut(weight, False))
    h = jax.lax.scan(add, jnp.zeros((flat.size, flat.size), flat.dtype), chunks)[0]
    values, vectors = jnp.linalg.eigh(h)
    values = jnp.maximum(values, 0)
    return Primal(whole, jax.vmap(build)(jnp.sqrt(values)[:, None] * vectors.T), values)


def by_size(
    outputs: Outputs,
    likelihood: Likelihood,
    phi: PyTree,
    batch: Batch,
    scale: PyTree,
    key: PRNGKeyArray | None = None,
) -> Dual | Primal:
    """The exact curvature by its cheaper form: `dual` up to 512 rows n r, `primal` for more and up to 2,048 parameters.

    The rows are those of the likelihood's root: an example of regression has one a target, one of classes one a class.

    Raises:
        ValueError: more than 4,096 rows under a batch norm or with more parameters: nothing exact is feasible.
    """
    f = jax.eval_shape(outputs, phi, batch.x)
    rows = f.shape[0] * jax.eval_shape(likelihood.hessian_root, f).shape[-1]
    if rows <= FEW_ROWS:
        return dual(outputs, likelihood, phi, batch, scale, key)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(phi))
    if parameters <= MOST_PARAMETERS and one_by_one(outputs, phi, batch.x):
        return primal(outputs, likelihood, phi, batch, scale, key)
    if rows > MOST_ROWS:
        raise ValueError(
            f"posterior: {rows} rows of a support and {parameters} parameters (or a batch norm) have no feasible exact "
            f"curvature (at most {MOST_ROWS} rows, or {MOST_PARAMETERS} parameters); show fewer rows, or give laplace "
            "a curvature of 'kfac', 'diagonal' or 'lanczos', which approximate it."
        )
    return dual(outputs, likelihood, phi, batch, scale, key)
