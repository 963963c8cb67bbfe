"""Second-order MAML, ProtoNet or a learned optimiser, as metaprior trains them.

Usage: ours.py PROBLEM INNER_STEPS STEPS_A_CALL (see worker.py); quadratics-16 is l2l on 16 functions a meta-step.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Learner, Task, TaskSource
from metaprior.learners.l2l import l2l
from metaprior.learners.maml import maml
from metaprior.learners.protonet import protonet
from metaprior.networks.conv4 import conv4
from metaprior.networks.linear import linear
from metaprior.networks.mlp import mlp
from metaprior.tasks.synthetic.optimisees import quadratics
from metaprior.tasks.synthetic.sinusoid import sinusoid
from metaprior.training.loop import Training, init_state, run_chunk
from worker import serve


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SameImages:
    """The same tasks at every step: the benchmark is of the step, not of the sampling."""

    tasks: Task

    def sample(self, key: jax.Array, n: int) -> Task:
        return jax.tree.map(lambda leaf: leaf[:n], self.tasks)


def images(tasks: int = 8, way: int = 5, queries: int = 15) -> SameImages:
    keys = jax.random.split(jax.random.key(0))

    def batch(key: jax.Array, each: int) -> Batch:
        y = jnp.repeat(jnp.arange(way), each)
        return Batch(jax.random.uniform(key, (tasks, way * each, 28, 28, 1)), jnp.tile(y, (tasks, 1)))

    return SameImages(Task(batch(keys[0], 1), batch(keys[1], queries)))


def problem(name: str, steps: int) -> tuple[Learner, TaskSource, Training]:
    if name == "sinusoid":
        training = Training(meta_batch=25, rate=1e-3)
        return maml(mlp(), Gaussian(), steps=steps, rate=0.01), sinusoid().train, training
    if name == "protonet":
        learner = protonet(conv4(gain=True, head=False), Categorical(), way=60)
        return learner, images(1, 60, 5), Training(meta_batch=1, rate=1e-3)
    if name.startswith("quadratics-"):
        functions = int(name.removeprefix("quadratics-"))
        learner = l2l(linear(), Gaussian((1 / 20) ** 0.5), steps=steps, unroll=20)
        return learner, quadratics().train, Training(meta_batch=functions, rate=1e-3)
    learner = maml(conv4(gain=True), Categorical(), steps=steps, rate=0.4)
    return learner, images(), Training(meta_batch=8, rate=1e-3, task_chunk=1)


def build(name: str, steps: int, at_once: int) -> Callable[[], int]:
    learner, source, training = problem(name, steps)
    state, chunk = init_state(learner, source, training), run_chunk(learner, training)

    def run() -> int:
        nonlocal state
        state = jax.block_until_ready(chunk(state, source, at_once))[0]
        return at_once

    return run


if __name__ == "__main__":
    serve(lambda: build(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
