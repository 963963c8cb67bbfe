"""The Python blocks of the README and of the walk-through run as they stand."""

import re
from importlib import import_module
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaprior as mp

README = Path(__file__).parent.parent / "README.md"
WALK = README.parent / "docs" / "add-a-learner.md"


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


@pytest.mark.slow
def test_the_readme_runs(capsys):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert "±" in capsys.readouterr().out
    mean, truth = names["predictive"].mean(), names["task"].query.y
    assert ((mean - truth) ** 2).mean() < 0.25 * truth.var()
    inside = (names["low"] < names["y"]) & (names["y"] < names["high"])
    assert inside.mean() > 0.8


def test_flax_modules_with_running_state_are_refused():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(2)(x))

    with pytest.raises(ValueError, match="batch_stats"):
        mp.from_flax(Normed()).init(jax.random.key(0), jnp.ones((3, 1)))
