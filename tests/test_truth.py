"""The referee: what must be exact is, what must be wrong is seen to be, and NUTS agrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Gaussian
from metaprior.learners import make_learner
from metaprior.learners.llama import Prior
from metaprior.learners.registry import learners_before
from metaprior.referees.nuts import against_nuts
from metaprior.referees.truth import judge, linear_model, referee
from metaprior.tasks import linear_gaussian


@pytest.fixture(scope="module")
def source():
    return linear_gaussian(features=2, shot=5, query=5, test_query=20).test


def verdict(source, params, **options):
    options = {**learners_before("truth")["llama"], "steps": 400, **options}
    learner = make_learner("llama", linear_model(2), Gaussian(0.5), **options)
    return judge(learner, params, source, source.sample(jax.random.key(3), 4000).support, jax.random.key(0), 40)


@pytest.mark.slow
def test_the_truth_is_judged_true(source):
    """LLAMA's Laplace approximation is exact here: with the true prior every figure is that of the truth."""
    found = verdict(source, Prior({"head": jnp.ones((2, 1))}, jnp.zeros(())))
    assert found.posterior_mean < 0.02
    assert found.sd_ratio == pytest.approx(1, abs=1e-3)
    assert found.log_marginal == pytest.approx(0, abs=0.02)
    assert found.nll == pytest.approx(0, abs=2e-3)
    assert found.prior_mean < 0.05
    assert np.mean(found.pit) == pytest.approx(1)


def test_a_wrong_prior_is_seen(source):
    """A prior that is too narrow and in the wrong place: each figure says so."""
    found = verdict(source, Prior({"head": jnp.zeros((2, 1))}, jnp.log(jnp.asarray(10.0))))
    assert found.prior_mean == pytest.approx(1, abs=0.05)
    assert found.sd_ratio < 0.95
    assert found.log_marginal < -0.5
    assert found.nll > 0.02


@pytest.mark.slow
def test_training_finds_the_prior():
    told = []
    found = referee(("llama",), steps=400, tasks=30, report=lambda name, verdict: told.append(name))
    assert told == ["llama"]
    assert found["llama"].prior_mean < 0.08
    assert found["llama"].sd_ratio == pytest.approx(1, abs=0.05)
    with pytest.raises(ValueError, match="did you mean 'llama'"):
        referee(("lama",))


@pytest.mark.parametrize("family", ["bernoulli", "poisson"])
@pytest.mark.slow
def test_inference_agrees_with_nuts(family):
    found = against_nuts(family, ("llama", "gem_bml"), tasks=12)
    assert found["nuts"].coverage > 0.7
    for name in ("llama", "gem_bml"):
        assert found[name].bias < 0.35, name
        assert 0.85 < found[name].sd_ratio < 1.15, name
