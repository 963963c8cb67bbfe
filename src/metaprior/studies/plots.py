"""Plots of studies: draws over explanations, error over acquisitions, AUROC for novel images, and layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from metaprior.core.types import Batch, Learner, Task
from metaprior.evaluation.plots import BLUE, GREEN, GREY, ORANGE, SERIES, inputs_over, literal, panels
from metaprior.studies.active import Acquisition
from metaprior.studies.bound import Bound
from metaprior.studies.concepts import Generation
from metaprior.studies.families import Kinds
from metaprior.studies.novelty import Novelty
from metaprior.studies.reuse import Reuse
from metaprior.studies.universality import Course, Transfer
from metaprior.tasks.synthetic.explained import ExplainedTasks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def explanations(
    source: ExplainedTasks, learners: dict[str, tuple[Learner, PyTree]], key: PRNGKeyArray, show: int = 3
) -> Figure:
    """Plots draws of each learner's posterior (columns) on tasks (rows) that have two explanations, which are dashed.

    For inputs [n, 1] each draw is a curve. For inputs [n, 2] each draw is a line, the border between the classes that
    it predicts.

    Args:
        source: The source of the tasks.
        learners: Learners with their parameters, by name.
        key: Random key.
        show: The number of tasks.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    tasks = source.sample(key, show)
    flat = tasks.support.x.shape[-1] == 2
    side = 2.9 if flat else 2.5
    figure, axes = panels(
        3.1 * len(learners), side * show, len(learners), show, sharex="row", sharey="row", squeeze=False
    )

    def drawing(learner: Learner) -> Any:
        def draw(params: Any, support: Batch, x: Any) -> Any:
            return learner.predict(params, learner.posterior(params, support, Batch(x, None), key), x, key)

        return jax.jit(draw)

    draw = {name: drawing(learner) for name, (learner, _) in learners.items()}
    for j, row in enumerate(axes):
        support = jax.tree.map(lambda leaf, j=j: leaf[j], tasks.support)
        task = Task(support, jax.tree.map(lambda leaf, j=j: leaf[j], tasks.query))
        x = _square(task) if flat else inputs_over(task)
        truth = np.asarray(source.explanations(support, x), float)
        for ax, (name, (_, params)) in zip(row, learners.items(), strict=True):
            predictive = draw[name](params, support, x)
            if flat:
                _borders(ax, x, truth, colours=[ORANGE, GREEN], linestyles="--", linewidths=1.6)
                p = np.exp(np.asarray(predictive.log_probs[..., 1]))
                _borders(ax, x, p, colours=[BLUE] * len(p), linestyles="-", linewidths=0.9, alpha=0.6)
                ax.set_aspect("equal")
            else:
                for curve, colour in zip(truth, (ORANGE, GREEN), strict=False):
                    ax.plot(x[:, 0], curve[:, 0], "--", color=colour, linewidth=1.6)
                ax.plot(x[:, 0], np.asarray(predictive.means)[..., 0].T, color=BLUE, alpha=0.6, linewidth=0.9)
                ax.set_ylim(truth.min() - 1, truth.max() + 1)
            ax.plot(support.x[:, 0], support.x[:, 1] if flat else support.y[:, 0], "o", color="black", markersize=5)
            if j == 0:
                ax.set_title(literal(name), loc="left", fontsize=10)
    return figure


def _square(task: Task, side: int = 80) -> jax.Array:
    low, high = task.query.x.min(0), task.query.x.max(0)
    first, second = (jnp.linspace(low[i], high[i], side) for i in (0, 1))
    return jnp.stack(jnp.meshgrid(first, second, indexing="ij"), -1).reshape(-1, 2)


def _borders(ax: Axes, x: jax.Array, levels: np.ndarray, colours: list[str], **style: Any) -> None:
    side = round(len(x) ** 0.5)
    first, second = (np.asarray(x)[:, i].reshape(side, side) for i in (0, 1))
    for values, colour in zip(levels, colours, strict=True):
        if values.min() < 0.5 < values.max():
            ax.contour(first, second, values.reshape(side, side), levels=[0.5], colors=colour, **style)


