"""Exact answers for the conjugate linear-Gaussian hierarchy, to judge approximate inference by.

    phi_j ~ N(mu, Sigma),   y_j = X_j phi_j + e_j,   e_j ~ N(0, s^2 I)

Posterior, predictive and marginal likelihood are in closed form (Gelman & Hill 2007, ch. 12-13; Bishop 2006, eqs.
3.49-3.59), and so is the empirical-Bayes estimate of mu. Sigma and s^2 are estimated by EM (Dempster, Laird & Rubin
1977). All functions compute in the type of their arguments: call them under `jax.enable_x64()` for float64.
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
    """A multivariate normal distribution.

    Attributes:
        mean: Its mean.
        covariance: Its covariance.
    """

    mean: Float[Array, " k"]
    covariance: Float[Array, "k k"]


def _observations(theta: Hierarchy, x: Float[Array, "n d"]) -> Normal:
    """p(y | theta) of y = X phi + e with phi integrated out."""
    # Symmetrised, as a Cholesky factorisation reads one triangle only and its gradient would not be symmetric.
    spread = x @ (theta.covariance + theta.covariance.T) @ x.T / 2
    return Normal(x @ theta.mean, spread + theta.noise**2 * jnp.eye(x.shape[0], dtype=spread.dtype))


def exact_posterior(theta: Hierarchy, batch: Batch) -> Normal:
    """Computes the exact posterior p(phi | batch, theta).

    It holds for any n, also 0, and for a singular prior covariance.

    Args:
        theta: The hierarchy's parameters.
        batch: The observations of one task, x [n, d] and y [n, 1].
    """
    marginal = _observations(theta, batch.x)
    factor = cho_factor(marginal.covariance, lower=True)
    cross = batch.x @ theta.covariance
    mean = theta.mean + cross.T @ cho_solve(factor, batch.y[:, 0] - marginal.mean)
    covariance = theta.covariance - cross.T @ cho_solve(factor, cross)
    return Normal(mean, (covariance + covariance.T) / 2)


def exact_log_marginal(theta: Hierarchy, batch: Batch) -> Scalar:
    """Computes the exact log p(y | X, theta) = log N(y; X mu, X Sigma X' + s^2 I), with all constants.

    Args:
        theta: The hierarchy's parameters.
        batch: The observations of one task, x [n, d] and y [n, 1].

    Returns:
        The log marginal likelihood in nats.
    """
    marginal = _observations(theta, batch.x)
    factor = cho_factor(marginal.covariance, lower=True)
    residual = batch.y[:, 0] - marginal.mean
    log_det = 2 * jnp.log(jnp.diagonal(factor[0])).sum()
    return -0.5 * (residual @ cho_solve(factor, residual) + log_det + residual.shape[0] * log(2 * pi))


def exact_predictive(theta: Hierarchy, support: Batch, x: Float[Array, "m d"]) -> Normal:
    """Computes the exact predictive p(y at x | support, theta), joint over the m queries, with the noise.

    Args:
        theta: The hierarchy's parameters.
        support: The observations of one task, x [n, d] and y [n, 1].
        x: The inputs of the queries.

    Returns:
        A normal distribution of m numbers.
    """
    return _observations(Hierarchy(*exact_posterior(theta, support), theta.noise), x)


def empirical_bayes_mean(theta: Hierarchy, batches: Batch) -> Float[Array, " d"]:
    """Computes the mu that maximises the tasks' marginal likelihood given Sigma and s, by generalised least squares.

    Args:
        theta: The hierarchy's parameters, of which the mean is not used.
        batches: The observations of all tasks, x [tasks, n, d] and y [tasks, n, 1].
    """

    def normal_equations(batch: Batch) -> tuple[Array, Array]:
        factor = cho_factor(_observations(theta, batch.x).covariance, lower=True)
        weighted = cho_solve(factor, batch.x)
        return weighted.T @ batch.x, weighted.T @ batch.y[:, 0]

    gram, moment = jax.tree.map(lambda leaf: leaf.sum(0), jax.vmap(normal_equations)(batches))
    return jnp.linalg.solve(gram, moment)


def em_step(theta: Hierarchy, batches: Batch) -> Hierarchy:
    """Computes one exact EM step in (mu, Sigma, s).

    A step never lowers the tasks' marginal likelihood, and its maximum is a fixed point.

    Args:
        theta: The current parameters.
        batches: The observations of all tasks, x [tasks, n, d] and y [tasks, n, 1].

    Returns:
        The next parameters.
    """
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
    """Maximises the tasks' marginal likelihood in all of theta, by EM.

    Args:
        theta: The start.
        batches: The observations of all tasks, x [tasks, n, d] and y [tasks, n, 1].
        steps: The number of EM steps.

    Returns:
        The parameters after the last step.
    """
    return jax.lax.fori_loop(0, steps, lambda _, now: em_step(now, batches), theta)
