"""metaprior adapt: a trained run meets a user's own few examples."""

import csv
import textwrap
from collections.abc import Callable
from math import floor, log10
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

from metaprior.cli.screen import screen
from metaprior.core.files import beside, check_output
from metaprior.core.likelihoods import Categories
from metaprior.core.types import Attributes, Batch
from metaprior.experiments.opened import load
from metaprior.experiments.recipe import Recipe, most_ways
from metaprior.tasks import Examples, Preparation, encode_labels, read_columns, read_examples, read_texts
from metaprior.tasks.pool import ClassPool, innermost
from metaprior.tasks.tables.columns import Columns, as_numbers

SHOWN = 50  # rows of the table on screen; --out holds all


def adapt(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    support: Path,
    query: Path,
    posterior: Literal["point", "implicit", "laplace"] | None = None,
    draws: int | None = None,
    calibrated: bool = False,
    steps: int | None = None,
    out: Path | None = None,
    seed: int = 0,
) -> int:
    """Adapt a run to labelled examples and predict others: a table with class probabilities or means and intervals.

    Tables go in and predictions come out in the table's own units.

    Args:
        run: the folder that `train` wrote.
        support: labelled examples. For a run on a table: a CSV or NPZ file with that table's columns, by name and in
            any order; the column of its target may also be called target or label. For a run on images: a folder of
            class-named folders. For a run on texts: a CSV, TSV or JSON file (columns text and label, or those the run
            was trained on) or a folder of class folders of text files; a missing word is written ___. Else a CSV file
            (with a column label or target) or an NPZ file (x and y).
        query: what to predict: an image, a folder of images, a CSV or an NPZ file; texts also one a line (.txt).
        posterior: what is put around phi_k (default: the learner's own).
        draws: networks drawn from the posterior; 0 is the linearised predictive.
        calibrated: with the scalars that `evaluate --calibrated` fitted for this posterior.
        steps: inner steps.
        out: a CSV file for all predictions.
        seed: of draws.
    """
    if out is not None:
        check_output(out, "--out", file=True)
    if draws is not None and posterior in (None, "point"):
        raise ValueError("--draws needs a posterior to draw from: give --posterior implicit or laplace too.")
    opened = load(run, posterior=posterior, draws=draws, calibrated=calibrated, steps=steps, blank=True)
    recipe, experiment, params, learner = opened.recipe, opened.experiment, opened.params, opened.learner
    like = jax.eval_shape(lambda: experiment.splits.train.sample(jax.random.key(0), 1)).support
    if isinstance(like.x, Attributes):
        raise ValueError(
            f"{run}: its support is class attributes, which files of examples do not hold; give learner.adapt a "
            "Batch(Attributes(...), labels) in Python"
        )
    preparation, encode = experiment.preparation, getattr(experiment.splits.train, "encode", None)
    if preparation is not None:
        given = _from_tables(preparation, support, query)
    elif encode is None:
        shown, asked = _from_examples(run, recipe, like.x.shape[2:], support, query)
        if isinstance(pool := innermost(experiment.splits.train), ClassPool):
            seen = [np.asarray(pool.normalised(jnp.asarray(part.x))) for part in (shown, asked)]
            shown, asked = shown._replace(x=seen[0]), asked._replace(x=seen[1])
        given = _given(run, recipe, like, shown, asked)
    else:
        given = _given(run, recipe, like, *_from_texts(recipe, encode, support, query))
    key = jax.random.key(seed)
    shown = Batch(jnp.asarray(given.x), jnp.asarray(given.y))
    adapted = jax.jit(learner.adapt)(params, shown, key)
    predictive = jax.jit(learner.predict)(params, adapted, jnp.asarray(given.query), key)
    if not jnp.isfinite(predictive.mean()).all():
        raise ValueError(
            f"--support: {recipe.learner} diverged on these {len(given.x)} examples, its predictions are not finite; "
            "try fewer inner steps (--steps), features on the scale of training's, or a run with a lower learner.rate"
        )
    target = None if preparation is None else preparation.target.name
    if given.classes is not None:
        rows = class_rows(predictive, given.names, given.classes)
    else:
        rows = target_rows(predictive if preparation is None else preparation.predictive(predictive), given.names)
    told = f"{len(given.x)} support examples, {len(given.names)} predictions"
    told += f" of {target}" if target else ""
    _show(rows, f"{recipe.name}, {recipe.learner}: {told}", given.classes is None)
    if out is not None:
        with beside(out) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return 0


class Given(NamedTuple):
    """What the user's files hold, as the learner sees it: a support, queries with their names, and the classes."""

    x: np.ndarray
    y: np.ndarray
    query: np.ndarray
    names: list[str]
    classes: list[Any] | None


def _from_tables(preparation: Preparation, support: Path, query: Path) -> Given:
    """Both files by the names of their columns, in the run's own scaling, levels and class codes."""
    x, y = preparation.examples(read_columns(support), labelled=True)
    asked, _ = preparation.examples(read_columns(query), labelled=False)
    assert y is not None
    names = [f"row {i}" for i in range(len(asked))]
    return Given(x, y, asked, names, list(preparation.target.classes) or None)


