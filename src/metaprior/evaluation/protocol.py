"""One report for every learner: how right it is on new tasks, and how honest about it.

Intervals are t sd / sqrt(g) with Student's t of g - 1 degrees of freedom. g counts independent pieces of evidence: the
tasks where each is a draw of its own (with hundreds of tasks this is the field's 1.96 sd / sqrt(tasks)), or the groups,
by their means, where tasks come from a fixed number of groups. Episodes from a pool of classes are independent draws
given the pool: their intervals speak of these classes, not of other ones. ECE, MCE and PIT pool all query examples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from metaprior.core.devices import everywhere, map_over_tasks, task_mesh
from metaprior.core.likelihoods import Categories, Counts, check_counts, check_labels, check_real
from metaprior.core.options import Count, checked
from metaprior.core.types import (
    Learner,
    Task,
    TaskSource,
    check_settled,
    check_source,
    check_weight,
    counted,
    draw_task,
    group_count,
    group_order,
    weighted_mean,
)
from metaprior.core.units import in_units
from metaprior.evaluation.calibration import BINS, brier, expected_error, maximum_error, reliability
from metaprior.evaluation.figures import FEW, figure_of
from metaprior.evaluation.report import CORRELATION, Report
from metaprior.tasks import preparation_of

LEVELS = (0.5, 0.9, 0.95)  # of the central predictive intervals whose coverage is reported


TASKS = 600  # by default, where tasks are independent draws


def score(predictive: Any, y: Array) -> dict[str, Array]:
    """Each query example's scores [n]; which ones depends on the kind of predictive."""
    nll = -predictive.log_prob(y)
    if isinstance(predictive, Categories):
        p = predictive.mean()
        confidence, choice = p.max(-1), p.argmax(-1)
        hit = jnp.where(jnp.isnan(nll), jnp.nan, (choice == y).astype(nll.dtype))
        return {"accuracy": hit, "nll": nll, "brier": brier(p, y), "confidence": confidence}
    rest = tuple(range(1, y.ndim))
    scores = {"mse": ((predictive.mean() - y) ** 2).mean(rest), "nll": nll}
    for level in LEVELS:
        low, high = (predictive.quantile(q) for q in ((1 - level) / 2, (1 + level) / 2))
        inside = (low <= y) & (y <= high)
        covered = jnp.where(jnp.isnan(low) | jnp.isnan(high), jnp.nan, inside.astype(nll.dtype))
        scores[f"coverage_{100 * level:.0f}"] = covered.mean(rest)
        scores[f"width_{100 * level:.0f}"] = (high - low).mean(rest)
    scores["variance"] = predictive.variance().mean(rest)
    return scores


