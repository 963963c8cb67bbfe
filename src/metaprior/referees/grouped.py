"""Evaluation on every held-out group of a table, after a given number of its observations.

A method is a pytree of what it has learned and a function answer(learned, support, x, key) -> Predictive with normal
components. So learners and classical mixed models are judged on the same tasks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from metaprior.core.types import Batch, Task
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.referees.mixed import Rows
from metaprior.tasks.checks import DataError, check_count
from metaprior.tasks.tables.arrays import ArrayTasks, array_tasks
from metaprior.tasks.tables.classes import encode_labels

Answer = Callable[[PyTree, Batch, Array, PRNGKeyArray], Any]


class Fold(NamedTuple):
    """One split of a table into groups to learn from and held-out groups.

    Attributes:
        seen: The groups to learn from. Their rows give the scaling of the whole table.
        held_out: The held-out groups.
    """

    seen: ArrayTasks
    held_out: ArrayTasks


class HeldOut(NamedTuple):
    """Stacked tasks from every held-out group.

    Attributes:
        tasks: The tasks.
        size: The requested number of observations in each support.
        group: The group of each task, 0..J-1.
    """

    tasks: Task
    size: Int[np.ndarray, " tasks"]
    group: Int[np.ndarray, " tasks"]


class GroupScores(NamedTuple):
    """Scores of each group, as means over its queries and draws, in the units of the table's target.

    Attributes:
        nll: Negative log-likelihood per query, in nats.
        mse: Mean squared error.
        coverage: The share of queries inside the central 90 % interval.
    """

    nll: Float[np.ndarray, " groups"]
    mse: Float[np.ndarray, " groups"]
    coverage: Float[np.ndarray, " groups"]

    def figures(self) -> dict[str, Figure]:
        """Returns log score, RMSE and coverage of the central 90 % intervals, with intervals over groups."""
        mse = figure_of(self.mse)
        root = mse.mean**0.5
        return {
            "log_score": figure_of(-self.nll),
            "rmse": Figure(root, None if mse.interval is None or root == 0 else mse.interval / (2 * root)),
            "coverage_90": figure_of(self.coverage),
        }


def folds(x: Any, y: Any, groups: Any, count: int, *, seed: int = 0, **options: Any) -> Iterator[Fold]:
    """Yields cross-validation splits of a table, in which each group is held out once.

    Groups with a single row are left out, as a task needs a support and a query.

    Args:
        x: Features [n, d].
        y: Targets [n].
        groups: The group of each row [n].
        count: The number of folds, at least 2.
        seed: The seed of the shuffling of groups.
        **options: Further options of `array_tasks`.

    Yields:
        The folds.

    Raises:
        DataError: `count` is below 2, or there are fewer than two groups per fold.
    """
    check_count("count", count)
    codes = encode_labels(groups)[0]
    names, sizes = np.unique(codes, return_counts=True)
    names = names[sizes > 1]
    if count < 2 or len(names) < 2 * count:
        raise DataError(
            f"count must be at least 2, with at least two groups per fold, got {count} folds of {len(names)} groups "
            "with more than one row. Give fewer folds, or a table with more groups."
        )
    parts = np.array_split(np.random.default_rng(seed).permutation(names), count)
    for i, part in enumerate(parts):
        seen = np.concatenate(parts[:i] + parts[i + 1 :])
        kept = np.isin(codes, names)
        split = (seen.tolist(), part[:1].tolist(), part[1:].tolist())
        made: Any = array_tasks(
            np.asarray(x)[kept], np.asarray(y)[kept], codes[kept], split=split, standardise=True, **options
        )
        both = ("groups", "starts", "counts")
        together = {n: jnp.concatenate([getattr(made.validation, n), getattr(made.test, n)]) for n in both}
        yield Fold(made.train, replace(made.test, **together))


def rows_of_source(source: ArrayTasks) -> Rows:
    """Returns all rows of a source's groups, with the groups numbered 0..J-1.

    Args:
        source: A table's task source.
    """
    starts, counts = np.asarray(source.starts), np.asarray(source.counts)
    index = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
    return Rows(source.x[index], source.y[index], jnp.asarray(np.repeat(np.arange(len(counts)), counts)))


def held_out_tasks(
    source: ArrayTasks, sizes: Sequence[int] = (0, 1, 3, 5), *, draws: int = 5, query: int = 20, seed: int = 0
) -> HeldOut:
    """Makes tasks from every group, with supports of several sizes.

    Each group's rows are shuffled `draws` times. For each n in `sizes`, the support is the first n rows. The queries
    are the same for all n: up to `query` rows that follow the largest n. The support of a small group has as many rows
    as leave one for the query. Supports and queries are padded with rows of weight 0, so n = 0 gives an empty support.

    Args:
        source: A table's task source.
        sizes: The numbers of support rows.
        draws: The number of shuffles of each group.
        query: The largest number of query rows.
        seed: The seed of the shuffling.

    Raises:
        ValueError: `sizes` is empty or has a number below 0, or `draws` or `query` is below 1.
    """
    check_count("draws", draws)
    check_count("query", query)
    if not sizes or min(sizes) < 0:
        raise ValueError(f"sizes must be numbers of observations, each at least 0, got {tuple(sizes)}.")
    most, cut, random = max(sizes), max(*sizes, 1), np.random.default_rng(seed)
    index, weights, size, group = [], [], [], []
    for j, (start, rows) in enumerate(zip(np.asarray(source.starts), np.asarray(source.counts), strict=True)):
        first = min(most, rows - 1)
        asked = min(query, rows - first)
        for _ in range(draws):
            order = start + random.permutation(rows)
            for n in sizes:
                shown = np.resize(order[: max(min(n, first), 1)], cut)
                index.append(np.concatenate([shown, np.resize(order[first : first + asked], query)]))
                weights.append(np.concatenate([np.arange(cut) < min(n, first), np.arange(query) < asked]))
                size.append(n)
                group.append(j)
    chosen, weight = np.stack(index), jnp.asarray(np.stack(weights), float)
    x, y = source.x[chosen], source.y[chosen]
    support = Batch(x[:, :cut], y[:, :cut], weight[:, :cut])
    tasks = Task(support, Batch(x[:, cut:], y[:, cut:], weight[:, cut:]))
    return HeldOut(tasks, np.asarray(size), np.asarray(group))


def judge_groups(
    answer: Answer, learned: PyTree, held: HeldOut, deviation: float, key: PRNGKeyArray, *, chunk: int = 50
) -> dict[int, GroupScores]:
    """Computes the scores of each group, for each number of observations in the support.

    Args:
        answer: answer(learned, support, x, key) -> Predictive.
        learned: What the method has learned, a pytree.
        held: The tasks of held-out groups.
        deviation: The standard deviation of the target, which converts scores back to its units.
        key: The random key.
        chunk: The number of tasks at once in memory.

    Returns:
        Scores by the number of observations in the support.
    """

    def one(learned: PyTree, task: Task, key: PRNGKeyArray) -> dict[str, Array]:
        support, query = task
        predictive = answer(learned, support, query.x, key)
        below = predictive.cdf(query.y)[:, 0]
        scores = {
            "nll": -predictive.log_prob(query.y),
            "mse": (predictive.mean() - query.y)[:, 0] ** 2,
            # The distribution function is continuous, so comparing it with the levels needs no quantiles.
            "coverage": ((below >= 0.05) & (below <= 0.95)).astype(float),
        }
        weight = jnp.ones_like(scores["nll"]) if query.weight is None else query.weight
        return jax.tree.map(lambda s: (weight * s).sum() / weight.sum(), scores)

    @jax.jit
    def run(learned: PyTree, tasks: Task, keys: PRNGKeyArray) -> dict[str, Array]:
        return jax.lax.map(lambda a: one(learned, *a), (tasks, keys), batch_size=min(chunk, len(held.size)))

    found = jax.device_get(run(learned, held.tasks, jax.random.split(key, len(held.size))))
    found = found | {"nll": found["nll"] + np.log(deviation), "mse": found["mse"] * deviation**2}
    scores = {}
    for n in np.unique(held.size).tolist():
        groups = np.unique(held.group[held.size == n])
        of = [(held.size == n) & (held.group == j) for j in groups]
        scores[n] = GroupScores(**{name: np.asarray([v[rows].mean() for rows in of]) for name, v in found.items()})
    return scores


def pooled(parts: Sequence[dict[int, GroupScores]]) -> dict[int, GroupScores]:
    """Concatenates the groups of several folds.

    Args:
        parts: The scores of each fold, by the number of observations in the support.
    """
    sizes = sorted({n for part in parts for n in part})
    return {
        n: GroupScores(*(np.concatenate(v) for v in zip(*(part[n] for part in parts if n in part), strict=True)))
        for n in sizes
    }
