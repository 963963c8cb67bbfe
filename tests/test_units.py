"""Predictives in the target's own units, against the normal distribution of those units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from metaprior.core.likelihoods import Normals
from metaprior.core.types import Predictive
from metaprior.core.units import in_units

OFFSET, SCALE = np.asarray([1.7e9, -3.0]), np.asarray([20.0, 0.5])
Z = Normals(jnp.asarray([[[0.5, -1.0], [0.25, 2.0]]]), jnp.asarray([[[0.25, 1.0], [4.0, 0.01]]]))


def exact():
    return norm(OFFSET + SCALE * np.asarray(Z.means[0], float), SCALE * np.sqrt(np.asarray(Z.variances[0], float)))


@pytest.mark.slow
def test_all_of_a_predictive_is_in_the_units_of_the_target():
    predictive, truth = in_units(Z, OFFSET, SCALE), exact()
    assert isinstance(predictive, Predictive)
    np.testing.assert_array_equal(predictive.mean(), truth.mean())  # to the digit: 1.7e9 + 10 and + 5
    np.testing.assert_allclose(predictive.variance(), truth.var(), rtol=1e-6)
    y = truth.mean() + [[1.0, 0.25], [-3.0, 0.125]]
    np.testing.assert_allclose(predictive.log_prob(y), truth.logpdf(y).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(predictive.cdf(y), truth.cdf(y), rtol=1e-5)
    for q in (0.05, 0.5, 0.95):
        np.testing.assert_allclose(predictive.quantile(q) - OFFSET, truth.ppf(q) - OFFSET, rtol=1e-4)
        np.testing.assert_allclose(predictive.cdf(predictive.quantile(q)), np.full((2, 2), q), atol=1e-4)


def test_units_survive_compiled_code_exactly():
    predictive = jax.jit(lambda base: in_units(base, OFFSET, SCALE))(Z)
    np.testing.assert_array_equal(predictive.mean(), exact().mean())
    inside = jax.jit(lambda base, y: in_units(base, [0.0, -3.0], SCALE).log_prob(y))
    y = exact().mean() - [1.7e9, 0]
    assert inside(Z, y) == pytest.approx(exact().logpdf(exact().mean()).sum(-1), rel=1e-5)
    with jax.enable_x64(True):
        assert in_units(Z, OFFSET, SCALE).mean().dtype == np.float64
