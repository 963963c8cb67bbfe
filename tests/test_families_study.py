"""What learned kinds say of true families."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaprior as mp
from metaprior.studies.families import compared, families, share_of_information
from metaprior.studies.plots import family_kinds
from metaprior.tasks import families_2d, sinusoid
from scenarios import KEY

FAMILY = np.arange(60) % 3


def test_weights_that_are_the_family_say_all_and_even_weights_say_nothing():
    certain, even = compared(np.eye(3)[FAMILY], FAMILY, ("a", "b", "c")), np.full((60, 4), 0.25)
    np.testing.assert_allclose([certain.information, certain.adjusted, certain.recognised.mean], 1, rtol=1e-6)
    assert certain.by_chance < 0.1
    assert certain.weights["b"] == [0, 1, 0]
    none = compared(even, FAMILY, ("a", "b", "c"))
    np.testing.assert_allclose([none.information, none.adjusted], 0, atol=1e-6)


def test_information_is_that_of_the_table_by_hand():
    weights = np.array([[0.8, 0.2], [0.3, 0.7]])
    expected = sum(0.5 * w * np.log2(w / m) for row in weights for w, m in zip(row, [0.55, 0.45], strict=True))
    np.testing.assert_allclose(share_of_information(weights, np.array([0, 1])), expected, rtol=1e-6)


def test_slightly_different_weights_are_recognised():
    rng = np.random.default_rng(1)
    lean = 0.5 + 0.02 * (FAMILY == 1) + 0.001 * rng.normal(size=60)
    found = compared(np.stack([lean, 1 - lean], 1), (FAMILY == 1).astype(int), ("a", "b"))
    assert found.information < 0.01
    assert found.recognised.mean > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hsml", "arml", "gem_mixture"])
def test_a_learner_of_kinds_is_studied(name):
    source = families_2d(shot=4, query=2).test
    small = {"hidden": 4} if name != "gem_mixture" else {"steps": 1, "components": 2}
    learner = mp.make_learner(name, mp.mlp(1, (4,)), mp.Gaussian(), **small)
    params = learner.init(KEY, jax.tree.map(lambda leaf: leaf[0], source.sample(KEY, 1)))
    found = families(learner, params, source, KEY, tasks=60)
    assert list(found.weights) == list(source.families)
    np.testing.assert_allclose(jnp.asarray(list(found.weights.values())).sum(1), 1, rtol=1e-5)
    assert len(family_kinds({name: found}).axes) == 1


def test_what_cannot_be_studied_is_an_error():
    plain = mp.make_learner("maml", mp.mlp(1, (4,)), mp.Gaussian())
    learner = mp.make_learner("hsml", mp.mlp(1, (4,)), mp.Gaussian())
    source = families_2d().test
    for wrong, message in (((plain, source, 60), "kinds of tasks"), ((learner, sinusoid().test, 60), "two families"),
                           ((learner, source, 59), "tasks must be at least 60")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            families(wrong[0], {}, wrong[1], KEY, tasks=wrong[2])