def integral_transform(predictive: Any, y: Array, key: PRNGKeyArray) -> dict[str, Array]:
    """PIT values of each target [n, d], those of counts randomised; none of classes."""
    if isinstance(predictive, Categories):
        return {}
    return {"pit": predictive.pit(y, key) if isinstance(predictive, Counts) else predictive.cdf(y)}


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
) -> Report:
    """Adapt to new tasks and judge the predictions of their queries, a table's in the units of its target.

    Args:
        tasks: how many; by default one of each group, where the source has groups, and 600 where it has none. A
            source of groups shows each before any comes again.
        chunk: tasks in memory at once.
        course: the learner whose `path` gives the figures after each inner step (default: the learner itself, if it
            has one; a cheaper posterior may be wanted there).
        metrics: names of the learner's own, of its loss on the test tasks, to report besides: a learner that is judged
            all along an episode has some.

    Raises:
        ValueError: arguments of a wrong type; targets that cannot be, such as a label that is no class; weights below
            0; no query that counts; a learner that has to be `settled` first.
    """
    check_settled(learner)
    if hasattr(params, "best") and hasattr(params, "history"):
        raise ValueError("params must be parameters, got what training ends with; give its .best or .params.")
    check_source(source)
    groups = group_count(source)
    tasks = (groups or TASKS) if tasks is None else tasks
    units = Units.of(source)
    course = learner if course is None else course

    def own(params: PyTree, task: Task, key: PRNGKeyArray) -> dict[str, Array]:
        has = learner.loss(params, task, key)[1] if metrics else {}
        if unknown := [name for name in metrics if name not in has]:
            raise ValueError(f"metrics: came {', '.join(unknown)}, but on these tasks the loss has {', '.join(has)}")
        return {name: has[name] for name in metrics}

    key_group, key = jax.random.split(key)
    place, kinds = group_order(source, key_group, tasks), []  # kinds: the predictive's type and shapes, when traced

    def one(params: PyTree, source: TaskSource, key: PRNGKeyArray, group: Array) -> tuple:
        key_task, key_adapt, key_predict, key_pit = jax.random.split(key, 4)
        task = draw_task(source, key_task, group)
        judged = counted(task.query)
        x, y = judged.x, judged.y
        posterior = learner.adapt(params, task.support, key_adapt)
        predictive = learner.predict(params, posterior, x, key_predict)
        scores = units.score(predictive, y) | integral_transform(predictive, y, key_pit)
        weight = jnp.ones_like(scores["nll"]) if judged.weight is None else judged.weight
        steps = {}
        if course.path is not None:
            path = course.path(params, task.support, key_adapt)
            later = jax.vmap(lambda p: units.score(course.predict(params, p, x, key_predict), y, brief_score))(path)
            steps = jax.tree.map(jax.vmap(lambda s: weighted_mean(s, judged)), later)
        sides = [(batch.y, batch.weight) for batch in task]
        kinds.append(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), predictive))
        return scores, steps, weight, own(params, task, key_adapt), sides

    def every(shared: tuple[PyTree, TaskSource], drawn: tuple[PRNGKeyArray, Array]) -> Any:
        return jax.lax.map(lambda one_drawn: one(*shared, *one_drawn), drawn, batch_size=min(chunk, tasks))

    mesh = task_mesh(tasks)
    run, shared = jax.jit(map_over_tasks(every, mesh)), everywhere((params, source), mesh)
    found = jax.device_get(run(shared, (jax.random.split(key, tasks), place)))
    scores, steps, weight, others, (support, query) = found
    check_targets(kind := kinds[0], support, query, bool(np.isnan(scores["nll"][weight > 0]).any()))
    members = None if groups is None else np.asarray(place)
    report = summarise(units.scaled(scores), units.scaled(steps), weight, members)
    own_figures = {name: figure_of(values, members) for name, values in others.items()}
    if isinstance(kind, Counts):
        note = "counts are whole numbers, so a true predictive covers its level or more; the PIT is randomised"
        report = replace(report, notes=[*report.notes, note])
    return replace(report, target=units.target, figures=report.figures | own_figures)


