"""The conjugate linear-Gaussian hierarchy, with everything exact: the yardstick of approximate inference.

    phi_j ~ N(mu, Sigma),   y_j = X_j phi_j + e_j,   e_j ~ N(0, s^2 I)

Posterior, predictive and marginal likelihood are in closed form (Gelman & Hill 2007, ch. 12-13; Bishop 2006, eqs.
3.49-3.59), and so is empirical Bayes in mu; Sigma and s^2 follow by EM (Dempster, Laird & Rubin 1977). All functions
run in the type of their arguments: call them under `jax.enable_x64()` for float64.
"""

from dataclasses import dataclass, field
from math import log, pi
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from metaprior.options import Count, NonNegative, checked
from metaprior.tasks.checks import DataError
from metaprior.types import Batch, Splits, Task


class Hierarchy(NamedTuple):
    """theta: the prior N(mean, covariance) of phi and the sd of the observations' noise."""

    mean: Float[Array, " d"]
    covariance: Float[Array, "d d"]
    noise: Scalar


class Normal(NamedTuple):
    """A multivariate normal distribution."""

    mean: Float[Array, " k"]
    covariance: Float[Array, "k k"]


def _observations(theta: Hierarchy, x: Float[Array, "n d"]) -> Normal:
    """p(y | theta) of y = X phi + e with phi integrated out."""
    # Symmetric in the prior's covariance too: a Cholesky factor reads one triangle, its gradient would be lopsided.
    spread = x @ (theta.covariance + theta.covariance.T) @ x.T / 2
    return Normal(x @ theta.mean, spread + theta.noise**2 * jnp.eye(x.shape[0], dtype=spread.dtype))


def exact_posterior(theta: Hierarchy, batch: Batch) -> Normal:
    """p(phi | batch, theta), exactly; x [n, d], y [n, 1]. Works for any n and for a singular prior covariance."""
    marginal = _observations(theta, batch.x)
    factor = cho_factor(marginal.covariance, lower=True)
    cross = batch.x @ theta.covariance
    mean = theta.mean + cross.T @ cho_solve(factor, batch.y[:, 0] - marginal.mean)
    covariance = theta.covariance - cross.T @ cho_solve(factor, cross)
    return Normal(mean, (covariance + covariance.T) / 2)


def exact_log_marginal(theta: Hierarchy, batch: Batch) -> Scalar:
    """log p(y | X, theta) = log N(y; X mu, X Sigma X' + s^2 I), phi integrated out, all constants kept."""
    marginal = _observations(theta, batch.x)
    factor = cho_factor(marginal.covariance, lower=True)
    residual = batch.y[:, 0] - marginal.mean
    log_det = 2 * jnp.log(jnp.diagonal(factor[0])).sum()
    return -0.5 * (residual @ cho_solve(factor, residual) + log_det + residual.shape[0] * log(2 * pi))


def exact_predictive(theta: Hierarchy, support: Batch, x: Float[Array, "m d"]) -> Normal:
    """p(y at x | support, theta): jointly normal over the m queries, noise included."""
    return _observations(Hierarchy(*exact_posterior(theta, support), theta.noise), x)


def empirical_bayes_mean(theta: Hierarchy, batches: Batch) -> Float[Array, " d"]:
    """The mu that maximises the tasks' marginal likelihood, given Sigma and s: generalised least squares.

    batches: x [tasks, n, d], y [tasks, n, 1].
    """

    def normal_equations(batch: Batch) -> tuple[Array, Array]:
        factor = cho_factor(_observations(theta, batch.x).covariance, lower=True)
        weighted = cho_solve(factor, batch.x)
        return weighted.T @ batch.x, weighted.T @ batch.y[:, 0]

    gram, moment = jax.tree.map(lambda leaf: leaf.sum(0), jax.vmap(normal_equations)(batches))
    return jnp.linalg.solve(gram, moment)


