"""Does a posterior know where to look? Choosing the next observation by predictive variance, against at random.

After the active learning of Finn, Xu & Levine 2018 and Yoon et al. 2018 (sec. 5.3, one more label at a time). All
candidates lie in the support from the start with weight 0; to observe one is to set its weight to 1, so every step has
the same shapes and one compilation serves all.
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
    """Over tasks, after 0, 1, ..., k acquisitions: the mean squared error of either policy and of the pair.

    Errors of a table are in the units of its target.

    difference: by variance less at random, task by task, on the same start, candidates and test points.
    seen: the number of support examples at each.
    """

    seen: list[int]
    by_variance: list[Figure]
    at_random: list[Figure]
    difference: list[Figure]


class Setting(NamedTuple):
    """One task: the start and the candidates as one support, its weights at the start, and the test points."""

    support: Batch
    weight: Float[Array, " n"]
    test: Batch


def lay_out(task: Task, start: int, pool: int) -> Setting:
    """The first `start` support examples, the first `pool` queries as candidates, all other queries to test on."""

    def cut(batch: Batch, low: int, high: int | None) -> Batch:
        return jax.tree.map(lambda leaf: leaf[low:high], Batch(batch.x, batch.y))

    support = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cut(task.support, 0, start), cut(task.query, 0, pool))
    return Setting(support, jnp.concatenate([jnp.ones(start), jnp.zeros(pool)]), cut(task.query, pool, None))


def acquire(
    learner: Learner, params: PyTree, setting: Setting, key: PRNGKeyArray, points: int, *, informed: bool
) -> Float[Array, " k"]:
    """Mean squared error on the test points after 0, ..., `points` acquisitions.

    informed: the candidate of greatest predictive variance, summed over targets; else any. Each step adapts anew.
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
    """Both policies on `tasks` regression tasks of the source.

    start: labelled examples to begin with. pool: candidates, taken from the query; the rest of the query tests.
    points: acquisitions. chunk: tasks in memory at once. A learner whose variance is the same everywhere chooses the
    first candidate, which is as good as any.

    Raises:
        ValueError: more of anything than a task has, or tasks of classes.
    """
    like = jax.eval_shape(lambda: source.sample(key, 1))
    if jnp.issubdtype(like.query.y.dtype, jnp.integer):
        raise ValueError("source: came tasks of classes, needs regression, whose predictives have a variance")
    shot, queries = like.support.y.shape[1], like.query.y.shape[1]
    most = {"tasks": (1, 10**9), "start": (0, shot), "pool": (1, queries - 1), "points": (1, pool)}
    for name, value in {"tasks": tasks, "start": start, "pool": pool, "points": points}.items():
        least, top = most[name]
        if not least <= value <= top:
            raise ValueError(f"{name}: came {value}, needs {least} to {top}")

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
        raise ValueError("source: came several targets of different units, whose squared errors have no common mean")
    found = run(params, source, (jax.random.split(key, tasks), place))
    informed, random = (np.asarray(a, float) * scale[0] ** 2 for a in found)  # in the units of a table's target
    with np.errstate(invalid="ignore"):  # inf - inf, where both diverged on a task
        gained = informed - random
    over = [[figure_of(column, members) for column in errors.T] for errors in (informed, random, gained)]
    return Acquisition([start + k for k in range(points + 1)], *over)
