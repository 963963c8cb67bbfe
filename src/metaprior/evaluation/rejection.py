"""Knowing what one does not know: queries that belong to no class of the task, told from the others by a score.

In a task of the source, queries are joined by as many inputs from outside. AUROC says how well the score ranks them,
whatever the threshold; accuracy with rejection says what comes of one threshold, chosen on validation tasks: a query is
right if it is kept and classified right, an outsider if it is rejected (Larson et al. 2019).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from metaprior.core.named import lookup
from metaprior.core.types import Batch, Learner, Model, TaskSource, examples
from metaprior.evaluation.calibration import auroc
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.learners.builders.amortised import embedding
from metaprior.learners.builders.metric import DISTANCES, memberships, present

# (params, support, x, key) -> how surely each of x is of one of the support's classes; higher is surer.
Score = Callable[[PyTree, Batch, PyTree, PRNGKeyArray], Float[Array, " n"]]


class Scored(NamedTuple):
    """Scores of `tasks` tasks: of the queries, whether each was classified right and counts, and of as many outside."""

    inside: Float[np.ndarray, "tasks n"]
    correct: Bool[np.ndarray, "tasks n"]
    counted: Bool[np.ndarray, "tasks n"]
    outside: Float[np.ndarray, "tasks n"]


@dataclass(frozen=True)
class Rejection:
    """AUROC by task, the threshold that was best on validation tasks, and what it does on the test tasks.

    accuracy: of queries and outsiders together, half and half; kept: the share of the queries that are not rejected;
    rejected: that of the outsiders that are.
    """

    auroc: Figure
    threshold: float
    accuracy: Figure
    kept: Figure
    rejected: Figure


def confidence(learner: Learner) -> Score:
    """The probability of the likeliest class (Hendrycks & Gimpel 2017)."""

    def score(params: PyTree, support: Batch, x: PyTree, key: PRNGKeyArray) -> Float[Array, " n"]:
        key_adapt, key_predict = jax.random.split(key)
        posterior = learner.adapt(params, support, key_adapt)
        return learner.predict(params, posterior, x, key_predict).mean().max(-1)

    return score


def closeness(model: Model, way: int, distance: str = "euclidean") -> Score:
    """Minus the distance to the nearest class mean, in the embedding of a learner that has one (`params.embedding`).

    distance: "euclidean" (squared) or "cosine".
    """
    measure, embed = lookup("distance", distance, DISTANCES), embedding(model)

    def score(params: PyTree, support: Batch, x: PyTree, key: PRNGKeyArray) -> Float[Array, " n"]:
        shares = memberships(support, way)
        count = shares.sum(0)
        means = shares.T @ embed(params.embedding, support.x) / jnp.where(count > 0, count, 1)[:, None]
        return present(-measure(embed(params.embedding, x), means), count > 0).max(-1)

    return score


def scored(
    learner: Learner,
    score: Score,
    params: PyTree,
    source: TaskSource,
    outside: PyTree,
    key: PRNGKeyArray,
    *,
    tasks: int = 600,
    chunk: int = 20,
) -> Scored:
    """Scores of the queries of `tasks` tasks, and in each of as many inputs drawn from `outside`."""
    if tasks < 1:
        raise ValueError(f"tasks: came {tasks}, needs at least 1")

    def one(key: PRNGKeyArray) -> tuple[Array, ...]:
        key_task, key_adapt, key_predict, key_score, key_outside = jax.random.split(key, 5)
        task = jax.tree.map(lambda leaf: leaf[0], source.sample(key_task, 1))
        n = examples(task.query)
        rows = jax.random.randint(key_outside, (n,), 0, jax.tree.leaves(outside)[0].shape[0])
        posterior = learner.adapt(params, task.support, key_adapt)
        choice = learner.predict(params, posterior, task.query.x, key_predict).mean().argmax(-1)
        # Queries and outsiders are scored apart, as a score that sees them together could tell the two sets by that.
        inside = score(params, task.support, task.query.x, key_score)
        apart = score(params, task.support, jax.tree.map(lambda leaf: leaf[rows], outside), key_score)
        counted = jnp.ones(n, bool) if task.query.weight is None else task.query.weight > 0
        return inside, choice == task.query.y, counted, apart

    keys = jax.random.split(key, tasks)
    run = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=min(chunk, tasks)))
    return Scored(*jax.device_get(run(keys)))


def best_threshold(found: Scored) -> float:
    """The threshold with the highest accuracy: right queries kept, outsiders rejected; at or above it one is kept."""
    scores = np.concatenate([found.inside[found.counted], found.outside.ravel()])
    # Keeping one more costs a rejected outsider or gains a query, if that is classified right.
    gain = np.concatenate([found.correct[found.counted].astype(int), np.full(found.outside.size, -1)])
    order = np.argsort(-scores, kind="stable")
    ordered, total = scores[order], np.cumsum(gain[order])
    # Equal scores are kept or rejected together.
    ends = np.append(ordered[1:] != ordered[:-1], True)
    best = int(np.argmax(np.where(ends, total, -np.inf)))
    if total[best] <= 0:
        return float("inf")
    return float(ordered[best] if best + 1 == len(ordered) else (ordered[best] + ordered[best + 1]) / 2)


def rejection(validation: Scored, test: Scored) -> Rejection:
    """How well outsiders are told from queries on test tasks, the threshold chosen on validation tasks."""
    threshold = best_threshold(validation)
    rows = []
    for inside, correct, counted, outside in zip(*test, strict=True):
        if not counted.any():
            continue
        inside, correct = inside[counted], correct[counted]
        kept, turned = inside >= threshold, outside < threshold
        right = ((kept & correct).mean() + turned.mean()) / 2
        rows.append((float(auroc(jnp.asarray(inside), jnp.asarray(outside))), right, kept.mean(), turned.mean()))
    area, accuracy, kept, rejected = (figure_of(np.asarray(column)) for column in zip(*rows, strict=True))
    return Rejection(area, threshold, accuracy, kept, rejected)
