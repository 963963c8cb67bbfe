"""Arguments of `fit`, `evaluate` and calibration, and what sources hold: refused where they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical, Categories, Counts, Gaussian, Normals
from metaprior.core.types import Batch, Splits, Task, check_weight, weighted_mean, weights
from metaprior.evaluation.calibration import calibrate_softmax
from metaprior.evaluation.protocol import evaluate
from metaprior.learners import nil, protonet
from metaprior.networks import mlp
from metaprior.tasks import FixedTasks, array_tasks, hide_labels, sinusoid
from metaprior.training.loop import Training, fit
from scenarios import KEY, TINY, tiny_learner, tiny_splits

LEARNER, SPLITS = tiny_learner(), tiny_splits()
BRIEF = Training(steps=1, meta_batch=2, chunk=1, validation_tasks=2)


def classes(y, weight=None, tasks=4):
    """Fixed tasks of these labels, the same on both sides."""
    x = np.random.default_rng(0).normal(size=(tasks, len(y), 2)).astype(np.float32)
    batch = Batch(x, np.stack([y] * tasks), None if weight is None else np.stack([weight] * tasks))
    source = FixedTasks(Task(batch, batch))
    return Splits(source, source, source)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tasks": 2.5}, "tasks must be an integer of at least 1 or None, got 2.5"),
        ({"tasks": "3"}, "tasks must be an integer of at least 1 or None, got '3'"),
        ({"chunk": -1}, "chunk must be an integer of at least 1, got -1"),
        ({"chunk": 0}, "chunk must be an integer of at least 1, got 0"),
        ({"chunk": "a"}, "chunk must be an integer of at least 1, got 'a'"),
        ({"key": 0}, r"key must be a key, e.g. jax.random.key\(0\), got 0"),
        ({"source": SPLITS}, "source must be a TaskSource, got Splits"),
        ({"learner": "maml"}, "learner must be a Learner, got 'maml'"),
    ],
)
def test_evaluate_names_an_argument_of_the_wrong_type(given, says):
    arguments = {"learner": LEARNER, "params": {}, "source": SPLITS.test, "key": KEY} | given
    with pytest.raises(ValueError, match=says):
        evaluate(**arguments)


def test_evaluate_takes_parameters_and_not_what_training_ends_with():
    fitted = fit(LEARNER, SPLITS, BRIEF)
    with pytest.raises(ValueError, match=r"params must be a learner's parameters, .* Give its .best or .params"):
        evaluate(LEARNER, fitted, SPLITS.test, KEY, tasks=2)
    assert evaluate(LEARNER, fitted.best, SPLITS.test, jax.random.PRNGKey(0), tasks=2.0, chunk=2).tasks == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"splits": tuple(SPLITS)}, "splits must be a Splits"),
        ({"splits": SPLITS.train}, "splits must be a Splits"),
        ({"training": {"steps": 3}}, "training must be a Training or None"),
        ({"resume": "yes"}, "resume must be true or false"),
    ],
)
def test_fit_names_an_argument_of_the_wrong_type(given, says):
    with pytest.raises(ValueError, match=says):
        fit(**{"learner": LEARNER, "splits": SPLITS, "training": TINY} | given)


@pytest.mark.parametrize("q", [0, 1, -1, True, "a", float("nan")])
def test_a_quantile_is_between_0_and_1(q):
    for predictive in (Normals(jnp.zeros((1, 2, 1)), jnp.ones((1, 2, 1))), Counts(jnp.zeros((1, 2, 1)))):
        with pytest.raises(ValueError, match="q must be a finite number above 0 and below 1"):
            predictive.quantile(q)


def test_target_and_group_have_names_of_their_own():
    with pytest.raises(ValueError, match="names must be two different names"):
        array_tasks(np.ones((40, 1)), np.arange(40.0), np.repeat(np.arange(10), 4), names=("y", "y"))


def test_texts_and_impossible_weights_of_given_tasks_are_refused_before_anything_is_compiled():
    learner = protonet(mlp(2, (4,)), Categorical())
    for y, weight, says in (
        (np.array(["a", "b"] * 2), None, "tasks.support.y must be numbers, got <U1 values .'a'.*encode_labels"),
        (np.array(["a", 1] * 2, object), None, "tasks.support.y must be numbers, got object values"),
        (np.arange(4) % 2, np.full(4, 1e-38, np.float32), "weight must have a sum of 0 or from 1e-12 to 1e[+]12"),
        (np.arange(4) % 2, np.full(4, 1e38, np.float32), "weight must have a sum of 0 or from 1e-12 to 1e[+]12"),
        (np.arange(4) % 2, -np.ones(4, np.float32), "weight must be finite and at least 0, got -1"),
    ):
        splits = classes(y, weight)
        for call in (
            lambda s: fit(learner, s, BRIEF),
            lambda s: evaluate(learner, {}, s.test, KEY),
            lambda s: calibrate_softmax(learner, {}, s.test, KEY, tasks=4),
        ):
            with pytest.raises(ValueError, match=says):
                call(splits)


def test_truth_values_are_the_classes_0_and_1_throughout():
    learner = protonet(mlp(2, (4,)), Categorical())
    found = []
    for kind in (int, bool):
        splits = classes((np.arange(6) % 2).astype(kind))
        fitted = fit(learner, splits, BRIEF)
        found.append(evaluate(learner, fitted.best, splits.test, KEY).figures)
        assert "validation/accuracy" in fitted.history[-1]
    assert found[0] == found[1]


def test_weights_are_relative_in_means_and_their_sum_is_bounded():
    values = jnp.arange(3.0)
    for scale in (1e-12, 1e-3, 1e11):
        w = jnp.asarray([1.0, 2.0, 3.0]) * scale
        np.testing.assert_allclose(weighted_mean(values, Batch(values, values, w)), 8 / 6, rtol=1e-6)
    for bad in (1e-38, 1e-13, 1e12, 1e38):
        with pytest.raises(ValueError, match="weight must have a sum"):
            check_weight(np.full(6, bad, np.float32))
    check_weight(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\), got shape \(3, 1\)"):
        weights(Batch(values, values, jnp.ones((3, 1))))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.slow
def test_nil_scores_do_not_depend_on_the_scale_of_weights(softmax):
    learner = nil(mlp(3, (4,)), Categorical(), softmax=softmax)
    x, y = jax.random.normal(KEY, (6, 2)), jnp.arange(6) % 3
    params = learner.init(KEY, Task(Batch(x, y), Batch(x, y)))

    def answer(scale):
        support = Batch(x, y, jnp.full(6, scale))
        return learner.predict(params, learner.adapt(params, support, KEY), x, KEY).mean()

    np.testing.assert_allclose(answer(0.1), answer(1.0), rtol=1e-5)
    np.testing.assert_allclose(answer(0.0), jnp.full((6, 3), 1 / 3), rtol=1e-5)
    with pytest.raises(ValueError, match=r"likelihood must be Categorical\(\) for nil, .* got Gaussian"):
        nil(mlp(1, (4,)), Gaussian())


def test_only_labels_of_classes_are_hidden():
    with pytest.raises(ValueError, match="y must hold one class label per example, got float32"):
        hide_labels(sinusoid(shot=4, query=4), 0.5)
    for kind in (np.uint8, bool, int):
        support = hide_labels(classes((np.arange(6) % 2).astype(kind)), 0.34, "askable").test.sample(KEY, 1).support
        assert sorted(support.y[0].tolist()) == [-3, -3, -2, -2, 0, 1]


def broken(lost):
    """A learner whose predictions are NaN on tasks whose first input is above `lost`."""
    learner = protonet(mlp(2, (4,)), Categorical())

    def predict(params, posterior, x, key):
        logs = learner.predict(params, posterior, x, key).log_probs
        return Categories(jnp.where(x[0, 0] > lost, jnp.nan, logs))

    return learner._replace(predict=predict)


def test_predictions_of_nan_are_counted_in_the_report_and_calibrate_nothing():
    source = classes(np.arange(6) % 2, tasks=5).test
    params = broken(0.0).init(KEY, jax.tree.map(lambda leaf: leaf[0], source.tasks))
    first = np.sort(source.tasks.query.x[:, 0, 0])
    report = evaluate(broken(first[2]), params, source, KEY)
    assert "2 of 5 tasks have predictions of NaN: the learner diverged on them" in report.notes
    with pytest.raises(ValueError, match="12 of 30 predictions are NaN"):
        calibrate_softmax(broken(first[2]), params, source, KEY, tasks=5)
