"""metaprior adapt: adapt a trained run to your own examples."""

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
from metaprior.core.types import Attributes, Batch, EncodingSource, innermost
from metaprior.experiments.opened import load
from metaprior.experiments.recipe import Recipe, most_ways
from metaprior.tasks import (
    INVERTED_SOURCES,
    Examples,
    Preparation,
    encode_labels,
    read_columns,
    read_examples,
    read_texts,
)
from metaprior.tasks.pool import ClassPool
from metaprior.tasks.tables.columns import Columns, as_numbers

SHOWN = 50  # rows of the table on the screen; --out writes all


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
    """Adapt a run to labelled examples and predict others, with class probabilities or intervals.

    For a run on a table, files and predictions are in the table's own units. Predictions of numbers are means with
    central 90 % intervals.

    Args:
        run: The folder that `train` wrote.
        support: Labelled examples. For a run on a table: a CSV or NPZ file with the table's columns, by name and in any
            order; the column of its target may also be called target or label. For a run on images: a folder with one
            folder of images per class, named after the class. For a run on texts: a CSV, TSV or JSON file (with the
            columns text and label, or those that the run was trained on), or a folder with one folder of text files per
            class; write a missing word as ___. For other runs: a CSV file (with a column label or target) or an NPZ
            file (with x and y).
        query: The examples to predict: an image, a folder of images, a CSV or an NPZ file. Texts can also be a .txt
            file with one text per line.
        posterior: The posterior around the adapted parameters phi_k. None means the learner's own.
        draws: How many networks to draw from the posterior; 0 gives the linearised predictive.
        calibrated: Use the scalars that `evaluate --calibrated` fitted for this posterior.
        steps: The number of inner steps. None means the recipe's.
        out: A CSV file for all predictions.
        seed: The seed of the draws.
    """
    if out is not None:
        check_output(out, "--out", file=True)
    if draws is not None and posterior in (None, "point"):
        raise ValueError("--draws needs a posterior to draw from. Give --posterior implicit or laplace too.")
    opened = load(run, posterior=posterior, draws=draws, calibrated=calibrated, steps=steps, blank=True)
    recipe, experiment, params, learner = opened.recipe, opened.experiment, opened.params, opened.learner
    like = jax.eval_shape(lambda: experiment.splits.train.sample(jax.random.key(0), 1)).support
    if isinstance(like.x, Attributes):
        raise ValueError(
            f"{run} was trained on class attributes, which files of examples do not hold. In Python, give "
            "learner.adapt a Batch(Attributes(...), labels)."
        )
    preparation, train = experiment.preparation, experiment.splits.train
    encode = train.encode if isinstance(train, EncodingSource) else None
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
    adapted = jax.jit(learner.posterior)(params, shown, Batch(jnp.asarray(given.query), None), key)
    predictive = jax.jit(learner.predict)(params, adapted, jnp.asarray(given.query), key)
    if not jnp.isfinite(predictive.mean()).all():
        raise ValueError(
            f"--support: {recipe.learner} diverged on these {len(given.x)} examples: its predictions are not finite. "
            "Use fewer inner steps (--steps), features on the scale of those in training, or a run with a lower "
            "learner.rate."
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
    """The contents of the user's files, as arrays for the learner.

    Attributes:
        x: Inputs of the support [n, ...].
        y: Targets of the support [n, ...].
        query: Inputs of the queries [m, ...].
        names: The names of the queries.
        classes: The classes in the order of their codes, or None if targets are numbers.
    """

    x: np.ndarray
    y: np.ndarray
    query: np.ndarray
    names: list[str]
    classes: list[Any] | None


def _from_tables(preparation: Preparation, support: Path, query: Path) -> Given:
    """Converts both files, whose columns go by name, with the run's scaling, levels and class codes."""
    x, y = preparation.examples(read_columns(support), labelled=True)
    asked, _ = preparation.examples(read_columns(query), labelled=False)
    assert y is not None
    names = [f"row {i}" for i in range(len(asked))]
    return Given(x, y, asked, names, list(preparation.target.classes) or None)


def _given(run: Path, recipe: Recipe, like: Batch, shown: Examples, asked: Examples) -> Given:
    """Converts examples for a run whose tasks have their own classes, or numeric targets."""
    if shown.labels is None:
        raise ValueError("--support must have labels, got none. Give one folder per class, or a column of labels.")
    if not jnp.issubdtype(like.y.dtype, jnp.integer):
        values = np.asarray(shown.labels)
        y = as_numbers(values, "target", Columns({"target": values}), "--support")
        return Given(shown.x, y.reshape(len(y), *like.y.shape[2:]).astype(like.y.dtype), asked.x, asked.names, None)
    codes, classes = encode_labels(shown.labels)
    way = most_ways(recipe) or len(classes)
    if len(classes) > way:
        raise ValueError(
            f"--support must have at most {way} classes, as {run} was trained with, got {len(classes)}. Leave some "
            f"out, or train with --set tasks.way={len(classes)}."
        )
    return Given(shown.x, codes, asked.x, asked.names, classes)


def _from_examples(
    run: Path, recipe: Recipe, shape: tuple[int, ...], support: Path, query: Path
) -> tuple[Examples, Examples]:
    image: dict[str, Any] = {"size": shape[:2], "channels": shape[-1]} if len(shape) == 3 else {}
    # In Omniglot's tasks ink is 1 and paper 0, while scans have dark ink on light paper.
    image |= {"invert": True} if recipe.tasks["name"] in INVERTED_SOURCES else {}
    shown = read_examples(support, labelled=True, **image)
    asked = _in_order(shown, read_examples(query, labelled=False, **image))
    for argument, given in (("--support", shown.x), ("--query", asked.x)):
        if given.shape[1:] != shape:
            raise ValueError(
                f"{argument} must have examples of shape {shape}, as {run} was trained with, got {given.shape[1:]}. "
                "Give the same features in the same order, or images (which are resized)."
            )
    return shown, asked


def _in_order(shown: Examples, asked: Examples) -> Examples:
    """Puts the query's columns in the order of the support's, by name."""
    if shown.features is None or asked.features is None or shown.features == asked.features:
        return asked
    for name in (*shown.features, *asked.features):
        if name not in asked.features or name not in shown.features:
            here, there = ("--support", "--query") if name in shown.features else ("--query", "--support")
            raise ValueError(f"{there} has no column {name!r}, but {here} has. Give both files the same columns.")
    return asked._replace(x=asked.x[:, [asked.features.index(name) for name in shown.features]])


def _from_texts(recipe: Recipe, encode: Callable[..., Any], support: Path, query: Path) -> tuple[Examples, Examples]:
    def read(path: Path, labelled: bool) -> Examples:
        # The user's files have the columns of the training file.
        usual = {name: recipe.tasks[name] for name in ("text", "label") if name in recipe.tasks}
        found = read_texts(path, labelled=labelled, **usual)
        return Examples(encode(found.texts), found.labels, [textwrap.shorten(text, 60) for text in found.texts])

    return read(support, True), read(query, False)


def class_rows(predictive: Categories, names: list[str], classes: list[Any]) -> list[dict[str, Any]]:
    """Returns one row per query: the most likely class, then the probability of each class.

    Args:
        predictive: The predictive distribution of the queries.
        names: The names of the queries.
        classes: The classes of the support. The probabilities of further classes are left out.
    """
    p = np.asarray(predictive.mean())[:, : len(classes)]
    p = p / p.sum(-1, keepdims=True)
    return [
        {"query": name, "prediction": classes[row.argmax()]}
        | {f"p({c})": round(float(v), 4) for c, v in zip(classes, row, strict=True)}
        for name, row in zip(names, p, strict=True)
    ]


def target_rows(predictive: Any, names: list[str]) -> list[dict[str, Any]]:
    """Returns one row per query: the mean and the central 90 % interval of each target.

    Args:
        predictive: The predictive distribution of the queries.
        names: The names of the queries.
    """
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
        screen().print(f"... and {len(rows) - SHOWN} more rows (write all with --out FILE.csv)")


def _digits(rows: list[dict[str, Any]]) -> int:
    """The number of digits that shows the narrowest interval to a hundredth of its width, from 4 to 16."""
    sizes = [max(abs(v) for v in row.values() if isinstance(v, float)) for row in rows if "5 %" in row]
    widths = [row["95 %"] - row["5 %"] for row in rows if "5 %" in row]
    ratio = min((w / s for w, s in zip(widths, sizes, strict=True) if w > 0 and s > 0), default=1.0)
    return min(max(4, 3 - floor(log10(ratio))), 16)
