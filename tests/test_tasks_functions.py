"""Sinusoids, lines and their mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaprior.core.types import TaskSource
from metaprior.tasks import (
    SOURCES,
    ambiguous,
    linear,
    linear_gaussian,
    polynomial,
    sinusoid,
    sinusoid_hard,
    sinusoid_nme,
)

FAMILIES = [sinusoid, sinusoid_hard, sinusoid_nme, linear, ambiguous, linear_gaussian, polynomial]


@pytest.mark.parametrize("factory", FAMILIES)
def test_shapes_and_splits(factory):
    splits = factory(shot=3, query=4, test_query=6)
    for source, query in zip(splits, (4, 6, 6), strict=True):
        assert isinstance(source, TaskSource)
        task = source.sample(jax.random.key(0), 5)
        assert task.support.y.shape == (5, 3, 1)
        assert task.query.y.shape == (5, query, 1)
        assert task.support.x.shape[:2] == (5, 3)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(task))
    draws = [np.asarray(source.sample(jax.random.key(0), 5).support.x[..., 0]) for source in splits]
    assert not np.isclose(draws[0], draws[1]).any()
    assert not np.isclose(draws[1], draws[2]).any()


@pytest.mark.parametrize("factory", FAMILIES)
def test_jit_with_the_source_as_argument_is_eager(factory):
    source = factory().train
    compiled = jax.jit(lambda s, key: s.sample(key, 3))
    eager, traced = source.sample(jax.random.key(1), 3), compiled(source, jax.random.key(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), eager, traced)
    again = compiled(source, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, traced, again)


@settings(max_examples=10)
@given(st.integers(0, 10_000))
def test_sinusoid_is_a_sinusoid_of_the_stated_range(seed):
    task = sinusoid(shot=4, query=40).train.sample(jax.random.key(seed), 8)
    for x, y in zip(task.query.x[..., 0], task.query.y[..., 0], strict=True):
        basis = np.stack([np.sin(x), np.cos(x)], 1)
        coefficients, *_ = np.linalg.lstsq(basis, y, rcond=None)
        np.testing.assert_allclose(basis @ coefficients, y, atol=2e-4)
        amplitude = np.hypot(*coefficients)
        assert 0.0999 <= amplitude <= 5.001
        # A sin(x - b) = A cos(b) sin(x) - A sin(b) cos(x), and b in [0, pi] has sin(b) >= 0.
        assert coefficients[1] <= 1e-4
    assert np.abs(task.query.x).max() <= 5


def test_amplitude_and_phase_are_uniform():
    task = sinusoid(shot=1, query=30).train.sample(jax.random.key(0), 4000)
    x, y = np.asarray(task.query.x[..., 0]), np.asarray(task.query.y)
    basis = np.stack([np.sin(x), np.cos(x)], -1)
    sine, cosine = (np.linalg.pinv(basis) @ y)[..., 0].T
    assert abs(np.hypot(sine, cosine).mean() - 2.55) < 0.1
    assert abs(np.arctan2(-cosine, sine).mean() - np.pi / 2) < 0.06


def test_hard_sinusoid_noise_is_on_training_only():
    splits = sinusoid_hard(shot=50, query=50, test_query=50, frequency=(1.0, 1.0))
    for source, noisy in ((splits.train, True), (splits.test, False)):
        task = source.sample(jax.random.key(2), 300)
        for batch, expected in ((task.support, True), (task.query, noisy)):
            basis = np.stack([np.sin(batch.x[..., 0]), np.cos(batch.x[..., 0])], -1)
            fit = np.linalg.pinv(basis) @ np.asarray(batch.y)
            residual = np.asarray(batch.y) - basis @ fit
            relative = residual.std((1, 2)) / np.linalg.norm(fit, axis=(1, 2))
            assert abs(relative.mean() - (0.01 if expected else 0.0)) < 5e-4


def test_support_domain():
    task = sinusoid(support_domain=(-5.0, 0.0), query=50).test.sample(jax.random.key(0), 20)
    assert task.support.x.max() <= 0 < task.query.x.max()


def test_names_tell_the_amplitude_in_training_only():
    splits = sinusoid_nme(names=5, amplitude=(1.0, 3.0), trained=4, noise=0.0)
    for source, given_away in ((splits.train, True), (splits.test, False)):
        task = source.sample(jax.random.key(0), 400)
        x = np.concatenate([task.support.x, task.query.x], 1)
        y = np.concatenate([task.support.y, task.query.y], 1)[..., 0]
        assert x.shape[2] == 6
        name = x[:, :, 1:].argmax(-1)
        np.testing.assert_array_equal(x[:, :, 1:], np.eye(5)[name])
        assert (name == name[:, :1]).all()
        wave = np.sin(x[..., 0])
        amplitude = (y * wave).sum(1) / (wave**2).sum(1)  # of least squares, which is exact without noise
        np.testing.assert_allclose(y, amplitude[:, None] * wave, atol=1e-4)
        assert abs(x[:, :10, 0]).max() > 4.9
        assert (abs(x[:, 10:, 0]).max() > 4.6) == given_away  # test queries are in -4.5..4.5
        if given_away:
            np.testing.assert_allclose(amplitude, np.linspace(1, 3, 5)[name[:, 0]], rtol=1e-4)
            assert set(name.ravel()) == {0, 1, 2, 3}
        else:
            assert set(name.ravel()) == {0, 1, 2, 3, 4}
            assert abs(np.corrcoef(amplitude, name[:, 0])[0, 1]) < 0.2
            assert len(set(np.round(amplitude, 4))) > 350
            assert 0.97 < amplitude.min() < 1.1 < 2.9 < amplitude.max() < 3.01
    noisy = sinusoid_nme(names=2, amplitude=(1.0, 1.0)).train.sample(jax.random.key(0), 400).query
    assert abs((noisy.y[..., 0] - np.sin(noisy.x[..., 0])).std() - 0.1) < 0.01
    with pytest.raises(ValueError, match="trained must be at most 5, the number of names, got 6"):
        sinusoid_nme(names=5, trained=6)


@pytest.mark.slow
def test_ambiguous_is_half_lines():
    task = ambiguous(noise=0.0, query=20).train.sample(jax.random.key(3), 1000)
    x, y = np.asarray(task.query.x[..., 0]), np.asarray(task.query.y)
    basis = np.stack([x, np.ones_like(x)], -1)
    fit = np.linalg.pinv(basis) @ y
    straight = np.abs(basis @ fit - y).max((1, 2)) < 1e-3
    assert 0.45 < straight.mean() < 0.55
    assert np.abs(fit[straight]).max() <= 3.001


@pytest.mark.slow
def test_float64():
    with jax.enable_x64():
        for factory in FAMILIES:
            assert factory().train.sample(jax.random.key(0), 2).query.y.dtype == jnp.float64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shot": 0}, "shot must be"),
        ({"query": 1.5}, "query must be"),
        ({"amplitude": (2, 1)}, "amplitude must be"),
        ({"phase": 3}, "phase must be"),
        ({"noise": -1}, "noise must be"),
        ({"domain": (0, float("nan"))}, "domain must be"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        sinusoid(**options)


def test_registry_names_factories():
    assert set(SOURCES) >= {"sinusoid", "sinusoid_hard", "linear", "ambiguous", "linear_gaussian"}
