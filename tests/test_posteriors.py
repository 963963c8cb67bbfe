"""Posteriors around phi_k against exact ones: Santos' equivalence, Bayesian linear regression, symmetries."""

from functools import partial
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Call
from metaprior.inference.curvature import CURVATURES, descent_spectrum, lanczos
from metaprior.inference.posteriors import POSTERIORS, Implied, implicit, laplace, point


def linear(phi, x):
    return x @ phi


@partial(jax.jit, static_argnames="rank")
def santos(key, rate, steps, rank):
    """GD from theta on 1/2 |y - X phi|^2 with diagonal preconditioner, and the implicit posterior it should imply."""
    kx, kv, ky, kt, kp = jax.random.split(key, 5)
    x = jax.random.normal(kx, (6, rank)) @ jax.random.normal(kv, (rank, 4))
    y, theta = jax.random.normal(ky, (6, 1)), jax.random.normal(kt, (4, 1))
    p = jax.random.uniform(kp, (4, 1), minval=0.3)
    whitened = jnp.sqrt(p) * (x.T @ x) * jnp.sqrt(p)[:, 0]
    p = p * rate / jnp.linalg.eigvalsh(whitened)[-1]  # the steepest direction has l = rate < 1
    phi = jax.lax.fori_loop(0, steps, lambda _, phi: phi - p * x.T @ (x @ phi - y), theta)
    posterior = implicit().infer(linear, Gaussian(1.0), phi, Batch(x, y), Implied(jnp.sqrt(p), steps))
    root = jax.vmap(lambda e: posterior.push(e[:, None])[:, 0])(jnp.eye(4))
    return x, y, theta, p, phi, root.T @ root, posterior


