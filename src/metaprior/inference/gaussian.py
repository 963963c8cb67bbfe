"""Diagonal Gaussians over pytrees, with their entropy, cross entropy and KL divergence.

Every function is a sum over leaves, so it can be computed separately for parts of a network.
"""

from math import e, log, pi
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar


class DiagonalGaussian(NamedTuple):
    """N(mean, exp(2 log_sd)), an independent normal distribution for each number.

    Attributes:
        mean: The means, a pytree.
        log_sd: Logarithms of the standard deviations, shaped as the mean.
    """

    mean: PyTree
    log_sd: PyTree

    def sample(self, key: PRNGKeyArray, sign: Scalar | float = 1.0) -> PyTree:
        """Draws mean + sign sd noise, reparametrised.

        Args:
            key: Random key for the noise.
            sign: 1, or -1 for the draw with the same key mirrored at the mean.
        """
        leaves, treedef = jax.tree.flatten(self.mean)
        keys = jax.tree.unflatten(treedef, list(jax.random.split(key, len(leaves))))
        return jax.tree.map(
            lambda k, m, s: m + sign * jnp.exp(s) * jax.random.normal(k, m.shape, m.dtype), keys, self.mean, self.log_sd
        )

    def quadratic(self, row: PyTree) -> Scalar:
        """Computes row C row', where C is the covariance.

        Args:
            row: A row, shaped as the mean.
        """
        return _total(jax.tree.map(lambda r, s: (r**2 * jnp.exp(2 * s)).sum(), row, self.log_sd))


def around(mean: PyTree, log_sd: float | Array) -> DiagonalGaussian:
    """Returns a Gaussian with the same log sd for every number.

    Args:
        mean: The means, a pytree.
        log_sd: Logarithm of the standard deviation.
    """
    return DiagonalGaussian(mean, jax.tree.map(lambda leaf: jnp.full_like(leaf, log_sd), mean))


def cross_entropy(q: DiagonalGaussian, p: DiagonalGaussian) -> Scalar:
    """Computes -E_q log p = sum of log sd_p + (sd_q^2 + (mean_q - mean_p)^2) / (2 sd_p^2) + log(2 pi) / 2.

    Args:
        q: A Gaussian.
        p: A Gaussian over the same pytree.
    """

    def leaf(m: Array, s: Array, mu: Array, sigma: Array) -> Array:
        return (sigma + 0.5 * (jnp.exp(2 * s) + (m - mu) ** 2) * jnp.exp(-2 * sigma) + 0.5 * log(2 * pi)).sum()

    return _total(jax.tree.map(leaf, *q, *p))


def entropy(q: DiagonalGaussian) -> Scalar:
    """Computes -E_q log q.

    Args:
        q: A Gaussian.
    """
    return _total(jax.tree.map(lambda s: (s + 0.5 * log(2 * pi * e)).sum(), q.log_sd))


def kl(q: DiagonalGaussian, p: DiagonalGaussian) -> Scalar:
    """Computes KL(q || p).

    Args:
        q: A Gaussian.
        p: A Gaussian over the same pytree.
    """

    def leaf(m: Array, s: Array, mu: Array, sigma: Array) -> Array:
        # Uses expm1, so that a small difference of almost equal variances is not lost in rounding.
        gap = 2 * (s - sigma)
        return 0.5 * (jnp.expm1(gap) - gap + (m - mu) ** 2 * jnp.exp(-2 * sigma)).sum()

    return _total(jax.tree.map(leaf, *q, *p))


def _total(tree: PyTree) -> Scalar:
    return jnp.asarray(sum(jax.tree.leaves(tree)))
