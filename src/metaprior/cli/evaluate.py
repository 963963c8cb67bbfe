"""metaprior evaluate: evaluate a run on new tasks."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from metaprior.cli.screen import screen
from metaprior.cli.tables import curve_table, family_table, memorisation_table, report_table
from metaprior.core.files import write_atomically
from metaprior.core.runtime import configure
from metaprior.core.types import Embedded, Learner, OutsideSource, group_count
from metaprior.evaluation.figures import title_of
from metaprior.evaluation.plots import adaptation_curve, check_plots, pit_histogram, reliability_diagram, save
from metaprior.evaluation.protocol import TASKS, Units
from metaprior.evaluation.protocol import evaluate as evaluate_learner
from metaprior.evaluation.rejection import Rejection, closeness, confidence, rejection, scored
from metaprior.evaluation.report import Report
from metaprior.experiments.one_shot import one_shot_runs_for
from metaprior.experiments.opened import load
from metaprior.experiments.recipe import (
    Experiment,
    Recipe,
    distance_of,
    load_recipe,
    most_ways,
    recipe_names,
    recipe_of,
    with_overrides,
)
from metaprior.experiments.reports import judged, name_of
from metaprior.experiments.results import published_for
from metaprior.experiments.runs import Run


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    posterior: Literal["point", "implicit", "laplace"] | None = None,
    draws: int | None = None,
    linear: bool = True,
    calibrated: bool = False,
    steps: int | None = None,
    tasks: int | None = None,
    split: Literal["validation", "test", "one_shot"] = "test",
    seed: int | None = None,
    memorisation: bool = True,
    devices: int = 1,
    set: tuple[str, ...] = (),
) -> int:
    """Evaluate a run on new tasks and write a report (JSON) and plots to its folder.

    Args:
        run: The folder that `train` wrote.
        posterior: The posterior around the adapted parameters phi_k. None means the learner's own.
        draws: How many networks to draw from the posterior; 0 gives the linearised predictive in closed form. None
            means 0 for regression and 16 otherwise.
        linear: Draw linearised networks, which stay accurate for broad posteriors; --no-linear draws full networks.
        calibrated: First fit scalars on validation tasks: the posterior's temperature (or precision), and the noise or,
            for classes, the temperature of the softmax.
        steps: The number of inner steps on a new task, instead of the recipe's. The report then has another file name,
            as with --set.
        tasks: The number of tasks. None means the recipe's, or else one per group of a table and 600 of other tasks.
        split: The split of the tasks. one_shot is Omniglot's official 20 runs of 20-way 1-shot classification.
        seed: The seed of the tasks.
        memorisation: Estimate how much the answers depend on the support, and warn if the learner ignores it. This
            draws as many tasks again, at most 64; --no-memorisation saves its time.
        devices: The number of devices that the cores are divided into. Each device evaluates a share of the tasks.
        set: Options of the tasks or the learner by name, e.g. --set tasks.shot=5. evaluation.metrics names further
            metrics of the learner's loss to report. evaluation.course=false leaves out the figures after each inner
            step. evaluation.together=5 predicts the queries of a task in random batches of five.
    """
    configure(devices=devices)
    check_plots(run, "run")
    options: dict[str, Any] = {}
    if posterior is not None:
        options["posterior"] = posterior
        if posterior != "point":
            recipe = recipe_of(Run.open(run))
            regression = recipe.likelihood.get("name") == "gaussian"
            options["draws"] = (0 if regression else 16) if draws is None else draws
            options["linear"] = linear
    opened = load(run, steps=steps, settings=set, **options)
    recipe, experiment, params, settings = opened.recipe, opened.experiment, opened.params, opened.experiment.evaluation
    console = screen()
    learner, fitted = opened.learner, None
    source = one_shot_runs_for(recipe) if split == "one_shot" else getattr(experiment.splits, split)
    number = settings.tasks if tasks is None and split != "one_shot" else tasks
    number = (group_count(source) or TASKS) if number is None else number
    changed = (*set, f"steps={steps}") if steps is not None else set  # these are part of the report's name
    if calibrated:
        # Drawn networks are slow, and fewer tasks are enough to fit one or two scalars.
        validation = min(number, 50 if options.get("draws") else 200)
        key = jax.random.key(settings.seed + 1)
        result = opened.calibrate(validation, key)
        fitted = result.knobs
        learner = opened.turned(fitted)
        units = Units.of(source)
        shift = float(np.sum(np.log(units.scale)))  # the nll in the target's units minus that of standardised targets
        before, after = (nll + shift for nll in (result.nll_before, result.nll_after))
        own = fitted | ({"noise": fitted["noise"] * units.scale[0]} if "noise" in fitted and units.scale else {})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in own.items())
        told = f"fitted on {validation} validation tasks: {shown} (NLL {before:.4f} -> {after:.4f})"
        console.print(told + (f", in units of {units.target}" if units.scale else ""), soft_wrap=True)
    course = learner
    if posterior not in (None, "point") and learner.path is not None:
        course = opened.made(posterior="point")
    if not settings.course:
        course = course._replace(path=None)
    report = evaluate_learner(
        learner,
        params,
        source,
        jax.random.key(settings.seed if seed is None else seed),
        tasks=number,
        chunk=experiment.training.at_once or 20,
        course=course,
        metrics=settings.metrics,
        memorisation=memorisation,
        together=settings.together,
    )
    name = f"report-{name_of(posterior, calibrated=bool(fitted), split=split, changed=changed)}"
    told = _outsiders(learner, params, recipe, experiment, split, number, settings.seed if seed is None else seed)
    asked = {"posterior": posterior, "draws": options.get("draws"), "linear": options.get("linear")}
    asked |= {"steps": opened.steps}
    asked |= {"fitted": fitted, "split": split, "set": set, "seed": settings.seed if seed is None else seed}
    asked |= {"checkpoint": judged(opened.run, params)}
    kind = "official runs" if split == "one_shot" else "tasks"
    try:
        _keep(opened.run, name, report, asked, told)
    finally:
        # Figures can take minutes to compute, so they are shown even if they cannot be written.
        title = f"{recipe.name}, {recipe.learner}, {posterior or 'own'} posterior, {number} {kind}"
        console.print(report_table(report, title))
        if (kinds := family_table(report)) is not None:
            console.print(kinds)
    if told:
        console.print(rejection_table(told))
    if (curve := curve_table(report)) is not None:
        console.print(curve)
    if report.memorisation is not None:
        console.print(memorisation_table(report.memorisation))
        console.print("\n".join(report.memorisation.summary()), soft_wrap=True, highlight=False)
    _compare(console, opened.run, recipe, split, changed)
    folder = opened.run.folder
    console.print(f"written: {folder / name}.json and plots in {folder / 'plots'}", soft_wrap=True)
    return 0


def _compare(console: Console, run: Run, recipe: Recipe, split: str, changed: Sequence[str]) -> None:
    """Prints the published figures for the evaluated tasks, if there are any."""
    if recipe.name in recipe_names():
        base = with_overrides(load_recipe(recipe.name), recipe.learner)
    elif any(o.startswith("tasks.") for o in (*run.started.get("asked", {}), *changed)):
        return  # the file's original options are not known
    else:
        base = recipe
    try:
        published = published_for(recipe, base, split)
    except ValueError as error:
        warnings.warn(f"{run.folder / 'recipe.json'}: {error}", stacklevel=2)
        return
    if not isinstance(published, str):
        figures = ", ".join(f"{title_of(name)} {figure}" for name, figure in published.figures.items())
        console.print(f"published: {figures} ({published.source or 'no source given'})", soft_wrap=True)


def _outsiders(
    learner: Learner, params: Any, recipe: Recipe, experiment: Experiment, split: str, tasks: int, seed: int
) -> dict[str, Rejection]:
    """For each score, how well texts of no class are rejected, if the source has such texts."""
    judged: Any = getattr(experiment.splits, split, None)
    validation: Any = experiment.splits.validation
    if not isinstance(getattr(experiment.splits, split, None), OutsideSource) or judged.outside is None:
        return {}
    scores = {"confidence": confidence(learner)}
    if isinstance(params, Embedded):
        scores["closeness"] = closeness(experiment.model, most_ways(recipe) or judged.way, distance_of(recipe))
    found = {}
    for name, score in scores.items():
        fitted, seen = (
            scored(learner, score, params, source, source.outside, jax.random.key(s), tasks=n)
            for source, s, n in ((validation, seed + 1, min(tasks, 200)), (judged, seed, tasks))
        )
        found[name] = rejection(fitted, seen)
    return found


def rejection_table(told: dict[str, Rejection]) -> Table:
    """Returns a table of AUROC, and of the effect of the threshold chosen on validation tasks, with one row per score.

    Args:
        told: The rejection by score.
    """
    table = Table(title="texts of no class, as many as queries", title_justify="left", header_style="bold")
    for name in ("score", "AUROC", "accuracy with rejection", "queries kept", "outsiders rejected"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name, row in told.items():
        table.add_row(name, *(str(figure) for figure in (row.auroc, row.accuracy, row.kept, row.rejected)))
    return table


def _keep(run: Run, name: str, report: Report, asked: dict[str, Any], told: dict[str, Rejection]) -> None:
    table = json.loads(report.to_json()) | {"settings": asked}
    table |= {"rejection": {score: asdict(row) for score, row in told.items()}} if told else {}
    write_atomically(run.folder / f"{name}.json", json.dumps(table, indent=2) + "\n")
    plots = run.folder / "plots"
    plots.mkdir(exist_ok=True)
    if report.reliability:
        save(reliability_diagram(report), plots / f"{name}-reliability.png")
    if report.pit:
        save(pit_histogram(report.pit), plots / f"{name}-pit.png")
    if report.curve:
        save(adaptation_curve(report), plots / f"{name}-adaptation.png")
