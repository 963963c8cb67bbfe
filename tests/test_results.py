"""Results as data: statuses, published figures, pages, and `metaprior reproduce` as a user runs it."""

import json
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from metaprior.evaluation.figures import Figure
from metaprior.evaluation.report import Report
from metaprior.experiments.pages import benchmark_page, headlines, result_table, suite_page, with_headlines, write_pages
from metaprior.experiments.recipe import load_recipe, recipe_from_dict, recipe_names, with_overrides
from metaprior.experiments.results import (
    Result,
    published_for,
    published_in,
    read_result,
    read_suite,
    recipe_hash,
    status_of,
    statuses,
)
from metaprior.experiments.runs import Run
from metaprior.experiments.suite import load_suite, suite_names
from metaprior.training.loop import fit
from scenarios import TINY, run_cli, tiny_learner, tiny_splits

ROOT = Path(__file__).parents[1]
REPORT = Report("classification", 600, {"accuracy": Figure(0.9836, 0.0021)}, {"ece": 0.0016})
MAML = Result("maml", "omniglot-5way-1shot", REPORT, steps=60000, asked=60000)

SUITE = """
title = "Two small sines"
recipe = "sinusoid"

[runs.maml]
set = SMALL

[runs.shots]
learner = "maml"
judge = {"tasks.shot" = 5}
set = SMALL
""".replace(
    "SMALL",
    '{"training.steps" = 40, "training.chunk" = 10, "training.meta_batch" = 2, "training.validation_tasks" = 4, '
    '"evaluation.tasks" = 6, "evaluation.course" = false, "network.hidden" = [4], "learner.test_steps" = 1}',
)


@pytest.mark.parametrize(
    ("ours", "published", "lower", "expected"),
    [
        ((0.99, 0.001), (0.987, 0.004), False, "reached"),
        ((0.987, None), (0.987, None), False, "reached"),
        ((0.9836, 0.0021), (0.987, 0.004), False, "within the interval"),  # ours lies in theirs
        ((0.9870, 0.0020), (0.988, None), False, "within the interval"),  # theirs lies in ours
        ((0.9959, 0.0011), (0.997, None), False, "within the interval"),  # on the edge
        ((0.95, 0.02), (0.99, 0.03), False, "below"),  # the intervals overlap, and neither holds the other's mean
        ((0.9901, 0.0018), (0.992, None), False, "below"),
        ((0.9, None), (0.95, None), False, "below"),
        ((0.04, None), (0.05, None), True, "reached"),
        ((0.06, 0.02), (0.05, None), True, "within the interval"),
        ((0.06, None), (0.05, None), True, "below"),
        ((math.nan, 0.1), (0.5, None), False, "below"),
        ((math.inf, math.nan), (0.5, None), True, "below"),
        ((-math.inf, None), (0.5, None), True, "below"),  # a loss of minus infinity is no success
    ],
)
def test_a_status_follows_from_both_figures(ours, published, lower, expected):
    assert status_of(Figure(*ours), Figure(*published), lower=lower) == expected


def published(recipe, learner=None, options=None, split="test"):
    base = with_overrides(load_recipe(recipe), learner)
    return published_for(with_overrides(base, None, options), base, split)


def told(result):
    return {name: str(status) for name, (_, status) in statuses(result).items()}


def test_a_result_is_compared_with_the_figure_of_its_own_tasks():
    assert told(MAML) == {"accuracy": "within the interval"}
    shorter = replace(MAML, steps=6000, asked=6000)
    assert told(shorter) == {"accuracy": "within the interval, after 10 % of the recipe's tasks"}
    few = replace(MAML, steps=6000, asked=6000, overrides={"training.meta_batch": 8})
    assert told(few) == {"accuracy": "within the interval, after 2.5 % of the recipe's tasks"}
    assert told(replace(MAML, learner="meta_sgd")) == {"": "not comparable: no published figure"}
    assert told(replace(MAML, judged={"tasks.way": 20})) == {
        "": "not comparable: tasks.way is 20, the published figure is for 5"
    }
    free = replace(MAML, judged={"tasks.test_query": 5}, overrides={"tasks.query": 3})
    assert told(free) == {"accuracy": "within the interval"}
    assert "split 'validation'" in told(replace(MAML, split="validation"))[""]
    assert "the only published figures are accuracy" in told(replace(MAML, report=replace(REPORT, figures={})))[""]
    assert told(replace(MAML, recipe=None)) == {"": "not comparable: no published figure"}


