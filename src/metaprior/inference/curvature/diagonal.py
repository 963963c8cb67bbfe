"""The diagonal of the Gauss-Newton matrix: one number a parameter, every correlation left out.

Time n r vector-Jacobian products, memory n r times phi.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.types import Batch
from metaprior.inference.curvature.rows import Outputs, as_scale, inner, map_rows, normal_like


class Diagonal(NamedTuple):
    """The diagonal of S H S, shaped as phi."""

    scale: PyTree
    values: PyTree

    def log_det(self) -> Scalar:
        """sum log(1 + d)."""
        return jnp.asarray(sum(jnp.log1p(d).sum() for d in jax.tree.leaves(self.values)))

    def push(self, noise: PyTree) -> PyTree:
        """S noise / sqrt(1 + d)."""
        return jax.tree.map(lambda s, d, e: s * e / jnp.sqrt(1 + d), self.scale, self.values, noise)

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """A draw from N(0, S^2 / (1 + d))."""
        return self.push(normal_like(key, self.scale))

    def quadratic(self, row: PyTree) -> Scalar:
        """sum row^2 S^2 / (1 + d)."""
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
    """The exact diagonal of the Gauss-Newton matrix of the batch's summed nll at phi. `key` is not used."""
    whole = as_scale(scale, phi)
    squares = map_rows(lambda row: jax.tree.map(jnp.square, row), outputs, likelihood, phi, batch, whole)
    return Diagonal(whole, jax.tree.map(lambda leaf: leaf.sum(0), squares))
