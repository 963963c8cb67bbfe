"""The evaluation protocol: one report of accuracy and calibration on new tasks, the same for every learner.

Intervals are t sd / sqrt(g) with Student's t of g - 1 degrees of freedom. g counts independent observations. Where
tasks are independent draws, g is the number of tasks; with hundreds of tasks this is the field's 1.96 sd / sqrt(tasks).
Where tasks come from a fixed number of groups, g is the number of groups, and the observations are the groups' means.
Where tasks come from families, which are drawn equally often, the sd is the one within families.
Episodes from a pool of classes are independent draws given the pool, so their intervals hold for these classes, not for
other ones. ECE, MCE and PIT pool all query examples.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from metaprior.core.devices import everywhere, map_over_tasks, task_mesh
from metaprior.core.likelihoods import Categories, Counts, check_counts, check_labels, check_real
from metaprior.core.options import Count, checked
from metaprior.core.types import (
    Batch,
    Learner,
    Task,
    TaskSource,
    check_settled,
    check_source,
    check_weight,
    counted,
    draw_task,
    examples,
    families_of,
    group_count,
    group_order,
    weighted_mean,
)
from metaprior.evaluation.calibration import BINS, expected_error, maximum_error, reliability
from metaprior.evaluation.figures import FEW, figure_of
from metaprior.evaluation.memorisation import ANSWERED
from metaprior.evaluation.memorisation import memorisation as diagnosed
from metaprior.evaluation.report import CORRELATION, Report
from metaprior.evaluation.scores import LEVELS, Units, brief_score, integral_transform, score

__all__ = ["LEVELS", "TASKS", "Units", "check_targets", "evaluate", "integral_transform", "score", "summarise"]

TASKS = 600  # the default number of tasks, where they are independent draws


@checked
def evaluate(
    learner: Learner,
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    *,
    tasks: Count | None = None,
    chunk: Count = 20,
    course: Learner | None = None,
    metrics: Sequence[str] = (),
    memorisation: bool = False,
    together: Count | None = None,
) -> Report:
    """Adapts a learner to new tasks and evaluates its predictions of their queries.

    The figures of a table are in the units of its target. If the source has families (`FamilySource`), the report also
    has the figures of each of them.

    Args:
        learner: The learner.
        params: Its meta-learned parameters, such as `Fitted.params` or `Fitted.best`.
        source: The test tasks.
        key: The random key of the tasks and of the adaptation.
        tasks: The number of tasks. The default is one task per group if the source has groups, and 600 otherwise.
            A source with groups draws each group once before any group is drawn again; one with families draws all
            families equally often, up to one task.
        chunk: The number of tasks at once in memory.
        course: The learner whose `path` gives the figures after each inner step. The default is `learner` itself, if
            it has a `path`. Give one with a cheaper posterior to save time.
        metrics: Names of further metrics to report, from those that the learner's loss returns on the test tasks (for
            example of a learner that is judged throughout an episode).
        memorisation: Whether to estimate how much the answers depend on the support, on as many further draws of tasks,
            at most 64 (see `evaluation.memorisation`). It adapts three times to each of these tasks, and predicts their
            queries with 18 supports. The command `evaluate` does so by default.
        together: The number of queries that are predicted together, a divisor of the number of a task's queries. These
            are then predicted in random batches of this size, which shows how much a learner gains from their company.
            The default is all.

    Returns:
        The report: figures with 95 % intervals, calibration, the figures after each inner step, and whether predictions
        depend on the other queries of their task.

    Raises:
        ValueError: An argument has a wrong type, a target is not possible (such as a label that is no class), a weight
            is below 0, no query has a weight above 0, `together` does not divide the number of queries, or the learner
            must be settled first (`Learner.settle`).
    """
    check_settled(learner)
    if hasattr(params, "best") and hasattr(params, "history"):
        raise ValueError("params must be a learner's parameters, got the result of `fit`. Give its .best or .params.")
    check_source(source)
    groups = group_count(source)
    tasks = (groups or TASKS) if tasks is None else tasks
    units = Units.of(source)
    course = learner if course is None else course

    def own(params: PyTree, task: Task, key: PRNGKeyArray) -> dict[str, Array]:
        has = learner.loss(params, task, key)[1] if metrics else {}
        if unknown := [name for name in metrics if name not in has]:
            raise ValueError(
                f"metrics must be names of the loss's metrics on these tasks, {', '.join(has)}, got "
                f"{', '.join(unknown)}."
            )
        return {name: has[name] for name in metrics}

    key_group, key = jax.random.split(key)
    # kinds: the predictive's type and shapes, which tracing appends.
    place, kinds = group_order(source, key_group, tasks), []

    def one(params: PyTree, source: TaskSource, key: PRNGKeyArray, group: Array, alone: Array) -> tuple:
        key_task, key_adapt, key_predict, key_pit = jax.random.split(key, 4)
        task = draw_task(source, key_task, group)
        judged = (
            counted(task.query) if together is None else shuffled(counted(task.query), jax.random.fold_in(key_pit, 1))
        )
        adapted = None if learner.transduce is not None else learner.adapt(params, task.support, key_adapt)
        path = None if course.path is None else course.path(params, task.support, key_adapt)

        def answered(query: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
            """Returns the scores of queries that are predicted together, and those after each inner step."""
            query = query._replace(x=company(query.x, alone))
            posterior = learner.posterior(params, task.support, query, key_adapt) if adapted is None else adapted
            predictive = learner.predict(params, posterior, query.x, key_predict)
            kinds.append(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), predictive))
            scores = units.score(predictive, query.y) | integral_transform(predictive, query.y, key_pit)

            def at(p: PyTree) -> dict[str, Array]:
                return units.score(course.predict(params, p, query.x, key_predict), query.y, brief_score)

            return scores, {} if path is None else jax.vmap(at, out_axes=1)(path)

        scores, later = answered(judged) if together is None else in_batches(answered, judged, together)
        weight = jnp.ones_like(scores["nll"]) if judged.weight is None else judged.weight
        steps = jax.tree.map(jax.vmap(lambda s: weighted_mean(s, judged), in_axes=1), later)
        sides = [(batch.y, batch.weight) for batch in task]
        return scores, steps, weight, own(params, task, key_adapt), sides

    mesh = task_mesh(tasks)
    devices = 1 if mesh is None else mesh.size
    at_once = min(chunk, tasks // devices)

    def every(shared: tuple[PyTree, TaskSource], drawn: tuple[PRNGKeyArray, Array, Array]) -> Any:
        return jax.lax.map(lambda one_drawn: one(*shared, *one_drawn), drawn, batch_size=at_once)

    # Some tasks come a second time, with other queries beside the first one: does its prediction change?
    again = np.arange(at_once * devices if learner.transduce is None else 0) % tasks
    twice = np.append(np.arange(tasks), again)
    drawn = jax.random.split(key, tasks)[twice], place[twice], jnp.arange(twice.size) >= tasks
    run, shared = jax.jit(map_over_tasks(every, mesh)), everywhere((params, source), mesh)
    found = jax.device_get(run(shared, drawn))
    second = found[0]["nll"][tasks:, 0]
    scores, steps, weight, others, (support, query) = jax.tree.map(lambda leaf: leaf[:tasks], found)
    first = scores["nll"][again, 0]
    mixed = not np.allclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True)
    check_targets(kind := kinds[0], support, query, bool(np.isnan(scores["nll"][weight > 0]).any()))
    names = () if groups else families_of(source)
    members, kin = (np.asarray(place) if of else None for of in (groups, names))
    report = summarise(units.scaled(scores), units.scaled(steps), weight, members, kin, names)
    own_figures = {name: figure_of(values, members, kin) for name, values in others.items()}
    transductive = "no"
    if learner.transduce is not None and together != 1:
        transductive = "by the learner"
        note = "transductive: each prediction may depend on the other queries of its task"
        report = replace(report, notes=[*report.notes, note])
        if alone := int((((weight > 0).sum(1) == 1) & (np.isnan(scores["nll"]) & (weight > 0)).any(1)).sum()):
            note = f"{alone} of the tasks with predictions of NaN have one query, beside which there is no other"
            report = replace(report, notes=[*report.notes, note])
    elif mixed:
        transductive = "by batch statistics"
        note = (
            "transductive by batch statistics: each prediction depends on the other queries of its task, with which "
            "it is normalised. Another norm of the network, or the learner's transductive=false, predicts each alone"
        )
        report = replace(report, notes=[*report.notes, note])
    if together is not None:
        size = f"{together} at a time" if together > 1 else "one at a time"
        report = replace(report, notes=[*report.notes, f"the queries of a task were predicted {size}"])
    if isinstance(kind, Counts):
        note = "targets are counts, so intervals of a true predictive cover at least their level; the PIT is randomised"
        report = replace(report, notes=[*report.notes, note])
    told = None
    if memorisation:
        told = diagnosed(learner, params, source, key, tasks=min(tasks, ANSWERED), chunk=chunk)
        if told is None:
            note = "there is no estimate of memorisation, as it needs at least two tasks of different groups"
            report = replace(report, notes=[*report.notes, note])
        elif together is not None:
            told = replace(told, notes=[*told.notes, "here, all queries of a task are predicted together"])
    figures = report.figures | own_figures
    return replace(report, target=units.target, figures=figures, memorisation=told, transductive=transductive)


def company(x: PyTree, alone: Array) -> PyTree:
    """Replaces all queries by copies of the first one, so that it is in other company.

    Args:
        x: The queries' inputs.
        alone: Whether to replace them, a traced boolean.
    """
    return jax.tree.map(lambda leaf: jnp.where(alone, jnp.broadcast_to(leaf[:1], leaf.shape), leaf), x)


def shuffled(batch: Batch, key: PRNGKeyArray) -> Batch:
    """Returns a batch in random order; the queries of most sources are sorted by class.

    Args:
        batch: The batch.
        key: The random key of the order.
    """
    order = jax.random.permutation(key, examples(batch))
    return jax.tree.map(lambda leaf: leaf[order], batch)


def in_batches(answered: Callable[[Batch], PyTree], query: Batch, size: int) -> PyTree:
    """Applies a function to batches of queries, one after the other.

    Args:
        answered: The function; the leading axis of its results is that of the queries.
        query: The queries.
        size: The size of a batch.

    Returns:
        The results of all queries.

    Raises:
        ValueError: `size` does not divide the number of queries.
    """
    n = examples(query)
    if n % size:
        raise ValueError(f"together must divide the number of queries of a task, {n}, got {size}.")
    batches = jax.tree.map(lambda leaf: leaf.reshape(n // size, size, *leaf.shape[1:]), query)
    return jax.tree.map(lambda leaf: leaf.reshape(n, *leaf.shape[2:]), jax.lax.map(answered, batches))


def check_targets(kind: Any, support: tuple[Any, Any], query: tuple[Any, Any], lost: bool) -> None:
    """Checks the targets and weights of stacked tasks.

    Labels below 0 are hidden ones. Some learners can read them in a support; if predictions are NaN, this one cannot.

    Args:
        kind: The predictive, whose type and shape determine which targets are possible.
        support: The targets and the weights of the supports.
        query: The targets and the weights of the queries.
        lost: Whether any prediction is NaN.

    Raises:
        ValueError: A target is not possible, or a weight is below 0.
    """
    for side, (y, weight) in (("support", support), ("query", query)):
        check_weight(weight)
        if jax.tree.structure(y).num_leaves != 1 or not hasattr(y, "dtype"):
            continue
        values = np.asarray(y) if weight is None else np.asarray(y)[np.asarray(weight) > 0]
        try:
            if isinstance(kind, Categories):
                hidden = side == "support" and not lost
                check_labels(values[values >= 0] if hidden else values, kind.log_probs.shape[-1])
            elif isinstance(kind, Counts):
                check_counts(values)
            else:
                check_real(values)
        except ValueError as error:
            raise ValueError(f"{side}: {error}") from None


def summarise(
    scores: dict[str, np.ndarray],
    steps: dict[str, np.ndarray],
    weight: np.ndarray,
    groups: np.ndarray | None = None,
    families: np.ndarray | None = None,
    names: Sequence[str] = (),
) -> Report:
    """Summarises the scores of many tasks in a report.

    Tasks whose queries all have weight 0 are left out.

    Args:
        scores: Scores by name, [tasks, n].
        steps: Means after 0, 1, ..., k inner steps by name, [tasks, k + 1].
        weight: The weights of the query examples [tasks, n].
        groups: The group of each task [tasks], or None if tasks are independent draws.
        families: The family of each task [tasks], or None if there is a single family.
        names: The names of the families.

    Returns:
        The report.

    Raises:
        ValueError: No task has a query with a weight above 0.
    """
    kept = weight.sum(-1) > 0
    if not kept.any():
        raise ValueError("query: no task has an example with a weight above 0, so there is nothing to judge.")
    lost = int((~kept).sum())
    scores, steps = ({name: values[kept] for name, values in of.items()} for of in (scores, steps))
    weight, (groups, families) = weight[kept], (None if of is None else of[kept] for of in (groups, families))
    total = weight.sum(-1)
    counts = weight > 0
    means = {
        name: (np.where(counts, values, 0) * weight).sum(-1) / total
        for name, values in scores.items() if values.ndim == 2
    }  # fmt: skip
    shown = [n for n in ("accuracy", "mse", "nll", "brier") if n in scores]
    shown += [n for n in scores if n.startswith(("coverage_", "width_"))]
    figures = {name: figure_of(means[name], groups, families) for name in shown}
    of_family = {
        family: {name: figure_of(means[name][families == i]) for name in shown}
        for i, family in enumerate(names) if (families == i).any()
    }  # fmt: skip
    curve = []
    for step in range(next(iter(steps.values())).shape[1] if steps else 0):
        curve.append({name: figure_of(values[:, step], groups, families) for name, values in steps.items()})
    number = None if groups is None else len(np.unique(groups))
    notes = _notes(len(weight), number, lost)
    if diverged := int(np.isnan(means["nll"]).sum()):
        notes.append(f"{diverged} of {len(weight)} tasks have predictions of NaN: the learner diverged on them")
    report = Report("", len(weight), figures, {}, curve, groups=number, families=of_family, notes=notes)
    flat = {name: values[counts] for name, values in scores.items()}
    of_row = weight[counts]
    if "accuracy" in scores:
        sure, right = jnp.asarray(flat["confidence"]), jnp.asarray(flat["accuracy"])
        table = reliability(sure, right, jnp.asarray(of_row))
        pooled = {"ece": float(expected_error(table)), "mce": float(maximum_error(table))}
        rows = [
            {"low": b / BINS, "high": (b + 1) / BINS, "count": float(n), "confidence": float(c), "accuracy": float(a)}
            for b, (n, c, a) in enumerate(zip(*table, strict=True))
        ]
        return replace(report, kind="classification", pooled=pooled, reliability=rows)
    least = max(1e-20 * flat["variance"].mean(), 1e-300)  # relative, as the target may have any units
    error, spread = (np.log(np.maximum(flat[name].astype(float), least)) for name in ("mse", "variance"))
    pooled = {
        "rmse": float(np.sqrt(figures["mse"].mean)),
        CORRELATION: _correlation(error, spread, of_row),
    }
    targets = flat["pit"].reshape(len(of_row), -1)
    each = np.repeat(of_row / targets.shape[1], targets.shape[1])
    histogram = np.histogram(targets.reshape(-1), bins=BINS, range=(0, 1), weights=each)[0] / of_row.sum() * BINS
    return replace(report, kind="regression", pooled=pooled, pit=histogram.tolist())


def _correlation(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> float | None:
    """The weighted correlation, or None if it is undefined because either input is constant up to rounding."""
    with np.errstate(invalid="ignore"):  # values are NaN where a task diverged
        a, b = (v - np.average(v, weights=weight) for v in (a, b))
    deviations = [float(np.sqrt(np.average(v**2, weights=weight))) for v in (a, b)]
    return None if min(deviations) <= 1e-5 else float(np.average(a * b, weights=weight) / np.prod(deviations))


def _notes(tasks: int, groups: int | None, lost: int) -> list[str]:
    independent, what = (tasks, "tasks") if groups is None else (groups, "groups")
    notes = [f"{lost} tasks have no query with a weight above 0 and were left out"] if lost else []
    if independent < 2:
        return [*notes, f"there are no intervals, as they need at least two {what}"]
    if independent < FEW:
        return [*notes, f"few {what}: the interval of a skewed figure covers less than 95 % with {independent} {what}"]
    return notes
