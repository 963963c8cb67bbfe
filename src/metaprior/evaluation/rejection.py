"""Rejection: a score tells inputs that belong to no class of the task (outsiders) from its queries.

Each task gets as many outsiders as it has queries. AUROC measures how well the score ranks them, over all thresholds.
Accuracy with rejection uses one threshold, chosen on validation tasks: a query counts as correct if it is kept and
classified correctly, an outsider if it is rejected (Larson et al. 2019).
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

# (params, support, x, key) -> a score [n] of each input; higher means that it more surely has a class of the support.
Score = Callable[[PyTree, Batch, PyTree, PRNGKeyArray], Float[Array, " n"]]


class Scored(NamedTuple):
    """Scores of queries and outsiders in many tasks.

    Attributes:
        inside: Scores of the queries.
        correct: Whether each query was classified correctly.
        counted: Whether each query has a weight above 0.
        outside: Scores of the outsiders.
    """

    inside: Float[np.ndarray, "tasks n"]
    correct: Bool[np.ndarray, "tasks n"]
    counted: Bool[np.ndarray, "tasks n"]
    outside: Float[np.ndarray, "tasks n"]


@dataclass(frozen=True)
class Rejection:
    """How well outsiders are rejected on the test tasks.

    Attributes:
        auroc: The area under the ROC curve, per task.
        threshold: The threshold that is best on the validation tasks.
        accuracy: Of queries and outsiders together, in equal shares.
        kept: The share of the queries that are kept.
        rejected: The share of the outsiders that are rejected.
    """

    auroc: Figure
    threshold: float
    accuracy: Figure
    kept: Figure
    rejected: Figure


def confidence(learner: Learner) -> Score:
    """Returns a score: the probability of the most likely class.

    Args:
        learner: The learner, a classifier.

    References:
        Hendrycks & Gimpel 2017.
    """

    def score(params: PyTree, support: Batch, x: PyTree, key: PRNGKeyArray) -> Float[Array, " n"]:
        key_adapt, key_predict = jax.random.split(key)
        posterior = learner.posterior(params, support, Batch(x, None), key_adapt)
        return learner.predict(params, posterior, x, key_predict).mean().max(-1)

    return score


def closeness(model: Model, way: int, distance: str = "euclidean") -> Score:
    """Returns a score: minus the distance to the nearest class mean in the learner's embedding (`params.embedding`).

    Args:
        model: The network that embeds inputs.
        way: The largest number of classes in a task.
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
    """Computes the scores of the queries and of as many outsiders in each of many tasks.

    Args:
        learner: The learner, a classifier.
        score: The score, such as `confidence(learner)`.
        params: The learner's meta-learned parameters.
        source: The tasks.
        outside: Inputs of no class; outsiders are drawn from these with replacement.
        key: The random key.
        tasks: The number of tasks.
        chunk: The number of tasks at once in memory.

    Raises:
        ValueError: `tasks` is below 1.
    """
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, got {tasks}.")

    def one(key: PRNGKeyArray) -> tuple[Array, ...]:
        key_task, key_adapt, key_predict, key_score, key_outside = jax.random.split(key, 5)
        task = jax.tree.map(lambda leaf: leaf[0], source.sample(key_task, 1))
        n = examples(task.query)
        rows = jax.random.randint(key_outside, (n,), 0, jax.tree.leaves(outside)[0].shape[0])
        posterior = learner.posterior(params, task.support, task.query, key_adapt)
        choice = learner.predict(params, posterior, task.query.x, key_predict).mean().argmax(-1)
        # Queries and outsiders are scored separately: a score that sees a whole set could tell the two sets apart.
        inside = score(params, task.support, task.query.x, key_score)
        apart = score(params, task.support, jax.tree.map(lambda leaf: leaf[rows], outside), key_score)
        counted = jnp.ones(n, bool) if task.query.weight is None else task.query.weight > 0
        return inside, choice == task.query.y, counted, apart

    keys = jax.random.split(key, tasks)
    run = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=min(chunk, tasks)))
    return Scored(*jax.device_get(run(keys)))


def best_threshold(found: Scored) -> float:
    """Returns the threshold with the highest accuracy. Inputs with scores at or above it are kept.

    Args:
        found: The scores on validation tasks.

    Returns:
        The threshold, or infinity if rejecting everything is best.
    """
    scores = np.concatenate([found.inside[found.counted], found.outside.ravel()])
    # Keeping one more input loses a rejected outsider, or gains a query if it is classified correctly.
    gain = np.concatenate([found.correct[found.counted].astype(int), np.full(found.outside.size, -1)])
    order = np.argsort(-scores, kind="stable")
    ordered, total = scores[order], np.cumsum(gain[order])
    # Inputs with equal scores are kept or rejected together.
    ends = np.append(ordered[1:] != ordered[:-1], True)
    best = int(np.argmax(np.where(ends, total, -np.inf)))
    if total[best] <= 0:
        return float("inf")
    return float(ordered[best] if best + 1 == len(ordered) else (ordered[best] + ordered[best + 1]) / 2)


def rejection(validation: Scored, test: Scored) -> Rejection:
    """Evaluates the rejection of outsiders on test tasks, with the threshold that is best on validation tasks.

    Args:
        validation: The scores on validation tasks.
        test: The scores on test tasks.
    """
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
