"""Reports: against scikit-learn and scipy, and on predictions whose calibration is known."""

import json
from dataclasses import dataclass
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as ss
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure as Picture
from rich.console import Console
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from metaprior.cli.tables import curve_table, report_table
from metaprior.core.likelihoods import Categories, Counts, Gaussian, Normals
from metaprior.core.types import Batch, Learner, Task
from metaprior.evaluation.calibration import (
    auroc,
    brier,
    calibrate_softmax,
    calibration,
    expected_error,
    fit_knobs,
    fit_temperature,
    maximum_error,
    reliability,
    temperature_scaled,
)
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.evaluation.plots import (
    adaptation_curve,
    pit_histogram,
    prior_functions,
    regression_tasks,
    reliability_diagram,
    training_curve,
)
from metaprior.evaluation.protocol import evaluate, summarise
from metaprior.evaluation.report import Report
from metaprior.inference.posteriors import implicit
from metaprior.learners import maml
from metaprior.networks import mlp
from metaprior.referees.conjugate import exact_posterior
from metaprior.tasks import HiddenLabels, array_tasks, linear_gaussian
from metaprior.training.loop import fit
from scenarios import TINY, tiny_learner, tiny_splits


def test_golden_calibration_errors():
    confidence, correct = jnp.array([0.91, 0.81, 0.61, 0.57]), jnp.array([1.0, 0, 1, 1])
    table = reliability(confidence, correct, jnp.ones(4), bins=20)
    assert expected_error(table) == pytest.approx(0.43, abs=1e-6)
    assert maximum_error(table) == pytest.approx(0.81, abs=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 20, 200]))  # few sizes: each is compiled anew
@pytest.mark.slow
def test_calibration_errors_are_bounded_and_ordered(seed, n):
    rng = np.random.default_rng(seed)
    confidence, correct = jnp.asarray(rng.uniform(0.2, 1, n)), jnp.asarray(rng.integers(0, 2, n).astype(float))
    weight = jnp.asarray(rng.permutation(np.arange(n) % 2).astype(float))
    table = reliability(confidence, correct, weight)
    assert 0 <= expected_error(table) <= maximum_error(table) + 1e-6 <= 1 + 1e-6
    assert table.number.sum() == pytest.approx(float(weight.sum()))
    kept = weight > 0
    without = reliability(confidence[kept], correct[kept], jnp.ones(n // 2))
    np.testing.assert_allclose(without.accuracy, table.accuracy, atol=1e-6)


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(2), 50)
    y = rng.integers(0, 2, 50)
    both_classes = 2 * brier_score_loss(y, p[:, 1])
    np.testing.assert_allclose(brier(jnp.asarray(p), jnp.asarray(y)).mean(), both_classes, rtol=1e-5)
    ours = -Categories(jnp.log(jnp.asarray(p))[None]).log_prob(jnp.asarray(y)).mean()
    np.testing.assert_allclose(ours, log_loss(y, p), rtol=1e-5)


def test_intervals_are_those_of_the_mean():
    values = np.array([0.2, 0.4, 0.9])
    low, high = ss.t.interval(0.95, 2, values.mean(), ss.sem(values))
    assert figure_of(values).interval == pytest.approx((high - low) / 2)
    many = np.random.default_rng(0).normal(size=600)
    assert figure_of(many).interval == pytest.approx(1.96 * many.std() / 600**0.5, rel=0.005)  # the field's
    assert figure_of(values[:1]) == Figure(0.2, None)
    assert str(figure_of(values[:1])) == "0.2000"


def test_repeats_of_a_group_are_one_piece_of_evidence():
    values, groups = np.array([0.0, 1.0, 2.0, 4.0, 9.0, 9.0]), np.array([7, 7, 3, 3, 3, 5])
    assert figure_of(values, groups) == figure_of(np.array([5.0, 0.5, 9.0]))
    assert figure_of(values, np.zeros(6, int)).interval is None


def test_a_task_that_diverged_is_told_in_the_figure_and_by_no_warning(recwarn):
    assert str(figure_of(np.array([1.0, 2.0]))) == "1.5000 ± 6.3531"
    assert f"{figure_of(np.array([1.0, 2.0])):.2f}" == "1.50 ± 6.35"
    assert str(figure_of(np.array([0.0, 1.4e14]))) == "7e+13 ± 8.89e+14"
    assert str(figure_of(np.array([1.0, np.inf]))) == "inf ± nan"
    assert not recwarn.list


def exact_learner(theta, widen=1.0) -> Learner:
    """The exact predictive of the conjugate hierarchy, its sd multiplied by `widen`."""

    def predict(params, posterior, x, key):
        spread = jnp.einsum("nd,de,ne->n", x, posterior.covariance, x) + theta.noise**2
        return Normals((x @ posterior.mean)[None, :, None], widen**2 * spread[None, :, None])

    return Learner(lambda k, t: None, lambda p, s, k: exact_posterior(theta, s), predict, lambda p, t, k: (0.0, {}))


def test_an_exact_posterior_is_reported_as_calibrated_and_a_wrong_one_is_not():
    source = linear_gaussian(features=2, shot=3).test
    report = evaluate(exact_learner(source.theta), None, source, jax.random.key(0), tasks=400)
    for level in (50, 90, 95):
        covered = report.figures[f"coverage_{level}"]
        assert abs(covered.mean - level / 100) < 2 * covered.interval
    assert max(abs(density - 1) for density in report.pit) < 0.1
    assert report.curve == []
    wide = evaluate(exact_learner(source.theta, 2.0), None, source, jax.random.key(0), tasks=400)
    assert wide.figures["coverage_50"].mean > 0.7
    assert wide.figures["nll"].mean > report.figures["nll"].mean


def test_chunks_do_not_change_the_report():
    learner, splits = tiny_learner(), tiny_splits()
    params = learner.init(jax.random.key(0), jax.tree.map(lambda a: a[0], splits.train.sample(jax.random.key(0), 1)))
    reports = [
        evaluate(learner, params, splits.test, jax.random.key(1), tasks=11, chunk=chunk) for chunk in (1, 4, 11, 600)
    ]
    for report in reports[1:]:
        for name, figure in reports[0].figures.items():
            assert report.figures[name].mean == pytest.approx(figure.mean, rel=1e-4, abs=1e-6)
        assert len(report.curve) == len(reports[0].curve) == 2
    assert reports[0].tasks == 11
    with pytest.raises(ValueError, match="tasks must be an integer of at least 1 or None, got 0"):
        evaluate(learner, params, splits.test, jax.random.key(1), tasks=0)


class Padded:
    """Two good queries and, with weight 0, a senseless one."""

    def sample(self, key, n):
        def one(_):
            x, y = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1.0], [2.0], [1e6]])
            return Task(Batch(x, x), Batch(x, y, jnp.array([1.0, 1.0, 0.0])))

        return jax.vmap(one)(jax.random.split(key, n))