def acquisitions(found: dict[str, Acquisition]) -> Figure:
    """Plots the error over the number of observed points, chosen by variance and at random, with one panel per learner.

    Args:
        found: The results of `active`, by name of the learner.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure, axes = panels(4.2 * len(found), 3.2, len(found), sharey=True)
    for ax, (name, result) in zip(axes, found.items(), strict=True):
        for label, curve, colour in (("at random", result.at_random, GREY), ("by variance", result.by_variance, BLUE)):
            mean, half = (np.array([getattr(f, part) for f in curve], float) for part in ("mean", "interval"))
            ax.fill_between(result.seen, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
            ax.plot(result.seen, mean, "o-", color=colour, markersize=4, linewidth=1.4, label=label)
        ax.set(xlabel="points seen", ylabel="MSE", ylim=(0, None))
        ax.set_title(literal(name), loc="left", fontsize=10)
    axes[0].legend(frameon=False)
    return figure


def bounds(found: dict[str, Bound]) -> Figure:
    """Plots the mean loss on training tasks and its PAC-Bayes bound for each learner.

    Args:
        found: The results of `pac_bayes`, by name of the learner.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure, (ax,) = panels(4.8, 3.4)
    at = np.arange(len(found))
    ax.bar(at, [it.bound for it in found.values()], 0.6, color=GREY, label="bound")
    ax.bar(at, [it.risk.mean for it in found.values()], 0.6, color=BLUE, label="on training tasks")
    ax.axhline(1, color="black", linestyle="--", linewidth=1)  # no loss is above 1
    ax.set(ylabel="loss from 0 to 1", xticks=at)
    ax.set_xticklabels([literal(name) for name in found])
    ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def novelty_bars(found: dict[str, Novelty]) -> Figure:
    """Plots the AUROC of each learner's uncertainty for each kind of novel image, with 95 % intervals.

    Args:
        found: The results of `novelty`, by name of the learner.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    rows = {
        f"{name}, {score}": kinds for name, result in found.items() for score, kinds in result.auroc.items()
    }  # fmt: skip
    figure, (ax,) = panels(6.4, 3.4)
    width = 0.8 / len(rows)
    for i, (label, kinds) in enumerate(rows.items()):
        at = np.arange(len(kinds)) + (i - (len(rows) - 1) / 2) * width
        mean, half = (np.array([getattr(f, part) for f in kinds.values()], float) for part in ("mean", "interval"))
        ax.bar(at, mean, 0.92 * width, yerr=half, color=SERIES[i % len(SERIES)], ecolor="black", label=literal(label))
    ax.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
    kinds = next(iter(rows.values()))
    ax.set(ylabel="AUROC", ylim=(0, 1), xticks=np.arange(len(kinds)))
    ax.set_xticklabels(kinds)
    ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def reuse_panels(found: dict[str, Reuse]) -> Figure:
    """Plots each layer's similarity before and after the inner loop, and the metric with the first layers frozen.

    Args:
        found: The results of `reuse`, by name of the learner; a row of panels for each.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure, axes = panels(8.4, 3.1 * len(found), 2, len(found), squeeze=False)
    for (left, right), (name, result) in zip(axes, found.items(), strict=True):
        names = list(result.layers)
        lines = {"own task": {layer: it.cka for layer, it in result.layers.items()}} | result.controls
        for (label, row), colour in zip(lines.items(), SERIES, strict=False):
            mean, half = (
                np.array([getattr(row[layer], part) or 0 for layer in names]) for part in ("mean", "interval")
            )
            style = "-" if label == "own task" else "--"
            left.errorbar(names, mean, half, fmt=f"o{style}", color=colour, markersize=4, linewidth=1.4, label=label)
        left.axhline(0, color=GREY, linewidth=0.8)
        left.set(ylabel="debiased CKA, before and after")
        left.set_title(literal(name), loc="left", fontsize=10)
        left.legend(frameon=False, fontsize=8)
        mean, half = (np.array([getattr(f, part) or 0 for f in result.frozen]) for part in ("mean", "interval"))
        label = "inner loop, first n layers frozen"
        right.errorbar(range(len(mean)), mean, half, fmt="o-", color=BLUE, markersize=4, linewidth=1.4, label=label)
        for (end, f), colour in zip(result.nil.items(), (GREEN, ORANGE), strict=False):
            kind = "NIL" if end == "theta" else "NIL with adapted features"
            right.axhline(f.mean, color=colour, linestyle="--", linewidth=1.2, label=kind)
        right.set(xlabel="frozen layers n", ylabel=result.metric, xticks=range(len(mean)))
        right.legend(frameon=False, fontsize=8)
    return figure