def test_what_was_cut_short_is_no_verdict():
    cut = replace(MAML, steps=600, report=replace(REPORT, figures={"accuracy": Figure(0.999, 0.001)}))
    assert told(cut) == {"accuracy": "cut short (reached so far), after 1 % of the recipe's tasks"}
    worse = replace(cut, report=replace(REPORT, figures={"accuracy": Figure(0.5, 0.1)}))
    assert "cut short (below so far)" in told(worse)["accuracy"]
    assert told(replace(cut, learner="meta_sgd"))[""].endswith("; cut short")
    assert "600 of 60,000" in result_table({"x": cut})


def test_the_options_of_a_published_figure_choose_it():
    way, shot = {"tasks.way": 20}, {"tasks.shot": 5}
    for judged, accuracy in (({}, 0.988), (shot, 0.997), (way, 0.96), (way | shot, 0.989)):
        assert published("omniglot-protonet", None, judged).figures["accuracy"].mean == accuracy
    assert "learner.context is None" in published("miniimagenet-protonet", "matching")
    full = published("miniimagenet-protonet", "matching", {"learner.context": True})
    assert full.figures["accuracy"].mean == 0.4356
    asking = {"tasks.unlabelled": "askable", "learner.ask": "attention"}
    assert published("omniglot-5way-5shot-semi", None, asking).figures["accuracy"].mean == 0.9962
    assert published("omniglot-siamese").figures.keys() == {"verification"}
    assert published("omniglot-siamese", split="one_shot").figures.keys() == {"accuracy"}


def test_a_recipe_that_has_changed_since_is_not_compared(tmp_path, monkeypatch):
    now = recipe_hash(with_overrides(load_recipe("omniglot-5way-1shot"), "maml"))
    assert told(replace(MAML, recipe_hash=now)) == {"accuracy": "within the interval"}
    assert told(replace(MAML, recipe_hash="0" * 16)) == {"": "not comparable: the recipe has changed since"}
    # A file of one's own that is called as a built-in recipe is not that recipe.
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "src/metaprior/experiments/recipes/omniglot-5way-1shot.toml").read_text()
    better = text.replace("accuracy = {mean = 0.987, interval = 0.004}", "accuracy = 0.99")
    Path("omniglot-5way-1shot.toml").write_text(better)
    assert told(replace(MAML, recipe="omniglot-5way-1shot.toml")) == {"accuracy": "below"}
    assert "tasks.shot is 3" in told(replace(MAML, recipe="omniglot-5way-1shot.toml", judged={"tasks.shot": 3}))[""]


def test_few_tasks_are_said():
    few = replace(MAML, report=replace(REPORT, tasks=20, figures={"accuracy": Figure(0.9, 0.2)}))
    assert told(few) == {"accuracy": "within the interval, evaluated on 20 of 600 tasks"}


def test_a_calibrated_report_is_not_held_against_uncalibrated_figures():
    report = replace(REPORT, figures={"accuracy": Figure(0.378, 0.013)}, pooled={"ece": 0.0074, "mce": 0.2})
    plain = Result("maml", "miniimagenet-5way-1shot", report)
    assert statuses(plain).keys() == {"accuracy", "ece", "mce"}
    assert statuses(replace(plain, calibrated=True)).keys() == {"accuracy"}