jax.tree_util.register_pytree_node(Padded, lambda p: ((), None), lambda _, __: Padded())


def test_padded_queries_do_not_count():
    identity = Learner(
        lambda k, t: None,
        lambda p, s, k: None,
        lambda p, q, x, k: Normals(x[None], jnp.ones_like(x)[None]),
        lambda p, t, k: (0.0, {}),
    )
    report = evaluate(identity, None, Padded(), jax.random.key(0), tasks=3)
    assert report.figures["mse"].mean == 0
    assert report.figures["coverage_90"].mean == 1
    assert sum(report.pit) == pytest.approx(20)


def test_reports_survive_json_and_print(tmp_path):
    learner, splits = tiny_learner(), tiny_splits()
    params = learner.init(jax.random.key(0), jax.tree.map(lambda a: a[0], splits.train.sample(jax.random.key(0), 1)))
    report = evaluate(learner, params, splits.test, jax.random.key(1), tasks=5)
    report.save(tmp_path / "report.json")
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert report_table(report).row_count == len(report.figures) + len(report.pooled)
    assert curve_table(report).row_count == 2
    lines = str(report).splitlines()
    assert lines[0] == "5 tasks"
    assert f"MSE {report.figures['mse']}" in " ".join(str(report).split())
    assert len(lines) == 1 + len(report.figures) + len(report.pooled) + len(report.notes)


def test_calibration_recovers_the_noise_and_never_ends_worse():
    source = linear_gaussian(features=2, shot=20, noise=0.5).validation
    theta = source.theta

    def build(knobs):
        exact = exact_learner(theta)

        def predict(params, posterior, x, key):
            spread = jnp.einsum("nd,de,ne->n", x, posterior.covariance, x)
            return Normals((x @ posterior.mean)[None, :, None], (spread + knobs["noise"] ** 2)[None, :, None])

        return exact._replace(predict=predict)

    found = fit_knobs(build, None, source, jax.random.key(0), {"noise": 3.0}, tasks=100)
    assert found.knobs["noise"] == pytest.approx(0.5, rel=0.05)
    assert found.nll_after < found.nll_before
    with pytest.raises(ValueError, match="positive"):
        fit_knobs(build, None, source, jax.random.key(0), {"noise": 0.0})


