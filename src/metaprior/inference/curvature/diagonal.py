"""The diagonal of the Gauss-Newton matrix: one number per parameter, without correlations.

Time is n r vector-Jacobian products, and memory is n r times phi.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.types import Batch
from metaprior.inference.curvature.rows import Outputs, as_scale, inner, map_rows, normal_like


class Diagonal(NamedTuple):
    """The diagonal d of S H S.

    Attributes:
        scale: The prior's scale S, shaped as phi.
        values: d, shaped as phi.
    """

    scale: PyTree
    values: PyTree

    def log_det(self) -> Scalar:
        """Computes the sum of log(1 + d)."""
        return jnp.asarray(sum(jnp.log1p(d).sum() for d in jax.tree.leaves(self.values)))

    def push(self, noise: PyTree) -> PyTree:
        """Computes S noise / sqrt(1 + d).

        Args:
            noise: A vector, shaped as phi.
        """
        return jax.tree.map(lambda s, d, e: s * e / jnp.sqrt(1 + d), self.scale, self.values, noise)

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws from N(0, S^2 / (1 + d)).

        Args:
            key: Random key.
        """
        return self.push(normal_like(key, self.scale))

    def quadratic(self, row: PyTree) -> Scalar:
        """Computes the sum of row^2 S^2 / (1 + d).

        Args:
            row: A row, shaped as phi.
        """
        pushed = self.push(row)
        return inner(pushed, pushed)


def diagonal(
    outputs: Outputs,
    likelihood: Likelihood,
    phi: PyTree,
    batch: Batch,
    scale: PyTree,
    key: PRNGKeyArray | None = None,
) -> Diagonal:
    """Computes the exact diagonal of the Gauss-Newton matrix of the batch's summed nll at phi.

    Args:
        outputs: Function (phi, x) -> outputs [n, c].
        likelihood: The likelihood.
        phi: The point of the curvature.
        batch: The n examples.
        scale: The prior's scale S, a scalar or shaped as phi.
        key: Not used.
    """
    whole = as_scale(scale, phi)
    squares = map_rows(lambda row: jax.tree.map(jnp.square, row), outputs, likelihood, phi, batch, whole)
    return Diagonal(whole, jax.tree.map(lambda leaf: leaf.sum(0), squares))
