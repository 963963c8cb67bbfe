"""metaprior evaluate: judge a run on new tasks."""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from metaprior.calibration import Calibration, calibrate, calibrate_softmax, temperature_scaled
from metaprior.cli.reports import judged, name_of
from metaprior.cli.screen import screen
from metaprior.evaluation import TASKS, Report, Units, title_of
from metaprior.evaluation import evaluate as evaluate_learner
from metaprior.files import write_atomically
from metaprior.inference.normalised import gathered
from metaprior.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from metaprior.networks.statistics import given
from metaprior.plots import adaptation_curve, check_pictures, pit_histogram, reliability_diagram, save
from metaprior.recipe import (
    Experiment,
    Recipe,
    build,
    distance_of,
    evaluation_of,
    keeps_unseen,
    load_recipe,
    most_ways,
    own_table,
    parse_overrides,
    recipe_learner,
    recipe_names,
    recipe_of,
    training_of,
    with_overrides,
)
from metaprior.rejection import Rejection, closeness, confidence, rejection, scored
from metaprior.results import published_for
from metaprior.runs import Run
from metaprior.runtime import configure
from metaprior.tasks import FixedTasks, one_shot_source
from metaprior.training import init_state
from metaprior.types import Learner, group_count


def open_run(
    folder: Path, steps: int | None = None, overrides: tuple[str, ...] = (), *, blank: bool = False, **posterior: Any
) -> tuple[Run, Recipe, Experiment, Any]:
    """A run, its recipe (with options set anew), what that builds, and the parameters that validated best.

    A table is prepared as it was for training, and its groups are shared out as they were, unless `tasks.path`,
    `tasks.split` or `tasks.seed` is set anew. blank: the tasks of a table are of the right shapes and empty, so that
    the table itself need not be there.
    """
    run = Run.open(folder)
    run.warn_if_edited()
    recipe = with_overrides(recipe_of(run), None, parse_overrides(overrides))
    configure(float64=training_of(recipe).float64)
    steps = evaluation_of(recipe).steps if steps is None else steps
    preparation, tasks = run.preparation, own_table(recipe.tasks, recipe.learner)
    if preparation is not None and any(re.match(r"tasks\.(path|split|seed)=", option) for option in overrides):
        preparation = replace(preparation, groups=None)
    splits = None
    if blank and preparation is not None and recipe.network.get("norm") != "running":
        shot, query = tasks.get("shot", 5), tasks.get("query", 5)
        splits = preparation.blank(shot, query, padded=tasks.get("ragged", "pad") == "pad")
    experiment = build(recipe, steps=steps, splits=splits, preparation=preparation, **posterior)
    if preparation is None and experiment.preparation is not None:
        warnings.warn(
            f"{folder} was trained by a version that kept no preparation.json; columns, levels and scaling are taken "
            "from the table as it is today",
            stacklevel=2,
        )
    params = run.params(init_state(experiment.learner, experiment.splits.train, experiment.training))
    if experiment.model.statistics == "running":
        gather = jax.jit(partial(gathered, experiment.learner, experiment.model))
        statistics = gather(params, experiment.splits.train, jax.random.key(experiment.training.seed))
        model = given(experiment.model, statistics)
        way = most_ways(recipe, experiment.preparation)
        learner = recipe_learner(recipe, model, experiment.likelihood, steps=steps, way=way, **posterior)
        experiment = experiment._replace(model=model, learner=learner)
    return run, recipe, experiment, params


def starting_knobs(posterior: str | None, likelihood: Likelihood) -> dict[str, float]:
    """The positive scalars of a posterior that validation tasks can fit, at their pure values."""
    knobs = {"implicit": {"temperature": 1.0}, "laplace": {"precision": 1.0}}.get(posterior or "point", {})
    if isinstance(likelihood, Gaussian) and likelihood.scale is not None:
        knobs = knobs | {"noise": float(likelihood.scale)}
    return knobs


def knob_names(recipe: Recipe, experiment: Experiment, posterior: str | None) -> set[str]:
    """The scalars that `--calibrated` fits."""
    of_classes = keeps_unseen(recipe) or isinstance(experiment.likelihood, Categorical | Bernoulli)
    return {*starting_knobs(posterior, experiment.likelihood), *(["softmax_temperature"] if of_classes else [])}