def courses(found: dict[str, dict[str, Any]]) -> Figure:
    """Plots the metric over inner steps, a panel for each kind of tasks, and over depth if the depths differ.

    Solid lines start from the learned initialisation, dashed ones from a random network. Learners without inner steps
    are horizontal lines.

    Args:
        found: By name of the run: its "tasks" (results of `universality` by name), inner "steps" of training (None
            without), number of "hidden" layers, and whether it is an "oracle".

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    kinds = list(next(iter(found.values()))["tasks"])
    depths = {it["hidden"] for it in found.values()} - {None}
    width = len(kinds) + (len(depths) > 1)
    figure, axes = panels(4.2 * width, 3.4, width)
    shown = {name: it for name, it in found.items() if not it["oracle"]} or found
    for ax, kind in zip(axes, kinds, strict=False):
        for i, (name, it) in enumerate(shown.items()):
            transfer: Transfer = it["tasks"][kind]
            colour = SERIES[i % len(SERIES)]
            if not it["steps"]:
                ax.axhline(transfer.trained.query[0].mean, color=colour, linewidth=1.4, label=literal(name))
                continue
            _course(ax, transfer.trained, color=colour, label=literal(name))
            if transfer.random is not None:
                _course(ax, transfer.random, color=colour, linestyle="--", alpha=0.6)
        metric = next(iter(shown.values()))["tasks"][kind].metric
        ax.set_xscale("symlog", linthresh=1)
        ticks = sorted({k or 0 for it in shown.values() for k in it["tasks"][kind].trained.steps})
        ax.set_xticks(ticks, [str(k) for k in ticks])
        ax.set_xlim(left=-0.1)
        ax.set(xlabel="inner steps", ylabel=metric, yscale="log" if metric == "mse" else "linear")
        ax.set_title(literal(kind), loc="left", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    if len(depths) > 1:
        for oracle, label, colour in ((False, "learned", BLUE), (True, "oracle", GREY)):
            rows = [it for it in found.values() if it["oracle"] == oracle and it["hidden"] is not None]
            rows.sort(key=lambda it: it["hidden"])
            figures = [_after_training(it) for it in rows]
            mean, half = (np.array([getattr(f, part) or 0 for f in figures]) for part in ("mean", "interval"))
            if rows:
                at = [it["hidden"] for it in rows]
                axes[-1].errorbar(at, mean, half, fmt="o-", color=colour, markersize=4, linewidth=1.4, label=label)
        axes[-1].set(xlabel="hidden layers", xticks=sorted(depths), yscale="log")
        axes[-1].set_title("by depth, steps as in training", loc="left", fontsize=10)
        axes[-1].legend(frameon=False, fontsize=8)
    return figure


def _after_training(it: dict[str, Any]) -> Any:
    course = it["tasks"][next(iter(it["tasks"]))].trained
    return course.query[course.steps.index(it["steps"]) if it["steps"] else 0]


def _course(ax: Axes, course: Course, **style: Any) -> None:
    steps = [k or 0 for k in course.steps]
    mean, half = (np.array([getattr(f, part) or 0 for f in course.query]) for part in ("mean", "interval"))
    ax.plot(steps, mean, linewidth=1.4, marker="o", markersize=3, **style)
    ax.fill_between(steps, mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)


def family_kinds(found: dict[str, Kinds]) -> Figure:
    """Plots the mean weights of each family of tasks (rows) on each kind (columns), a panel for each learner.

    Kinds are sorted by the family that has most of their weight.

    Args:
        found: The results of `families`, by name of the learner.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure, axes = panels(4.6 * len(found), 3.4, len(found))
    for ax, (name, result) in zip(axes, found.items(), strict=True):
        table = np.array(list(result.weights.values()))
        order = np.lexsort((-table.max(0), table.argmax(0)))
        ax.imshow(table[:, order], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(table[:, order]):
            ax.text(
                j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > 0.6 else "black"
            )
        ax.set_yticks(range(len(table)), [literal(family) for family in result.weights])
        ax.set_xticks(range(table.shape[1]), [str(k + 1) for k in order])
        ax.grid(visible=False)
        ax.set(xlabel="kind")
        ax.set_title(f"{literal(name)}, recognised {result.recognised.mean:.2f}", loc="left", fontsize=10)
    return figure


def new_drawings(generation: Generation, show: int = 8) -> Figure:
    """Plots concepts in rows: the one example, drawings that were generated from it, and a real one of another drawer.

    Args:
        generation: The drawings.
        show: The number of concepts.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    example, real, generated = (np.concatenate(part)[:show] for part in generation[:3])
    columns = generated.shape[1] + 2
    figure, axes = panels(0.8 * columns, 0.85 * len(example), columns, len(example), squeeze=False)
    for row, (first, other, new) in enumerate(zip(example, real, generated, strict=True)):
        for column, drawing in enumerate((first, *new, other[0])):
            ax = axes[row][column]
            ax.imshow(~drawing, cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            edge = BLUE if column == 0 else ORANGE if column == columns - 1 else GREY
            for spine in ax.spines.values():
                spine.set(visible=True, color=edge)
    axes[0][0].set_title("example", fontsize=8)
    axes[0][1].set_title("generated", fontsize=8)
    axes[0][-1].set_title("real", fontsize=8)
    return figure
