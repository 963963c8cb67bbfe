"""Plots of reports, of training and of posteriors. Each function returns a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from metaprior.core.extras import extra
from metaprior.core.files import beside, check_output
from metaprior.core.types import Batch, Learner, Task
from metaprior.evaluation.report import Report
from metaprior.tasks import Preparation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette, which colour-blind readers can tell apart too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
SERIES = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", GREY)  # for many lines in one plot
DPI = 160


def literal(name: str) -> str:
    r"""Escapes '$' in a name, which would begin a formula in matplotlib.

    Args:
        name: The name.

    Returns:
        The name, with '\$' for '$'.
    """
    return name.replace("$", r"\$")


def save(figure: Figure, path: Path) -> None:
    """Writes a plot atomically, in the format of the path's suffix.

    Args:
        figure: The plot.
        path: The file.
    """
    with beside(path) as partial:
        figure.savefig(partial)


def check_plots(folder: Path, option: str) -> None:
    """Checks that plots can be written, before anything is computed for them.

    Args:
        folder: Where the plots will be written.
        option: The command-line option that names the folder, for the error message.

    Raises:
        MissingExtra: matplotlib is not installed.
        ValueError: The folder cannot be written to. The message begins with the option.
    """
    with extra("plots", "A plot"):
        import matplotlib.figure  # noqa: F401
    check_output(folder, option)


def panels(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """Creates an empty figure in the library's style.

    Args:
        width: In inches.
        height: In inches.
        columns: The number of columns of axes.
        rows: The number of rows of axes.
        **options: Further options of matplotlib's `subplots`.

    Returns:
        The figure and its axes, [rows], [columns] or [rows, columns].
    """
    with extra("plots", "A plot"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, **options))
    for ax in axes.ravel():
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e6e6e6", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def reliability_diagram(report: Report) -> Figure:
    """Plots accuracy against confidence, with binomial 95 % intervals, and the number of predictions in each bin.

    Args:
        report: The report of a classification.
    """
    figure, (top, low) = panels(4.6, 5.2, rows=2, sharex=True, height_ratios=(3, 1))
    rows = [r for r in report.reliability if r["count"] > 0]
    count, confidence, accuracy = (np.array([r[k] for r in rows]) for k in ("count", "confidence", "accuracy"))
    half = 1.96 * np.sqrt(np.maximum(accuracy * (1 - accuracy), 1e-4) / count)
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfect")
    top.errorbar(confidence, accuracy, yerr=half, fmt="o-", color=BLUE, markersize=4, linewidth=1.4, label="measured")
    top.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, 1))
    top.set_title(f"ECE {report.pooled['ece']:.4f}, MCE {report.pooled['mce']:.4f}", loc="left", fontsize=10)
    top.legend(frameon=False, loc="lower right")
    low.bar([(r["low"] + r["high"]) / 2 for r in rows], count, width=0.045, color=BLUE)
    low.set(xlabel="confidence of the predicted class", ylabel="predictions", yscale="log")
    return figure


def pit_histogram(pit: Sequence[float]) -> Figure:
    """Plots the density of the probability integral transform, which is flat if the predictive is calibrated.

    Args:
        pit: The density in equal bins of [0, 1].
    """
    figure, (ax,) = panels(4.6, 3.0)
    bins = len(pit)
    ax.bar((np.arange(bins) + 0.5) / bins, pit, width=0.9 / bins, color=BLUE)
    ax.axhline(1.0, color=GREY, linestyle="--", linewidth=1, label="calibrated")
    ax.set(xlabel="predictive distribution function at the truth", ylabel="density", xlim=(0, 1))
    ax.legend(frameon=False)
    return figure


def adaptation_curve(report: Report) -> Figure:
    """Plots each figure of a report after each inner step, with its 95 % interval.

    Args:
        report: The report of a learner with inner steps.
    """
    names = list(report.curve[0])
    figure, axes = panels(4.2 * len(names), 3.2, columns=len(names))
    steps = np.arange(len(report.curve))
    for ax, name in zip(axes, names, strict=True):
        mean = np.array([row[name].mean for row in report.curve])
        half = np.array([row[name].interval for row in report.curve], float)
        ax.fill_between(steps, mean - half, mean + half, color=BLUE, alpha=0.2, linewidth=0)
        ax.plot(steps, mean, "o-" if len(steps) <= 20 else "-", color=BLUE, markersize=4, linewidth=1.4)
        ax.set(xlabel="inner steps", ylabel=_label(name, report.target))
        ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _label(name: str, target: str | None) -> str:
    of = f", in units of {literal(target)}" if target and name in ("nll", "mse") else ""
    return {"nll": "NLL", "mse": "MSE"}.get(name, name) + of


def compared_curves(reports: Mapping[str, Report]) -> Figure:
    """Plots each figure of several reports after each inner step.

    Args:
        reports: The reports by label. A report without inner steps is drawn as a horizontal line.
    """
    names = [n for n in ("accuracy", "mse", "nll") if all(n in report.figures for report in reports.values())]
    figure, axes = panels(4.6 * len(names), 3.6, columns=len(names))
    longest = max(len(report.curve) for report in reports.values())
    for ax, name in zip(axes, names, strict=True):
        for i, (label, report) in enumerate(reports.items()):
            style = {"color": SERIES[i % len(SERIES)], "linestyle": ("-", "--", ":")[i // len(SERIES) % 3]}
            rows = [row[name] for row in report.curve] or [report.figures[name]] * max(longest, 2)
            mean, half = (np.array([getattr(figure, part) for figure in rows], float) for part in ("mean", "interval"))
            steps = np.arange(len(rows))
            ax.fill_between(steps, mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)
            ax.plot(steps, mean, linewidth=1.4, label=literal(label), **style)
        ax.set(xlabel="inner steps", ylabel=_label(name, next(iter(reports.values())).target))
        if name == "mse":
            ax.set_yscale("log")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[-1].legend(frameon=False, fontsize="small")
    return figure


def training_curve(rows: Sequence[dict[str, float]], target: str | None = None) -> Figure:
    """Plots the training and validation metrics against meta-steps.

    Args:
        rows: The metrics of each chunk, as `Fitted.history` and metrics.jsonl hold them.
        target: The name of a table's target, which training sees standardised.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("rows must hold the metrics of at least one chunk of training, got none.")
    names = [n for n in ("accuracy", "mse", "nll", "loss") if f"train/{n}" in rows[0] or f"validation/{n}" in rows[0]]
    # The loss of many learners is their nll, which needs to be drawn only once.
    names = names[:2] if len(names) > 1 else names
    figure, axes = panels(4.6 * len(names), 3.2, columns=len(names))
    for ax, name in zip(axes, names, strict=True):
        for split, colour in (("train", GREY), ("validation", BLUE)):
            points = [(r["step"], r[f"{split}/{name}"]) for r in rows if f"{split}/{name}" in r]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, label=split, alpha=0.9)
        ax.set(xlabel="meta-steps", ylabel=_label(name, f"standardised {target}" if target else None))
        ax.legend(frameon=False)
    return figure


