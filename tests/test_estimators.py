"""The scikit-learn face: groups in, error bars out."""

import pickle
import re
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import sklearn
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict

from metaprior.core.types import Batch, Task
from metaprior.estimators.programs import Setting, size_of
from metaprior.estimators.sklearn import MetaClassifier, MetaRegressor
from metaprior.inference.posteriors import laplace
from metaprior.learners.builders.knobs import turned
from metaprior.learners.registry import traits_of
from metaprior.tasks.tables.columns import Columns
from metaprior.tasks.tables.preparation import Column
from metaprior.training.loop import Training

QUICK = Training(steps=300, meta_batch=8, chunk=100, validate_every=100, validation_tasks=20, rate=1e-2, clip_norm=1.0)


def shortly(learner="maml", **settings):
    """An estimator whose training is too short to learn anything."""
    few = Training(steps=2, meta_batch=2, chunk=2, validation_tasks=2)
    return MetaRegressor(learner, hidden=(8,), training=few, **settings)


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
    with pytest.warns(RuntimeWarning, match="no groups were given"):
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
        before.append(np.abs(regressor.predict(x[new], ["new"] * len(new)) - y[new]).mean())
        after.append(np.abs(adapted.predict(x[new]) - y[new]).mean())
    assert np.mean(after) < 0.4 * np.mean(before)
    assert 0.8 < np.mean(inside) < 0.98


def test_it_is_a_scikit_learn_estimator(regressor):
    x, y, _ = lines(3, groups=2)
    assert clone(regressor).get_params()["options"] == {"steps": 5, "rate": 0.1}
    again = pickle.loads(pickle.dumps(regressor))
    with pytest.warns(RuntimeWarning, match="no groups were given"):
        np.testing.assert_array_equal(again.predict(x), regressor.predict(x))
    with pytest.warns(RuntimeWarning, match="no groups were given"):
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
    with pytest.raises(ValueError, match=r"y must hold classes that .fit. saw, .*, got 'dead'"):
        model.adapt(new[:1], ["dead"])


def test_bad_input_is_named(regressor):
    with pytest.raises(ValueError, match=r"coverage must be a number between 0 and 1, e\.g\. 0\.9, got 90"):
        regressor.predict_interval([[0.0]], coverage=90)
    with pytest.raises(ValueError, match="groups must have one value for each of the 2 rows of X, got 1"):
        regressor.predict([[0.0], [1.0]], ["a"])
    with pytest.raises(ValueError, match="features"):
        regressor.predict([[0.0, 1.0]])
    with pytest.raises(ValueError, match="did you mean 'maml'"):
        MetaRegressor("mamml").fit(*lines(0, groups=10))
    with pytest.raises(ValueError, match="not fitted"):
        MetaRegressor().predict([[0.0]])


