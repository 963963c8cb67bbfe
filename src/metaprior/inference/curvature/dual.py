"""Exact Gauss-Newton curvature in the dual: everything follows from the n r x n r matrix R R' of the whitened rows.

Time n r vector-Jacobian products and (n r)^3; memory n r P. For few-shot supports (n r = 5 to 400) nothing is
approximated beyond Gauss-Newton itself; for large ones take `lanczos`, `kfac` or `diagonal`.
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
    """The whitened rows R (leaves [n r, ...]) and their Gram matrix R R'."""

    scale: PyTree
    rows: PyTree
    gram: Float[Array, "nr nr"]

    def log_det(self) -> Scalar:
        """log det(I + S H S), by Cholesky: its derivative needs no eigenvectors, so repeated eigenvalues are safe."""
        return 2 * jnp.log(jnp.diagonal(self._root())).sum()

    def _root(self) -> Float[Array, "nr nr"]:
        return jnp.linalg.cholesky(jnp.eye(self.gram.shape[0], dtype=self.gram.dtype) + self.gram)

    def gaussian(self, mean: PyTree, spectrum: Spectrum, temperature: float | Array = 1.0) -> SpectralGaussian:
        """N(mean, temperature S s(S H S) S). Not to be differentiated where eigenvalues of the Gram matrix repeat."""
        values, vectors = jnp.linalg.eigh(self.gram)
        turned = jax.tree.map(lambda leaf: jnp.tensordot(vectors.T, leaf, axes=1), self.rows)
        return around(mean, self.scale, turned, jnp.maximum(values, 0), spectrum, temperature)

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """A draw from N(0, S (I + S H S)^-1 S)."""
        return self.gaussian(jax.tree.map(jnp.zeros_like, self.scale), laplace_spectrum).sample(key)

    def quadratic(self, row: PyTree) -> Scalar:
        """row S (I + S H S)^-1 S row', differentiable."""
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
    """The exact Gauss-Newton curvature of the batch's summed nll at phi. `key` is not used."""
    whole = as_scale(scale, phi)
    rows = map_rows(lambda row: row, outputs, likelihood, phi, batch, whole)
    return Dual(whole, rows, gram_of(rows))


def gram_of(rows: PyTree) -> Float[Array, "r r"]:
    """Inner products of all pairs of rows."""
    leaves = jax.tree.leaves(rows)
    return jnp.asarray(sum(jnp.tensordot(leaf, leaf, (tuple(range(1, leaf.ndim)),) * 2) for leaf in leaves))