def with_knobs(
    recipe: Recipe, experiment: Experiment, posterior: str | None, steps: int | None, options: dict[str, Any],
    knobs: dict[str, Any],
) -> Learner:  # fmt: skip
    """The experiment's learner with fitted scalars in its posterior and in what predicts from it."""
    way = most_ways(recipe, experiment.preparation)
    learner, inner = experiment.learner, {n: v for n, v in knobs.items() if n != "softmax_temperature"}
    if posterior is None and inner:
        # The learner's own posterior stays as it is; only what predicts from it sees another noise.
        noisy = recipe_learner(recipe, experiment.model, Gaussian(inner["noise"]), steps=steps, way=way)
        learner = learner._replace(predict=noisy.predict)
    elif inner:
        likelihood, own = experiment.likelihood, options | inner
        learner = recipe_learner(recipe, experiment.model, likelihood, steps=steps, way=way, **own)
    scale = knobs.get("softmax_temperature")
    if scale is not None and keeps_unseen(recipe):
        return recipe_learner(
            recipe, experiment.model, experiment.likelihood, steps=steps, way=way, softmax_temperature=scale
        )
    return learner if scale is None else temperature_scaled(learner, scale)


def _fitted(
    recipe: Recipe, experiment: Experiment, params: Any, posterior: str | None, steps: int | None,
    options: dict[str, Any], tasks: int, key: jax.Array,
) -> Calibration:  # fmt: skip
    """The posterior's scalars first; then, of classes, the softmax's temperature around it, which leaves it alone."""
    source, chunk = experiment.splits.validation, experiment.training.at_once or 10
    found = []
    if knobs := starting_knobs(posterior, experiment.likelihood):
        build = partial(with_knobs, recipe, experiment, posterior, steps, options)
        evaluations = 25 if options.get("draws") else 40
        found.append(calibrate(build, params, source, key, knobs, tasks=tasks, evaluations=evaluations, chunk=chunk))
    if keeps_unseen(recipe):
        build = partial(with_knobs, recipe, experiment, posterior, steps, options)
        found.append(calibrate(build, params, source, key, {"softmax_temperature": 1.0}, tasks=tasks, chunk=chunk))
    elif isinstance(experiment.likelihood, (Categorical, Bernoulli)):
        learner = with_knobs(recipe, experiment, posterior, steps, options, found[0].knobs if found else {})
        found.append(calibrate_softmax(learner, params, source, key, tasks=tasks, chunk=chunk))
    if not found:
        raise ValueError(
            f"--calibrated: {recipe.learner} with this likelihood has no scalar to fit; leave it out, or give "
            "--posterior implicit or laplace"
        )
    return Calibration({n: v for f in found for n, v in f.knobs.items()}, found[0].nll_before, found[-1].nll_after)


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
    devices: int = 1,
    set: tuple[str, ...] = (),
) -> int:
    """Judge a run on new tasks: a table, a JSON file and pictures in its folder.

    Args:
        run: the folder that `train` wrote.
        posterior: what is put around phi_k (default: the learner's own).
        draws: networks drawn from the posterior; 0 is the linearised predictive in closed form (default: 0 for
            regression, else 16).
        linear: draw linearised networks, which broad posteriors do not throw off course; --no-linear draws networks.
        calibrated: fit on validation tasks first: the posterior's temperature (or precision), and the noise or, of
            classes, the softmax's temperature.
        steps: inner steps on a new task, in place of the recipe's; the report is another file, as with --set.
        tasks: how many (default: the recipe's; else each group of a table once, and 600 of others).
        split: the tasks' split; one_shot is Omniglot's official 20 runs of 20 ways, 1 shot.
        seed: of the tasks.
        devices: into how many the cores are divided, each judging its own share of the tasks.
        set: options of the tasks or the learner by name, e.g. --set tasks.shot=5; evaluation.metrics names
            figures of the learner's loss to report besides, evaluation.course=false leaves out those after each inner
            step.
    """
    configure(devices=devices)
    check_pictures(run, "run")
    options: dict[str, Any] = {}
    if posterior is not None:
        options["posterior"] = posterior
        if posterior != "point":
            recipe = recipe_of(Run.open(run))
            regression = recipe.likelihood.get("name") == "gaussian"
            options["draws"] = (0 if regression else 16) if draws is None else draws
            options["linear"] = linear
    opened, recipe, experiment, params = open_run(run, steps, set, **options)
    settings = experiment.evaluation
    console = screen()
    learner, fitted = experiment.learner, None
    source = one_shot_runs_for(recipe) if split == "one_shot" else getattr(experiment.splits, split)
    number = settings.tasks if tasks is None and split != "one_shot" else tasks
    number = (group_count(source) or TASKS) if number is None else number
    changed = (*set, f"steps={steps}") if steps is not None else set  # other tasks or steps: another report
    steps = settings.steps if steps is None else steps
    if calibrated:
        # Drawn networks are dear: one or two scalars are told well enough by fewer tasks.
        validation = min(number, 50 if options.get("draws") else 200)
        key = jax.random.key(settings.seed + 1)
        result = _fitted(recipe, experiment, params, posterior, steps, options, validation, key)
        fitted = result.knobs
        learner = with_knobs(recipe, experiment, posterior, steps, options, fitted)
        units = Units.of(source)
        shift = float(np.sum(np.log(units.scale)))  # from the nll of standardised targets to that in their own units
        before, after = (nll + shift for nll in (result.nll_before, result.nll_after))
        own = fitted | ({"noise": fitted["noise"] * units.scale[0]} if "noise" in fitted and units.scale else {})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in own.items())
        told = f"fitted on {validation} validation tasks: {shown} (NLL {before:.4f} -> {after:.4f})"
        console.print(told + (f", in units of {units.target}" if units.scale else ""), soft_wrap=True)
    course = learner
    if posterior not in (None, "point") and learner.path is not None:
        way, likelihood = most_ways(recipe, experiment.preparation), experiment.likelihood
        course = recipe_learner(recipe, experiment.model, likelihood, posterior="point", steps=steps, way=way)
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
    )
    name = f"report-{name_of(posterior, calibrated=bool(fitted), split=split, changed=changed)}"
    told = _outsiders(learner, params, recipe, experiment, split, number, settings.seed if seed is None else seed)
    asked = {"posterior": posterior, "draws": options.get("draws"), "linear": options.get("linear"), "steps": steps}
    asked |= {"fitted": fitted, "split": split, "set": set, "seed": settings.seed if seed is None else seed}
    asked |= {"checkpoint": judged(opened, params)}
    kind = "official runs" if split == "one_shot" else "tasks"
    try:
        _keep(opened, name, report, asked, told)
    finally:
        # Figures that cost minutes are shown even where they cannot be written.
        title = f"{recipe.name}, {recipe.learner}, {posterior or 'own'} posterior, {number} {kind}"
        console.print(report.table(title))
    if told:
        console.print(rejection_table(told))
    if (curve := report.curve_table()) is not None:
        console.print(curve)
    _compare(console, opened, recipe, split, changed)
    console.print(f"written: {opened.folder / name}.json and pictures in {opened.folder / 'plots'}", soft_wrap=True)
    return 0