def _bands(ax: Axes, x: np.ndarray, predictive: Any, colour: str) -> None:
    for level, alpha in ((0.95, 0.18), (0.5, 0.32)):
        low, high = (np.asarray(predictive.quantile(q))[:, 0] for q in ((1 - level) / 2, (1 + level) / 2))
        ax.fill_between(x, low, high, color=colour, alpha=alpha, linewidth=0, label=f"{100 * level:.0f} %")
    ax.plot(x, np.asarray(predictive.mean())[:, 0], color=colour, linewidth=1.6, label="mean")


def inputs_over(task: Task) -> jax.Array:
    """Returns 200 evenly spaced inputs [200, 1] that span a task's support and query.

    Args:
        task: A task with inputs [n, 1].
    """
    x = jnp.concatenate([task.support.x.reshape(-1), task.query.x.reshape(-1)])
    return jnp.linspace(x.min(), x.max(), 200)[:, None]


def _points(ax: Axes, task: Task) -> None:
    order = np.argsort(np.asarray(task.query.x)[:, 0])
    x, y = np.asarray(task.query.x)[order, 0], np.asarray(task.query.y)[order, 0]
    dense = len(x) >= 30
    ax.plot(x, y, "--" if dense else ".", color=GREY, linewidth=1, label="truth" if dense else "query")
    ax.plot(task.support.x[:, 0], task.support.y[:, 0], "o", color="black", markersize=4.5, label="support", zorder=5)


