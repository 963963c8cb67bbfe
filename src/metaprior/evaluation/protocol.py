"""The evaluation protocol: one report of accuracy and calibration on new tasks, the same for every learner.

Intervals are t sd / sqrt(g) with Student's t of g - 1 degrees of freedom. g counts independent observations. Where
tasks are independent draws, g is the number of tasks; with hundreds of tasks this is the field's 1.96 sd / sqrt(tasks).
Where tasks come from a fixed number of groups, g is the number of groups, and the observations are the groups' means.
Where tasks come from families, which are drawn equally often, the sd is the one within families.
Episodes from a pool of classes are independent draws given the pool, so their intervals hold for these classes, not for
other ones. ECE, MCE and PIT pool all query examples.
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
    NumericPredictive,
    Task,
    TaskSource,
    check_settled,
    check_source,
    check_weight,
    counted,
    draw_task,
    families_of,
    group_count,
    group_order,
    weighted_mean,
)
from metaprior.core.units import in_units
from metaprior.evaluation.calibration import BINS, brier, expected_error, maximum_error, reliability
from metaprior.evaluation.figures import FEW, figure_of
from metaprior.evaluation.report import CORRELATION, Report
from metaprior.tasks import preparation_of

LEVELS = (0.5, 0.9, 0.95)  # the central predictive intervals whose coverage is reported


TASKS = 600  # the default number of tasks, where they are independent draws


def score(predictive: Any, y: Array) -> dict[str, Array]:
    """Computes the scores of each query example.

    Args:
        predictive: The predictive distribution of n examples.
        y: Their targets, [n] class labels or [n, d] numbers.

    Returns:
        Scores [n] by name. For classes: accuracy, nll, brier and confidence. Otherwise: mse, nll, the coverage and
        width of central intervals at `LEVELS`, and the variance, as means over the d targets (nll: their sum).
    """
    nll = -predictive.log_prob(y)
    if isinstance(predictive, Categories):
        p = predictive.mean()
        confidence, choice = p.max(-1), p.argmax(-1)
        hit = jnp.where(jnp.isnan(nll), jnp.nan, (choice == y).astype(nll.dtype))
        return {"accuracy": hit, "nll": nll, "brier": brier(p, y), "confidence": confidence}
    if not isinstance(predictive, NumericPredictive):
        raise ValueError(
            f"predictive must have variance, cdf and quantile (`NumericPredictive`), got {type(predictive).__name__}."
        )
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
    """Computes the probability integral transform (PIT) of each target.

    Args:
        predictive: The predictive distribution of n examples.
        y: Their targets [n, d].
        key: The random key for counts, whose PIT is randomised.

    Returns:
        "pit": [n, d], or nothing for classes.
    """
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

    Returns:
        The report: figures with 95 % intervals, calibration, and the figures after each inner step.

    Raises:
        ValueError: An argument has a wrong type, a target is not possible (such as a label that is no class), a weight
            is below 0, no query has a weight above 0, or the learner must be settled first (`Learner.settle`).
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

    def one(params: PyTree, source: TaskSource, key: PRNGKeyArray, group: Array) -> tuple:
        key_task, key_adapt, key_predict, key_pit = jax.random.split(key, 4)
        task = draw_task(source, key_task, group)
        judged = counted(task.query)
        x, y = judged.x, judged.y
        posterior = learner.posterior(params, task.support, judged, key_adapt)
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
    names = () if groups else families_of(source)
    members, kin = (np.asarray(place) if of else None for of in (groups, names))
    report = summarise(units.scaled(scores), units.scaled(steps), weight, members, kin, names)
    own_figures = {name: figure_of(values, members, kin) for name, values in others.items()}
    if learner.transduce is not None:
        note = "transductive: each prediction may depend on the other queries of its task"
        report = replace(report, notes=[*report.notes, note])
    if isinstance(kind, Counts):
        note = "targets are counts, so intervals of a true predictive cover at least their level; the PIT is randomised"
        report = replace(report, notes=[*report.notes, note])
    return replace(report, target=units.target, figures=report.figures | own_figures)


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


@dataclass(frozen=True)
class Units:
    """The units of a table's target.

    Scores are computed with scales relative to the largest one, so that none is above 1, and then multiplied in
    float64, in which the square of a scale does not overflow.

    Attributes:
        target: The name of the target, or None if there is no table.
        scale: For each target, how many of its units are one standardised unit.
    """

    target: str | None = None
    scale: tuple[float, ...] = ()

    @classmethod
    def of(cls, source: Any) -> "Units":
        """Returns the units of a source's table, which are empty for classes and where there is no table.

        Args:
            source: A task source.
        """
        preparation = preparation_of(source)
        if preparation is None or preparation.target.kind == "class":
            return cls()
        return cls(preparation.target.name, preparation.target.deviation)

    def score(self, predictive: Any, y: Array, by: Callable[..., dict[str, Array]] | None = None) -> dict[str, Array]:
        """Computes scores of a predictive of standardised targets, in units relative to the largest scale.

        Args:
            predictive: The predictive distribution of n examples.
            y: Their standardised targets [n, d].
            by: The function that computes the scores. The default is `score`.

        Returns:
            Scores [n] by name.
        """
        if set(self.scale) - {1.0}:
            relative = np.asarray(self.scale) / max(self.scale)
            predictive, y = in_units(predictive, 0 * relative, relative), y * relative.astype(y.dtype)
        return (score if by is None else by)(predictive, y)

    def scaled(self, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts the results of `score` to the target's own units.

        Args:
            scores: The scores by name.
        """
        if not set(self.scale) - {1.0}:
            return scores
        largest, own = max(self.scale), {name: np.asarray(values, float) for name, values in scores.items()}
        own |= {name: own[name] * largest**2 for name in ("mse", "variance") if name in own}
        own |= {name: own[name] * largest for name in own if name.startswith("width_")}
        return own | ({"nll": own["nll"] + len(self.scale) * float(np.log(largest))} if "nll" in own else {})


def brief_score(predictive: Any, y: Array) -> dict[str, Array]:
    """Computes the scores that are reported after each inner step: accuracy or mse, and nll.

    Args:
        predictive: The predictive distribution of n examples.
        y: Their targets.

    Returns:
        Scores [n] by name.
    """
    scores = score(predictive, y)
    return {name: scores[name] for name in ("accuracy", "mse", "nll") if name in scores}


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