@jax.tree_util.register_static
class Outcomes:
    """Tasks without a support whose inputs are the logits of their outcomes."""

    def sample(self, key, n):
        key_x, key_y = jax.random.split(key)
        x = jax.random.normal(key_x, (n, 20, 3))
        nothing = Batch(x[:, :0], jnp.zeros((n, 0), int))
        return Task(nothing, Batch(x, jax.random.categorical(key_y, x)))


@pytest.mark.parametrize("sure", [0.25, 1.0, 4.0])
def test_the_softmax_temperature_undoes_what_is_too_sure(sure):
    def predict(params, posterior, x, key):
        # Two draws, the second of which says nothing: what is scaled is their mixture.
        return Categories(jax.nn.log_softmax(jnp.stack([sure * params * x, 0 * x])))

    boaster = exact_learner(None)._replace(adapt=lambda params, support, key: None, predict=predict)
    alone = boaster._replace(predict=lambda *given: Categories(predict(*given).log_probs[:1]))
    found = calibrate_softmax(alone, 1.0, Outcomes(), jax.random.key(0), tasks=300)
    assert found.knobs["softmax_temperature"] == pytest.approx(sure, rel=0.1)
    assert found.nll_after <= found.nll_before
    x, key = jnp.asarray([[2.0, 1.0, -1.0]]), jax.random.key(0)
    plain, scaled = boaster.predict(1.0, None, x, key), temperature_scaled(boaster, 2.0).predict(1.0, None, x, key)
    rooted = jnp.sqrt(plain.mean())
    np.testing.assert_allclose(scaled.mean(), rooted / rooted.sum(), rtol=1e-5)
    same = temperature_scaled(boaster, 1.0).predict(1.0, None, x, key)
    np.testing.assert_allclose(same.mean(), plain.mean(), rtol=1e-5)


def test_the_implicit_posterior_lowers_the_nll_of_a_trained_learner():
    splits = tiny_splits()
    model = mlp(1, (32, 32))

    def learner(**knobs):
        return maml(model, Gaussian(), steps=5, posterior=implicit(**knobs))

    trained = fit(learner(), splits, TINY.__class__(steps=1500, meta_batch=10, chunk=500, clip_norm=1.0))
    key = jax.random.key(3)
    point = calibration(maml(model, Gaussian(), steps=5), trained.params, splits.validation, key)
    around = calibration(learner(), trained.params, splits.validation, key)
    assert point.knobs.keys() == {"noise"}
    assert around.knobs.keys() == {"noise", "temperature"}
    by_hand = fit_knobs(
        lambda k: learner(**k), trained.params, splits.validation, key, {"temperature": 1.0, "noise": 0.5**0.5}
    )
    assert around == by_hand
    assert around.nll_after < point.nll_after - 0.02


def test_pictures_are_drawn(tmp_path):
    learner, splits = tiny_learner(), tiny_splits()
    fitted = fit(learner, splits, TINY)
    report = evaluate(learner, fitted.params, splits.test, jax.random.key(1), tasks=5)
    sure = [
        {"low": b / 20, "high": (b + 1) / 20, "count": float(b), "confidence": b / 20, "accuracy": 0.5}
        for b in range(20)
    ]
    classes = Report("classification", 5, report.figures, {"ece": 0.1, "mce": 0.2}, [], sure)
    tasks, key = splits.test.sample(jax.random.key(2), 2), jax.random.key(0)
    longer = maml(mlp(1, (8,), "tanh"), Gaussian(), steps=3)
    pictures = [
        reliability_diagram(classes),
        pit_histogram(report.pit),
        adaptation_curve(report),
        training_curve(fitted.history),
        regression_tasks(longer, fitted.params, tasks, key),
        regression_tasks(longer, fitted.params, tasks, key, each=True),
        regression_tasks(learner._replace(path=None), fitted.params, tasks, key),
        prior_functions(learner, fitted.params, tasks, key),
    ]
    for i, picture in enumerate(pictures):
        assert isinstance(picture, Picture)
        picture.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 5000
    titles = [[ax.get_title(loc="left") for ax in pictures[i].axes if ax.get_title(loc="left")] for i in (4, 5, 6)]
    every = ["before", "after 1 step", *(f"after {k} steps" for k in range(2, 4))]
    assert titles == [[every[0], every[1], every[-1]], every, ["adapted"]]
    with pytest.raises(ValueError, match="rows"):
        training_curve([])


