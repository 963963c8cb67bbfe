"""The conjugate hierarchy against dense joint-normal algebra and against its own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

from metaprior.core.types import Batch
from metaprior.referees.conjugate import (  # fmt: skip
    em_step,
    empirical_bayes,
    empirical_bayes_mean,
    exact_log_marginal,
    exact_posterior,
    exact_predictive,
)
from metaprior.tasks.synthetic.linear_gaussian import Hierarchy, linear_gaussian

COVARIANCE = [[1.0, 0.3, 0.0], [0.3, 0.5, -0.2], [0.0, -0.2, 0.8]]


def problem(tasks=1, **options):
    source = linear_gaussian(features=3, mean=[1.0, -2.0, 0.5], covariance=COVARIANCE, **options).train
    return source.theta, source.sample(jax.random.key(4), tasks)


def one(batch):
    return jax.tree.map(lambda leaf: leaf[0], batch)


def test_golden_scalar():
    # Prior N(0, 1), unit noise, support {1}: posterior N(1/2, 1/2); log p({1, 2}) = -3.38718321.
    with jax.enable_x64():
        theta = Hierarchy(jnp.zeros(1), jnp.eye(1), jnp.asarray(1.0))
        posterior = exact_posterior(theta, Batch(jnp.ones((1, 1)), jnp.ones((1, 1))))
        np.testing.assert_allclose([posterior.mean[0], posterior.covariance[0, 0]], 0.5, rtol=1e-12)
        both = Batch(jnp.ones((2, 1)), jnp.asarray([[1.0], [2.0]]))
        np.testing.assert_allclose(exact_log_marginal(theta, both), -3.38718321, atol=1e-8)


@pytest.mark.slow
def test_posterior_is_the_textbook_precision_form():
    with jax.enable_x64():
        theta, task = problem()
        x, y = one(task.support)[:2]
        precision = jnp.linalg.inv(theta.covariance) + x.T @ x / theta.noise**2
        right = jnp.linalg.solve(theta.covariance, theta.mean) + x.T @ y[:, 0] / theta.noise**2
        posterior = exact_posterior(theta, one(task.support))
        np.testing.assert_allclose(posterior.covariance, jnp.linalg.inv(precision), atol=1e-12)
        np.testing.assert_allclose(posterior.mean, jnp.linalg.solve(precision, right), atol=1e-12)


def test_chain_rule_ties_marginal_posterior_and_predictive():
    with jax.enable_x64():
        theta, task = problem()
        support, query = one(task.support), one(task.query)
        joint = Batch(jnp.concatenate([support.x, query.x]), jnp.concatenate([support.y, query.y]))
        predictive = exact_predictive(theta, support, query.x)
        conditional = multivariate_normal.logpdf(query.y[:, 0], *predictive)
        np.testing.assert_allclose(
            exact_log_marginal(theta, joint), exact_log_marginal(theta, support) + conditional, rtol=1e-11
        )


def test_empirical_bayes_mean_is_where_the_gradient_vanishes():
    with jax.enable_x64():
        theta, task = problem(tasks=20)

        def total(mean):
            here = theta._replace(mean=mean)
            return jax.vmap(exact_log_marginal, in_axes=(None, 0))(here, task.support).sum()

        best = empirical_bayes_mean(theta, task.support)
        np.testing.assert_allclose(jax.grad(total)(best), 0, atol=1e-9)


@pytest.mark.slow
def test_em_climbs_and_recovers_the_truth():
    with jax.enable_x64():
        theta, task = problem(tasks=1500, shot=8)

        def total(now):
            return jax.vmap(exact_log_marginal, in_axes=(None, 0))(now, task.support).sum()

        now = Hierarchy(jnp.zeros(3), jnp.eye(3), jnp.asarray(1.0))
        step, total = jax.jit(em_step), jax.jit(total)
        for _ in range(4):
            after = step(now, task.support)
            assert total(after) > total(now)
            now = after
        best = jax.jit(empirical_bayes, static_argnums=2)(now, task.support, 60)
        np.testing.assert_allclose(best.mean, theta.mean, atol=0.08)
        np.testing.assert_allclose(best.covariance, theta.covariance, atol=0.08)
        np.testing.assert_allclose(best.noise, theta.noise, rtol=0.02)
        slope = jax.grad(total)(best)
        assert max(np.abs(leaf).max() for leaf in slope) < 1e-6


def test_samples_follow_the_hierarchy_with_bias_and_singular_covariance():
    source = linear_gaussian(features=2, mean=[3.0, 1.0], covariance=[1.0, 0.0], noise=0.1, bias=True).train
    task = source.sample(jax.random.key(0), 4000)
    assert (task.query.x[..., 0] == 1).all()
    phi = (np.linalg.pinv(task.query.x) @ np.asarray(task.query.y))[..., 0]
    np.testing.assert_allclose(phi.mean(0), [3, 1], atol=0.05)
    np.testing.assert_allclose(phi.std(0), [1, 0], atol=0.06)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"noise": 0.0}, "noise must be a finite number above 0, got 0.0"),
        (
            {"mean": [1.0, 2.0, 3.0]},
            r"mean must be .* a finite array of shape \(2,\), got shape \(3,\)",
        ),
        ({"covariance": [[1.0, 2.0], [2.0, 1.0]]}, "no negative eigenvalue, got -1"),
        ({"covariance": [[1.0, 0.5], [0.0, 1.0]]}, "must be symmetric"),
        ({"features": 0}, "features must be"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        linear_gaussian(**options)
