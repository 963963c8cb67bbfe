"""One report for every learner: how right it is on new tasks, and how honest about it.

Intervals are 1.96 sd / sqrt(tasks) of per-task means (population sd, as in MAML's code). ECE, MCE and coverage pool all
query examples of all tasks.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree
from rich.table import Table

from metaprior.calibration import BINS, brier, expected_error, maximum_error, reliability
from metaprior.devices import everywhere, map_over_tasks, task_mesh
from metaprior.files import write_atomically
from metaprior.likelihoods import Categories
from metaprior.tasks import preparation_of
from metaprior.types import Learner, Task, TaskSource
from metaprior.units import in_units

LEVELS = (0.5, 0.9, 0.95)  # of the central predictive intervals whose coverage is reported


@dataclass(frozen=True)
class Figure:
    """A mean over tasks with the half-width of its 95 % interval."""

    mean: float
    interval: float

    def __format__(self, digits: str) -> str:
        digits = (digits or ".4f") if _digits(self.mean) == ".4f" else ".3g"
        return f"{self.mean:{digits}} ± {self.interval:{digits}}"

    def __str__(self) -> str:
        return format(self)


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. `pooled` are figures without an interval; `curve` has a row an inner step.

    `target` names the column of a table that was predicted: errors, widths and NLL are in its own units.
    """

    kind: str
    tasks: int
    figures: dict[str, Figure]
    pooled: dict[str, float]
    curve: list[dict[str, Figure]] = field(default_factory=list)
    reliability: list[dict[str, float]] = field(default_factory=list)
    pit: list[float] = field(default_factory=list)
    target: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def save(self, path: Path | str) -> None:
        write_atomically(Path(path), self.to_json())

    @classmethod
    def from_json(cls, text: str) -> "Report":
        table = json.loads(text)
        table["figures"] = {k: Figure(**v) for k, v in table["figures"].items()}
        table["curve"] = [{k: Figure(**v) for k, v in row.items()} for row in table["curve"]]
        return cls(**{f.name: table[f.name] for f in fields(cls) if f.name in table})

    def table(self, title: str = "") -> Table:
        """The report as a table to print."""
        title = (title or f"{self.tasks} tasks") + (f"; in units of {self.target}" if self.target else "")
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("figure")
        table.add_column("mean", justify="right")
        table.add_column("95 % interval", justify="right")
        for name, figure in self.figures.items():
            digits = _digits(figure.mean)
            table.add_row(title_of(name), f"{figure.mean:{digits}}", f"± {figure.interval:{digits}}")
        for name, value in self.pooled.items():
            table.add_row(title_of(name), f"{value:{_digits(value)}}", "")
        return table

    def curve_table(self) -> Table | None:
        """Figures after each inner step, or None where there are no inner steps."""
        if not self.curve:
            return None
        table = Table(title="after each inner step", title_justify="left", header_style="bold")
        table.add_column("steps", justify="right")
        for name in self.curve[0]:
            table.add_column(title_of(name), justify="right")
        for step, row in enumerate(self.curve):
            if step <= 10 or step % 10 == 0 or step == len(self.curve) - 1:
                table.add_row(str(step), *(str(figure) for figure in row.values()))
        return table


def _digits(value: float) -> str:
    """Four decimals, or four digits for figures of tables in units that are very small or large."""
    return ".4f" if value == 0 or 1e-2 <= abs(value) < 1e5 else ".4g"


def title_of(name: str) -> str:
    """A figure's name as it is printed."""
    special = {"nll": "NLL", "mse": "MSE", "rmse": "RMSE", "ece": "ECE", "mce": "MCE"}
    return special.get(name, name.replace("_", " "))


def score(predictive: Any, y: Array) -> dict[str, Array]:
    """Each query example's scores [n]; which ones depends on the kind of predictive."""
    nll = -predictive.log_prob(y)
    if isinstance(predictive, Categories):
        p = predictive.mean()
        confidence, choice = p.max(-1), p.argmax(-1)
        hit = (choice == y).astype(nll.dtype)
        return {"accuracy": hit, "nll": nll, "brier": brier(p, y), "confidence": confidence}
    rest = tuple(range(1, y.ndim))
    scores = {"mse": ((predictive.mean() - y) ** 2).mean(rest), "nll": nll}
    for level in LEVELS:
        low, high = (predictive.quantile(q) for q in ((1 - level) / 2, (1 + level) / 2))
        inside = (low <= y) & (y <= high)
        scores[f"coverage_{100 * level:.0f}"] = inside.astype(nll.dtype).mean(rest)
        scores[f"width_{100 * level:.0f}"] = (high - low).mean(rest)
    scores["variance"] = predictive.variance().mean(rest)
    scores["pit"] = predictive.cdf(y).mean(rest)
    return scores