def constant(learned) -> Learner:
    """Predicts `learned`(x), whatever the support."""
    return Learner(lambda k, t: None, lambda p, s, k: s.y.sum(), lambda p, q, x, k: learned(x), None)


def few_groups(shift: float = 0.0):
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 12)
    y = rng.normal(size=20)[groups] + 0.1 * rng.normal(size=len(groups)) + shift
    return array_tasks(rng.normal(size=(len(y), 1)), y, groups, shot=2, query=10, split=(0.3, 0.3, 0.4)).test


def test_each_group_is_judged_once_and_repeats_narrow_no_interval():
    learner, source = constant(lambda x: Normals(jnp.zeros_like(x)[None], jnp.ones_like(x)[None])), few_groups()
    once = evaluate(learner, None, source, jax.random.key(0))
    assert (once.tasks, once.groups) == (8, 8)
    often = evaluate(learner, None, source, jax.random.key(0), tasks=80)
    assert (often.tasks, often.groups) == (80, 8)
    assert often.figures["mse"].interval == pytest.approx(once.figures["mse"].interval, rel=0.1)
    assert "8 groups" in report_table(often).title
    assert "few groups" in often.notes[0]
    assert json.loads(often.to_json())["groups"] == 8
    alone = evaluate(learner, None, source, jax.random.key(0), tasks=1)
    assert alone.figures["mse"].interval is None
    assert Report.from_json(alone.to_json()) == alone
    Console(file=StringIO()).print(report_table(alone))
    groups, y = np.repeat(np.arange(12), 4), np.arange(48) % 2
    classes = array_tasks(np.ones((48, 1)), y, groups, shot=2, query=2, split=(0.3, 0.3, 0.4), classification=True).test
    told = constant(lambda x: Categories(jnp.log(jnp.full((1, x.shape[0], 2), 0.5))))
    hidden = evaluate(told, None, HiddenLabels(classes, 1.0), jax.random.key(0))
    assert hidden.tasks == hidden.groups == classes.group_count


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """One task over and over."""

    task: Task

    def sample(self, key, n):
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (n, *leaf.shape)), self.task)


def given_task(y, weight=None, support=None):
    x = jnp.zeros((len(y), 1))
    query = Batch(x, jnp.asarray(y), None if weight is None else jnp.asarray(weight, float))
    return Given(Task(Batch(x, query.y if support is None else jnp.asarray(support)), query))


def test_the_pit_of_several_targets_is_theirs_and_not_that_of_their_mean():
    y = jax.random.normal(jax.random.key(0), (4000, 2))
    learner = constant(lambda x: Normals(jnp.zeros((1, len(x), 2)), jnp.ones((1, len(x), 2))))
    report = evaluate(learner, None, given_task(y), jax.random.key(0), tasks=2)
    np.testing.assert_allclose(report.pit, 1, atol=0.2)


def test_the_pit_of_counts_is_randomised_and_the_report_says_so():
    y = jnp.asarray(np.random.default_rng(0).poisson(0.7, size=(8000, 1)), float)
    learner = constant(lambda x: Counts(jnp.full((1, len(x), 1), np.log(0.7))))
    report = evaluate(learner, None, given_task(y), jax.random.key(0), tasks=2)
    np.testing.assert_allclose(report.pit, 1, atol=0.2)
    assert any("targets are counts" in note for note in report.notes)


def test_weights_count_in_every_figure():
    y = jnp.asarray([[0.0], [2.0], [5.0]])
    learner = constant(lambda x: Normals(jnp.zeros((1, len(x), 1)), jnp.ones((1, len(x), 1))))
    tenth = evaluate(learner, None, given_task(y, [0.1, 0.3, 0]), jax.random.key(0), tasks=2)
    assert tenth.figures["mse"].mean == pytest.approx(3.0, rel=1e-6)
    assert sum(tenth.pit) == pytest.approx(20)
    assert max(tenth.pit) == pytest.approx(15)
    for weight in ([1, -1, 0], [1, np.nan, 0]):
        with pytest.raises(ValueError, match="weight must be finite and at least 0"):
            evaluate(learner, None, given_task(y, weight), jax.random.key(0), tasks=2)
    with pytest.raises(ValueError, match="nothing to judge"):
        evaluate(learner, None, given_task(y, [0, 0, 0]), jax.random.key(0), tasks=2)


