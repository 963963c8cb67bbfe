"""Tasks of several families: the protocol, mixtures, ARML's 2-D functions, and the figures of each family."""

import json
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import t as student

import metaprior as mp
from metaprior.cli.tables import family_table
from metaprior.core.likelihoods import Gaussian
from metaprior.core.types import FamilySource, families_of, group_order
from metaprior.evaluation.figures import Figure, figure_of, title_of
from metaprior.evaluation.report import Report
from metaprior.experiments.recipe import load_recipe, most_ways, recipe_from_dict
from metaprior.experiments.results import Result, figures_of, statuses
from metaprior.learners.registry import make_learner
from metaprior.networks import mlp
from metaprior.tasks import class_pool, families_2d, hide_labels, mixture, mixture_of, sinusoid
from metaprior.tasks.synthetic.families_2d import FAMILIES, NAMES

LINEAR = {  # the families that are linear in their parameters, and the functions that span them
    "line": lambda x, z: (x, 1 + 0 * x),
    "quadratic": lambda x, z: (x**2, x, 1 + 0 * x),
    "cubic": lambda x, z: (x**3, x**2, x, 1 + 0 * x),
    "quadratic_surface": lambda x, z: (x**2, z**2),
}


def judged(splits) -> Any:
    return splits.test


def queries(name, tasks=40, noise=0.0):
    source = judged(families_2d(families=(name,), noise=noise, test_query=60))
    batch = jax.vmap(lambda key: source.of_family(key, jnp.asarray(0)))(
        jax.random.split(jax.random.key(3), tasks)
    ).query
    return np.asarray(batch.x, float), np.asarray(batch.y, float)[..., 0]


@pytest.mark.parametrize("name", LINEAR)
def test_linear_families_lie_in_their_span_with_the_stated_coefficients(name):
    for x, y in zip(*queries(name), strict=True):
        basis = np.stack(LINEAR[name](*x.T), -1)
        coefficients = np.linalg.lstsq(basis, y, rcond=None)[0]
        np.testing.assert_allclose(basis @ coefficients, y, atol=1e-4)
        for value, (low, high) in zip(coefficients, FAMILIES[name].intervals, strict=True):
            assert low - 1e-4 <= value <= high + 1e-4


def test_sinusoids_have_the_stated_amplitudes_and_frequencies():
    for x, y in zip(*queries("sinusoid", 20), strict=True):
        fits = []
        for frequency in np.linspace(0.8, 1.2, 81):
            basis = np.stack([np.sin(frequency * x[:, 0]), np.cos(frequency * x[:, 0])], -1)
            coefficients = np.linalg.lstsq(basis, y, rcond=None)[0]
            fits.append((np.abs(basis @ coefficients - y).max(), np.hypot(*coefficients)))
        error, amplitude = min(fits)
        assert error < 0.05
        assert 0.09 < amplitude < 5.05


def test_ripples_depend_on_the_radius():
    for x, y in zip(*queries("ripple", 20), strict=True):
        square = (x**2).sum(-1)
        rest = y - np.sin(-np.linspace(-0.2, 0.2, 801)[:, None] * square)
        best = rest.std(-1).argmin()
        assert rest.std(-1)[best] < 0.02
        assert -3.02 < rest[best].mean() < 3.02


def test_functions_of_one_variable_have_one_as_second_input_and_noise_has_its_deviation():
    for name, formula in FAMILIES.items():
        x, _ = queries(name)
        assert (x[..., 1] == 1).all() == (formula.inputs == 1)
        assert np.abs(x[..., 0]).max() <= 5
    x, y = queries("line", 300, noise=0.3)
    rest = [b - np.polyval(np.polyfit(a[:, 0], b, 1), a[:, 0]) for a, b in zip(x, y, strict=True)]
    assert abs(np.sqrt((np.square(rest)).sum() / (300 * 58)) - 0.3) < 0.005


def test_all_families_are_drawn_equally_often_and_the_splits_differ():
    splits = families_2d(oracle=True, noise=0.0)
    tasks = [source.sample(jax.random.key(0), 1200) for source in splits]
    counts = np.asarray(tasks[0].support.x[:, 0, 2:]).sum(0)
    assert counts.sum() == 1200
    assert np.abs(counts - 200).max() < 60  # more than four standard deviations
    np.testing.assert_array_equal(tasks[0].support.x[:, 0, 2:], tasks[0].query.x[:, -1, 2:])
    assert not np.isclose(tasks[0].support.y, tasks[1].support.y).any(-1).all()


def test_a_chosen_family_keeps_its_place_in_the_oracle():
    task = families_2d(families=("ripple",), oracle=True).train.sample(jax.random.key(0), 3)
    np.testing.assert_array_equal(task.support.x[..., 2:].argmax(-1), NAMES.index("ripple"))


@pytest.mark.slow
def test_figures_of_families_average_to_the_overall_ones():
    source = families_2d(test_query=5).test
    assert isinstance(source, FamilySource)
    learner = make_learner("maml", mlp(1, (8,)), Gaussian(), steps=1)
    params = learner.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], source.sample(jax.random.key(0), 1)))
    report = mp.evaluate(learner, params, source, jax.random.key(1), tasks=60)
    assert tuple(report.families) == NAMES
    means = [row["mse"].mean for row in report.families.values()]
    np.testing.assert_allclose(np.mean(means), report.figures["mse"].mean, rtol=1e-6)
    assert report.families["quadratic_surface"]["mse"].mean > 4 * report.families["ripple"]["mse"].mean
    intervals: Any = [row["mse"].interval for row in report.families.values()]
    within = np.sqrt(np.mean(np.square(intervals) / student.ppf(0.975, 9) ** 2 * 10))  # the sd within families
    expected: Any = report.figures["mse"].interval
    np.testing.assert_allclose(expected, student.ppf(0.975, 54) * within / np.sqrt(60), rtol=1e-6)
    assert Report.from_json(report.to_json()) == report
    assert json.loads(json.dumps(asdict(report)))["families"]["line"]["mse"]["interval"] > 0
    assert "MSE of line" in str(report)
    table = family_table(report)
    assert table is not None
    assert [column.header for column in table.columns][:3] == ["family", "MSE", "NLL"]
    assert table.row_count == 7


