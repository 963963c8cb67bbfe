"""The time that a learner takes for one task."""

import statistics
import time
from collections.abc import Callable

import jax
from jaxtyping import PRNGKeyArray, PyTree

from metaprior.core.options import Count, checked
from metaprior.core.types import Learner, Task, TaskSource, counted, draw_task, group_order


@checked
def milliseconds_per_task(
    learner: Learner,
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    *,
    tasks: Count = 20,
    clock: Callable[[], float] = time.process_time,
) -> float:
    """Measures how long a learner takes to adapt to a task and to predict its queries.

    The program is compiled before it is timed, and tasks are processed one after the other.

    Args:
        learner: The learner.
        params: Its meta-learned parameters.
        source: The tasks.
        key: The random key of the tasks and of the adaptation.
        tasks: The number of timed tasks.
        clock: The clock, in seconds. The default counts the time of all processor cores of this process, which does not
            depend on other work of the machine. Use `time.perf_counter` on an accelerator.

    Returns:
        The median over tasks, in milliseconds.
    """

    @jax.jit
    def answer(params: PyTree, task: Task, key: PRNGKeyArray) -> PyTree:
        key_adapt, key_predict = jax.random.split(key)
        query = counted(task.query)
        posterior = learner.posterior(params, task.support, query, key_adapt)
        return learner.predict(params, posterior, query.x, key_predict).mean()

    draw = jax.jit(draw_task)
    key_group, key_task, key_answer = jax.random.split(key, 3)
    groups = group_order(source, key_group, tasks)
    drawn = [draw(source, jax.random.fold_in(key_task, i), groups[i]) for i in range(tasks)]
    jax.block_until_ready((drawn, answer(params, drawn[0], key_answer)))
    times = []
    for task in drawn:
        began = clock()
        jax.block_until_ready(answer(params, task, key_answer))
        times.append(1000 * (clock() - began))
    return statistics.median(times)