def test_labels_that_are_no_class_are_named():
    learner = constant(lambda x: Categories(jnp.full((1, len(x), 3), -np.log(3.0))))
    for y, support, says in (([0, 3], [0, 1], "query: y must hold .* got 3"),
                             ([0, 1], [0, 7], "support: y must hold .* got 7"),
                             ([0, -1], [0, 1], "query: y must hold .* got -1")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            evaluate(learner, None, given_task(y, support=support), jax.random.key(0), tasks=2)
    # Of weight 0 it may be anything.
    fine = evaluate(learner, None, given_task([0, 3], [1, 0], [0, 0]), jax.random.key(0), tasks=2)
    assert fine.figures["nll"].mean == pytest.approx(np.log(3))
    # Labels below 0 in a support are hidden ones.
    evaluate(learner, None, given_task([0, 1], support=[0, -1]), jax.random.key(0), tasks=2)


def test_auroc_by_ranks_at_any_size():
    rng = np.random.default_rng(0)
    higher, lower = rng.normal(0.5, 1, 40_000).round(2), rng.normal(size=40_000).round(2)
    truth = roc_auc_score(np.repeat([1, 0], 40_000), np.concatenate([higher, lower]))
    assert auroc(jnp.asarray(higher), jnp.asarray(lower)) == pytest.approx(truth, abs=1e-5)
    assert auroc(jnp.ones(7), jnp.ones(13)) == 0.5
    assert auroc(jnp.ones(7), jnp.zeros(13)) == 1
    assert jnp.isnan(auroc(jnp.asarray([jnp.nan, 1]), jnp.zeros(2)))
    with pytest.raises(ValueError, match="both kinds"):
        auroc(jnp.zeros(0), jnp.ones(2))


def test_a_temperature_is_bounded_by_the_number_of_tasks():
    # 80 of 80 queries right, as one time in three where each is right with probability 0.987: temperature 1 is true.
    logits = np.array([5.0, 0.0, 0.0])
    rows, true = np.tile(logits - np.log(np.exp(logits).sum()), (80, 1)), np.exp(logits) / np.exp(logits).sum()

    def expected(temperature):
        scaled = logits / temperature
        return np.log(np.exp(scaled).sum()) - (true * scaled).sum()

    def fitted(tasks, **options):
        return fit_temperature(rows, np.zeros(80, int), np.ones(80), tasks, **options).knobs["softmax_temperature"]

    found = [fitted(tasks) for tasks in (5, 16, 80)]
    assert 1 > found[0] > found[1] > found[2]
    assert max(map(expected, found)) < 1.6 * expected(1.0)
    assert expected(fitted(16, prior_sd=np.inf)) > 5 * expected(1.0)
    with pytest.raises(ValueError, match=r"classes 0..2, got 3"):
        fit_temperature(rows, np.full(80, 3), np.ones(80), 16)


def test_answers_that_are_nan_are_not_scored_as_answers():
    learner, splits = tiny_learner(), tiny_splits()
    params = learner.init(jax.random.key(0), jax.tree.map(lambda a: a[0], splits.train.sample(jax.random.key(0), 1)))
    lost = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    figures = evaluate(learner, lost, splits.test, jax.random.key(1), tasks=4).figures
    assert all(np.isnan(figures[name].mean) for name in ("mse", "nll", "coverage_50", "coverage_95"))


def test_the_correlation_with_a_constant_width_is_undefined():
    random = np.random.default_rng(0)
    error, weight = random.exponential(size=(3, 7)), np.ones((3, 7))

    def report_of(variance):
        scores = {"mse": error, "nll": np.zeros((3, 7)), "variance": variance, "pit": random.uniform(size=(3, 7, 1))}
        return summarise(scores, {}, weight)

    name = "variance_error_correlation"
    # As float32 rounds a width that depends on nothing.
    rounded = (0.3 * (1 + 1e-7 * random.normal(size=(3, 7)))).astype(np.float32)
    for constant in (np.full((3, 7), 0.3), rounded):
        report = report_of(constant)
        assert report.pooled[name] is None
        assert json.loads(report.to_json())["pooled"][name] is None
        assert Report.from_json(report.to_json()) == report
        cells = [list(column.cells) for column in report_table(report).columns]
        assert cells[1][cells[0].index("variance error correlation")] == "-"
    assert report_of(error**2).pooled[name] == pytest.approx(1)
