"""Diagonal Gaussians over pytrees, and the three numbers of a pair of them that Bayesian meta-learning needs.

Every function is a sum over leaves, so a layer's part never needs another layer's: a network may be cut anywhere.
"""

from math import e, log, pi
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar


class DiagonalGaussian(NamedTuple):
    """N(mean, exp(2 log_sd)), one independent normal a number; both pytrees of the same shape."""

    mean: PyTree
    log_sd: PyTree

    def sample(self, key: PRNGKeyArray, sign: Scalar | float = 1.0) -> PyTree:
        """One reparametrised draw: mean + sign sd noise; sign -1 is the draw of the same key mirrored at the mean."""
        leaves, treedef = jax.tree.flatten(self.mean)
        keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))
        return jax.tree.map(
            lambda k, m, s: m + sign * jnp.exp(s) * jax.random.normal(k, m.shape, m.dtype), keys, self.mean, self.log_sd
        )

    def quadratic(self, row: PyTree) -> Scalar:
        """row C row' for a row shaped as the mean."""
        return _total(jax.tree.map(lambda r, s: (r**2 * jnp.exp(2 * s)).sum(), row, self.log_sd))


def around(mean: PyTree, log_sd: float | Array) -> DiagonalGaussian:
    """One log sd for every number."""
    return DiagonalGaussian(mean, jax.tree.map(lambda leaf: jnp.full_like(leaf, log_sd), mean))


def cross_entropy(q: DiagonalGaussian, p: DiagonalGaussian) -> Scalar:
    """-E_q log p = sum of log sd_p + (sd_q^2 + (mean_q - mean_p)^2) / 2 sd_p^2 + log(2 pi) / 2."""

    def leaf(m: Array, s: Array, mu: Array, sigma: Array) -> Array:
        return (sigma + 0.5 * (jnp.exp(2 * s) + (m - mu) ** 2) * jnp.exp(-2 * sigma) + 0.5 * log(2 * pi)).sum()

    return _total(jax.tree.map(leaf, *q, *p))


def entropy(q: DiagonalGaussian) -> Scalar:
    """-E_q log q."""
    return _total(jax.tree.map(lambda s: (s + 0.5 * log(2 * pi * e)).sum(), q.log_sd))


def kl(q: DiagonalGaussian, p: DiagonalGaussian) -> Scalar:
    """KL(q || p), 0 where they are the same."""

    def leaf(m: Array, s: Array, mu: Array, sigma: Array) -> Array:
        # By expm1, so that the small gap between almost equal variances is not lost in rounding.
        gap = 2 * (s - sigma)
        return 0.5 * (jnp.expm1(gap) - gap + (m - mu) ** 2 * jnp.exp(-2 * sigma)).sum()

    return _total(jax.tree.map(leaf, *q, *p))


def _total(tree: PyTree) -> Scalar:
    return jnp.asarray(sum(jax.tree.leaves(tree)))