@pytest.mark.usefixtures("x64")
@settings(max_examples=60)
@given(st.integers(0, 2**30), st.floats(0.05, 0.95), st.integers(1, 10), st.integers(1, 4))
@pytest.mark.slow
def test_truncated_gradient_descent_is_the_mode_of_the_implicit_posterior(seed, rate, steps, rank):
    x, y, theta, p, phi, c, posterior = santos(jax.random.key(seed), rate, steps, rank)
    # A Gaussian posterior N(m, C) of the likelihood N(y; X phi, I) has m = theta + C X'(y - X theta).
    np.testing.assert_allclose(theta + c @ x.T @ (y - x @ theta), phi, atol=1e-9)
    assert posterior.clipped == 0
    h = np.asarray(x.T @ x)
    contraction = np.linalg.matrix_power(np.eye(4) - np.asarray(p) * h, steps)
    if rank == 4 and np.linalg.cond(h) < 1e4 and np.linalg.cond(contraction) < 1e6:
        # Q = ((I - P H)^-k - I) H^-1 is the prior's covariance (Grant et al. 2018, sec. 3.2), here by an inverse.
        q = (np.linalg.inv(contraction) - np.eye(4)) @ np.linalg.inv(h)
        np.testing.assert_allclose(c, np.linalg.inv(h + np.linalg.inv(q)), atol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_santos_golden():
    # h = 2, rate 0.1, k = 3, phi_0 = 1, phi* = 3: phi_3 = 1.976 and the prior's variance is 0.4765625.
    batch = Batch(jnp.array([[2.0**0.5]]), jnp.array([[3 * 2.0**0.5]]))
    implied = Implied(jnp.full((1, 1), 0.1**0.5), 3)
    posterior = implicit().infer(linear, Gaussian(1.0), jnp.array([[1.976]]), batch, implied)
    variance = posterior.quadratic(jnp.ones((1, 1)))
    np.testing.assert_allclose(1 / (1 / variance - 2), 0.4765625, rtol=1e-12)
    np.testing.assert_allclose(variance * (2 * 3 + 1 / 0.4765625), 1.976, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_descent_spectrum_in_exact_arithmetic():
    for k in (0, 1, 2, 5, 40):
        values = np.array([0.0, 1e-14, 1e-9, 1e-5, 2e-5, 9.9e-4 / max(k, 1), 1.01e-3 / max(k, 1), 0.3, 0.999])
        flat, drop, _ = descent_spectrum(jnp.asarray(values), k)
        # sum_{i < k} (1 - l)^i is (1 - (1 - l)^k) / l without a division.
        s = sum((1 - values) ** i for i in range(k)) + 0 * values
        assert flat == k
        np.testing.assert_allclose(flat + values * drop, s, rtol=1e-12)
        assert drop[0] == -comb(k, 2)
    flat, drop, _ = jax.vmap(lambda k: descent_spectrum(jnp.array([1.0, 2.5]), k))(jnp.arange(3))
    np.testing.assert_allclose(flat[:, None] + jnp.array([1.0, 2.5]) * drop, [[0, 0], [1, 0.4], [1, 0.4]], rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_implicit_by_lanczos_is_the_dual_one():
    x = jax.random.normal(jax.random.key(0), (5, 4))
    arguments = linear, Gaussian(0.5), jnp.ones((4, 1)), Batch(x, jnp.zeros((5, 1))), Implied(jnp.full((4, 1), 0.3), 6)
    row = jnp.array([[1.0], [-1.0], [2.0], [0.5]])
    exact, matrix_free = (implicit(curvature=c).infer(*arguments).quadratic(row) for c in ("dual", "lanczos"))
    np.testing.assert_allclose(matrix_free, exact, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_overshooting_directions_are_clipped_and_counted():
    batch = Batch(jnp.diag(jnp.array([2.0, 1.0, 0.5])), jnp.zeros((3, 1)))
    posterior = implicit().infer(
        linear, Gaussian(1.0), jnp.zeros((3, 1)), batch, Implied(jnp.full((3, 1), 0.5**0.5), 4)
    )
    np.testing.assert_allclose(posterior.clipped, 1 / 3)  # l = 2, 0.5, 0.125
    np.testing.assert_allclose(posterior.quadratic(jnp.array([[1.0], [0], [0]])), 1 / 4, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("curvature", ["dual", partial(lanczos, order=40)])
@pytest.mark.slow
def test_laplace_is_bayesian_linear_regression(curvature):
    kx, ky = jax.random.split(jax.random.key(0))
    x, y = jax.random.normal(kx, (7, 3)), jax.random.normal(ky, (7, 2))
    precision, noise = 0.7, 0.4
    covariance = jnp.linalg.inv(x.T @ x / noise**2 + precision * jnp.eye(3))
    mode = covariance @ x.T @ y / noise**2
    at = jax.random.normal(jax.random.key(3), (5, 3))

    @jax.jit
    def run(temperature, scale):
        rule = laplace(precision, temperature, scale, curvature=curvature)
        posterior = rule.infer(linear, Gaussian(noise), mode, Batch(x, y), Implied(1.0, 1))
        return posterior, rule.predict(linear, Gaussian(noise), posterior, at, jax.random.key(0))

    posterior, predictive = run(1.0, noise)
    spread = jnp.einsum("np,pq,nq->n", at, covariance, at)[:, None]
    np.testing.assert_allclose(predictive.mean(), at @ mode, rtol=1e-10)
    np.testing.assert_allclose(predictive.variance(), jnp.broadcast_to(noise**2 + spread, (5, 2)), rtol=1e-8)
    np.testing.assert_allclose(posterior.log_det(), 2 * jnp.linalg.slogdet(covariance)[1], rtol=1e-8)
    # temperature multiplies the covariance, noise replaces the likelihood's, and both can be fitted.
    np.testing.assert_allclose(run(3.0, 0.5)[1].variance()[:, 0], 0.25 + 3 * spread[:, 0], rtol=1e-8)
    slopes = jax.grad(lambda t, s: run(t, s)[1].variance().sum(), (0, 1))(3.0, 0.5)
    np.testing.assert_allclose(slopes, (2 * spread.sum(), 10.0), rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.slow
def test_precision_and_temperature_can_be_fitted_for_a_softmax(curvature):
    """Its Gauss-Newton matrix has repeated zero eigenvalues, where eigenvectors have no derivative."""
    phi = {"layer": {"w": jnp.ones((2, 3)) / 2}, "head": {"w": jnp.arange(9.0).reshape(3, 3) / 9}}
    batch = Batch(jax.random.normal(jax.random.key(0), (4, 2)), jnp.array([0, 1, 2, 0]))

    @jax.jit
    def nll(options):
        rule = laplace(options[0], options[1], curvature=curvature)
        posterior = rule.infer(net, Categorical(), phi, batch, Implied(1.0, 1))
        return -rule.predict(net, Categorical(), posterior, batch.x, jax.random.key(0)).log_prob(batch.y).sum()

    at, e = jnp.array([0.6, 1.4]), 1e-6
    differences = [(nll(at + e * d) - nll(at - e * d)) / (2 * e) for d in jnp.eye(2)]
    np.testing.assert_allclose(jax.jit(jax.grad(nll))(at), differences, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_draws_agree_with_the_closed_form_where_the_network_is_linear():
    x = jax.random.normal(jax.random.key(0), (4, 3))
    batch, phi = Batch(x, jnp.zeros((4, 1))), jnp.ones((3, 1))
    implied = Implied(jnp.full((3, 1), 0.5), 5)
    for rule in (implicit, laplace):
        posterior = rule().infer(linear, Gaussian(0.5), phi, batch, implied)
        closed = rule().predict(linear, Gaussian(0.5), posterior, x, jax.random.key(1))
        drawn = rule(draws=4000).predict(linear, Gaussian(0.5), posterior, x, jax.random.key(1))
        assert drawn.means.shape == (4000, 4, 1)
        np.testing.assert_allclose(drawn.mean(), closed.mean(), atol=0.1)
        np.testing.assert_allclose(drawn.variance(), closed.variance(), rtol=0.12)


@pytest.mark.usefixtures("x64")
def test_imaml_explicit_prior_is_its_laplace_posterior():
    x = jax.random.normal(jax.random.key(0), (4, 3))
    batch, phi = Batch(x, jnp.zeros((4, 1))), jnp.ones((3, 1))
    implied = Implied(jnp.full((3, 1), 8.0**-0.5), 16, 8.0)
    own = implicit().infer(linear, Gaussian(0.5), phi, batch, implied)
    stated = laplace(8.0).infer(linear, Gaussian(0.5), phi, batch, implied)
    read = laplace(None).infer(linear, Gaussian(0.5), phi, batch, implied)
    row = jnp.array([[1.0], [-1.0], [2.0]])
    np.testing.assert_allclose(own.quadratic(row), stated.quadratic(row), rtol=1e-12)
    np.testing.assert_allclose(read.quadratic(row), stated.quadratic(row), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_what_all_logits_share_changes_no_softmax_predictive():
    """A parameter added to every logit has prior variance but no effect on any class probability."""
    x = jax.random.normal(jax.random.key(0), (6, 2))
    batch, w = Batch(x, jnp.arange(6) % 3), jax.random.normal(jax.random.key(1), (2, 3))
    rule = laplace(1.0)

    def shared(phi, x):
        return x @ phi["w"] + phi["shift"]

    def probabilities(outputs, phi):
        posterior = rule.infer(outputs, Categorical(), phi, batch, Implied(1.0, 1))
        return rule.predict(outputs, Categorical(), posterior, x, jax.random.key(0)).mean()

    with_shift = probabilities(shared, {"w": w, "shift": jnp.zeros(())})
    without = probabilities(lambda phi, x: x @ phi["w"], {"w": w})
    np.testing.assert_allclose(with_shift, without, rtol=1e-10)
    plain = jax.nn.softmax(x @ w)
    assert jnp.all(without.max(-1) < plain.max(-1))  # less confident than the point


@pytest.mark.slow
def test_softmax_closed_form_is_near_the_exact_mixture():
    x = jax.random.normal(jax.random.key(0), (8, 4))
    batch, phi = Batch(x, jnp.arange(8) % 3), jax.random.normal(jax.random.key(1), (4, 3))
    posterior = laplace(1.0).infer(linear, Categorical(), phi, batch, Implied(1.0, 1))
    closed = laplace().predict(linear, Categorical(), posterior, x, jax.random.key(2)).mean()
    mixed = laplace(draws=4000).predict(linear, Categorical(), posterior, x, jax.random.key(2)).mean()
    error, point_error = jnp.abs(closed - mixed).max(), jnp.abs(jax.nn.softmax(x @ phi) - mixed).max()
    assert error < 0.1
    assert error < 0.6 * point_error


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_linear_draws_have_the_closed_forms_moments():
    phi = {"layer": {"w": jnp.ones((2, 3)) / 2}, "head": {"w": jnp.arange(3.0)[:, None]}}
    x = jax.random.normal(jax.random.key(0), (4, 2))
    rule = laplace(0.2, draws=4000, linear=True)
    posterior = rule.infer(net, Gaussian(0.5), phi, Batch(x, jnp.zeros((4, 1))), Implied(1.0, 1))
    drawn = rule.predict(net, Gaussian(0.5), posterior, 3 * x, jax.random.key(1))
    closed = laplace().predict(net, Gaussian(0.5), posterior, 3 * x, jax.random.key(1))
    networks = laplace(draws=4000).predict(net, Gaussian(0.5), posterior, 3 * x, jax.random.key(1))
    np.testing.assert_allclose(drawn.variance(), closed.variance(), rtol=0.12)
    assert jnp.abs(networks.variance() / closed.variance() - 1).max() > 0.2  # tanh is not linear this far out


def net(phi, x, call=Call(lambda name, inputs, s: s)):
    h = jnp.tanh(call.tap("layer", x, x @ phi["layer"]["w"]))
    return call.tap("head", h, h @ phi["head"]["w"])


RULES = {
    "point": point(),
    "implicit": implicit(),
    "implicit lanczos": implicit(curvature="lanczos"),
    "implicit drawn": implicit(draws=3),
    "implicit linear": implicit(draws=3, linear=True),
    **{f"laplace {name}": laplace(curvature=name) for name in CURVATURES},
    **{f"laplace {name} drawn": laplace(curvature=name, draws=3) for name in CURVATURES},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_runs_compiled_over_tasks_and_one_by_one(rule):
    phi = {"layer": {"w": jnp.ones((2, 3)) / 2}, "head": {"w": jnp.arange(9.0).reshape(3, 3) / 9}}
    x = jax.random.normal(jax.random.key(0), (2, 4, 2))
    y = jnp.stack([jnp.array([0, 1, 2, 0]), jnp.array([2, 2, 1, 0])])

    def run(x, y, steps):
        implied = Implied(jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.3), phi), steps)
        posterior = rule.infer(net, Categorical(), phi, Batch(x, y), implied)
        return rule.predict(net, Categorical(), posterior, x, jax.random.key(0)).mean()

    together = jax.jit(jax.vmap(run))(x, y, jnp.array([0, 5]))
    alone = jax.jit(run)(x[1], y[1], 5)
    np.testing.assert_allclose(together.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(together[1], alone, rtol=1e-3, atol=1e-4)


def test_bad_options_are_named():
    assert set(POSTERIORS) == {"point", "laplace", "implicit"}
    with pytest.raises(ValueError, match="curvature"):
        laplace(curvature="exact")
    with pytest.raises(ValueError, match="spectrum"):
        implicit(curvature="kfac")
    with pytest.raises(ValueError, match="draws"):
        implicit(draws=-1)
    batch = Batch(jnp.ones((2, 1)), jnp.zeros(2, int))
    with pytest.raises(ValueError, match="precision"):
        laplace(None).infer(linear, Categorical(), jnp.ones((1, 2)), batch, Implied(1.0, 1))
    rule = point(noise=0.1)
    at = rule.infer(linear, Categorical(), jnp.ones((1, 2)), batch, Implied(1.0, 1))
    with pytest.raises(ValueError, match="noise"):
        rule.predict(linear, Categorical(), at, batch.x, jax.random.key(0))
