"""Exact Gauss-Newton curvature in the dual, by the n r x n r matrix R R' of the whitened rows.

Time is n r vector-Jacobian products and (n r)^3, and memory is n r P. For few-shot supports (n r = 5 to 400) there is
no approximation besides Gauss-Newton. For large supports use `lanczos`, `kfac` or `diagonal`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.types import Batch
from metaprior.inference.curvature.rows import Outputs, against, as_scale, inner, map_rows, scaled
from metaprior.inference.curvature.spectral import SpectralGaussian, Spectrum, around, laplace_spectrum


class Dual(NamedTuple):
    """The whitened rows and their Gram matrix.

    Attributes:
        scale: The prior's scale S, shaped as phi.
        rows: The whitened rows R (leaves [n r, ...]).
        gram: R R' [n r, n r].
    """

    scale: PyTree
    rows: PyTree
    gram: Float[Array, "nr nr"]

    def log_det(self) -> Scalar:
        """Computes log det(I + S H S) by Cholesky, whose derivative is safe if eigenvalues repeat."""
        return 2 * jnp.log(jnp.diagonal(self._root())).sum()

    def _root(self) -> Float[Array, "nr nr"]:
        return jnp.linalg.cholesky(jnp.eye(self.gram.shape[0], dtype=self.gram.dtype) + self.gram)

    def gaussian(self, mean: PyTree, spectrum: Spectrum, temperature: float | Array = 1.0) -> SpectralGaussian:
        """Returns N(mean, temperature S s(S H S) S). It is not differentiable if eigenvalues of the Gram matrix repeat.

        Args:
            mean: The mean of phi.
            spectrum: The function s.
            temperature: Factor of the covariance.
        """
        values, vectors = jnp.linalg.eigh(self.gram)
        turned = jax.tree.map(lambda leaf: jnp.tensordot(vectors.T, leaf, axes=1), self.rows)
        return around(mean, self.scale, turned, jnp.maximum(values, 0), spectrum, temperature)

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws from N(0, S (I + S H S)^-1 S).

        Args:
            key: Random key.
        """
        return self.gaussian(jax.tree.map(jnp.zeros_like, self.scale), laplace_spectrum).sample(key)

    def quadratic(self, row: PyTree) -> Scalar:
        """Computes row S (I + S H S)^-1 S row'. It is differentiable.

        Args:
            row: A row, shaped as phi.
        """
        white = scaled(self.scale, row)
        learned = jax.scipy.linalg.solve_triangular(self._root(), against(self.rows, white), lower=True)
        return inner(white, white) - learned @ learned


def dual(
    outputs: Outputs,
    likelihood: Likelihood,
    phi: PyTree,
    batch: Batch,
    scale: PyTree,
    key: PRNGKeyArray | None = None,
) -> Dual:
    """Computes the exact Gauss-Newton curvature of the batch's summed nll at phi.

    Args:
        outputs: Function (phi, x) -> outputs [n, c].
        likelihood: The likelihood.
        phi: The point of the curvature.
        batch: The n examples.
        scale: The prior's scale S, a scalar or shaped as phi.
        key: Not used.
    """
    whole = as_scale(scale, phi)
    rows = map_rows(lambda row: row, outputs, likelihood, phi, batch, whole)
    return Dual(whole, rows, gram_of(rows))


def gram_of(rows: PyTree) -> Float[Array, "r r"]:
    """Computes the inner products of all pairs of rows.

    Args:
        rows: The rows (leaves [r, ...]).
    """
    leaves = jax.tree.leaves(rows)
    return jnp.asarray(sum(jnp.tensordot(leaf, leaf, (tuple(range(1, leaf.ndim)),) * 2) for leaf in leaves))
