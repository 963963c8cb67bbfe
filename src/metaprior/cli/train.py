"""metaprior train: meta-train a recipe into a run folder."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.text import Text

from metaprior.cli.progress import Progress
from metaprior.cli.screen import screen
from metaprior.named import lookup
from metaprior.recipe import (
    as_dict,
    build,
    load_recipe,
    parse_overrides,
    recipe_from_dict,
    recipe_names,
    training_of,
    with_overrides,
)
from metaprior.runs import Run
from metaprior.runtime import configure
from metaprior.training import fit


def train(
    recipe: Annotated[str, tyro.conf.Positional],
    /,
    learner: str | None = None,
    out: Path | None = None,
    steps: int | None = None,
    seed: int | None = None,
    resume: bool = False,
    devices: int = 1,
    threads: int | None = None,
    set: tuple[str, ...] = (),
) -> int:
    """Meta-train a recipe (a built-in name or a TOML file) into a run folder.

    Args:
        recipe: what to train, see `metaprior list`; with --resume, it may be left as it was.
        learner: the algorithm, in place of the recipe's own.
        out: the run's folder (default: runs/RECIPE-LEARNER).
        steps: meta-steps, in place of the recipe's.
        seed: of everything random.
        resume: go on with the run in the folder, as if it had never stopped.
        devices: into how many the cores are divided, each running through its own share of the tasks: on two cores 2
            trains Omniglot's small episodes nearly twice as fast. Accelerators are all used as they are.
        threads: how many to compute with (default: all cores). On networks as small as the sinusoid's, one is faster
            than two, which would pass tiny pieces of work to and fro.
        set: options by name, e.g. --set training.rate=3e-4 learner.rate=0.1 tasks.shot=5
    """
    if not recipe.endswith(".toml"):
        lookup("recipe", recipe, dict.fromkeys(recipe_names()))
    overrides = parse_overrides(set)
    overrides |= {} if steps is None else {"training.steps": steps}
    overrides |= {} if seed is None else {"training.seed": seed}
    chosen = with_overrides(load_recipe(recipe), learner, overrides)
    folder = out or Path("runs") / f"{chosen.name}-{chosen.learner}"
    kept = Run.open(folder) if resume else None
    if kept is not None:
        # What the run was started with holds; only how long it goes on may be said anew.
        chosen = with_overrides(recipe_from_dict(kept.recipe), None, overrides)
    training = training_of(chosen)
    configure(float64=training.float64, devices=devices, threads=threads)
    experiment = build(chosen, preparation=None if kept is None else kept.preparation)
    run = Run.create(folder, as_dict(chosen)) if kept is None else kept
    if experiment.preparation is not None and run.preparation is None:
        run.keep(experiment.preparation)
    console = screen()
    named = Text.assemble((chosen.name, "bold"), " with ", (chosen.learner, "bold"), f": {chosen.description}")
    console.print(named, soft_wrap=True)
    with Progress(training.steps, console) as progress:
        fitted = fit(
            experiment.learner,
            experiment.splits,
            training,
            run=run,
            resume=resume,
            report=progress.report,
            name=chosen.learner,
        )
    if fitted.interrupted:
        at = int(fitted.state.step)
        console.print(f"stopped at meta-step {at}, saved; go on with --resume --out {folder}", soft_wrap=True)
        return 130
    console.print(f"done: {folder}; next: metaprior evaluate {folder}", soft_wrap=True)
    return 0