@pytest.mark.parametrize("name", recipe_names())
def test_published_figures_are_of_the_reports_names_and_units(name):
    for learner in (recipe := load_recipe(name)).published:
        for entry in published_in(recipe, learner):
            assert entry.source
            assert entry.figures
            assert published(name, learner, entry.when, entry.split) == entry


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"accuracy": 98.7}], "published.maml.accuracy must be a share from 0 to 1, got 98.7"),
        ([{"accuracy": "98.7 %"}], "published.maml.accuracy must be a finite number"),
        ([{"accuracy": {"mean": 0.9, "sd": 0.1}}], "published.maml.accuracy must be a number or have a mean"),
        ([{"accuracy": {"mean": 0.9, "interval": -1}}], "maml.accuracy must be a finite number of at least 0"),
        (98.7, "published.maml must be"),
        ([{"accuracy": 0.9, "when": {"task.way": 3}}], "task.way"),
    ],
)
def test_published_figures_that_cannot_be_are_named(given, message):
    table = {"name": "mine", "tasks": {"name": "sinusoid"}, "published": {"maml": given}}
    with pytest.raises(ValueError, match=message):
        published_for(recipe := recipe_from_dict(table), recipe)


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = replace(MAML, overrides={"a.b": 3}, command=["metaprior train x"], run={"id": "a"}, minutes=1.5, seed=0)
    result.save(tmp_path / "suite" / "x.json")
    assert read_result(tmp_path / "suite" / "x.json") == result
    wrong = (({"stepz": 3}, "stepz is not part of a result"), ({"report": 3}, "report"), ({"minutes": "3"}, "minutes"))
    for damage, message in wrong:
        (tmp_path / "y.json").write_text(json.dumps(asdict(result) | damage))
        with pytest.raises(ValueError, match=message):
            read_result(tmp_path / "y.json")


def test_a_hash_is_of_what_is_trained_and_judged():
    recipe = load_recipe("sinusoid")
    assert recipe_hash(replace(recipe, description="x", published={"maml": []})) == recipe_hash(recipe)
    assert recipe_hash(with_overrides(recipe, None, {"training.steps": 7})) != recipe_hash(recipe)
    assert recipe_hash(with_overrides(recipe, None, {"learner.rate": 0.5})) != recipe_hash(recipe)
    others = recipe.learners | {"fomaml": {"rate": 0.5}}
    assert recipe_hash(replace(recipe, learners=others)) == recipe_hash(recipe)


def test_training_ends_when_its_time_is_over_and_goes_on(tmp_path):
    training = replace(TINY, steps=12, chunk=3)
    whole = fit(tiny_learner(), tiny_splits(), training)
    with Run.create(tmp_path / "run", {"name": "x"}) as run:
        cut = fit(tiny_learner(), tiny_splits(), training, run=run, seconds=0)
    assert (int(cut.state.step), cut.interrupted) == (3, 0)
    assert "validation/nll" in cut.history[-1]
    with Run.resume(tmp_path / "run") as run:
        after = fit(tiny_learner(), tiny_splits(), training, run=run, resume=True, seconds=3600)
    assert int(after.state.step) == 12
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_suite_is_reproduced_within_a_budget_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SUITE)
    run_cli("reproduce", "small.toml", "--budget", "0.001s", "--only", "maml")
    out = " ".join(capsys.readouterr().out.split())
    assert "maml: cut short by its budget at 10 of 40 meta-steps" in out
    found = read_suite(tmp_path / "results" / "small")
    assert {name: (r.steps, r.asked, r.cut) for name, r in found.items()} == {"maml": (10, 40, True)}
    assert "cut short" in suite_page(tmp_path / "results" / "small")
    run_cli("reproduce", "small.toml", "--budget", "10m")
    capsys.readouterr()
    found = read_suite(tmp_path / "results" / "small")
    maml, shots = found["maml"], found["shots"]
    assert (maml.steps, maml.cut, shots.cut) == (40, False, False)
    assert (maml.seed, maml.report.tasks, maml.recipe, maml.learner) == (0, 6, "sinusoid", "maml")
    assert maml.run["id"] == shots.run["id"]  # one training, judged twice
    assert maml.report.figures["mse"] != shots.report.figures["mse"]
    assert maml.minutes > 0
    assert maml.device
    assert maml.recipe_hash == recipe_hash(with_overrides(load_recipe("sinusoid"), "maml", maml.overrides))
    # The command that a result names gives its figures.
    train, judge = (shlex.split(line)[1:] for line in maml.command)
    run_cli(*["other" if word == judge[1] else word for word in train])
    run_cli(*["other" if word == judge[1] else word for word in judge])
    again = Report.from_json((tmp_path / "other" / "report-own.json").read_text())
    assert again.figures["mse"].mean == pytest.approx(maml.report.figures["mse"].mean, rel=1e-4)
    before = (tmp_path / "results" / "small" / "maml.json").read_text()
    run_cli("reproduce", "small.toml", "--budget", "10m")
    assert capsys.readouterr().out.count("already done") == 2
    assert (tmp_path / "results" / "small" / "maml.json").read_text() == before
    run_cli("results")
    page = (tmp_path / "docs" / "results" / "small.md").read_text()
    assert "| `maml` |" in page
    assert "†" not in page