def _compare(console: Console, run: Run, recipe: Recipe, split: str, changed: Sequence[str]) -> None:
    """Print the published figures of the tasks that were judged, if there are any."""
    if recipe.name in recipe_names():
        base = with_overrides(load_recipe(recipe.name), recipe.learner)
    elif any(o.startswith("tasks.") for o in (*run.started.get("asked", {}), *changed)):
        return  # what the file had before is not known
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


def one_shot_runs_for(recipe: Recipe) -> FixedTasks:
    """The official runs as the recipe's learner sees images.

    Raises:
        ValueError: a run that was trained on some of their characters, or to tell fewer than 20 classes apart.
    """
    tasks = own_table(recipe.tasks, recipe.learner)
    if tasks.get("name") != "omniglot" or tasks.get("split") != "lake":
        raise ValueError(
            f"--split one_shot: this run was trained on {tasks.get('name')} with split {tasks.get('split')!r}, needs "
            "Omniglot's split 'lake', which leaves the runs' characters out; train with --set tasks.split=lake"
        )
    if (way := most_ways(recipe) or 0) < 20:
        raise ValueError(
            f"--split one_shot: has 20 classes a run, but this run was trained to tell {way} apart; train with "
            "--set tasks.way=20 (or tasks.train_way=20)"
        )
    return one_shot_source(size=tasks.get("size", 28))


def _outsiders(
    learner: Learner, params: Any, recipe: Recipe, experiment: Experiment, split: str, tasks: int, seed: int
) -> dict[str, Rejection]:
    """By score, how well texts of no class are told apart, where the tasks come with such texts."""
    judged: Any = getattr(experiment.splits, split, None)
    validation: Any = experiment.splits.validation
    if getattr(judged, "outside", None) is None:
        return {}
    scores = {"confidence": confidence(learner)}
    if hasattr(params, "embedding"):
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
    """A row a score: AUROC, and what its validated threshold does."""
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
