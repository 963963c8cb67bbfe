"""Does a posterior show where to observe next? Choosing the next observation by predictive variance or at random.

All candidates are in the support from the start, with weight 0. Observing a candidate sets its weight to 1, so every
step has the same shapes and is compiled once.

References:
    Finn, Xu & Levine 2018, active learning.

    Yoon et al. 2018, sec. 5.3, one more label at a time.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.types import Batch, Learner, Task, TaskSource, draw_task, group_count, group_order
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.evaluation.protocol import Units


class Acquisition(NamedTuple):
    """The mean squared error of both policies after 0, 1, ..., k acquisitions, averaged over tasks.

    The errors of a table are in the units of its target.

    Attributes:
        seen: The number of support examples at each step.
        by_variance: The error when the candidate of largest predictive variance is chosen.
        at_random: The error when a random candidate is chosen.
        difference: The error by variance minus the error at random, task by task, with the same start, candidates and
            test points.
    """

    seen: list[int]
    by_variance: list[Figure]
    at_random: list[Figure]
    difference: list[Figure]


class Setting(NamedTuple):
    """One task as a study sees it.

    Attributes:
        support: The initial examples and all candidates.
        weight: The initial weights of the support: 1 for the examples, 0 for the candidates.
        test: The test points.
    """

    support: Batch
    weight: Float[Array, " n"]
    test: Batch


def lay_out(task: Task, start: int, pool: int) -> Setting:
    """Divides a task into initial examples, candidates and test points.

    Args:
        task: A task.
        start: The first `start` support examples are the initial examples.
        pool: The first `pool` query examples are the candidates; all others are test points.
    """

    def cut(batch: Batch, low: int, high: int | None) -> Batch:
        return jax.tree.map(lambda leaf: leaf[low:high], Batch(batch.x, batch.y))

    support = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cut(task.support, 0, start), cut(task.query, 0, pool))
    return Setting(support, jnp.concatenate([jnp.ones(start), jnp.zeros(pool)]), cut(task.query, pool, None))


def acquire(
    learner: Learner, params: PyTree, setting: Setting, key: PRNGKeyArray, points: int, *, informed: bool
) -> Float[Array, " k"]:
    """Computes the mean squared error on the test points after 0, ..., `points` acquisitions.

    The learner adapts again from the start at each step.

    Args:
        learner: A regression learner.
        params: Its parameters.
        setting: The task.
        key: Random key.
        points: The number of acquisitions.
        informed: Whether to choose the candidate of largest predictive variance, summed over targets, instead of a
            random one.

    Returns:
        The errors, [points + 1].
    """
    key_adapt, key_choice = jax.random.split(key)

    def adapted(weight: Array) -> Any:
        return learner.adapt(params, setting.support._replace(weight=weight), key_adapt)

    def error(posterior: Any) -> Array:
        mean = learner.predict(params, posterior, setting.test.x, key_adapt).mean()
        return ((mean - setting.test.y) ** 2).mean()

    def step(weight: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        posterior = adapted(weight)
        if informed:
            variance = learner.predict(params, posterior, setting.support.x, key_adapt).variance()
            value = variance.reshape(weight.shape[0], -1).sum(-1)
        else:
            value = jax.random.uniform(key, weight.shape)
        chosen = jnp.where(weight > 0, -jnp.inf, value).argmax()
        return weight.at[chosen].set(1.0), error(posterior)

    weight, errors = jax.lax.scan(step, setting.weight, jax.random.split(key_choice, points))
    return jnp.append(errors, error(adapted(weight)))


def active(
    learner: Learner,
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    *,
    tasks: int = 200,
    start: int = 2,
    pool: int = 50,
    points: int = 8,
    chunk: int = 20,
) -> Acquisition:
    """Compares acquisition by predictive variance with acquisition at random, on regression tasks.

    A learner whose variance is the same everywhere chooses the first candidate, which is as good as any other.

    Args:
        learner: A regression learner.
        params: Its parameters.
        source: The source of the tasks.
        key: Random key.
        tasks: The number of tasks.
        start: The number of observed examples at the start.
        pool: The number of candidates, which come from the query. The rest of the query is the test set.
        points: The number of acquisitions.
        chunk: The number of tasks in memory at once.

    Returns:
        The errors of both policies.

    Raises:
        ValueError: A number above what a task has, tasks of classes, or several targets of different units.
    """
    like = jax.eval_shape(lambda: source.sample(key, 1))
    if jnp.issubdtype(like.query.y.dtype, jnp.integer):
        raise ValueError("source must be of regression tasks, whose predictives have a variance, got tasks of classes.")
    shot, queries = like.support.y.shape[1], like.query.y.shape[1]
    most = {"tasks": (1, 10**9), "start": (0, shot), "pool": (1, queries - 1), "points": (1, pool)}
    for name, value in {"tasks": tasks, "start": start, "pool": pool, "points": points}.items():
        least, top = most[name]
        if not least <= value <= top:
            raise ValueError(f"{name} must be {least} to {top}, got {value}.")

    place = group_order(source, jax.random.fold_in(key, 1), tasks)
    members = None if group_count(source) is None else np.asarray(place)

    @jax.jit
    def run(params: PyTree, source: TaskSource, drawn: tuple[PRNGKeyArray, Array]) -> tuple[Array, Array]:
        def one(drawn: tuple[PRNGKeyArray, Array]) -> tuple[Array, Array]:
            key_task, key = jax.random.split(drawn[0])
            task = draw_task(source, key_task, drawn[1])
            setting = lay_out(task, start, pool)
            policy = partial(acquire, learner, params, setting, key, points)
            return policy(informed=True), policy(informed=False)

        return jax.lax.map(one, drawn, batch_size=min(chunk, tasks))

    scale = np.asarray(Units.of(source).scale or (1.0,))
    if (scale != scale[0]).any():
        raise ValueError(
            "source must have targets of the same units, because squared errors of others have no common mean."
        )
    found = run(params, source, (jax.random.split(key, tasks), place))
    informed, random = (np.asarray(a, float) * scale[0] ** 2 for a in found)  # in the units of a table's target
    with np.errstate(invalid="ignore"):  # inf - inf, if both diverged on a task
        gained = informed - random
    over = [[figure_of(column, members) for column in errors.T] for errors in (informed, random, gained)]
    return Acquisition([start + k for k in range(points + 1)], *over)
