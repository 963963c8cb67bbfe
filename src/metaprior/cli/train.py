"""metaprior train: meta-train a recipe into a run folder."""

import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.text import Text

from metaprior.cli.progress import Progress
from metaprior.cli.screen import screen
from metaprior.core.named import lookup
from metaprior.core.runtime import configure
from metaprior.experiments.course import check_same_course
from metaprior.experiments.recipe import (
    Experiment,
    Recipe,
    as_dict,
    build,
    load_recipe,
    parse_overrides,
    recipe_from_dict,
    recipe_names,
    recipe_of,
    training_of,
    with_overrides,
)
from metaprior.experiments.runs import Run
from metaprior.experiments.start import begun
from metaprior.tasks.images.clusters import clusters_of
from metaprior.training.loop import Fitted, fit


def train(
    recipe: Annotated[str, tyro.conf.Positional],
    /,
    learner: str | None = None,
    out: Path | None = None,
    steps: int | None = None,
    seed: int | None = None,
    start_from: str | None = None,
    freeze: bool = False,
    resume: bool = False,
    devices: int = 1,
    threads: int | None = None,
    set: tuple[str, ...] = (),
) -> int:
    """Meta-train a recipe (a built-in name or a TOML file) into a run folder.

    Args:
        recipe: The recipe, see `metaprior list`. With --resume, the one that the run was started with.
        learner: The learner. None means the recipe's.
        out: The run's folder. None means runs/RECIPE-LEARNER.
        steps: The number of meta-steps. None means the recipe's.
        seed: The seed of everything random. None means the recipe's.
        start_from: The folder of a run whose network this one starts from, such as one that `fine_tune` pretrained. Its
            head is taken only if it has the same number of outputs. The same as --set start.run=RUN.
        freeze: Leave that network as it is, and train only what the learner has besides. The same as --set
            start.freeze=true.
        resume: Continue the run in the folder, as if it had never stopped. It keeps its settings: only --steps may
            change (if the learning rate's schedule is constant), and any other difference is an error.
        devices: The number of devices that the cores are divided into. Each device computes a share of the tasks: on
            two cores, 2 trains Omniglot's small episodes nearly twice as fast. On accelerators all devices are used.
        threads: The number of threads. None means one per core. For networks as small as the sinusoid's, one is faster
            than two, which would exchange tiny pieces of work.
        set: Options by name, e.g. --set training.rate=3e-4 learner.rate=0.1 tasks.shot=5
    """
    if not recipe.endswith(".toml"):
        lookup("recipe", recipe, dict.fromkeys(recipe_names()))
    overrides = parse_overrides(set)
    for option, value in {"steps": steps, "seed": seed}.items():
        if value is not None and (other := overrides.setdefault(f"training.{option}", value)) != value:
            raise ValueError(f"--{option} must agree with --set training.{option}={other}, got {value}. Leave one out.")
    for option, value in {"run": start_from, "freeze": freeze or None}.items():
        if value is not None:
            overrides[f"start.{option}"] = value
    chosen = with_overrides(load_recipe(recipe), learner, overrides)
    folder = out or Path("runs") / one_name(f"{chosen.name}-{chosen.learner}")
    if resume:
        with Run.resume(folder) as run:
            chosen = going_on(run, recipe, learner, overrides)
            configure(float64=training_of(chosen).float64, devices=devices, threads=threads)
            return _train(run, chosen, build(chosen, preparation=run.preparation), resume)
    configure(float64=training_of(chosen).float64, devices=devices, threads=threads)
    experiment = build(chosen)
    with Run.create(folder, as_dict(chosen), overrides) as run:
        try:
            return _train(run, chosen, experiment, resume)
        finally:
            run.discard()  # a start that failed leaves no folder


def one_name(text: str) -> str:
    """Converts a text to a folder's name, since a recipe may be called '../../x'.

    Args:
        text: The text.
    """
    return re.sub(r"[/\\\0]+", "_", text).lstrip(".") or "run"


def going_on(kept: Run, recipe: str, learner: str | None, overrides: dict[str, Any]) -> Recipe:
    """Returns the recipe with which a run continues: its own, of which only the number of meta-steps may change.

    Args:
        kept: The run.
        recipe: The recipe's name or path on the command line.
        learner: The learner on the command line, or None.
        overrides: The options on the command line by dotted name.

    Raises:
        OtherSettings: The recipe, the learner or an option differs from the run's.
    """
    own = recipe_of(kept)
    asked: dict[str, Any] = kept.started.get("asked", {})
    # A TOML file may have been edited since, so all of it is compared, with the options of the first start.
    edited = recipe.endswith(".toml") and "asked" in kept.started
    base, options = (load_recipe(recipe), asked | overrides) if edited else (own, overrides)
    wanted = as_dict(with_overrides(base, learner or own.learner, options))
    if not edited and (name := load_recipe(recipe).name) != own.name:
        wanted["name"] = name
    was = as_dict(own)
    if "training.steps" not in overrides and "steps" in was["training"]:
        wanted["training"]["steps"] = was["training"]["steps"]  # an earlier --resume may have changed it
    settings = ({"training": asdict(training_of(recipe_from_dict(table)))} for table in (was, wanted))
    check_same_course(kept.folder, was | next(settings), wanted | next(settings), "")
    return recipe_from_dict(wanted)


def trained_run(
    run: Run,
    chosen: Recipe,
    experiment: Experiment,
    resume: bool,
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Fitted:
    """Trains a run and shows its progress.

    Args:
        run: The run.
        chosen: Its recipe.
        experiment: The parts of the recipe.
        resume: Whether the run continues.
        seconds: The time limit, see `training.fit`.
        clock: The clock of the time limit, see `training.fit`.
    """
    experiment, record = begun(chosen, experiment)
    run.keep_start(record)
    if experiment.preparation is not None and run.preparation is None:
        run.keep(experiment.preparation)
    console, training = screen(), experiment.training
    named = Text.assemble((chosen.name, "bold"), " with ", (chosen.learner, "bold"), f": {chosen.description}")
    console.print(named, soft_wrap=True)
    if (clusters := clusters_of(experiment.splits.train)) is not None:
        console.print(f"training tasks of clusters: {clusters}", soft_wrap=True)
    prepared = experiment.preparation
    with Progress(training.steps, console, prepared and prepared.standardised) as progress:
        return fit(
            experiment.learner,
            experiment.splits,
            training,
            run=run,
            resume=resume,
            report=progress.report,
            name=chosen.learner,
            seconds=seconds,
            clock=clock,
        )


def _train(run: Run, chosen: Recipe, experiment: Experiment, resume: bool) -> int:
    fitted, console, folder = trained_run(run, chosen, experiment, resume), screen(), run.folder
    if fitted.interrupted:
        at = int(fitted.state.step)
        console.print(f"stopped at meta-step {at}, saved; continue with --resume --out {folder}", soft_wrap=True)
        return 128 + fitted.interrupted
    console.print(f"done: {folder}; next: metaprior evaluate {folder}", soft_wrap=True)
    return 0
