"""The scikit-learn face: groups in, error bars out."""

import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone

from metaprior.estimators import MetaClassifier, MetaRegressor, padded
from metaprior.training import Training

QUICK = Training(steps=300, meta_batch=8, chunk=100, validate_every=100, validation_tasks=20, rate=1e-2, clip_norm=1.0)


def lines(seed, groups=50, rows=10, noise=0.1):
    """Each group its own line about y = 20 + 5 x, in units that need standardising."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), rows)
    slope, offset = rng.normal(5, 1, groups)[group], rng.normal(20, 2, groups)[group]
    x = rng.uniform(-3, 3, len(group))
    return x[:, None], slope * x + offset + noise * rng.normal(size=len(group)), group


@pytest.fixture(scope="module")
def regressor():
    x, y, group = lines(0)
    options = {"steps": 5, "rate": 0.1}
    return MetaRegressor("maml", hidden=(), options=options, training=QUICK).fit(x, y, [f"county {g}" for g in group])


def test_a_group_is_predicted_from_its_own_rows_and_a_strange_one_from_the_prior(regressor):
    x, y, group = lines(0)
    names = np.array([f"county {g}" for g in group])
    own = regressor.predict(x, names)
    prior, spread = regressor.predict(x, ["nowhere"] * len(x), return_std=True)
    assert np.abs(own - y).mean() < 0.4 * np.abs(prior - y).mean()
    np.testing.assert_allclose(prior, regressor.predict(x))
    assert (spread > regressor.predict(x, names, return_std=True)[1]).all()
    # Any order of the rows gives each row the same answer.
    order = np.random.default_rng(1).permutation(len(x))
    np.testing.assert_allclose(regressor.predict(x[order], names[order]), own[order], rtol=1e-5)


def test_intervals_of_new_groups_hold_what_they_say(regressor):
    x, y, group = lines(7, groups=60, rows=15, noise=0.1)
    inside, before, after = [], [], []
    for g in range(60):
        rows = np.flatnonzero(group == g)
        seen, new = rows[:5], rows[5:]
        adapted = regressor.adapt(x[seen], y[seen])
        low, high = adapted.predict_interval(x[new], coverage=0.9).T
        inside.append(((low < y[new]) & (y[new] < high)).mean())
        before.append(np.abs(regressor.predict(x[new]) - y[new]).mean())
        after.append(np.abs(adapted.predict(x[new]) - y[new]).mean())
    assert np.mean(after) < 0.4 * np.mean(before)
    assert 0.8 < np.mean(inside) < 0.98


def test_it_is_a_scikit_learn_estimator(regressor):
    x, y, _ = lines(3, groups=2)
    assert clone(regressor).get_params()["options"] == {"steps": 5, "rate": 0.1}
    again = pickle.loads(pickle.dumps(regressor))
    np.testing.assert_array_equal(again.predict(x), regressor.predict(x))
    assert regressor.adapt(x, y).score(x, y) > regressor.score(x, y)


def test_classes_of_any_kind():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 12)
    bent = rng.choice([-1, 1], 40)[group]
    x = rng.normal(size=(480, 1))
    y = np.where(bent * x[:, 0] > 0, "ill", "well")
    options = {"steps": 5, "rate": 0.5}
    model = MetaClassifier("maml", hidden=(8,), options=options, training=QUICK).fit(x, y, group)
    assert list(model.classes_) == ["ill", "well"]
    new = rng.normal(size=(40, 1))
    truth = np.where(new[:, 0] < 0, "ill", "well")
    adapted = model.adapt(new[:10], truth[:10])
    np.testing.assert_allclose(adapted.predict_proba(new).sum(-1), 1, rtol=1e-5)
    assert adapted.score(new[10:], truth[10:]) > 0.85
    assert adapted.knobs_.keys() == {"temperature", "softmax_temperature"}
    with pytest.raises(ValueError, match="y: came class 'dead', needs one of those"):
        model.adapt(new[:1], ["dead"])


def test_bad_input_is_named(regressor):
    with pytest.raises(ValueError, match="coverage: came 90"):
        regressor.predict_interval([[0.0]], coverage=90)
    with pytest.raises(ValueError, match="groups: came 1 for 2 rows"):
        regressor.predict([[0.0], [1.0]], ["a"])
    with pytest.raises(ValueError, match="features"):
        regressor.predict([[0.0, 1.0]])
    with pytest.raises(ValueError, match="did you mean 'maml'"):
        MetaRegressor("mamml").fit(*lines(0, groups=10))
    with pytest.raises(ValueError, match="not fitted"):
        MetaRegressor().predict([[0.0]])


def test_groups_on_which_the_learner_diverges_are_told(regressor):
    x, y, group = lines(0, groups=3)
    with pytest.warns(RuntimeWarning, match="maml diverged on 1 of 1 groups"):
        regressor.adapt(x[:5] * 1e15, y[:5]).predict(x[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(regressor.predict(x, group)).all()


def test_padding_goes_to_the_next_power_of_two():
    assert [len(padded(np.ones((n, 2)))) for n in (0, 1, 2, 3, 5, 8)] == [1, 1, 2, 4, 8, 8]
