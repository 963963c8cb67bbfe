"""How do errors change with further inner steps, on other tasks, and with the depth of the network?

A deep network and one gradient step from a learned initialisation can represent any learning rule. The questions are
whether depth helps in practice, whether further steps overfit, and whether a rule that follows gradients transfers to
other tasks better than a black box that reads the support.

References:
    Finn & Levine 2018, Meta-learning and universality.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.types import (
    Batch,
    Learner,
    Model,
    TaskSource,
    counted,
    draw_task,
    group_count,
    group_order,
    weighted_mean,
)
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.evaluation.protocol import Units, brief_score
from metaprior.networks.frozen import layer_names


class Course(NamedTuple):
    """The metric after some numbers of inner steps, over tasks.

    Attributes:
        steps: The numbers of inner steps. None stands for a learner without inner steps.
        query: The metric on the query.
        median: Its median over tasks, which a few diverged tasks do not change.
        support: The metric on the support itself.
    """

    steps: list[int | None]
    query: list[Figure]
    median: list[float]
    support: list[Figure]


class Transfer(NamedTuple):
    """The result of `universality` for one source of tasks.

    Attributes:
        metric: "accuracy" or "mse".
        trained: From the learned initialisation.
        random: The same steps from a network that is not trained, another one for each task. None for a learner
            without inner steps.
    """

    metric: str
    trained: Course
    random: Course | None


class Size(NamedTuple):
    """The size of a learner.

    Attributes:
        hidden: The number of hidden layers of its network, or None if that does not name its layers.
        parameters: The number of meta-learned parameters.
    """

    hidden: int | None
    parameters: int


def size_of(model: Model, params: PyTree, source: TaskSource) -> Size:
    """Returns the size of a learner.

    Args:
        model: Its network.
        params: Its parameters.
        source: The source of the tasks.
    """
    task = jax.eval_shape(lambda: draw_task(source, jax.random.key(0), jnp.zeros((), int)))
    network = jax.eval_shape(model.init, jax.random.key(0), task.support.x)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    try:
        names = jax.eval_shape(
            lambda p, x: dict.fromkeys(layer_names(partial(model.outputs, p), x), ()), network, task.support.x
        )
    except ValueError:  # the network takes no `Call`, or names no layers
        return Size(None, count)
    return Size(len(names) - 1, count)


def universality(
    learner: Learner,
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    *,
    steps: Sequence[int] = (0, 1, 5, 10, 50, 100),
    tasks: int = 600,
    chunk: int = 10,
) -> Transfer:
    """Computes the metric after several numbers of inner steps, from the learned and from a random initialisation.

    Args:
        learner: The learner. One with inner steps must take at least the largest number of steps on a new task.
        params: Its parameters.
        source: The source of the tasks, which need not be the one of training.
        key: Random key.
        steps: The numbers of inner steps.
        tasks: The number of tasks.
        chunk: The number of tasks in memory at once.

    Returns:
        The metric by inner steps.

    Raises:
        ValueError: There are no tasks or steps, or more steps than the learner takes.
    """
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, got {tasks}.")
    if not steps or min(steps) < 0:
        raise ValueError(f"steps must be numbers of at least 0, got {tuple(steps)}.")
    task = jax.eval_shape(lambda: draw_task(source, key, jnp.zeros((), int)))
    metric, units = "accuracy" if jnp.issubdtype(task.query.y.dtype, jnp.integer) else "mse", Units.of(source)
    at, path = np.unique(steps), learner.path
    if path is not None:
        course_of = jax.eval_shape(lambda p, t: path(p, t.support, key), params, task)
        if (most := jax.tree.leaves(course_of)[0].shape[0] - 1) < at[-1]:
            raise ValueError(f"steps must be at most the learner's steps on a new task, {most}, got {at[-1]}.")

    def course(params: PyTree, key: PRNGKeyArray, support: Batch, query: Batch) -> Float[Array, "2 steps"]:
        if path is None:
            chosen = jax.tree.map(lambda leaf: leaf[None], learner.posterior(params, support, query, key))
        else:
            chosen = jax.tree.map(lambda leaf: leaf[at], path(params, support, key))

        def judged(posterior: PyTree) -> Array:
            def on(batch: Batch) -> Array:
                predictive = learner.predict(params, posterior, batch.x, key)
                return weighted_mean(units.score(predictive, counted(batch).y, brief_score)[metric], batch)

            return jnp.stack([on(query), on(support)])

        return jax.lax.map(judged, chosen).T

    @jax.jit
    def run(params: PyTree, source: TaskSource, drawn: tuple[PRNGKeyArray, Array]) -> dict[str, Array]:
        def one(drawn: tuple[PRNGKeyArray, Array]) -> dict[str, Array]:
            key_task, key_adapt, key_init = jax.random.split(drawn[0], 3)
            task = draw_task(source, key_task, drawn[1])
            found = {"trained": course(params, key_adapt, *task)}
            if path is not None:
                found["random"] = course(learner.init(key_init, task), key_adapt, *task)
            return found

        return jax.lax.map(one, drawn, batch_size=min(chunk, tasks))

    place = group_order(source, jax.random.fold_in(key, 1), tasks)
    members = None if group_count(source) is None else np.asarray(place)
    found = run(params, source, (jax.random.split(key, tasks), place))

    def summed_up(values: Any) -> Course:
        values = units.scaled({metric: np.asarray(values, float)})[metric]
        query, support = ([figure_of(column, members) for column in side.T] for side in values.swapaxes(0, 1))
        median = [float(column.item()) for column in np.median(values[:, 0], 0)]
        return Course([None] if path is None else [int(k) for k in at], query, median, support)

    return Transfer(metric, summed_up(found["trained"]), None if path is None else summed_up(found["random"]))