def test_a_report_of_one_family_has_no_families():
    assert families_of(sinusoid().test) == ()
    assert family_table(Report("regression", 1, {"mse": Figure(1.0, None)}, {})) is None


def test_the_interval_is_that_of_the_stratified_mean():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        families = np.repeat([0, 1, 2], 5)
        figure = figure_of(np.array([-9.0, 0.0, 9.0])[families] + rng.normal(size=15), None, families)
        assert figure.interval is not None
        covered.append(abs(figure.mean) < figure.interval)
    assert 0.92 < np.mean(covered) < 0.98
    alone = figure_of(np.array([1.0, 2.0, 5.0]), None, np.arange(3))  # no spread within families is known
    assert alone == figure_of(np.array([1.0, 2.0, 5.0]))


def test_published_figures_of_families_are_compared():
    assert title_of("mse of quadratic_surface") == "MSE of quadratic_surface"
    rows = {"line": {"mse": Figure(0.2, 0.01)}, "cubic": {"mse": Figure(0.9, 0.01)}}
    result = Result("maml", "families-2d", Report("regression", 1000, {"mse": Figure(0.55, 0.1)}, {}, families=rows))
    assert figures_of(result)["mse of cubic"] == Figure(0.9, 0.01)
    assert statuses(result)["mse"][1].kind == "reached"


def test_the_order_of_tasks_visits_each_family_equally_often():
    source = families_2d().test
    assert np.bincount(group_order(source, jax.random.key(0), 20), minlength=6).tolist().count(3) == 4


def test_mixtures_of_sources_and_of_class_pools():
    waves = {"name": "sinusoid", "shot": 5, "test_query": 7}
    source = judged(mixture(families={"wave": waves, "line": {"name": "linear", "test_query": 7}}, oracle=True))
    task = source.sample(jax.random.key(0), 6)
    assert task.query.x.shape == (6, 7, 3)
    for i, name in enumerate(source.families):
        task = jax.jit(source.of_family)(jax.random.key(1), jnp.asarray(i))
        np.testing.assert_array_equal(task.support.x[:, 1:], np.broadcast_to(np.eye(2)[i], (5, 2)))
        slopes = np.diff(np.asarray(task.query.y[:, 0])[np.argsort(task.query.x[:, 0])])
        assert slopes.size == 6, name


def shades(value):
    """Tasks of classes whose images all have one shade."""
    pool = class_pool(np.full((12, 4, 4, 1), value, np.uint8), [3] * 4, way=2, shot=2, query=1)
    return mp.Splits(pool, pool, pool)


def test_families_pass_through_hidden_labels():
    source = judged(hide_labels(mixture_of({"dark": shades(0), "light": shades(255)}), 0.5))
    assert families_of(source) == ("dark", "light")
    for i, shade in enumerate((0, 1)):
        task = source.of_family(jax.random.key(0), i)
        assert (task.support.x == shade).all()
        assert task.support.known.sum() == 2
    with pytest.raises(ValueError, match=r"family must be the index of a family .0 dark, 1 light., got 2"):
        source.of_family(jax.random.key(0), 2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: families_2d(families=("line", "cubics")), "did you mean 'cubic'"),
        (lambda: families_2d(families=("line", "line")), "none twice"),
        (lambda: families_2d(families=()), "at least one name"),
        (lambda: judged(families_2d()).of_family(jax.random.key(0), 6), "family must be the index .*5 ripple.*got 6"),
        (lambda: judged(families_2d()).of_family(jax.random.key(0), -1), "got -1"),
        (lambda: judged(families_2d()).of_family(jax.random.key(0), 1.0), "got 1.0"),
        (lambda: mixture_of({"one": sinusoid()}), "at least two, got one"),
        (lambda: mixture_of({"a": sinusoid(), "b": sinusoid(shot=3)}), "families.b must have tasks of the same shapes"),
        (lambda: mixture_of({"a": sinusoid(), "b": families_2d()}), "families.b must have no families"),
        (lambda: mixture(families={"a": {"name": "sinusoids"}, "b": {}}), "did you mean 'sinusoid'"),
        (lambda: mixture(families={"a": {"shot": 3}}), "families.a.name is missing"),
        (lambda: mixture(families={"a": {"name": "sinusoid", "shots": 3}}), "families.a.shots .*'shot'"),
    ],
)  # fmt: skip
def test_bad_families(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_the_recipe_and_the_ways_of_a_mixture():
    recipe = load_recipe("families-2d")
    assert recipe.published["maml"][0]["mse"] == {"mean": 2.29, "interval": 0.16}
    families = {"a": {"name": "omniglot", "way": 5}, "b": {"name": "omniglot", "way": 3}}
    assert most_ways(recipe_from_dict({"name": "m", "tasks": {"name": "mixture", "families": families}})) == 5
