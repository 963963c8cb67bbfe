"""Likelihoods against scipy, their curvature against autodiff, and mixtures against sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as ss
from hypothesis import given, settings
from hypothesis import strategies as st

from metaprior.likelihoods import Bernoulli, Categorical, Counts, Gaussian, Normals, Poisson

RNG = np.random.default_rng(0)
OUT = RNG.normal(size=(6, 2))
CASES = {
    "gaussian": (Gaussian(0.7), OUT, RNG.normal(size=(6, 2)), lambda o, y: ss.norm.logpdf(y, o, 0.7).sum(1)),
    "gaussian with learned noise": (
        Gaussian(None),
        OUT,
        RNG.normal(size=(6, 1)),
        lambda o, y: ss.norm.logpdf(y[:, 0], o[:, 0], np.exp(o[:, 1])),
    ),
    "categorical": (
        Categorical(),
        OUT,
        np.array([0, 1, 1, 0, 0, 1]),
        lambda o, y: np.log(np.exp(o)[np.arange(6), y] / np.exp(o).sum(1)),
    ),
    "bernoulli": (
        Bernoulli(),
        OUT[:, :1],
        np.array([0, 1, 1, 0, 0, 1]),
        lambda o, y: ss.bernoulli.logpmf(y, 1 / (1 + np.exp(-o[:, 0]))),
    ),
    "poisson": (
        Poisson(),
        OUT,
        RNG.poisson(2.0, size=(6, 2)).astype(float),
        lambda o, y: ss.poisson.logpmf(y, np.exp(o)).sum(1),
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_nll_and_predictive_are_the_textbook_density(name):
    likelihood, outputs, y, log_density = CASES[name]
    np.testing.assert_allclose(likelihood.nll(jnp.asarray(outputs), jnp.asarray(y)), -log_density(outputs, y))
    mixture = likelihood.predictive(jnp.asarray(np.stack([outputs, outputs + 1])))
    expected = np.logaddexp(log_density(outputs, y), log_density(outputs + 1, y)) - np.log(2)
    np.testing.assert_allclose(mixture.log_prob(jnp.asarray(y)), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["gaussian", "categorical", "bernoulli", "poisson"])
def test_hessian_root_squares_to_the_hessian(name):
    likelihood, outputs, y, _ = CASES[name]
    root = likelihood.hessian_root(jnp.asarray(outputs))

    def one(o, yi):
        return likelihood.nll(o[None], yi[None])[0]

    hessian = jax.vmap(jax.hessian(one))(jnp.asarray(outputs), jnp.asarray(y))
    np.testing.assert_allclose(root @ root.mT, hessian, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_learned_noise_root_is_the_fisher_information():
    # For N(m, exp(2 l)) the Fisher information in (m, l) is diag(exp(-2 l), 2).
    root = Gaussian(None).hessian_root(jnp.asarray(OUT))
    expected = [np.diag([np.exp(-2 * o[1]), 2.0]) for o in OUT]
    np.testing.assert_allclose(root @ root.mT, expected)


@pytest.mark.usefixtures("x64")
@settings(max_examples=25)
@given(st.floats(0.02, 0.98), st.integers(0, 10_000))
def test_quantiles_invert_the_mixture_cdf(q, seed):
    rng = np.random.default_rng(seed)
    mixture = Normals(jnp.asarray(rng.normal(size=(3, 4, 1)) * 5), jnp.asarray(rng.uniform(0.01, 4, (3, 4, 1))))
    np.testing.assert_allclose(mixture.cdf(mixture.quantile(q)), q, atol=1e-7)
    counts = Counts(jnp.asarray(rng.uniform(0.1, 20, (3, 4, 1))))
    at = counts.quantile(q)
    assert (counts.cdf(at) >= q).all()
    assert (counts.cdf(at - 1) < q).all()


def test_moments_of_mixtures():
    mixture = Normals(jnp.array([[[0.0]], [[2.0]]]), jnp.array([[[1.0]], [[3.0]]]))
    assert mixture.mean() == 1.0
    assert mixture.variance() == 3.0  # 2 within and 1 between


def test_epistemic_variance_widens_and_softens():
    outputs = jnp.array([[[2.0, -1.0, 0.5]]])
    assert (Gaussian(1.0).predictive(outputs, jnp.full_like(outputs, 3.0)).variance() == 4.0).all()
    sure, unsure = (Categorical().predictive(outputs, v).mean() for v in (None, jnp.full_like(outputs, 5.0)))
    assert unsure.max() < sure.max()
    assert unsure.argmax() == sure.argmax()
    np.testing.assert_allclose(Bernoulli().predictive(outputs[..., :1], outputs[..., :1]).mean().sum(-1), 1, rtol=1e-6)
    # E exp(N(m, v)) = exp(m + v / 2) to the order of three Gauss-Hermite points
    rate = Poisson().predictive(jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), 0.25)).mean()
    np.testing.assert_allclose(rate, np.exp(0.125), rtol=1e-3)


def test_wrong_shapes_say_what_is_needed():
    with pytest.raises(ValueError, match="one column an output"):
        Gaussian().nll(jnp.zeros((3, 1)), jnp.zeros(3))
    with pytest.raises(ValueError, match="even number"):
        Gaussian(None).nll(jnp.zeros((3, 1)), jnp.zeros((3, 1)))