def _given(run: Path, recipe: Recipe, like: Batch, shown: Examples, asked: Examples) -> Given:
    """Examples of a run whose tasks bring classes of their own, or numbers without names."""
    if shown.labels is None:
        raise ValueError("--support: has no labels; give class-named folders, or a column of labels")
    if not jnp.issubdtype(like.y.dtype, jnp.integer):
        values = np.asarray(shown.labels)
        y = as_numbers(values, "target", Columns({"target": values}), "--support")
        return Given(shown.x, y.reshape(len(y), *like.y.shape[2:]).astype(like.y.dtype), asked.x, asked.names, None)
    codes, classes = encode_labels(shown.labels)
    way = most_ways(recipe) or len(classes)
    if len(classes) > way:
        raise ValueError(
            f"--support: has {len(classes)} classes, but {run} was trained to tell {way} apart; give at most {way}, or "
            f"train with --set tasks.way={len(classes)}"
        )
    return Given(shown.x, codes, asked.x, asked.names, classes)


def _from_examples(
    run: Path, recipe: Recipe, shape: tuple[int, ...], support: Path, query: Path
) -> tuple[Examples, Examples]:
    image: dict[str, Any] = {"size": shape[:2], "channels": shape[-1]} if len(shape) == 3 else {}
    # Omniglot's tasks show ink as 1 on 0; people's scans are dark ink on light paper.
    image |= {"invert": True} if recipe.tasks["name"] == "omniglot" else {}
    shown = read_examples(support, labelled=True, **image)
    asked = _in_order(shown, read_examples(query, labelled=False, **image))
    for argument, given in (("--support", shown.x), ("--query", asked.x)):
        if given.shape[1:] != shape:
            raise ValueError(
                f"{argument}: examples of shape {given.shape[1:]} came, but {run} was trained on {shape}; give the "
                "same features in the same order, or images (which are resized)"
            )
    return shown, asked


def _in_order(shown: Examples, asked: Examples) -> Examples:
    """The query's columns in the order of the support's, by name."""
    if shown.features is None or asked.features is None or shown.features == asked.features:
        return asked
    for name in (*shown.features, *asked.features):
        if name not in asked.features or name not in shown.features:
            here, there = ("--support", "--query") if name in shown.features else ("--query", "--support")
            raise ValueError(f"{there}: lacks column {name!r}, which {here} has; give both the same columns")
    return asked._replace(x=asked.x[:, [asked.features.index(name) for name in shown.features]])


def _from_texts(recipe: Recipe, encode: Callable[..., Any], support: Path, query: Path) -> tuple[Examples, Examples]:
    def read(path: Path, labelled: bool) -> Examples:
        # The user's files have the columns that the run was trained on.
        usual = {name: recipe.tasks[name] for name in ("text", "label") if name in recipe.tasks}
        found = read_texts(path, labelled=labelled, **usual)
        return Examples(encode(found.texts), found.labels, [textwrap.shorten(text, 60) for text in found.texts])

    return read(support, True), read(query, False)


def class_rows(predictive: Categories, names: list[str], classes: list[Any]) -> list[dict[str, Any]]:
    """A row a query: the likeliest class, then the probability of each; classes beyond the run's are left out."""
    p = np.asarray(predictive.mean())[:, : len(classes)]
    p = p / p.sum(-1, keepdims=True)
    return [
        {"query": name, "prediction": classes[row.argmax()]}
        | {f"p({c})": round(float(v), 4) for c, v in zip(classes, row, strict=True)}
        for name, row in zip(names, p, strict=True)
    ]


def target_rows(predictive: Any, names: list[str]) -> list[dict[str, Any]]:
    """A row a query: mean and central 90 % interval of its target, or of each of several."""
    parts = {"mean": predictive.mean(), "5 %": predictive.quantile(0.05), "95 %": predictive.quantile(0.95)}
    several = parts["mean"].shape[1] > 1
    columns = {
        f"{part}[{i}]" if several else part: np.asarray(values, float)[:, i]
        for i in range(parts["mean"].shape[1])
        for part, values in parts.items()
    }
    return [{"query": name} | {c: float(v[i]) for c, v in columns.items()} for i, name in enumerate(names)]


def _show(rows: list[dict[str, Any]], title: str, interval: bool) -> None:
    table = Table(title=title, title_justify="left", header_style="bold", caption_justify="left")
    table.caption = "90 % interval: 5 % to 95 %" if interval else None
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("query", "prediction") else "right")
    digits = _digits(rows)
    for row in rows[:SHOWN]:
        table.add_row(*(f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in row.values()))
    screen().print(table)
    if len(rows) > SHOWN:
        screen().print(f"... and {len(rows) - SHOWN} more; --out FILE.csv holds all")


def _digits(rows: list[dict[str, Any]]) -> int:
    """As many digits as tell the ends of the narrowest interval apart to a hundredth; 4 at least."""
    sizes = [max(abs(v) for v in row.values() if isinstance(v, float)) for row in rows if "5 %" in row]
    widths = [row["95 %"] - row["5 %"] for row in rows if "5 %" in row]
    ratio = min((w / s for w, s in zip(widths, sizes, strict=True) if w > 0 and s > 0), default=1.0)
    return min(max(4, 3 - floor(log10(ratio))), 16)
