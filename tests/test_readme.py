"""The README's Python blocks run as they stand."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import metaprior as mp

README = Path(__file__).parent.parent / "README.md"


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