@pytest.mark.slow
def test_a_suite_can_give_each_run_minutes_of_a_core(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timed.toml").write_text(SUITE.replace("[runs", "minutes = 0.0001\n\n[runs", 1))
    run_cli("reproduce", "timed.toml", "--budget", "1m", code=2)
    assert "--budget must be left out" in " ".join(capsys.readouterr().err.split())
    run_cli("reproduce", "timed.toml", "--only", "maml")
    maml = read_suite(tmp_path / "results" / "timed")["maml"]
    assert (maml.steps, maml.asked, maml.cut, maml.budget) == (10, 10, False, 0.0001)
    assert maml.minutes > 0
    assert maml.milliseconds > 0
    run_cli("reproduce", "timed.toml", "--only", "maml")
    assert "already done" in capsys.readouterr().out


def test_runs_of_one_budget_are_sorted_by_their_first_figure():
    def named(name, mean, budget):
        report = replace(MAML.report, figures={"mse": Figure(mean, 0.1)})
        return replace(MAML, title=name, report=report, budget=budget, milliseconds=1.5)

    three = {name: named(name, mean, 8.0) for name, mean in (("b", 2.0), ("lost", float("nan")), ("a", 1.0))}
    rows = result_table(three).splitlines()
    assert [row.split("|")[1].split()[0] for row in rows[2:5]] == ["a", "b", "lost"]
    assert "| ms a task |" in rows[0]
    rows = result_table(three | {"b": named("b", 2.0, None)}).splitlines()
    assert [row.split("|")[1].split()[0] for row in rows[2:5]] == ["b", "lost", "a"]


def test_a_figure_whose_run_is_lost_is_not_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SUITE)
    replace(MAML, run=None).save(tmp_path / "results" / "small" / "maml.json")
    run_cli("reproduce", "small.toml", "--budget", "1s", code=2)
    assert "but its run was not kept" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing",), "suite must be one of"),
        (("small.toml", "--budget", "10"), "--budget must be a time such as 90s"),
        (("small.toml", "--budget", "0m"), "--budget must be a time"),
        (("small.toml", "--only", "mamm"), "maml"),
        (("wrong.toml",), "learner.stepz is not an option"),
        (("empty.toml",), "runs is missing"),
        (("none.toml",), "got none.toml: no such file"),
    ],
)
def test_what_cannot_be_reproduced_is_said_before_any_training(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SUITE)
    (tmp_path / "empty.toml").write_text('title = "x"')
    (tmp_path / "wrong.toml").write_text(SUITE.replace('"tasks.shot" = 5', '"learner.stepz" = 5'))
    run_cli("reproduce", *words, code=2)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", suite_names())
def test_the_librarys_suites_can_be_loaded(name):
    assert load_suite(name).runs


@pytest.mark.slow
def test_the_pages_are_those_of_the_data(tmp_path):
    """Stale pages fail: run `make results`."""
    write_pages(ROOT / "results", ROOT / "benchmarks" / "results", tmp_path)
    kept = {path.name: path.read_text() for path in (ROOT / "docs" / "results").glob("*.md")}
    assert {path.name: path.read_text() for path in tmp_path.glob("*.md")} == kept
    page = (ROOT / "RESULTS.md").read_text()
    assert with_headlines(page, headlines(ROOT / "results", "docs/results/")) == page
    assert "| status |" in page
    nav = (ROOT / "mkdocs.yml").read_text()
    assert all(f"results/{name}" in nav for name in kept)


def test_benchmarks_are_a_page(tmp_path):
    rows = [{"x": "`a`", "ms": [1.5, 2000]}]
    (tmp_path / "a.json").write_text(json.dumps({"title": "T", "about": "A.", "rows": rows}))
    assert "| `a` | 1.5 / 2,000 |" in benchmark_page(tmp_path)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ValueError, match=r"b\.json must hold the measurements of a benchmark"):
        benchmark_page(tmp_path)
