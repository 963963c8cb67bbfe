"""The Python blocks of README.md and of some pages of the docs run as they are printed."""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn

import metaprior as mp
from metaprior.core.named import summary
from metaprior.experiments.learner_table import PAGES, learner_table, with_learners, write_learner_tables
from metaprior.learners import LEARNERS

ROOT = Path(__file__).parent.parent
WALK = ROOT / "docs" / "add-a-learner.md"
BRIEF = mp.Training(steps=20, meta_batch=4, chunk=20, validation_tasks=5)


def test_the_walk_through_is_cavia():
    block, *_ = re.findall(r"```python\n(.*?)```", WALK.read_text(), re.DOTALL)
    names = dict(vars(import_module("metaprior.learners.cavia")))
    exec(compile(block, str(WALK), "exec"), names)
    theirs, ours = mp.learners.cavia, names["cavia"]
    assert ours is not theirs
    assert ours.traits == theirs.traits
    key, source = jax.random.key(0), mp.tasks.sinusoid(shot=5, query=5).train
    task = jax.tree.map(lambda leaf: leaf[0], source.sample(key, 1))
    values = []
    for factory in (ours, theirs):
        learner = factory(mp.mlp(1, (8,)), mp.Gaussian(), steps=2)
        params = learner.init(key, task)
        posterior = learner.adapt(params, task.support, key)
        mean = learner.predict(params, posterior, task.query.x, key).mean()
        values.append((learner.loss(params, task, key)[0], *mean.ravel()))
    np.testing.assert_array_equal(*values)
    with pytest.raises(ValueError, match=r"steps must be an integer of at least 0, got 2\.5"):
        ours(mp.mlp(1), mp.Gaussian(), steps=2.5)


def run_blocks(page: str, names: dict) -> Iterator[str]:
    """Runs the Python blocks of a page, and yields each after it has run."""
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        exec(compile(block, page, "exec"), names)
        yield block


def is_finite(params: Any) -> bool:
    """Whether all parameters are finite."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_the_readme_runs(capsys):
    names: dict = {}
    assert len(list(run_blocks("README.md", names))) == 2
    assert "±" in capsys.readouterr().out
    mean, truth = names["predictive"].mean(), names["task"].query.y
    assert ((mean - truth) ** 2).mean() < 0.25 * truth.var()
    assert dict(names["calibrated"].knobs) != dict(names["learner"].knobs)
    inside = (names["low"] < names["y"]) & (names["y"] < names["high"])
    assert inside.mean() > 0.8


@pytest.mark.slow
def test_the_page_of_networks_runs():
    """Each of its learners is trained, on sinusoids or, in the block that trains its own, on images by class."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 28, 28, 1), np.uint8)
    pool = mp.tasks.class_pool(pixels, [6] * 10, way=5, shot=1, query=2)
    names = {"splits": mp.Splits(pool, pool, pool), "training": BRIEF, "key": jax.random.key(0)}
    own = others = 0
    for block in run_blocks("docs/networks.md", names):
        if "mp.fit(" in block:
            own += 1
            assert is_finite(names["fitted"].params)
        elif "learner = " in block:
            others += 1
            assert is_finite(mp.fit(names["learner"], mp.tasks.sinusoid(), BRIEF).params)
    assert others >= 4  # a pair of functions, Flax, Equinox, K-FAC
    assert own >= 2  # a likelihood, batch norm


@pytest.mark.slow
def test_the_page_of_estimators_runs():
    with sklearn.config_context():  # the page sets an option of scikit-learn
        names: dict = {}
        assert len(list(run_blocks("docs/estimators.md", names))) >= 2
    assert names["scores"].shape == (3,)
    assert np.isfinite(names["scores"]).all()
    assert ((names["out_of_fold"] - names["y"]) ** 2).mean() < 0.25 * names["y"].var()


@pytest.mark.parametrize("page", PAGES)
def test_the_table_of_learners_is_that_of_the_registry(page):
    """A stale table fails: run `make results`."""
    text = (ROOT / page).read_text()
    assert with_learners(page, text) == text
    for name in LEARNERS:
        assert text.count(f"| [`{name}`](") == 1


def test_each_learner_has_a_line_and_a_page():
    for name, factory in LEARNERS.items():
        assert summary(factory).endswith("."), name
    table = learner_table("{file}")
    files = set(re.findall(r"^\| \[`\w+`\]\((\w+)\)", table, re.MULTILINE))
    api = (ROOT / "docs" / "api" / "learners.md").read_text()
    for file in files:
        assert (ROOT / "src" / "metaprior" / "learners" / f"{file}.py").is_file()
        assert f"::: metaprior.learners.{file}\n" in api


def test_the_table_of_papers_has_every_learner():
    section = (ROOT / "docs" / "learners.md").read_text().split("## How do the learners differ?")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == sorted(LEARNERS)


def test_the_tables_are_written(tmp_path):
    with pytest.raises(ValueError, match=r"must be the root of a checkout, got .*, which has no README\.md"):
        write_learner_tables(tmp_path)
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        (tmp_path / page).write_text("a\n<!-- learners -->\nold\n<!-- /learners -->\nb\n")
    write_learner_tables(tmp_path)
    for page in PAGES:
        text = (tmp_path / page).read_text()
        assert text.startswith("a\n<!-- learners -->\n| name |")
        assert text.endswith("|\n<!-- /learners -->\nb\n")
        assert "old" not in text


def test_flax_modules_with_running_state_are_refused():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(2)(x))

    with pytest.raises(ValueError, match="batch_stats"):
        mp.from_flax(Normed()).init(jax.random.key(0), jnp.ones((3, 1)))