def test_groups_on_which_the_learner_diverges_are_told(regressor):
    x, y, group = lines(0, groups=3)
    with (
        pytest.warns(RuntimeWarning, match="maml diverged on 1 of 1 groups"),
        pytest.warns(UserWarning, match="deviations from the training mean"),
    ):
        regressor.adapt(x[:5] * 1e15, y[:5]).predict(x[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(regressor.predict(x, group)).all()


def test_sizes_are_few():
    assert [size_of(n) for n in (0, 1, 2, 4, 5, 17, 1024, 1025, 3000)] == [1, 1, 4, 4, 16, 64, 1024, 2048, 3072]


def test_large_offsets_change_nothing(regressor):
    x, y, group = lines(0)
    moved = MetaRegressor("maml", hidden=(), options={"steps": 5, "rate": 0.1}, training=QUICK)
    moved.fit(x + 1e9, y + 1e9, [f"county {g}" for g in group])
    names, shown = np.array([f"county {g}" for g in group]), regressor.adapt(x[:4], y[:4])
    for one, other in (
        (moved.predict(x + 1e9, names) - 1e9, regressor.predict(x, names)),
        (moved.adapt(x[:4] + 1e9, y[:4] + 1e9).predict(x[4:9] + 1e9) - 1e9, shown.predict(x[4:9])),
    ):
        np.testing.assert_allclose(one, other, atol=0.02)


def test_every_way_of_asking_gives_a_row_the_same_answer(regressor):
    # One group or many in a call, few queries or so many that they are asked for in pieces.
    x, _, group = lines(0)
    names = np.array([f"county {g}" for g in group])
    whole, spread = regressor.predict(x, names, return_std=True)
    for g in (0, 7, 49):
        rows = group == g
        np.testing.assert_allclose(regressor.predict(x[rows], names[rows]), whole[rows], rtol=1e-5)
    many = np.linspace(-3, 3, 1500)[:, None]
    together, some = regressor.predict(many, ["county 3"] * 1500), [0, 700, 1499]
    np.testing.assert_allclose(together[some], regressor.predict(many[some], ["county 3"] * 3), rtol=1e-5)
    middle = regressor.predict_interval(x, names, coverage=0.5)
    np.testing.assert_allclose(middle.mean(1), whole, atol=0.02)
    assert (middle[:, 1] - middle[:, 0] < 1.5 * spread).all()


def test_rows_are_not_scored_by_themselves(regressor):
    # Outcomes that nothing can predict: a group's own rows must not help to predict themselves.
    rng = np.random.default_rng(0)
    x, group = rng.normal(size=(200, 1)), np.repeat(np.arange(20), 10)
    y = rng.normal(size=200)
    model = MetaRegressor("maml", hidden=(8,), options={"steps": 5, "rate": 0.1}, training=QUICK).fit(x, y, group)
    assert model.score(x, y, groups=group) < 0.15
    unknown = [f"new {g}" for g in group]
    assert model.score(x, y, groups=group) == model.score(x, y, groups=unknown)
    with pytest.warns(RuntimeWarning, match="no groups were given"):
        assert model.score(x, y, groups=group, support_rows=0) == pytest.approx(model.score(x, y), abs=0.2)
    with pytest.raises(ValueError, match="support_rows must be an integer of at least 0, got -1"):
        model.score(x, y, groups=group, support_rows=-1)
    known, told, counties = lines(7, groups=30)
    shown, alone = (regressor.score(known, told, groups=counties, support_rows=n) for n in (None, 0))
    assert shown > 0.97 > alone


@pytest.mark.parametrize("posterior", ["laplace", laplace(1.0)], ids=["by name", "as a rule"])
def test_a_posterior_of_ones_own_has_the_fitted_noise(posterior):
    x, y, group = lines(0, noise=0.1)
    options = {"steps": 5, "rate": 0.1, "posterior": posterior}
    model = MetaRegressor("maml", hidden=(), options=options, training=QUICK).fit(x, y, group)
    for noise in (0.01, 1.0):
        model.knobs_ = model.knobs_ | {"noise": noise, "precision": 1e4}
        _, spread = model.adapt(x[:5], y[:5]).predict(x[:5], return_std=True)
        own = model.scaling_.y_deviation[0]
        assert (spread / own > noise).all()
        assert (spread / own < (noise + 1.0 if posterior != "laplace" else 1.1 * noise + 0.02)).all()


def programs():
    """A list that grows by one whenever XLA compiles a program."""
    seen = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: seen.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    return seen


def test_second_calls_compile_nothing(regressor):
    x, y, group = lines(0)
    names = [f"county {g}" for g in group]
    seen = programs()

    def everything(model):
        model.predict(x, names, return_std=True)
        model.predict_interval(x, names)
        model.adapt(x[:3], y[:3]).predict(x[3:9])
        model.score(x, y, groups=names)

    model = clone(regressor).fit(x, y, names)  # the fixture's programs may have been cleared since
    everything(model)
    before = len(seen)
    everything(model)
    assert len(seen) == before
    other, values, _ = lines(5)
    again = clone(model).fit(other, values, names)
    everything(again)
    assert len(seen) == before
    # Classes likewise.
    labels = np.where(y > 20, "high", "low")
    first = MetaClassifier("maml", hidden=(), training=QUICK).fit(x, labels, names)
    first.predict_proba(x, names)
    before = len(seen)
    clone(first).fit(other, np.where(values > 20, "high", "low"), names).predict_proba(x, names)
    assert len(seen) == before


def test_classes_that_a_group_has_not_shown_keep_their_prior_mass():
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(40), 10)
    labels = rng.integers(0, 3, 400)
    x = np.eye(3)[labels] * 3 + rng.normal(size=(400, 3)) + rng.normal(size=(40, 3))[group]
    y = np.array(["a", "b", "c"])[labels]
    for name in ("protonet", "matching", "nearest_neighbour"):
        model = MetaClassifier(name, hidden=(8,), training=QUICK).fit(x, y, group)
        p = model.adapt(x[labels == 0][:3], ["a"] * 3).predict_proba(x[:50])
        scale = model.knobs_["softmax_temperature"]
        assert 1 / 20 < scale < 20
        assert (p > 1e-4).all()
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
        np.testing.assert_allclose(model.predict_proba(x[:5], ["new"] * 5), 1 / 3, rtol=1e-4)
        shown = model.adapt(x[:30], y[:30])
        assert shown.score(x[100:130], y[100:130]) > 0.5
        assert np.isfinite(np.log(model.predict_proba(x, group))).all()


def test_scikit_learns_errors():
    x, y, group = lines(0, groups=10)
    for ask in ("predict", "predict_interval"):
        with pytest.raises(NotFittedError):
            getattr(MetaRegressor(), ask)(x)
    for call in (lambda m: m.adapt(x, y), lambda m: m.score(x, y)):
        with pytest.raises(NotFittedError):
            call(MetaRegressor())
    gaps = pd.array([1, pd.NA] * 50, dtype="Int64")
    lost = pd.DataFrame({"x": gaps})
    for bad, message in (
        (lambda: MetaRegressor().fit(lost, y, group), "missing|NaN"),
        (lambda: MetaRegressor().fit(x, pd.Series(gaps), group), "missing|NaN"),
        (lambda: MetaRegressor().fit(x, y, gaps), "groups must have no missing value, got one in row 1"),
        (
            lambda: MetaRegressor().fit(x, y, np.ones((100, 2))),
            r"groups must have one value per row, got shape \(100, 2\)",
        ),
        (lambda: MetaRegressor().fit(x, y, None), "groups must have one value per row, got None"),
        (lambda: MetaRegressor().fit(x, y, group[:5]), "one value for each of the 100 rows of X, got 5"),
        (lambda: MetaClassifier().fit(x, ["a"] * 100, group), "y must have at least 2 classes, got one: 'a'"),
        (lambda: MetaClassifier().fit(x, [None] * 100, group), "y must have no missing value, got one in row 0"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_a_frame_of_one_column_of_groups_is_a_column(regressor):
    x, _, group = lines(0)
    names = pd.DataFrame({"county": [f"county {g}" for g in group]})
    np.testing.assert_array_equal(regressor.predict(x, names), regressor.predict(x, names["county"]))


def test_many_groups_are_fitted_in_linear_time():
    rng = np.random.default_rng(0)
    few = Training(steps=1, meta_batch=2, chunk=1, validation_tasks=1)

    def seconds(groups):
        x, group = rng.normal(size=(3 * groups, 1)), np.repeat(np.arange(groups), 3)
        began = time.process_time()
        MetaRegressor("maml", hidden=(), training=few).fit(x, x[:, 0], group)
        return time.process_time() - began

    seconds(50)
    # A quadratic fit would take some 50 seconds.
    assert seconds(20_000) < 20


@pytest.mark.slow
def test_the_prior_mass_of_unseen_classes_is_not_tempered():
    setting = Setting("protonet", (4,), (), 3, True)
    support = Batch(jnp.ones((4, 2)), jnp.array([0, 0, 1, 1]))
    params = setting.made().init(jax.random.key(0), Task(support, support))
    for temperature in (0.3, 1.0, 3.0):
        learner = turned(setting.made(), {"softmax_temperature": temperature})
        p = learner.predict(params, learner.adapt(params, support, None), jnp.ones((5, 2)), None).mean()
        # One class of three is not among four examples: 1 / (4 + 3).
        np.testing.assert_allclose(p[:, 2], 1 / 7, rtol=1e-5)
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)


def test_a_posterior_in_a_table_and_one_that_cannot_be_kept():
    x, y, group = lines(0, groups=20)
    quick = Training(steps=2, meta_batch=2, chunk=2, validation_tasks=2)
    table = {"name": "laplace", "draws": 4}
    model = MetaRegressor("maml", hidden=(), options={"posterior": table}, training=quick).fit(x, y, group)
    assert model.knobs_.keys() == {"precision", "noise"}
    assert np.isfinite(model.predict(x, group)).all()
    with pytest.raises(ValueError, match="options: rate must be hashable"):
        MetaRegressor("maml", options={"rate": np.ones(2)}, training=quick).fit(x, y, group)


@pytest.mark.filterwarnings("ignore:The groups parameter is ignored by KFold")
def test_an_answer_of_the_prior_to_a_forgotten_group_is_told(regressor):
    x, y, group = lines(0)
    for ask in (lambda: regressor.predict(x), lambda: regressor.predict_interval(x), lambda: regressor.score(x, y)):
        with pytest.warns(
            RuntimeWarning, match=r"no groups were given, so every row is predicted from the prior.* groups=\['new'\]"
        ):
            ask()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = regressor.predict(x[:9], ["new"] * 9)  # a group that has shown nothing is no mistake
        regressor.adapt(x[:3], y[:3]).predict(x[:9])
    with pytest.warns(RuntimeWarning, match="no groups"):
        np.testing.assert_array_equal(new, regressor.predict(x[:9]))
    # cross_val_predict passes params to `fit` alone: the one way in which the groups were lost without a word.
    with pytest.warns(RuntimeWarning, match="cross_val_predict never passes them"):
        cross_val_predict(shortly(), x, y, cv=2, params={"groups": group})
    with pytest.raises(
        ValueError, match=r"groups must have one value per row, got None. cross_val_score and GridSearchCV"
    ):
        cross_val_predict(shortly(), x, y, cv=2, groups=group)


@pytest.mark.slow
def test_the_docs_cross_validation_runs():
    text = (Path(__file__).parent.parent / "docs" / "estimators.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    with sklearn.config_context(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for block in blocks:
            exec(compile(block.replace("steps=1000", "steps=200"), "docs/estimators.md", "exec"), names)
    assert len(names["scores"]) == 3
    assert (names["scores"] > 0.5).all()
    out, y = names["out_of_fold"], names["y"]
    assert ((out - y) ** 2).mean() < 0.3 * y.var()


def test_a_grid_search_passes_groups_on():
    x, y, group = lines(0, groups=20)
    with sklearn.config_context(enable_metadata_routing=True), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = shortly().set_fit_request(groups=True).set_score_request(groups=True)
        search = GridSearchCV(model, {"shot": [2, 3]}, cv=GroupKFold(2), error_score="raise").fit(x, y, groups=group)
    assert search.best_params_["shot"] in (2, 3)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_what_is_far_from_training_is_warned_of():
    x, y, group = lines(0)
    frame = pd.DataFrame({"age": x[:, 0], "site": 7.0})
    model = shortly().fit(frame, y, group)
    for ask in (lambda rows: model.predict(rows, group[:4]), lambda rows: model.adapt(rows, y[:4])):
        with pytest.warns(UserWarning, match=r"X: column 'age' has .* in row 0 .* deviations from the training mean"):
            ask(frame[:4] + [1e4, 0])
        with pytest.warns(UserWarning, match=r"'site' has 8 in row 0 \(4 such rows\). In training it was always 7"):
            ask(frame[:4] + [0, 1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ask(frame[:4])
    with pytest.warns(UserWarning, match="y: column 'y' has .* deviations from the training mean"):
        model.adapt(frame[:4], y[:4] * 1e4)
    nameless = shortly().fit(frame.to_numpy(), y, group)
    with pytest.warns(UserWarning, match=r"column 'x\[1\]' has 8 in row 0. In training it was always 7"):
        nameless.predict([[0.0, 8.0]], [0])
    # What is not scaled has no deviations to be far in.
    assert Column("a", "number").warn_of_strange(np.full((1, 1), 1e3), Columns({"a": np.ones(1)})) is None


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")  # scikit-learn's, for an array after a frame
def test_every_odd_input_is_right_or_an_error_of_scikit_learns_form():
    x, y, group = lines(0, groups=20)
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 0] ** 2})
    model, shown = shortly().fit(frame, y, group), {"groups": group}
    for bad, message in (
        (lambda: model.score(frame, y, **shown, sample_weight=np.ones(5)), r"sample_weight.shape == \(5,\), expected"),
        (lambda: model.score(frame, y, sample_weight=-np.ones(200), **shown), "Negative values"),
        (lambda: model.predict(frame, group[:5]), "groups must have one value for each of the 200 rows of X, got 5"),
        (
            lambda: model.predict(frame, np.where(group == 1, np.nan, group)),
            "groups must have no missing value, got one in row 10",
        ),
        (lambda: model.predict(frame, "a"), "groups must have one value per row"),
        (lambda: model.predict(frame[["b", "a"]], group), "must be in the same order as they were in fit"),
        (lambda: model.predict(frame[["a"]], group), "now missing"),
        (lambda: model.predict(np.ones((3, 3)), [1, 2, 3]), "X has 3 features"),
        (lambda: model.predict(frame[:0], []), "0 sample"),
        (lambda: shortly().fit(frame, None, group), "requires y to be passed"),
        (lambda: shortly().fit(frame, np.array(["high"] * 200, object), group), "could not convert string to float"),
        (lambda: shortly().fit(frame, np.stack([y, y], 1), group), "1d array"),
        (lambda: shortly().fit(frame.assign(c="u"), y, group), "could not convert string to float"),
        (lambda: model.set_params(steps=3), "Invalid parameter 'steps'"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    with pytest.raises(TypeError, match="Sparse data was passed for X"):
        shortly().fit(csr_matrix(x), y, group)
    answer = model.predict(frame, group)
    # The same numbers in other clothes.
    clothed = frame.astype("Float64"), pd.Series(y, dtype="Float64"), pd.Series(group, dtype="Int64")
    for other in (
        shortly().fit(*clothed).predict(clothed[0], clothed[2]),
        shortly().fit(frame, y.astype(object), group).predict(frame, group.astype(float)),
        shortly().fit(frame, y, group).predict(frame, pd.Series(group).astype("category")),
        clone(model).set_params(shot=3).set_params(shot=5).fit(frame, y, group).predict(frame, group),
    ):
        np.testing.assert_array_equal(other, answer)
    # A prior that is fitted anew forgets the group that the old one had been adapted to.
    again = model.adapt(frame[:3], y[:3]).fit(frame, y, group)
    with pytest.warns(RuntimeWarning, match="no groups"):
        np.testing.assert_array_equal(again.predict(frame), model.predict(frame, ["new"] * 200))


def test_learners_whose_steps_imply_no_prior_have_laplaces_posterior():
    x, y, group = lines(0, groups=20)
    model = shortly(learner="l2l", options={"steps": 4, "unroll": 2}).fit(x, y, group)
    assert model.knobs_.keys() == {"precision", "noise"}
    assert np.isfinite(model.predict(x, group, return_std=True)).all()
    with pytest.raises(ValueError, match="posterior must be 'laplace' or 'point' for this learner, got 'implicit'"):
        shortly(learner="l2l", options={"posterior": "implicit", "steps": 4, "unroll": 2}).fit(x, y, group)


@pytest.mark.slow
def test_classes_without_a_shown_row_share_their_mass_evenly():
    # Four classes, six rows of two of them: 1 / (6 + 4) for either other, whatever the shares in training.
    setting = Setting("protonet", (4,), (), 4, True)
    support = Batch(jnp.ones((6, 2)), jnp.array([0, 0, 0, 0, 0, 1]))
    learner = setting.made()
    params = learner.init(jax.random.key(0), Task(support, support))
    p = learner.predict(params, learner.adapt(params, support, None), jnp.ones((5, 2)), None).mean()
    np.testing.assert_allclose(p[:, 2:], 0.1, rtol=1e-5)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)


def test_defaults_hold_until_one_of_them_is_said():
    x, y, group = lines(0, groups=20)
    x = np.concatenate([x, x**2, x**3], 1)
    quick = Training(steps=2, meta_batch=2, chunk=2, validation_tasks=2)
    own = {"steps": 5, "rate": 0.1}
    assert traits_of("maml").on_table(3) == own
    assert traits_of("maml").on_table(50)["rate"] == 0.01
    assert traits_of("amortized_bml").on_table(3) == {}
    for options, expected in (
        (None, own), ({"posterior": "point"}, own | {"posterior": "point"}), ({"steps": 2}, {"steps": 2}),
    ):  # fmt: skip
        model = MetaRegressor(hidden=(), options=options, training=quick).fit(x, y, group)
        assert dict(model.setting_.options) == expected


def test_groups_named_by_dates_are_known_in_every_unit():
    x, y, group = lines(0, groups=12)
    days = np.datetime64("2024-01-01", "D") + group
    quick = Training(steps=2, meta_batch=2, chunk=2, validation_tasks=2)
    model = MetaRegressor(hidden=(), training=quick).fit(x, y, days)
    known = model.predict(x, days)
    np.testing.assert_array_equal(model.predict(x, days.astype("M8[ns]")), known)
    np.testing.assert_array_equal(model.predict(x, days.astype(str)), known)
