"""Exact Gauss-Newton curvature in the primal, for many rows and few parameters, and the choice between primal and dual.

S H S [P, P] is summed over examples and decomposed once. Time is n r P^2 + P^3, and memory is P^2 for any number of
rows.
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

FEW_ROWS = 512  # up to this many rows n r the dual is used
MOST_ROWS = 4096  # with more rows the dual takes minutes
MOST_PARAMETERS = 2048  # up to this many parameters S H S is formed
EXAMPLES = 128  # number of examples whose rows are in memory at the same time


class Primal(NamedTuple):
    """The eigendecomposition of S H S.

    Attributes:
        scale: The prior's scale S, shaped as phi.
        rows: Eigenvectors (leaves [P, ...]), each with the square root of its eigenvalue as length.
        values: Eigenvalues [P].
    """

    scale: PyTree
    rows: PyTree
    values: Float[Array, " P"]

    def log_det(self) -> Scalar:
        """Computes log det(I + S H S)."""
        return jnp.log1p(self.values).sum()

    def gaussian(self, mean: PyTree, spectrum: Spectrum, temperature: float | Array = 1.0) -> SpectralGaussian:
        """Returns N(mean, temperature S s(S H S) S).

        Args:
            mean: The mean of phi.
            spectrum: The function s.
            temperature: Factor of the covariance.
        """
        return around(mean, self.scale, self.rows, self.values, spectrum, temperature)

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws from N(0, S (I + S H S)^-1 S).

        Args:
            key: Random key.
        """
        return self.gaussian(jax.tree.map(jnp.zeros_like, self.scale), laplace_spectrum).sample(key)

    def quadratic(self, row: PyTree) -> Scalar:
        """Computes row S (I + S H S)^-1 S row'.

        Args:
            row: A row, shaped as phi.
        """
        return self.gaussian(jax.tree.map(jnp.zeros_like, self.scale), laplace_spectrum).quadratic(row)


def primal(
    outputs: Outputs,
    likelihood: Likelihood,
    phi: PyTree,
    batch: Batch,
    scale: PyTree,
    key: PRNGKeyArray | None = None,
) -> Primal:
    """Computes the exact Gauss-Newton curvature of the batch's summed nll.

    The network must treat examples one by one (no batch norm).

    Args:
        outputs: Function (phi, x) -> outputs [n, c].
        likelihood: The likelihood.
        phi: The point of the curvature.
        batch: The n examples.
        scale: The prior's scale S, a scalar or shaped as phi.
        key: Not used.
    """
    whole = as_scale(scale, phi)
    flat, build = ravel_pytree(whole)

    n = examples(batch)
    weight = jnp.ones(n, flat.dtype) if batch.weight is None else batch.weight
    fill = -n % EXAMPLES

    def cut(leaf: Array, repeat: bool = True) -> Array:
        """Divides examples into chunks. The last chunk is filled with copies of the first example, at weight 0."""
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
    """Computes the exact curvature in its cheaper form.

    That is `dual` up to 512 rows n r, and `primal` for more rows and up to 2,048 parameters. An example has one row per
    target in regression, and one per class in classification.

    Args:
        outputs: Function (phi, x) -> outputs [n, c].
        likelihood: The likelihood.
        phi: The point of the curvature.
        batch: The n examples.
        scale: The prior's scale S, a scalar or shaped as phi.
        key: Not used.

    Raises:
        ValueError: There are more than 4,096 rows, and a batch norm or more than 2,048 parameters, so that no exact
            form is feasible.
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
            f"posterior must have at most {MOST_ROWS} rows, or {MOST_PARAMETERS} parameters without a batch norm, for "
            f"an exact curvature, got {rows} rows of a support and {parameters} parameters. Use fewer rows, or "
            "laplace with curvature='kfac', 'diagonal' or 'lanczos', which approximate it."
        )
    return dual(outputs, likelihood, phi, batch, scale, key)
