"""A run opened in Python says what the command line says."""

import csv
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaprior as mp
from metaprior.tasks import read_columns
from scenarios import run_cli, write_csv

SETTINGS = ["training.steps=20", "training.meta_batch=4", "training.chunk=20", "training.validation_tasks=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on a table of lines, with its calibrated report, and files of a new group."""
    folder = tmp_path_factory.mktemp("opened")
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(20), 8)
    x = rng.uniform(0, 10, 160)
    y = 250 + rng.normal(0, 5, 20)[group] + 10 * x + rng.normal(0, 1, 160)
    table = write_csv(folder / "table.csv", zip(group, x, y, strict=True), ("group", "dose", "response"))
    recipe = folder / "lines.toml"
    recipe.write_text(
        f'[tasks]\nname = "table"\npath = "{table}"\ngroup = "group"\ntarget = "response"\nshot = 4\nquery = 4\n'
        '[network]\nname = "mlp"\nhidden = [8]\n[likelihood]\nname = "gaussian"\n[learners.maml]\nrate = 0.05\n'
    )
    run_cli("train", recipe, "--out", folder / "run", "--set", *SETTINGS)
    run_cli("evaluate", folder / "run", "--tasks", 4, "--no-memorisation", "--posterior", "implicit", "--calibrated")
    write_csv(folder / "support.csv", [(1, 255), (4, 291), (8, 330)], ("dose", "response"))
    write_csv(folder / "query.csv", [(2,), (9,)], ("dose",))
    return folder


@pytest.mark.parametrize("asked", [{}, {"posterior": "implicit"}, {"posterior": "implicit", "calibrated": True}])
def test_a_loaded_run_predicts_as_adapt_does(folder, asked):
    options = ["--posterior", "implicit"] * ("posterior" in asked) + ["--calibrated"] * ("calibrated" in asked)
    out = folder / f"told{len(asked)}.csv"
    run_cli("adapt", folder / "run", "--support", folder / "support.csv", "--query", folder / "query.csv",
            "--out", out, *options)  # fmt: skip
    with out.open() as file:
        told = [[float(v) for k, v in row.items() if k != "query"] for row in csv.DictReader(file)]
    run = mp.load(folder / "run", **asked)
    support = mp.Batch(*map(jnp.asarray, run.preparation.examples(read_columns(folder / "support.csv"), labelled=True)))
    x, _ = run.preparation.examples(read_columns(folder / "query.csv"), labelled=False)
    posterior = run.learner.adapt(run.params, support, jax.random.key(0))
    predictive = run.preparation.predictive(run.learner.predict(run.params, posterior, x, jax.random.key(0)))
    found = [predictive.mean(), predictive.quantile(0.05), predictive.quantile(0.95)]
    for values in found:
        assert any(np.allclose(values[:, 0], column, rtol=1e-5) for column in zip(*told, strict=True))


def test_a_loaded_run_has_the_tasks_of_its_training_and_can_be_judged(folder):
    run = mp.load(str(folder / "run"), settings=["evaluation.tasks=3"])
    assert run.recipe.learner == "maml"
    assert run.posterior is None
    assert run.splits.test.group_count == 3
    report = mp.evaluate(run.learner, run.params, run.splits.test, jax.random.key(0))
    assert report.target == "response"
    assert run.knobs() == {"noise"}


def test_what_cannot_be_loaded_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no recipe\.json"):
        mp.load(tmp_path)
    with pytest.raises(ValueError, match="has no report-laplace-calibrated"):
        mp.load(folder / "run", posterior="laplace", calibrated=True)
    with pytest.raises(ValueError, match="draws needs a posterior"):
        mp.load(folder / "run", draws=3)


def test_groups_that_trained_a_run_are_told_where_they_judge_it(folder):
    with pytest.warns(UserWarning, match=r"trained on [1-3] of the 3 test groups"):
        run = mp.load(folder / "run", settings=["tasks.seed=1"])
    assert set(run.preparation.groups[2]) & set(mp.load(folder / "run").run.preparation.groups[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mp.load(folder / "run", settings=["evaluation.tasks=2"])
