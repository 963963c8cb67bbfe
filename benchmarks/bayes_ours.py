"""What posteriors cost: particles, draws and Laplace, as metaprior runs them.

Usage: bayes_ours.py WHAT (see worker.py)
    maml, bmaml-M, chaser-M             a meta-step on 25 sinusoids, with M particles and either loss
    variational-N, laplace-N            600 sinusoid tasks adapted and predicted with N draws a task
    head, all                           Laplace of these weights of a Conv4: fit to 5 images, 75 queries
"""

import sys
from collections.abc import Callable

import jax

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Learner, TaskSource
from metaprior.inference.posteriors import laplace
from metaprior.learners.amortized_bml import amortized_bml
from metaprior.learners.anil import anil
from metaprior.learners.bmaml import bmaml
from metaprior.learners.maml import maml
from metaprior.networks.conv4 import conv4
from metaprior.networks.mlp import mlp
from metaprior.tasks.synthetic.sinusoid import sinusoid
from metaprior.training.loop import Training, init_state, run_chunk
from ours import images
from worker import serve

TASKS = 600


def training(learner: Learner, at_once: int = 50) -> Callable[[], int]:
    source, settings = sinusoid().train, Training(meta_batch=25, rate=1e-3)
    state, chunk = init_state(learner, source, settings), run_chunk(learner, settings)

    def run() -> int:
        nonlocal state
        state = jax.block_until_ready(chunk(state, source, at_once))[0]
        return at_once

    return run


def answering(learner: Learner, source: TaskSource, tasks: int, batch: int) -> Callable[[], int]:
    """Adapt to `tasks` tasks and predict their queries, `batch` at once."""
    drawn = source.sample(jax.random.key(0), tasks)
    params = learner.init(jax.random.key(1), jax.tree.map(lambda leaf: leaf[0], drawn))

    @jax.jit
    def answer(params, drawn):
        def one(given):
            task, key = given
            posterior = learner.adapt(params, task.support, key)
            return learner.predict(params, posterior, task.query.x, key).mean()

        return jax.lax.map(one, (drawn, jax.random.split(jax.random.key(2), tasks)), batch_size=batch)

    def run() -> int:
        jax.block_until_ready(answer(params, drawn))
        return 1

    return run


def build(what: str) -> Callable[[], int]:
    kind, _, number = what.partition("-")
    if kind == "maml":
        return training(maml(mlp(), Gaussian()))
    if kind == "bmaml":
        return training(bmaml(mlp(), Gaussian(), particles=int(number), rate=0.01, loss="mixture"))
    if kind == "chaser":
        return training(bmaml(mlp(), Gaussian(), particles=int(number), rate=0.01))
    if kind == "variational":
        return answering(amortized_bml(mlp(), Gaussian(), draws=int(number)), sinusoid().test, TASKS, 25)
    if kind == "laplace":
        learner = maml(mlp(), Gaussian(), steps=5, posterior=laplace(draws=int(number)))
        return answering(learner, sinusoid().test, TASKS, 25)
    # No inner step: both sides fit the posterior around given weights and predict with the probit approximation.
    rule = {"steps": 0, "rate": 0.4, "posterior": laplace()}
    learner = (anil if kind == "head" else maml)(conv4(gain=True), Categorical(), **rule)
    return answering(learner, images(1), 1, 1)


if __name__ == "__main__":
    serve(lambda: build(sys.argv[1]))