def em_step(theta: Hierarchy, batches: Batch) -> Hierarchy:
    """One exact EM step in (mu, Sigma, s); never lowers the tasks' marginal likelihood, and fixed at its optimum."""
    posteriors = jax.vmap(exact_posterior, in_axes=(None, 0))(theta, batches)
    mean = posteriors.mean.mean(0)
    centred = posteriors.mean - mean
    covariance = (posteriors.covariance + centred[:, :, None] * centred[:, None, :]).mean(0)

    def squared_error(posterior: Normal, batch: Batch) -> Scalar:
        residual = batch.y[:, 0] - batch.x @ posterior.mean
        return residual @ residual + jnp.sum((batch.x @ posterior.covariance) * batch.x)

    error = jax.vmap(squared_error)(posteriors, batches).sum()
    return Hierarchy(mean, covariance, jnp.sqrt(error / batches.y[..., 0].size))


def empirical_bayes(theta: Hierarchy, batches: Batch, steps: int = 1000) -> Hierarchy:
    """The maximum of the tasks' marginal likelihood in all of theta, by `steps` of EM from the given start."""
    return jax.lax.fori_loop(0, steps, lambda _, now: em_step(now, batches), theta)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearGaussianTasks:
    """Tasks of the hierarchy with standard normal inputs: x [n, d], y [n, 1]. `theta` is the truth."""

    theta: Hierarchy
    shot: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    bias: bool = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n tasks: support [n, shot, d], [n, shot, 1] and query [n, query, d], [n, query, 1]."""
        key_phi, key_x, key_noise = jax.random.split(jax.random.fold_in(key, self.stream), 3)
        mean, covariance, noise = self.theta
        # By the eigenvalues, so that a singular covariance (a shared slope, say) is as good as any other.
        values, vectors = jnp.linalg.eigh(covariance)
        root = vectors * jnp.sqrt(jnp.maximum(values, 0))
        phi = mean + jax.random.normal(key_phi, (n, mean.shape[0]), mean.dtype) @ root.T
        points = self.shot + self.query
        x = jax.random.normal(key_x, (n, points, mean.shape[0]), mean.dtype)
        if self.bias:
            x = x.at[..., 0].set(1)
        y = jnp.einsum("npd,nd->np", x, phi) + noise * jax.random.normal(key_noise, (n, points), mean.dtype)
        y = y[..., None]
        k = self.shot
        return Task(Batch(x[:, :k], y[:, :k]), Batch(x[:, k:], y[:, k:]))


@checked
def linear_gaussian(
    *,
    features: Count = 2,
    shot: Count = 5,
    query: Count = 10,
    test_query: Count = 100,
    mean: Any = 1.0,
    covariance: Any = 1.0,
    noise: NonNegative = 0.5,
    bias: bool = False,
) -> Splits:
    """Tasks of the conjugate linear-Gaussian hierarchy with standard normal inputs; exact answers are in this file.

    Args:
        features: d, the length of phi.
        mean: of phi, a number or [d]. covariance: of phi, a number, variances [d], or a matrix [d, d].
        noise: sd of the observations' noise, above 0.
        bias: whether the first input is the constant 1.

    Raises:
        ValueError: shapes that do not fit, a covariance that is not positive semidefinite, a noise not above 0.
    """
    d = features
    if not (np.isfinite(noise) and noise > 0):
        raise ValueError(f"noise: came {noise!r}, needs a finite number above 0")
    theta = Hierarchy(
        jnp.asarray(_broadcast("mean", mean, (d,)), float), jnp.asarray(_matrix(covariance, d), float),
        jnp.asarray(noise, float),
    )  # fmt: skip
    sizes = [query] + 2 * [test_query]
    return Splits(*(LinearGaussianTasks(theta, shot, size, bias, stream) for stream, size in enumerate(sizes)))


def _broadcast(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(value, float)
    if array.shape not in ((), shape) or not np.isfinite(array).all():
        raise DataError(f"{name}: came shape {array.shape}, needs a finite number or an array of shape {shape}")
    return np.broadcast_to(array, shape)


def _matrix(covariance: Any, d: int) -> np.ndarray:
    array = np.asarray(covariance, float)
    if array.ndim < 2:
        return np.diag(_nonnegative(_broadcast("covariance", array, (d,))))
    array = _broadcast("covariance", array, (d, d))
    if not np.allclose(array, array.T):
        raise DataError("covariance: came a matrix that is not symmetric, needs a covariance matrix")
    _nonnegative(np.linalg.eigvalsh(array))
    return array


def _nonnegative(variances: np.ndarray) -> np.ndarray:
    if variances.min() < -1e-10:
        raise DataError(f"covariance: came a least eigenvalue of {variances.min():.3g}, needs none below 0")
    return variances
