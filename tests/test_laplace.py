"""Laplace's evidence against the exact marginal likelihood of linear-Gaussian tasks, and against its wrong variants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch
from metaprior.inference.curvature import CURVATURES, dual
from metaprior.inference.evidence import negative_log_evidence


def linear(phi, x):
    return (x @ phi)[:, None]


def problem():
    kx, ky, kt = jax.random.split(jax.random.key(0), 3)
    x, y, theta = jax.random.normal(kx, (5, 3)), jax.random.normal(ky, (5,)), jax.random.normal(kt, (3,))
    scale, noise = jnp.array([0.5, 1.3, 0.8]), 0.6
    exact = -multivariate_normal.logpdf(y, x @ theta, x @ jnp.diag(scale**2) @ x.T + noise**2 * jnp.eye(5))
    precision = x.T @ x / noise**2 + jnp.diag(scale**-2)
    mode = theta + jnp.linalg.solve(precision, x.T @ (y - x @ theta) / noise**2)
    return Batch(x, y[:, None]), theta, scale, Gaussian(noise), exact, mode, precision


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_evidence_is_the_exact_marginal_likelihood():
    batch, theta, scale, likelihood, exact, mode, _ = problem()
    got = negative_log_evidence(linear, likelihood, mode, theta, batch, scale)
    np.testing.assert_allclose(got, exact, rtol=1e-12)
    anywhere = negative_log_evidence(linear, likelihood, theta, theta, batch, scale, off_mode=True)
    np.testing.assert_allclose(anywhere, exact, rtol=1e-12)
    padded = Batch(
        jnp.concatenate([batch.x, jnp.ones((2, 3))]), jnp.concatenate([batch.y, jnp.ones((2, 1))]), jnp.arange(7) < 5
    )
    padded = padded._replace(weight=padded.weight.astype(float))
    masked = negative_log_evidence(linear, likelihood, mode, theta, padded, scale)
    np.testing.assert_allclose(masked, exact, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_every_wrong_variant_differs():
    """The variants that circulate: no prior in H, no factor 1/2, a wrong sign, no prior term, a mean loss."""
    batch, theta, scale, likelihood, exact, mode, precision = problem()
    nll = likelihood.nll(linear(mode, batch.x), batch.y)
    gap = (mode - theta) / scale
    prior = 0.5 * gap @ gap + jnp.log(scale).sum()
    log_det = jnp.linalg.slogdet(precision)[1]
    np.testing.assert_allclose(nll.sum() + prior + 0.5 * log_det, exact, rtol=1e-12)
    data_only = jnp.linalg.slogdet(precision - jnp.diag(scale**-2))[1]
    averaged = jnp.linalg.slogdet((precision - jnp.diag(scale**-2)) / 5 + jnp.diag(scale**-2))[1]
    wrong = {
        "prior left out of H": nll.sum() + prior + 0.5 * data_only,
        "no factor 1/2": negative_log_evidence(linear, likelihood, mode, theta, batch, scale, weight=1.0),
        "sign": negative_log_evidence(linear, likelihood, mode, theta, batch, scale, weight=-0.5),
        "no prior term": nll.sum() + 0.5 * log_det,
        "curvature of the mean loss": nll.sum() + prior + 0.5 * averaged,
        "not at the mode": negative_log_evidence(linear, likelihood, theta, theta, batch, scale),
    }
    for name, value in wrong.items():
        assert abs(value - exact) > 0.1, name


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_its_gradient_is_that_of_the_marginal_likelihood():
    batch, theta, scale, likelihood, *_ = problem()

    def exact(theta, scale):
        covariance = batch.x @ jnp.diag(scale**2) @ batch.x.T + 0.36 * jnp.eye(5)
        return -multivariate_normal.logpdf(batch.y[:, 0], batch.x @ theta, covariance)

    def evidence(theta, scale):
        return negative_log_evidence(linear, likelihood, theta, theta, batch, scale, off_mode=True)

    for got, wanted in zip(
        jax.grad(evidence, (0, 1))(theta, scale), jax.grad(exact, (0, 1))(theta, scale), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("curvature", ["dual", "diagonal", "lanczos", dual])
@pytest.mark.slow
def test_any_curvature_serves(curvature):
    batch = Batch(jax.random.normal(jax.random.key(0), (6, 2)), jnp.arange(6) % 3)
    phi = jax.random.normal(jax.random.key(1), (2, 3))

    def evidence(scale):
        return negative_log_evidence(lambda p, x: x @ p, Categorical(), phi, 0 * phi, batch, scale, curvature=curvature)

    fit = CURVATURES.get(curvature, curvature)(lambda p, x: x @ p, Categorical(), phi, batch, 0.9)
    joint = Categorical().nll(batch.x @ phi, batch.y).sum() + 0.5 * (phi**2).sum() / 0.81
    np.testing.assert_allclose(evidence(0.9), joint + 0.5 * fit.log_det(), rtol=1e-12)
