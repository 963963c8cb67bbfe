"""metaprior adapt: a trained run meets a user's own few examples."""

import csv
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

from metaprior.cli.evaluate import fitted_knobs, open_run, with_knobs
from metaprior.cli.screen import screen
from metaprior.likelihoods import Categories
from metaprior.recipe import Recipe, most_ways
from metaprior.tasks import Examples, encode_labels, read_examples, read_texts
from metaprior.types import Attributes, Batch

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

    Args:
        run: the folder that `train` wrote.
        support: labelled examples: a folder of class-named folders of images, a CSV file (last column: label or target)
            or an NPZ file (x and y). For a run on texts: a CSV, TSV or JSON file (columns text and label, or those the
            run was trained on) or a folder of class folders of text files; a missing word is written ___.
        query: what to predict: an image, a folder of images, a CSV or an NPZ file; texts also one a line (.txt).
        posterior: what is put around phi_k (default: the learner's own).
        draws: networks drawn from the posterior; 0 is the linearised predictive.
        calibrated: with the scalars that `evaluate --calibrated` fitted for this posterior.
        steps: inner steps.
        out: a CSV file for all predictions.
        seed: of draws.
    """
    options: dict[str, Any] = {} if posterior is None else {"posterior": posterior}
    if draws is not None and posterior not in (None, "point"):
        options["draws"] = draws
    opened, recipe, experiment, params = open_run(run, steps, **options)
    like = jax.eval_shape(lambda: experiment.splits.train.sample(jax.random.key(0), 1)).support
    if isinstance(like.x, Attributes):
        raise ValueError(
            f"{run}: its support is class attributes, which files of examples do not hold; give learner.adapt a "
            "Batch(Attributes(...), labels) in Python"
        )
    encode = getattr(experiment.splits.train, "encode", None)
    if encode is None:
        (x, labels, _), (x_query, _, names) = _from_examples(run, recipe, like.x.shape[2:], support, query)
    else:
        (x, labels, _), (x_query, _, names) = _from_texts(recipe, encode, support, query)
    if labels is None:
        raise ValueError(f"--support: {support} has no labels; give class-named folders, or a last column of labels")
    learner, key = experiment.learner, jax.random.key(seed)
    if calibrated:
        knobs, steps = fitted_knobs(opened.folder, posterior), experiment.evaluation.steps if steps is None else steps
        learner = with_knobs(recipe, experiment, posterior, steps, options, knobs)
    classify = jnp.issubdtype(like.y.dtype, jnp.integer)
    if classify:
        codes, classes = encode_labels(labels)
        way = most_ways(recipe) or len(classes)
        if len(classes) > way:
            raise ValueError(
                f"--support: has {len(classes)} classes, but {run} was trained to tell {way} apart; give at most "
                f"{way}, or train with --set tasks.way={len(classes)}"
            )
        y = jnp.asarray(codes)
    else:
        classes = []
        y = jnp.asarray(np.asarray(labels, float).reshape(len(x), *like.y.shape[2:]), like.y.dtype)
    adapted = jax.jit(learner.adapt)(params, Batch(jnp.asarray(x), y), key)
    predictive = jax.jit(learner.predict)(params, adapted, jnp.asarray(x_query), key)
    if not jnp.isfinite(predictive.mean()).all():
        raise ValueError(
            f"--support: {recipe.learner} diverged on these {len(x)} examples, its predictions are not finite; try "
            "fewer inner steps (--steps), features on the scale of training's, or a run with a lower learner.rate"
        )
    rows = class_rows(predictive, names, classes) if classify else target_rows(predictive, names)
    _show(rows, f"{recipe.name}, {recipe.learner}: {len(x)} support examples, {len(names)} predictions")
    if out is not None:
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    return 0


def _from_examples(
    run: Path, recipe: Recipe, shape: tuple[int, ...], support: Path, query: Path
) -> tuple[Examples, Examples]:
    image: dict[str, Any] = {"size": shape[0], "channels": shape[-1]} if len(shape) == 3 else {}
    # Omniglot's tasks show ink as 1 on 0; people's scans are dark ink on light paper.
    image |= {"invert": True} if recipe.tasks["name"] == "omniglot" else {}
    shown = read_examples(support, labelled=True, **image)
    asked = read_examples(query, labelled=False, **image)
    for argument, given in (("--support", shown.x), ("--query", asked.x)):
        if given.shape[1:] != shape:
            raise ValueError(
                f"{argument}: examples of shape {given.shape[1:]} came, but {run} was trained on {shape}; give the "
                "same features in the same order, or images (which are resized)"
            )
    return shown, asked


def _from_texts(recipe: Recipe, encode: Callable[..., Any], support: Path, query: Path) -> tuple[Examples, Examples]:
    def read(path: Path, labelled: bool) -> Examples:
        # The user's files have the columns that the run was trained on.
        usual = {name: recipe.tasks[name] for name in ("text", "label") if name in recipe.tasks}
        found = read_texts(path, labelled=labelled, **usual)
        return Examples(encode(found.texts), found.labels, [textwrap.shorten(text, 60) for text in found.texts])

    return read(support, True), read(query, False)


def class_rows(predictive: Categories, names: list[str], classes: list[Any]) -> list[dict[str, Any]]:
    """A row a query: the likeliest class, then the probability of each; classes the support lacks are ruled out."""
    p = np.asarray(predictive.mean())[:, : len(classes)]
    p = p / p.sum(-1, keepdims=True)
    return [
        {"query": name, "prediction": classes[row.argmax()]}
        | {f"p({c})": round(float(v), 4) for c, v in zip(classes, row, strict=True)}
        for name, row in zip(names, p, strict=True)
    ]


def target_rows(predictive: Any, names: list[str]) -> list[dict[str, Any]]:
    """A row a query: mean and central 90 % interval of its (first) target."""
    low, high = predictive.quantile(0.05), predictive.quantile(0.95)
    mean, low, high = (np.asarray(a)[:, 0] for a in (predictive.mean(), low, high))
    return [
        {"query": name, "mean": float(m), "5 %": float(a), "95 %": float(b)}
        for name, m, a, b in zip(names, mean, low, high, strict=True)
    ]


def _show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("query", "prediction") else "right")
    for row in rows[:SHOWN]:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    screen().print(table)
    if len(rows) > SHOWN:
        screen().print(f"... and {len(rows) - SHOWN} more; --out FILE.csv holds all")