def check_targets(kind: Any, support: tuple[Any, Any], query: tuple[Any, Any], lost: bool) -> None:
    """A ValueError for targets (y, weight) of stacked tasks that cannot be, and for weights below 0.

    kind: the predictive, whose type and shape say what may be. lost: predictions came out NaN. Labels below 0 are
    hidden ones, which some learners read in a support; where predictions are lost, this one did not.
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


@dataclass(frozen=True)
class Units:
    """The units of a table's target: `scale` of them are one standardised unit of each target.

    Scores are computed with scales of 1 at most, and brought to their size in float64, where no square of a scale
    overflows.
    """

    target: str | None = None
    scale: tuple[float, ...] = ()

    @classmethod
    def of(cls, source: Any) -> "Units":
        """Those of a source's table; none for classes and for tasks that are no tables."""
        preparation = preparation_of(source)
        if preparation is None or preparation.target.kind == "class":
            return cls()
        return cls(preparation.target.name, preparation.target.deviation)

    def score(self, predictive: Any, y: Array, by: Callable[..., dict[str, Array]] | None = None) -> dict[str, Array]:
        """Scores of a predictive of standardised targets, relative to the largest scale."""
        if set(self.scale) - {1.0}:
            relative = np.asarray(self.scale) / max(self.scale)
            predictive, y = in_units(predictive, 0 * relative, relative), y * relative.astype(y.dtype)
        return (score if by is None else by)(predictive, y)

    def scaled(self, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The scores in the target's own units."""
        if not set(self.scale) - {1.0}:
            return scores
        largest, own = max(self.scale), {name: np.asarray(values, float) for name, values in scores.items()}
        own |= {name: own[name] * largest**2 for name in ("mse", "variance") if name in own}
        own |= {name: own[name] * largest for name in own if name.startswith("width_")}
        return own | ({"nll": own["nll"] + len(self.scale) * float(np.log(largest))} if "nll" in own else {})


def brief_score(predictive: Any, y: Array) -> dict[str, Array]:
    """The scores of the per-step curve: what is right, and the nll."""
    scores = score(predictive, y)
    return {name: scores[name] for name in ("accuracy", "mse", "nll") if name in scores}


def summarise(
    scores: dict[str, np.ndarray],
    steps: dict[str, np.ndarray],
    weight: np.ndarray,
    groups: np.ndarray | None = None,
) -> Report:
    """A report from scores [tasks, n], per-step means [tasks, k + 1], weights [tasks, n] and groups [tasks].

    A task without a query that counts has no figures, and is left out.
    """
    kept = weight.sum(-1) > 0
    if not kept.any():
        raise ValueError("query: no task has an example with a weight above 0, so there is nothing to judge.")
    lost = int((~kept).sum())
    scores, steps = ({name: values[kept] for name, values in of.items()} for of in (scores, steps))
    weight, groups = weight[kept], None if groups is None else groups[kept]
    total = weight.sum(-1)
    counts = weight > 0
    means = {
        name: (np.where(counts, values, 0) * weight).sum(-1) / total
        for name, values in scores.items() if values.ndim == 2
    }  # fmt: skip
    names = [n for n in ("accuracy", "mse", "nll", "brier") if n in scores]
    names += [n for n in scores if n.startswith(("coverage_", "width_"))]
    figures = {name: figure_of(means[name], groups) for name in names}
    curve = []
    for step in range(next(iter(steps.values())).shape[1] if steps else 0):
        curve.append({name: figure_of(values[:, step], groups) for name, values in steps.items()})
    number = None if groups is None else len(np.unique(groups))
    notes = _notes(len(weight), number, lost)
    if diverged := int(np.isnan(means["nll"]).sum()):
        notes.append(f"{diverged} of {len(weight)} tasks have predictions of NaN: the learner diverged on them")
    report = Report("", len(weight), figures, {}, curve, groups=number, notes=notes)
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
    least = max(1e-20 * flat["variance"].mean(), 1e-300)  # in the units of the target, whatever they are
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
    """The weighted correlation; None where either is constant up to rounding, which leaves it undefined."""
    with np.errstate(invalid="ignore"):  # NaN where a task diverged
        a, b = (v - np.average(v, weights=weight) for v in (a, b))
    deviations = [float(np.sqrt(np.average(v**2, weights=weight))) for v in (a, b)]
    return None if min(deviations) <= 1e-5 else float(np.average(a * b, weights=weight) / np.prod(deviations))


def _notes(tasks: int, groups: int | None, lost: int) -> list[str]:
    independent, what = (tasks, "tasks") if groups is None else (groups, "groups")
    notes = [f"{lost} tasks have no query that counts and were left out"] if lost else []
    if independent < 2:
        return [*notes, f"one of {what} leaves the intervals unknown"]
    if independent < FEW:
        return [*notes, f"few {what}: the interval of a skewed figure covers less than 95 % with {independent} {what}"]
    return notes
