"""A Gaussian around phi whose covariance is a function of the support's curvature: S s(S H S) S.

S H S = V' V with few rows V, so s(S H S) = s(0) I + V' diag((s(l) - s(0)) / l) V. No P x P matrix is formed. Because
(s(l) - s(0)) / l is finite at l = 0, no eigenvector is divided by a small eigenvalue.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.inference.curvature.rows import against, combine, inner, normal_like, safe_sqrt, scaled

# l [r] -> s(0), (s(l) - s(0)) / l [r], and whether no prior explains the steps [r]
Spectrum = Callable[[Float[Array, " r"]], tuple[Scalar, Float[Array, " r"], Bool[Array, " r"]]]


def laplace_spectrum(
    values: Float[Array, " r"], precision: float | Array = 1.0
) -> tuple[Scalar, Float[Array, " r"], Bool[Array, " r"]]:
    """Computes s(l) = 1 / (precision + l), the spectrum for the prior N(., S^2 / precision).

    Args:
        values: Eigenvalues l [r].
        precision: The prior's precision in units of S^-2.

    Returns:
        s(0), (s(l) - s(0)) / l [r], and False [r].
    """
    tau = jnp.asarray(precision, values.dtype)
    return 1 / tau, -1 / (tau * (tau + values)), jnp.zeros(values.shape, bool)


def descent_spectrum(
    values: Float[Array, " r"], steps: int | Array
) -> tuple[Scalar, Float[Array, " r"], Bool[Array, " r"]]:
    """Computes s(l) = (1 - (1 - l)^k) / l, s(0) = k, the spectrum that k gradient steps imply.

    For a quadratic loss and 0 <= l < 1, steps with the preconditioner S^2 end at the mode of this posterior. Beyond
    l = 1 no prior explains them. There s = 1 / l, the likelihood alone.

    Args:
        values: Eigenvalues l [r].
        steps: Number of steps k.

    Returns:
        s(0), (s(l) - s(0)) / l [r], and whether no prior explains the steps [r].

    References:
        Santos 1996; Grant et al. 2018, sec. 3.2.
    """
    k = jnp.asarray(steps, values.dtype)
    tiny = k * values < 1e-3
    at = jnp.where(tiny, 1e-3, values)
    left = jnp.where(k > 0, jnp.exp(k * jnp.log1p(-jnp.minimum(at, 1 - jnp.finfo(at.dtype).eps))), 1)  # (1 - l)^k
    s = jnp.where((at >= 1) & (k > 0), 1 / at, (1 - left) / at)
    # s(l) = sum_j binom(k, j + 1) (-l)^j: four terms are exact to 1e-12 where the closed form would lose digits.
    terms = [-k * (k - 1) / 2]
    for j in range(2, 5):
        terms.append(-terms[-1] * (k - j) / (j + 1))
    series = terms[0] + values * (terms[1] + values * (terms[2] + values * terms[3]))
    return k, jnp.where(tiny, series, (s - k) / at), values > 1


class SpectralGaussian(NamedTuple):
    """N(mean, S s(S H S) S).

    Attributes:
        mean: The mean of phi.
        scale: S, shaped as phi.
        rows: Eigenvectors of S H S (leaves [r, ...]), each with the square root of its eigenvalue as length. These are
            r P numbers, e.g. 25 times phi for 5-way 1-shot.
        values: Eigenvalues l of S H S [r].
        drop: (s(l) - s(0)) / l [r].
        flat: s(0), the variance in units of S^2 in directions without information from the support.
        overshot: Whether no prior explains the inner steps [r].
    """

    mean: PyTree
    scale: PyTree
    rows: PyTree
    values: Float[Array, " r"]
    drop: Float[Array, " r"]
    flat: Scalar
    overshot: Bool[Array, " r"]

    @property
    def clipped(self) -> Scalar:
        """The fraction of directions in which the steps overshoot (l > 1 for plain descent, see `descent_spectrum`).

        Directions without information from the data do not count: their eigenvalues are rounding errors.
        """
        floor = self.values.max(-1, keepdims=True) * 1e-6
        return self.overshot.sum(-1) / jnp.maximum((self.values > floor).sum(-1), 1)

    def _root(self, white: PyTree) -> PyTree:
        """Multiplies a vector by the symmetric matrix s(S H S)^(1/2)."""
        flat = safe_sqrt(self.flat)
        spectral = safe_sqrt(self.flat + self.values * self.drop)
        total = jnp.where(self.flat > 0, spectral + flat, 1)
        move = combine(self.drop / total * against(self.rows, white), self.rows)
        return jax.tree.map(lambda e, m: flat * e + m, white, move)

    def push(self, noise: PyTree) -> PyTree:
        """Computes C^(1/2) noise = S s(S H S)^(1/2) noise, without the mean.

        Args:
            noise: A vector, shaped as phi.
        """
        return scaled(self.scale, self._root(noise))

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws one phi.

        Args:
            key: Random key.
        """
        return jax.tree.map(jnp.add, self.mean, self.push(normal_like(key, self.mean)))

    def quadratic(self, row: PyTree) -> Scalar:
        """Computes row C row', where C is the covariance.

        Args:
            row: A row, shaped as phi.
        """
        # Computed as a squared length: the difference s(0) |white|^2 - ... would lose all digits near the support.
        pushed = self._root(scaled(self.scale, row))
        return inner(pushed, pushed)

    def log_det(self) -> Scalar:
        """Computes log det of the covariance. It is -inf if a parameter's scale is 0, so that it does not move."""
        leaves = jax.tree.leaves(self.scale)
        prior = sum(2 * jnp.log(s).sum() for s in leaves) + sum(s.size for s in leaves) * jnp.log(self.flat)
        return prior + jnp.log1p(self.values * self.drop / self.flat).sum()


def around(
    mean: PyTree,
    scale: PyTree,
    rows: PyTree,
    values: Float[Array, " r"],
    spectrum: Spectrum,
    temperature: float | Array = 1.0,
) -> SpectralGaussian:
    """Makes a SpectralGaussian from the eigenvectors.

    Args:
        mean: The mean of phi.
        scale: S, shaped as phi.
        rows: Eigenvectors of S H S (leaves [r, ...]), each with the square root of its eigenvalue as length.
        values: Eigenvalues [r].
        spectrum: The function s.
        temperature: Factor of the covariance.
    """
    flat, drop, overshot = spectrum(values)
    return SpectralGaussian(mean, scale, rows, values, temperature * drop, temperature * flat, overshot)
