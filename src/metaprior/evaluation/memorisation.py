"""The memorisation diagnosis: how much a learner's answers depend on the support.

If a task can be told from its inputs, a meta-learner can ignore the support (Yin, Tucker, Zhou, Levine & Finn 2020).
The diagnosis compares the queries' nll with four supports: the right one, those of other tasks, the right one with its
targets permuted, and none (weights of 0). It also estimates

    I(y; D | x) = E[log p(y | x, D) - log p(y | x)],    p(y | x) = E_D'[p(y | x, D')],

in nats per query, where D' are supports of other tasks. Tasks come in blocks of K, and each task's queries are answered
with the K supports of its block. There are two estimates of p(y | x):

* The mean over the K - 1 other supports (the leave-one-out bound of Poole et al. 2019). By Jensen's inequality, the
  information is then too high on average, by about var(p) / (2 (K - 1) E[p]^2).
* The mean over all K supports (the bound of van den Oord et al. 2018). The information is then at most log K. If the
  predictive is the true one and inputs do not depend on the task, it is too low on average.

Either says what the *learner* extracts. It can be below 0 for an overconfident predictive, and above the information
of the data if the learner cannot use another task's support.

Tasks of a block share supports, so their figures are not independent. Each interval therefore uses the influence of
each task, as a query and as a support of others (Hoeffding's projection, Sen 1960).

References:
    Yin, Tucker, Zhou, Levine & Finn (2020), Meta-Learning without Memorization.
    Poole, Ozair, van den Oord, Alemi & Tucker (2019), On Variational Bounds of Mutual Information, sec. 2.
    van den Oord, Li & Vinyals (2018), Representation Learning with Contrastive Predictive Coding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.devices import everywhere, map_over_tasks, task_mesh
from metaprior.core.options import Count, checked
from metaprior.core.types import (
    Batch,
    Learner,
    Task,
    TaskSource,
    counted,
    draw_task,
    group_count,
    group_order,
    weights,
)
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.evaluation.report import Memorisation
from metaprior.evaluation.scores import Units, brief_score

ANSWERED = 64  # tasks
OTHERS = 15  # supports of other tasks for each


class Answers(NamedTuple):
    """Scores of T queries' n examples, by the support that answered them.

    Attributes:
        pairs: Scores by name [T, K, n]: those of query j under the support of the i-th task of its block.
        shuffled: Scores by name [T, n] with the right support, its targets permuted.
        empty: Scores by name [T, n] with an empty support, or the reason why there are none.
        weight: The weights of the query examples [T, n].
    """

    pairs: dict[str, np.ndarray]
    shuffled: dict[str, np.ndarray]
    empty: dict[str, np.ndarray] | str
    weight: Float[np.ndarray, "T n"]


@checked
def memorisation(
    learner: Learner,
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    *,
    tasks: Count = ANSWERED,
    others: Count = OTHERS,
    chunk: Count = 20,
) -> Memorisation | None:
    """Estimates how much a learner's answers depend on the support. See the module's text for the estimators.

    It adapts to each task three times and predicts each task's queries `others` + 3 times. A learner with `transduce`
    adapts as often as it predicts.

    Args:
        learner: The learner.
        params: Its meta-learned parameters.
        source: The tasks. Of a source with groups, each group gives at most one task.
        key: The random key.
        tasks: The number of tasks, rounded up to whole blocks.
        others: The number of other tasks whose supports answer each query.
        chunk: The number of adaptations and predictions at once in memory.

    Returns:
        The diagnosis, or None if the source has one group, so that there is no other task.
    """
    wanted = min(tasks, group_count(source) or tasks)
    blocks = -(-wanted // (others + 1))
    size = wanted // blocks if group_count(source) else -(-wanted // blocks)
    if size < 2:
        return None
    units = Units.of(source)
    found = _answers(learner, params, source, key, units, blocks, size, chunk)
    scaled = (found.empty if isinstance(found.empty, str) else units.scaled(found.empty),)
    return diagnose(Answers(units.scaled(found.pairs), units.scaled(found.shuffled), *scaled, found.weight))


def _answers(
    learner: Learner,
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    units: Units,
    blocks: int,
    size: int,
    chunk: int,
) -> Answers:
    """Answers the queries of blocks of `size` tasks with each of their supports."""
    key_group, key = jax.random.split(key)
    place = group_order(source, key_group, blocks * size).reshape(blocks, size)

    def over(f: Any, xs: PyTree) -> PyTree:
        n = jax.tree.leaves(xs)[0].shape[0]
        # A divisor of n: a remainder would be compiled as a second program.
        return jax.lax.map(f, xs, batch_size=max(d for d in range(1, min(chunk, n) + 1) if n % d == 0))

    def block(shared: tuple[PyTree, TaskSource], drawn: tuple[PRNGKeyArray, Array], emptied: bool) -> tuple:
        params, source = shared
        keys = jax.vmap(lambda key: jax.random.split(key, 4))(drawn[0])
        key_task, key_adapt, key_predict, key_shuffle = (keys[:, i] for i in range(4))
        drawn_tasks: Task = over(lambda each: draw_task(source, *each), (key_task, drawn[1]))
        supports, queries = drawn_tasks.support, jax.vmap(counted)(drawn_tasks.query)
        kinds = [supports, jax.vmap(_shuffled)(supports, key_shuffle)]
        if emptied:
            kinds = [jax.vmap(_weighed)(support) for support in kinds]
            kinds.append(jax.vmap(_emptied)(kinds[0]))
        given = _concatenated(kinds), _concatenated([key_adapt] * len(kinds))
        if learner.transduce is None:
            given = over(lambda each: learner.adapt(params, *each), given)

        def answered(place: Array, query: Batch, key: PRNGKeyArray) -> dict[str, Array]:
            """The scores of a query by the supports of all tasks of the block, then by those of `place`."""
            places = jnp.concatenate([jnp.arange(size), place])

            def by(one: PyTree) -> dict[str, Array]:
                posterior = one
                if learner.transduce is not None:
                    posterior = learner.posterior(params, one[0], query, one[1])
                return units.score(learner.predict(params, posterior, query.x, key), query.y, brief_score)

            return over(by, jax.tree.map(lambda leaf: leaf[places], given))

        rest = size * jnp.arange(1, len(kinds)) + jnp.arange(size)[:, None]
        scores = jax.lax.map(lambda each: answered(*each), (rest, queries, key_predict))
        weight = jnp.ones_like(scores["nll"][:, 0]) if queries.weight is None else queries.weight
        return scores, weight

    def run(emptied: bool) -> Any:
        mesh = task_mesh(blocks)

        def every(shared: tuple[PyTree, TaskSource], drawn: tuple[PRNGKeyArray, Array]) -> Any:
            return jax.lax.map(lambda each: block(shared, each, emptied), drawn)

        keys = jax.random.split(key, (blocks, size))
        whole = jax.jit(map_over_tasks(every, mesh))(everywhere((params, source), mesh), (keys, place))
        return jax.tree.map(lambda leaf: leaf.reshape(blocks * size, *leaf.shape[2:]), jax.device_get(whole))

    refused = None
    try:
        scores, weight = run(True)
    except ValueError as error:
        refused = str(error)
        scores, weight = run(False)
    # The own support of task j is the (j mod K)-th of its block: roll it to the front.
    own = np.arange(blocks * size) % size
    order = (own[:, None] + np.arange(size)) % size
    pairs = {name: np.take_along_axis(values, order[:, :, None], 1) for name, values in scores.items()}
    shuffled, empty = ({name: values[:, i] for name, values in scores.items()} for i in (size, -1))
    return Answers(pairs, shuffled, empty if refused is None else refused, weight)


def _concatenated(trees: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _emptied(support: Batch) -> Batch:
    return support._replace(weight=jnp.zeros_like(weights(support)))


def _weighed(support: Batch) -> Batch:
    return support._replace(weight=weights(support))


def _shuffled(support: Batch, key: PRNGKeyArray) -> Batch:
    """Permutes the targets of the rows that count and whose class is known."""
    there = weights(support) > 0
    if support.known is not None:
        there = there & support.known
    place = jnp.argsort(~there, stable=True)
    drawn = jnp.argsort(jnp.where(there, jax.random.uniform(key, there.shape), jnp.inf), stable=True)
    return support._replace(y=jax.tree.map(lambda y: y.at[place].set(y[drawn]), support.y))


def diagnose(found: Answers) -> Memorisation:
    """Computes the figures of the diagnosis.

    Args:
        found: The scores. The first support of each query is the right one, and the i-th is that of the i-th task after
            it in its block, cyclically.
    """
    weight = np.asarray(found.weight, float)
    total = weight.sum(-1)
    kept = total > 0
    share = weight / np.where(kept, total, 1)[:, None]
    size = found.pairs["nll"].shape[1]
    notes = [f"{int((~kept).sum())} tasks have no query with a weight above 0 and were left out"] * int((~kept).any())

    def mean(scores: np.ndarray) -> np.ndarray:
        """The weighted mean over examples; what has weight 0 may be anything."""
        part = share if scores.ndim == 2 else share[:, None]
        return np.where(part > 0, scores * part, 0).sum(-1)

    def figure(per_task: np.ndarray, from_support: np.ndarray | None = None) -> Figure:
        """The mean over tasks; `from_support` [T, K - 1] is what each other support adds, with a mean of 0 per task."""
        influence = per_task if from_support is None else per_task + _by_support(from_support)
        return Figure(float(per_task[kept].mean()), figure_of(influence[kept]).interval)

    with np.errstate(all="ignore"):
        pairs = {name: mean(np.asarray(values, float)) for name, values in found.pairs.items()}
        answers = {"right": {name: values[:, 0] for name, values in pairs.items()}}
        answers["other"] = {name: values[:, 1:].mean(1) for name, values in pairs.items()}
        answers["shuffled"] = {name: mean(np.asarray(values, float)) for name, values in found.shuffled.items()}
        if isinstance(found.empty, str):
            notes.append(f"this learner cannot take an empty support ({found.empty.rstrip('.')})")
        else:
            empty = {name: mean(np.asarray(values, float)) for name, values in found.empty.items()}
            if np.isfinite(empty["nll"][kept]).all():
                answers["empty"] = empty
            else:
                notes.append("this learner cannot take an empty support: its NLL is not finite there")
        centred = {name: v[:, 1:] - v[:, 1:].mean(1, keepdims=True) for name, v in pairs.items()}
        figures = {
            support: {n: figure(v, centred[n] / (size - 1) if support == "other" else None) for n, v in scores.items()}
            for support, scores in answers.items()
        }
        right = answers["right"]["nll"]
        rise = {
            support: figure(scores["nll"] - right, centred["nll"] / (size - 1) if support == "other" else None)
            for support, scores in answers.items() if support != "right"
        }  # fmt: skip
        log_p = -np.asarray(found.pairs["nll"], float)
        information = _information(log_p, log_p[:, 1:], mean, figure)
        least = _information(log_p, log_p, mean, figure)
    lost = int(np.isnan(answers["other"]["nll"][kept]).sum())
    notes += [f"{lost} of {int(kept.sum())} tasks have predictions of NaN with another task's support"] * (lost > 0)
    return Memorisation(int(kept.sum()), size - 1, figures, rise, information, least, notes)


def _information(log_p: np.ndarray, marginal: np.ndarray, mean: Any, figure: Any) -> Figure:
    """The mean of log p(y | x, D) - log mean_i p(y | x, D_i), where the marginal has log densities [T, i, n]."""
    log_mean = np.logaddexp.reduce(marginal, 1) - np.log(marginal.shape[1])
    ratio = mean(np.exp(log_p[:, 1:] - log_mean[:, None])) / marginal.shape[1]
    return figure(mean(log_p[:, 0] - log_mean), -(ratio - ratio.mean(1, keepdims=True)))


def _by_support(from_support: np.ndarray) -> np.ndarray:
    """Sums what each task's support adds to the other tasks of its block.

    Args:
        from_support: [T, K - 1], for each task, what the support of the i-th next task of its block adds.
    """
    tasks, others = from_support.shape
    blocks = from_support.reshape(-1, others + 1, others)
    added = np.zeros(blocks.shape[:2])
    for i in range(others):
        added += np.roll(blocks[:, :, i], i + 1, axis=1)
    return added.reshape(tasks)