def evaluate(
    learner: Learner,
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    *,
    tasks: int = 600,
    chunk: int = 20,
    course: Learner | None = None,
    metrics: Sequence[str] = (),
) -> Report:
    """Adapt to `tasks` new tasks and judge the predictions of their queries, a table's in the units of its target.

    chunk: tasks in memory at once. course: the learner whose `path` gives the figures after each inner step (default:
    the learner itself, if it has one; a cheaper posterior may be wanted there). metrics: names of the learner's own, of
    its loss on the test tasks, to report besides: a learner that is judged all along an episode has some. A source of
    given tasks (one with a `total`) shows as many different ones.
    """
    if tasks < 1:
        raise ValueError(f"tasks: came {tasks}, needs at least 1")
    units = Units.of(source)
    course = learner if course is None else course

    def own(params: PyTree, task: Task, key: PRNGKeyArray) -> dict[str, Array]:
        has = learner.loss(params, task, key)[1] if metrics else {}
        if unknown := [name for name in metrics if name not in has]:
            raise ValueError(f"metrics: came {', '.join(unknown)}, but on these tasks the loss has {', '.join(has)}")
        return {name: has[name] for name in metrics}

    # Drawn one at a time, given tasks would come twice and others never.
    given = source.sample(key, tasks) if hasattr(source, "total") else None

    def one(params: PyTree, source: TaskSource, key: PRNGKeyArray, given: Task | None) -> tuple:
        key_task, key_adapt, key_predict = jax.random.split(key, 3)
        task: Task = jax.tree.map(lambda leaf: leaf[0], source.sample(key_task, 1)) if given is None else given
        x, y = task.query.x, task.query.y
        posterior = learner.adapt(params, task.support, key_adapt)
        scores = units.score(learner.predict(params, posterior, x, key_predict), y)
        weight = jnp.ones_like(scores["nll"]) if task.query.weight is None else task.query.weight
        steps = {}
        if course.path is not None:
            path = course.path(params, task.support, key_adapt)
            later = jax.vmap(lambda p: units.score(course.predict(params, p, x, key_predict), y, brief_score))(path)
            steps = jax.tree.map(lambda s: task_mean(s, weight), later)
        return scores, steps, weight, own(params, task, key_adapt)

    def every(shared: tuple[PyTree, TaskSource], drawn: tuple[PRNGKeyArray, Task | None]) -> Any:
        return jax.lax.map(lambda one_drawn: one(*shared, *one_drawn), drawn, batch_size=min(chunk, drawn[0].size))

    mesh = task_mesh(tasks)
    run, shared = jax.jit(map_over_tasks(every, mesh)), everywhere((params, source), mesh)
    scores, steps, weight, others = jax.device_get(run(shared, (jax.random.split(key, tasks), given)))
    report = summarise(units.scaled(scores), units.scaled(steps), weight)
    own_figures = {name: figure_of(values) for name, values in others.items()}
    return replace(report, target=units.target, figures=report.figures | own_figures)


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

    def score(
        self, predictive: Any, y: Array, by: Callable[..., dict[str, Array]] | None = None
    ) -> dict[str, Array]:
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


def task_mean(values: Array, weight: Array) -> Array:
    """Weighted mean over the last axis."""
    return (values * weight).sum(-1) / jnp.maximum(weight.sum(-1), 1e-12)


def figure_of(per_task: np.ndarray) -> Figure:
    """Mean and 95 % half-width of one number a task; inf or NaN where a task diverged."""
    with np.errstate(over="ignore", invalid="ignore"):
        return Figure(float(per_task.mean()), float(1.96 * per_task.std() / np.sqrt(per_task.size)))


def summarise(scores: dict[str, np.ndarray], steps: dict[str, np.ndarray], weight: np.ndarray) -> Report:
    """A report from scores [tasks, n], per-step means [tasks, k + 1] and weights [tasks, n]."""
    total = np.maximum(weight.sum(-1), 1e-12)
    means = {name: (values * weight).sum(-1) / total for name, values in scores.items()}
    names = [n for n in ("accuracy", "mse", "nll", "brier") if n in scores]
    names += [n for n in scores if n.startswith(("coverage_", "width_"))]
    figures = {name: figure_of(means[name]) for name in names}
    curve = []
    for step in range(next(iter(steps.values())).shape[1] if steps else 0):
        curve.append({name: figure_of(values[:, step]) for name, values in steps.items()})
    flat = {name: values.reshape(-1) for name, values in scores.items()}
    counted = weight.reshape(-1) > 0
    if "accuracy" in scores:
        confidence, correct = jnp.asarray(flat["confidence"]), jnp.asarray(flat["accuracy"])
        table = reliability(confidence, correct, jnp.asarray(weight.reshape(-1)))
        pooled = {"ece": float(expected_error(table)), "mce": float(maximum_error(table))}
        rows = [
            {"low": b / BINS, "high": (b + 1) / BINS, "count": float(n), "confidence": float(c), "accuracy": float(a)}
            for b, (n, c, a) in enumerate(zip(*table, strict=True))
        ]
        return Report("classification", len(weight), figures, pooled, curve, rows)
    least = max(1e-20 * flat["variance"][counted].mean(), 1e-300)  # in the units of the target, whatever they are
    error, spread = (np.log(np.maximum(flat[name][counted].astype(float), least)) for name in ("mse", "variance"))
    together = float(np.corrcoef(error, spread)[0, 1]) if spread.std() > 1e-6 else 0.0
    pooled = {"rmse": float(np.sqrt(means["mse"].mean())), "variance_error_correlation": together}
    histogram = np.histogram(flat["pit"][counted], bins=BINS, range=(0, 1))[0] / counted.sum() * BINS
    return Report("regression", len(weight), figures, pooled, curve, [], histogram.tolist())