def regression_tasks(
    learner: Learner,
    params: PyTree,
    tasks: Task,
    key: PRNGKeyArray,
    each: bool = False,
    preparation: Preparation | None = None,
) -> Figure:
    """Plots the predictive mean with 50 % and 95 % bands, before adaptation, after one inner step and after the last.

    Args:
        learner: The learner.
        params: Its meta-learned parameters.
        tasks: A stack of tasks with inputs and targets [tasks, n, 1].
        key: The random key of the adaptation.
        each: Plots every inner step, instead of the first and the last.
        preparation: Of a table. The axes then have the table's units and column names.

    Returns:
        A figure with one row per task.
    """
    scaling = None if preparation is None else preparation.scaling
    names = ("x", "y") if preparation is None else (preparation.features[0], preparation.target.name)
    number = jax.tree.leaves(tasks.support.y)[0].shape[0]
    adapt, predict = jax.jit(learner.adapt), jax.jit(learner.predict)
    courses, shown = None, []
    if learner.path is not None:
        courses = jax.jit(jax.vmap(learner.path, (None, 0, None)))(params, tasks.support, key)
        last = jax.tree.leaves(courses)[0].shape[1] - 1
        shown = [k for k in range(1, last + 1) if each or k in (1, last)]
    columns = 1 + len(shown)
    width = 3.9 if columns < 4 else 2.6
    figure, axes = panels(width * columns, 2.9 * number, columns, number, sharey="row", squeeze=False)
    axes = axes.reshape(number, columns)
    for j in range(number):
        task = jax.tree.map(lambda leaf, j=j: leaf[j], tasks)
        x = inputs_over(task)
        if courses is None:
            stages = {"adapted": adapt(params, task.support, key)}
        else:
            # The prior is the posterior of a support with all weights 0. Zero inner steps would give no spread.
            unseen = task.support._replace(weight=jnp.zeros(task.support.x.shape[0]))
            stages = {"before": adapt(params, unseen, key)}
            stages |= {_stage(k): jax.tree.map(lambda leaf, j=j, k=k: leaf[j, k], courses) for k in shown}
        for ax, (title, posterior) in zip(axes[j], stages.items(), strict=True):
            predictive, across, points = predict(params, posterior, x, key), np.asarray(x), task
            if preparation is not None and scaling is not None:
                predictive, across = preparation.predictive(predictive), scaling.raw_features(x)
                points = Task(*(Batch(scaling.raw_features(b.x), scaling.targets(b.y)) for b in task))
            _bands(ax, across[:, 0], predictive, BLUE)
            _points(ax, points)
            if j == 0:
                ax.set_title(title, loc="left", fontsize=10)
            ax.set_xlabel(literal(names[0])) if j == number - 1 else None
        axes[j, 0].set_ylabel(literal(names[1]))
    # The legend is above the panels, where it covers no points; over a single column it takes two lines.
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=5 if columns > 1 else 3, frameon=False, fontsize=8)
    return figure


def _stage(k: int) -> str:
    return f"after {k} step{'s' if k > 1 else ''}"


def prior_functions(learner: Learner, params: PyTree, tasks: Task, key: PRNGKeyArray, show: int = 12) -> Figure:
    """Plots the prior's function before adaptation, and the functions after adaptation to several tasks.

    Args:
        learner: The learner.
        params: Its meta-learned parameters.
        tasks: A stack of tasks with inputs and targets [tasks, n, 1].
        key: The random key of the adaptation.
        show: The number of tasks to draw.
    """
    figure, (ax,) = panels(5.4, 3.4)
    first = jax.tree.map(lambda leaf: leaf[0], tasks)
    x = inputs_over(first)

    @jax.jit
    @jax.vmap
    def mean(support: Any) -> jax.Array:
        return learner.predict(params, learner.posterior(params, support, Batch(x, None), key), x, key).mean()[:, 0]

    for j, curve in enumerate(mean(tasks.support)[:show]):
        ax.plot(x[:, 0], curve, color=BLUE, alpha=0.45, linewidth=1, label="adapted to a task" if j == 0 else None)
    if learner.path is not None:
        course = jax.jit(learner.path)(params, first.support, key)
        start = jax.tree.map(lambda leaf: leaf[0], course)
        theta = jax.jit(learner.predict)(params, start, x, key).mean()[:, 0]
        ax.plot(x[:, 0], theta, color=ORANGE, linewidth=2, label="theta")
    ax.set(xlabel="x", ylabel="y")
    ax.legend(frameon=False)
    return figure


def gate_values(forget: PyTree, input: PyTree) -> Figure:
    """Plots the gates of a learned update rule at each inner step, one line per layer.

    Lines are medians over a layer's parameters and the tasks; bands are the middle 80 %. A forget gate below 1 acts as
    weight decay. The input gate is the learning rate.

    Args:
        forget: The forget gates, with phi's structure and leaves [tasks, steps, ...].
        input: The input gates, of the same structure.

    References:
        Ravi & Larochelle 2017, fig. 2.
    """
    figure, axes = panels(9.2, 3.4, columns=2)
    for ax, title, values in zip(axes, ("forget gate", "input gate"), (forget, input), strict=True):
        for i, (name, layer) in enumerate(_by_layer(values).items()):
            low, middle, high = np.percentile(layer, (10, 50, 90), axis=1)
            steps, colour = np.arange(1, len(middle) + 1), SERIES[i % len(SERIES)]
            ax.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            ax.plot(steps, middle, "o-", color=colour, markersize=4, linewidth=1.4, label=literal(name))
        ax.set(xlabel="inner step", ylabel=title)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _by_layer(values: PyTree) -> dict[str, np.ndarray]:
    """The values [steps, parameters and tasks] of each layer, named by the first name in a leaf's path."""
    layers: dict[str, list[np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(values):
        name = jax.tree_util.keystr(path[:1], simple=True) or "parameters"
        layers.setdefault(name, []).append(np.moveaxis(np.asarray(leaf), 1, 0).reshape(leaf.shape[1], -1))
    return {name: np.concatenate(leaves, 1) for name, leaves in layers.items()}
