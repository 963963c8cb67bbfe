"""Likelihoods against scipy, their curvature against autodiff, and mixtures against sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as ss
from hypothesis import given, settings
from hypothesis import strategies as st

from metaprior.core.likelihoods import Bernoulli, Categorical, Counts, Gaussian, Normals, Poisson

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
@pytest.mark.slow
def test_nll_and_predictive_are_the_textbook_density(name):
    likelihood, outputs, y, log_density = CASES[name]
    np.testing.assert_allclose(likelihood.nll(jnp.asarray(outputs), jnp.asarray(y)), -log_density(outputs, y))
    mixture = likelihood.predictive(jnp.asarray(np.stack([outputs, outputs + 1])))
    expected = np.logaddexp(log_density(outputs, y), log_density(outputs + 1, y)) - np.log(2)
    np.testing.assert_allclose(mixture.log_prob(jnp.asarray(y)), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["gaussian", "categorical", "bernoulli", "poisson"])
@pytest.mark.slow
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
@pytest.mark.slow
def test_quantiles_invert_the_mixture_cdf(q, seed):
    rng = np.random.default_rng(seed)
    mixture = Normals(jnp.asarray(rng.normal(size=(3, 4, 1)) * 5), jnp.asarray(rng.uniform(0.01, 4, (3, 4, 1))))
    np.testing.assert_allclose(mixture.cdf(mixture.quantile(q)), q, atol=1e-7)
    counts = Counts(jnp.log(jnp.asarray(rng.uniform(0.1, 20, (3, 4, 1)))))
    at = counts.quantile(q)
    assert (counts.cdf(at) >= q).all()
    assert (counts.cdf(at - 1) < q).all()


def test_moments_of_mixtures():
    mixture = Normals(jnp.array([[[0.0]], [[2.0]]]), jnp.array([[[1.0]], [[3.0]]]))
    assert mixture.mean() == 1.0
    assert mixture.variance() == 3.0  # 2 within and 1 between


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="one column per output"):
        Gaussian().nll(jnp.zeros((3, 1)), jnp.zeros(3))
    with pytest.raises(ValueError, match="even number"):
        Gaussian(None).nll(jnp.zeros((3, 1)), jnp.zeros((3, 1)))


def monte_carlo(mean, variance, draws=200_000, seed=0):
    """E softmax of independent normal logits, in float64."""
    rng, total = np.random.default_rng(seed), 0.0
    for _ in range(20):
        logits = mean + np.sqrt(variance) * rng.normal(size=(draws // 20, len(mean)))
        p = np.exp(logits - logits.max(1, keepdims=True))
        total = total + (p / p.sum(1, keepdims=True)).mean(0) / 20
    return total


@pytest.mark.parametrize("classes", [2, 3, 5, 20, 100])
@pytest.mark.parametrize("variance", [0.1, 1.0, 4.0, 25.0, 400.0])
@pytest.mark.slow
def test_the_closed_form_softmax_is_that_of_gaussian_logits(classes, variance):
    rng = np.random.default_rng(classes)
    for equal in (True, False):
        mean, spread = 3 * rng.normal(size=classes), variance * (1 if equal else rng.uniform(0, 1, classes))
        spread = np.broadcast_to(spread, (classes,))
        found = Categorical().predictive(*(jnp.asarray(v, float)[None, None] for v in (mean, spread))).mean()[0]
        np.testing.assert_allclose(found, monte_carlo(mean, spread), atol=0.005 if classes == 2 else 0.01)
        np.testing.assert_allclose(found.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize(("classes", "exact"), [(2, 0.8160), (5, 0.5728), (20, 0.2822)])
def test_the_softmax_of_a_leading_logit(classes, exact):
    mean = jnp.zeros((1, 1, classes)).at[..., 0].set(3.0)
    found = Categorical().predictive(mean, jnp.full_like(mean, 4.0)).mean()[0, 0]
    assert found == pytest.approx(exact, abs=5e-4)
    # The same model with one logit: the difference of the two has twice the variance.
    alone = Bernoulli().predictive(jnp.full((1, 1, 1), 3.0), jnp.full((1, 1, 1), 8.0)).mean()[0, 1]
    assert alone == pytest.approx(0.8160, abs=5e-4)


@pytest.mark.slow
def test_the_closed_form_softmax_without_variance_is_the_softmax_and_has_derivatives():
    mean = jnp.asarray([[[0.0, -30.0, -60.0, 1.0]]])
    found = Categorical().predictive(mean, jnp.zeros_like(mean)).log_probs
    np.testing.assert_allclose(found, jax.nn.log_softmax(mean), rtol=1e-4, atol=1e-5)
    # An unlikely class keeps its digits: E exp(l) grows by exp(variance / 2), of it and of what it is divided by.
    for variance in (0.0, 1.0, 30.0):
        gradient = jax.jacrev(lambda m, v=variance: Categorical().predictive(m, jnp.full_like(m, v)).log_probs)(mean)
        assert jnp.isfinite(gradient).all()
    batched = jax.jit(jax.vmap(lambda m: Categorical().predictive(m, jnp.ones_like(m)).log_probs))(mean[None])
    np.testing.assert_allclose(batched[0], Categorical().predictive(mean, jnp.ones_like(mean)).log_probs, rtol=1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variance", [0.0, 0.25, 1.0, 4.0])
@pytest.mark.slow
def test_an_uncertain_log_sd_or_log_rate_is_integrated_out(variance):
    z = np.linspace(-9, 9, 20_001)
    weights = ss.norm.pdf(z) / ss.norm.pdf(z).sum()
    outputs = jnp.asarray([[[0.3, -0.2]]])
    normal = Gaussian(None).predictive(outputs, jnp.asarray([[[0.5, variance]]]))
    sds = np.sqrt(np.exp(2 * (-0.2 + np.sqrt(variance) * z)) + 0.5)
    assert normal.variance()[0, 0] == pytest.approx(0.5 + np.exp(-0.4 + 2 * variance), rel=1e-6)
    for y in (-3.0, 0.0, 1.0, 4.0):
        truth = np.log((weights * ss.norm.pdf(y, 0.3, sds)).sum())
        assert normal.log_prob(jnp.asarray([[y]]))[0] == pytest.approx(truth, abs=0.05)
    counts = Poisson().predictive(outputs[..., :1], jnp.full((1, 1, 1), variance))
    assert counts.mean()[0, 0] == pytest.approx(np.exp(0.3 + variance / 2), rel=1e-6)
    for y in (0.0, 1.0, 4.0):
        truth = np.log((weights * ss.poisson.pmf(y, np.exp(0.3 + np.sqrt(variance) * z))).sum())
        assert counts.log_prob(jnp.asarray([[y]]))[0] == pytest.approx(truth, abs=0.02)
    at, one = jnp.full_like(outputs, variance), jnp.ones((1, 1))
    assert jnp.isfinite(jax.grad(lambda v: Gaussian(None).predictive(outputs, v).log_prob(one)[0])(at)).all()


BAD_TARGETS = {
    "a label too high": (Categorical(), jnp.zeros((2, 3)), [0, 3], "labels of the 3 classes 0..2, got 3"),
    "a hidden label": (Categorical(), jnp.zeros((2, 3)), [0, -1], "0..2, got -1"),
    "a label between": (Categorical(), jnp.zeros((2, 3)), [0, 1.5], "0..2, got 1.5"),
    "a third of two": (Bernoulli(), jnp.zeros((2, 1)), [0, 2], "labels of the 2 classes 0..1, got 2"),
    "a negative count": (Poisson(), jnp.zeros((2, 1)), [[0.0], [-1.0]], "at least 0, got -1.0"),
    "half a count": (Poisson(), jnp.zeros((2, 1)), [[0.0], [0.5]], "at least 0, got 0.5"),
    "a target that is NaN": (Gaussian(), jnp.zeros((2, 1)), [[0.0], [np.nan]], "must hold finite numbers, got nan"),
    "a target without bound": (
        Gaussian(None),
        jnp.zeros((2, 2)),
        [[0.0], [np.inf]],
        "must hold finite numbers, got inf",
    ),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_impossible_targets_are_errors_or_nan_in_compiled_code(case):
    likelihood, outputs, y, says = BAD_TARGETS[case]
    y = jnp.asarray(y)
    for density in (likelihood.nll, lambda o, y: likelihood.predictive(o[None]).log_prob(y)):
        with pytest.raises(ValueError, match=says):
            density(outputs, y)
        found = jax.jit(density)(outputs, y)
        assert jnp.isfinite(found[0])
        assert jnp.isnan(found[1])
        slope = jax.jit(jax.grad(lambda o, y, f=density: f(o, y).sum()))(outputs, y)
        assert jnp.isnan(slope[1]).any()


@pytest.mark.parametrize("likelihood", [Gaussian(), Poisson()])
def test_targets_of_another_shape_are_not_broadcast(likelihood):
    mixture = likelihood.predictive(jnp.zeros((1, 3, 1)))
    for call in (lambda y: likelihood.nll(jnp.zeros((3, 1)), y), mixture.log_prob, mixture.cdf):
        with pytest.raises(ValueError, match="one column per output"):
            call(jnp.zeros(3))
    with pytest.raises(ValueError, match="labels of shape"):
        Categorical().nll(jnp.zeros((3, 2)), jnp.zeros((3, 1), int))
    with pytest.raises(ValueError, match="one logit"):
        Bernoulli().predictive(jnp.zeros((1, 3, 2)))


@pytest.mark.slow
def test_no_count_at_a_vanishing_rate_is_certain():
    assert Counts(jnp.full((1, 1, 1), -120.0)).log_prob(jnp.zeros((1, 1))) == 0
    assert Counts(jnp.full((1, 1, 1), -jnp.inf)).log_prob(jnp.zeros((1, 1))) == 0
    assert Counts(jnp.full((1, 1, 1), -120.0)).log_prob(jnp.ones((1, 1))) == -120
    assert jax.grad(lambda r: Counts(r).log_prob(jnp.zeros((1, 1)))[0])(jnp.full((1, 1, 1), -120.0)) == 0


@pytest.mark.slow
def test_far_tails_keep_their_digits():
    normal = Normals(jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1)))
    for q in (1e-9, 1 - 1e-9):
        np.testing.assert_allclose(normal.quantile(q)[0, 0], ss.norm.ppf(q), rtol=1e-4)
    counts = Counts(jnp.full((1, 1, 1), np.log(0.5)))
    for q in (1e-9, 0.5, 1 - 1e-9):
        assert counts.quantile(q)[0, 0] == ss.poisson.ppf(q, 0.5)


def test_randomised_pit_of_counts_is_uniform():
    rng, key = np.random.default_rng(0), jax.random.key(0)
    rates = rng.uniform(0.2, 3, size=(4000, 1))
    y = jnp.asarray(rng.poisson(rates), float)
    pit = np.sort(np.asarray(Counts(jnp.log(jnp.asarray(rates, float))[None]).pit(y, key))[:, 0])
    assert ss.kstest(pit, "uniform").pvalue > 0.01
