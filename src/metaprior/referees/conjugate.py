"""The conjugate linear-Gaussian hierarchy, exactly: the yardstick of approximate inference.

    phi_j ~ N(mu, Sigma),   y_j = X_j phi_j + e_j,   e_j ~ N(0, s^2 I)

Posterior, predictive and marginal likelihood are in closed form (Gelman & Hill 2007, ch. 12-13; Bishop 2006, eqs.
3.49-3.59), and so is empirical Bayes in mu; Sigma and s^2 follow by EM (Dempster, Laird & Rubin 1977). All functions
run in the type of their arguments: call them under `jax.enable_x64()` for float64.
"""

from math import log, pi
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float, Scalar

from metaprior.core.types import Batch
from metaprior.tasks.synthetic.linear_gaussian import Hierarchy


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
