"""Shared problems, small enough to train in a second."""

import csv

import jax
import jax.numpy as jnp
import pytest

from metaprior.cli import main
from metaprior.core.likelihoods import Gaussian
from metaprior.core.types import Batch, Learner, Model, Splits, Task
from metaprior.learners import maml
from metaprior.networks import mlp
from metaprior.tasks import sinusoid
from metaprior.training.loop import Training

TINY = Training(steps=12, meta_batch=4, chunk=4, validate_every=4, validation_tasks=6, rate=1e-2)


def tiny_learner(hidden: int = 8, rate: float = 0.01) -> Learner:
    """MAML with one hidden layer."""
    return maml(mlp(1, (hidden,), "tanh"), Gaussian(), rate=rate)


def tiny_splits() -> Splits:
    """Sinusoids from five points."""
    return sinusoid(shot=5, query=5, test_query=5)


def same_bits(a, b) -> bool:
    """Whether two pytrees hold the same arrays, to the bit."""
    return all((u == v).all() for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


KEY = jax.random.key(0)
# Its features are x itself, and it has three outputs.
BARE = Model(lambda key, x: {}, lambda params, x: jnp.zeros((x.shape[0], 3)), lambda params, x: x)


def batch(n, seed=1):
    """Two features, three classes."""
    kx, ky = jax.random.split(jax.random.key(seed))
    return Batch(jax.random.normal(kx, (n, 2)), jax.random.randint(ky, (n,), 0, 3))


def answer(learner, params, support, x):
    """What the learner predicts at x after the support."""
    return jax.jit(lambda p, s, x: learner.predict(p, learner.adapt(p, s, KEY), x, KEY).mean())(params, support, x)


def start(learner, support):
    """The learner's parameters before training."""
    return jax.jit(learner.init)(KEY, Task(support, support))


def write_csv(path, rows, header=("text", "label")):
    """A CSV file of these rows; its path."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def run_cli(*args, code=0):
    """The command line, which must end with this code."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in args])
    assert end.value.code == code


def deadened(params):
    """Units whose bias keeps them below zero, and a head of zeros."""

    def kill(path, leaf):
        names = str(path)
        if "log" in names or "rule" in names or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if names.endswith("'b'),)") and "'head'" not in names:
            return leaf.at[..., :2].set(-100.0)
        return jnp.zeros_like(leaf) if "'head'" in names else leaf

    return jax.tree_util.tree_map_with_path(kill, params)


def finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))
