"""A Gaussian around phi whose covariance is a function of the support's curvature: S s(S H S) S.

S H S = V' V with few rows V, so s(S H S) = s(0) I + V' diag((s(l) - s(0)) / l) V: nothing P x P is formed, and as
(s(l) - s(0)) / l stays finite at l = 0, no eigenvector is ever divided by a small eigenvalue.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.inference.curvature.rows import against, combine, inner, normal_like, safe_sqrt, scaled

# l [r] -> s(0), (s(l) - s(0)) / l [r], where no prior explains the steps [r]
Spectrum = Callable[[Float[Array, " r"]], tuple[Scalar, Float[Array, " r"], Bool[Array, " r"]]]


def laplace_spectrum(
    values: Float[Array, " r"], precision: float | Array = 1.0
) -> tuple[Scalar, Float[Array, " r"], Bool[Array, " r"]]:
    """s(l) = 1 / (precision + l): the posterior of the prior N(., S^2 / precision)."""
    tau = jnp.asarray(precision, values.dtype)
    return 1 / tau, -1 / (tau * (tau + values)), jnp.zeros(values.shape, bool)


def descent_spectrum(
    values: Float[Array, " r"], steps: int | Array
) -> tuple[Scalar, Float[Array, " r"], Bool[Array, " r"]]:
    """s(l) = (1 - (1 - l)^k) / l, s(0) = k: the posterior that k gradient steps with preconditioner S^2 imply.

    For a quadratic loss and 0 <= l < 1 those steps end at the mode of that posterior (Santos 1996; Grant et al. 2018,
    sec. 3.2). Beyond l = 1 no prior explains them: there s = 1 / l, the likelihood alone.
    """
    k = jnp.asarray(steps, values.dtype)
    tiny = k * values < 1e-3
    at = jnp.where(tiny, 1e-3, values)
    left = jnp.where(k > 0, jnp.exp(k * jnp.log1p(-jnp.minimum(at, 1 - jnp.finfo(at.dtype).eps))), 1)  # (1 - l)^k
    s = jnp.where((at >= 1) & (k > 0), 1 / at, (1 - left) / at)
    # s(l) = sum_j binom(k, j + 1) (-l)^j: four terms are exact to 1e-12 where the closed form would cancel.
    terms = [-k * (k - 1) / 2]
    for j in range(2, 5):
        terms.append(-terms[-1] * (k - j) / (j + 1))
    series = terms[0] + values * (terms[1] + values * (terms[2] + values * terms[3]))
    return k, jnp.where(tiny, series, (s - k) / at), values > 1


class SpectralGaussian(NamedTuple):
    """N(mean, S s(S H S) S). `rows` has leaves [r, ...]: r P numbers, e.g. 25 times phi for 5-way 1-shot.

    rows: the eigenvectors of S H S, each as long as the square root of its eigenvalue. drop: (s(l) - s(0)) / l, and
    `flat`: s(0), the variance in units of S^2 of the directions that the support says nothing about. overshot: where no
    prior explains the inner steps.
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
        """The share of directions where the steps overshoot (l > 1 of plain descent, see `descent_spectrum`).

        Among those directions that the data say anything about: eigenvalues of float noise do not count.
        """
        floor = self.values.max(-1, keepdims=True) * 1e-6
        return self.overshot.sum(-1) / jnp.maximum((self.values > floor).sum(-1), 1)

    def _root(self, white: PyTree) -> PyTree:
        """s(S H S)^(1/2), a symmetric matrix, times a vector."""
        flat = safe_sqrt(self.flat)
        spectral = safe_sqrt(self.flat + self.values * self.drop)
        total = jnp.where(self.flat > 0, spectral + flat, 1)
        move = combine(self.drop / total * against(self.rows, white), self.rows)
        return jax.tree.map(lambda e, m: flat * e + m, white, move)

    def push(self, noise: PyTree) -> PyTree:
        """C^(1/2) noise = S s(S H S)^(1/2) noise, without the mean."""
        return scaled(self.scale, self._root(noise))

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """One draw of phi."""
        return jax.tree.map(jnp.add, self.mean, self.push(normal_like(key, self.mean)))

    def quadratic(self, row: PyTree) -> Scalar:
        """row C row' for a row shaped as phi."""
        # As the length of a vector: the difference s(0) |white|^2 - ... would cancel to noise near the support.
        pushed = self._root(scaled(self.scale, row))
        return inner(pushed, pushed)

    def log_det(self) -> Scalar:
        """log det of the covariance; -inf if a parameter's scale is 0 (it does not move)."""
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
    """A SpectralGaussian from eigen-rows; `temperature` multiplies its covariance."""
    flat, drop, overshot = spectrum(values)
    return SpectralGaussian(mean, scale, rows, values, temperature * drop, temperature * flat, overshot)
