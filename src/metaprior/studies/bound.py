"""How far may the error on new tasks exceed that on the training tasks? The PAC-Bayes bound of Yin et al. (2020).

Theorem 1: with probability 1 - delta over n training tasks with K queries each, for all q(w) at once,

    E loss <= mean training loss + c sqrt(KL(q || r) + log(n (K + 1) / delta))
    c = sqrt(1 / (2 (K - 1))) + sqrt(1 / (2 (n - 1)))

where the loss of a query is in [0, 1], and w ~ q is drawn before a task adapts. To first order in KL this is a training
loss with the weight `kl_weight` on the KL.
"""

from math import log, sqrt
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Categories, Normals
from metaprior.core.options import Count, Positive, Range, checked
from metaprior.core.types import (
    Learner,
    Task,
    TaskSource,
    check_settled,
    counted,
    group_count,
    weighted_mean,
)
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.inference.gaussian import DiagonalGaussian, around, kl
from metaprior.learners.builders.bottleneck import Coded
from metaprior.tasks.fixed import FixedTasks
from metaprior.training.loop import Training, draw_tasks

Several = Annotated[int, Range(least=2)]
Risk = Annotated[float, Range(above=0, below=1)]


class Bound(NamedTuple):
    """The result of `pac_bayes`.

    Attributes:
        loss: The loss: "error rate", or "squared error / SCALE, at most 1".
        risk: The mean loss on training tasks, with the 95 % interval of its estimate.
        divergence: KL(q || N(0, I)) of the random weights.
        bound: The upper bound of the expected loss on new tasks of the training distribution.
        tasks: The number n of training tasks.
        queries: The number K of queries per training task.
        weight: The weight beta of the KL to which the bound leads, see `kl_weight`.
    """

    loss: str
    risk: Figure
    divergence: float
    bound: float
    tasks: int
    queries: int
    weight: float


def _slope(tasks: int, queries: int) -> float:
    return sqrt(1 / (2 * (queries - 1))) + sqrt(1 / (2 * (tasks - 1)))


@checked
def gap(divergence: Annotated[float, Range(least=0)], tasks: Several, queries: Several, delta: Risk) -> float:
    """Computes how far the bound is above the mean training loss.

    Args:
        divergence: KL(q || r).
        tasks: The number n of training tasks.
        queries: The number K of queries per task.
        delta: The probability that the bound does not hold.

    References:
        Yin et al. (2020), Theorem 1.
    """
    return _slope(tasks, queries) * sqrt(divergence + log(tasks * (queries + 1) / delta))


@checked
def kl_weight(tasks: Several, queries: Several, delta: Risk) -> float:
    """Computes the weight of the KL to which the bound leads: the derivative of `gap` by KL at 0.

    Args:
        tasks: The number n of training tasks.
        queries: The number K of queries per task.
        delta: The probability that the bound does not hold.

    References:
        Yin et al. (2020), the expansion after Theorem 1.
    """
    return _slope(tasks, queries) / (2 * sqrt(log(tasks * (queries + 1) / delta)))


def random_weights(params: PyTree) -> DiagonalGaussian:
    """Returns q(w) of a learner's random encoder.

    Args:
        params: The learner's meta-learned parameters.

    Raises:
        ValueError: The learner has none.
    """
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Coded))
    found = [node.bottleneck for node in nodes if isinstance(node, Coded)]
    if len(found) != 1 or not isinstance(found[0], DiagonalGaussian):
        raise ValueError(
            "learner must have an encoder with random weights, i.e. be mr_maml or mr_cnp with on='weights', got params "
            "without one. The bound is about such weights."
        )
    return found[0]


@checked
def pac_bayes(
    learner: Learner,
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    training: Training,
    *,
    steps: Count | None = None,
    tasks: Several = 1000,
    scale: Positive = 1.0,
    delta: Risk = 0.05,
    chunk: Count = 20,
) -> Bound:
    """Computes the PAC-Bayes bound of a trained learner with random encoder weights.

    The mean training loss is computed on the tasks of the training itself, which are drawn again. A loss is that of the
    adapted network for a drawn encoder (Gibbs), not of the average over draws.

    The bound holds under these conditions. Check them before you quote it:

    * It is about new tasks *of the training distribution*. Where test tasks differ (other classes, new amplitudes), it
      says nothing about them. A learner that has memorised its training tasks can have a low bound.
    * Training tasks are independent draws, and so are the queries of a task. Episodes with as many queries of each
      class are not quite that.
    * Only w is random. The start theta of the adapted network is learned from the same tasks and has no KL, so the
      theorem covers it only as a fixed part of the algorithm. The number is a bound in the paper's sense, and no strict
      guarantee for the learned theta.

    Args:
        learner: The learner, `mr_maml` or `mr_cnp` with `on="weights"`.
        params: Its meta-learned parameters.
        source: The training tasks.
        key: Random key of the encoders and the adaptation.
        training: The settings of the training, which determine its tasks.
        steps: The number of meta-steps of the training. The default is `training.steps`.
        tasks: The number of training tasks to compute the mean loss on, evenly spaced among all.
        scale: For regression: the squared error at which the loss is 1, and above which it stays 1.
        delta: The probability that the bound does not hold.
        chunk: The number of tasks at once in memory.

    Returns:
        The bound and its parts.

    Raises:
        ValueError: The learner has no random encoder weights, predicts neither classes nor numbers, or a task has a
            single query; the tasks come from groups; or an argument is out of range.

    References:
        Yin, Tucker, Zhou, Levine & Finn (2020), Theorem 1.
    """
    check_settled(learner)
    q = random_weights(params)
    if group_count(source) is not None and not isinstance(source, FixedTasks):
        raise ValueError("source must draw independent tasks, got one whose tasks come from a fixed number of groups.")
    seen = (training.steps if steps is None else steps) * training.meta_batch
    n = source.total if isinstance(source, FixedTasks) else seen
    if n < 2:
        raise ValueError(f"training must have at least 2 tasks, got {n}.")
    places = np.unique(np.linspace(0, n - 1, min(tasks, n)).round().astype(int))
    draw, kinds = draw_tasks(training), []

    def drawn(source: TaskSource, place: Array) -> Task:
        if isinstance(source, FixedTasks):
            return source.of_group(key, place)
        step, at = place // training.meta_batch, place % training.meta_batch
        return jax.tree.map(lambda leaf: leaf[at], draw(step, source)[0])

    def one(shared: tuple[PyTree, TaskSource], place: Array, key: PRNGKeyArray) -> Array:
        params, source = shared
        key_adapt, key_predict = jax.random.split(key)
        task = drawn(source, place)
        query = counted(task.query)
        posterior = learner.posterior(params, task.support, query, key_adapt)
        predictive = learner.predict(params, posterior, query.x, key_predict)
        kinds.append((type(predictive), query.y.shape[0]))
        return weighted_mean(gibbs_loss(predictive, query.y, scale), query)

    @jax.jit
    def every(shared: tuple[PyTree, TaskSource], places: Array, keys: PRNGKeyArray) -> Array:
        return jax.lax.map(lambda drawn: one(shared, *drawn), (places, keys), batch_size=chunk)

    losses = np.asarray(every((params, source), jnp.asarray(places), jax.random.split(key, len(places))))
    kind, queries = kinds[0]
    if queries < 2:
        raise ValueError("source must have tasks with at least 2 queries, got 1.")
    risk, divergence = figure_of(losses), float(kl(q, around(jax.tree.map(jnp.zeros_like, q.mean), 0.0)))
    return Bound(
        "error rate" if kind is Categories else f"squared error / {scale:g}, at most 1",
        risk,
        divergence,
        risk.mean + gap(divergence, n, queries, delta),
        n,
        queries,
        kl_weight(n, queries, delta),
    )


def gibbs_loss(predictive: Any, y: Array, scale: float) -> Float[Array, " n"]:
    """Computes the loss in [0, 1] of each query, as a mean over the networks that a predictive averages.

    Args:
        predictive: The predictive distribution of n queries.
        y: Their targets.
        scale: The squared error at which the loss of a number is 1.

    Raises:
        ValueError: The predictive is neither of classes nor of numbers.
    """
    if isinstance(predictive, Categories):
        wrong = predictive.log_probs.argmax(-1) != y
        return jnp.where(jnp.isnan(predictive.log_probs).any(-1), jnp.nan, wrong).mean(0)
    if isinstance(predictive, Normals):
        return jnp.minimum(((predictive.means - y) ** 2).mean(-1) / scale, 1).mean(0)
    raise ValueError(f"learner must predict classes or numbers, got {type(predictive).__name__}.")
