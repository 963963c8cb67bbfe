"""metaprior plot: the pictures of a run."""

from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from metaprior.cli.evaluate import open_run
from metaprior.plots import regression_tasks, training_curve


def plot(run: Annotated[Path, tyro.conf.Positional], /) -> int:
    """Draw a run's training curve and, for regression on a line, what its posterior says of new tasks.

    Args:
        run: the folder that `train` wrote.
    """
    opened, recipe, experiment, params = open_run(run)
    plots = opened.folder / "plots"
    plots.mkdir(exist_ok=True)
    written = [plots / "training.png"]
    training_curve(opened.metrics()).savefig(written[0])
    task = experiment.splits.test.sample(jax.random.key(experiment.evaluation.seed), 3)
    x = task.support.x
    if recipe.likelihood["name"] == "gaussian" and getattr(x, "shape", (0,))[-1] == 1 and x.ndim == 3:
        written.append(plots / "tasks.png")
        regression_tasks(experiment.learner, params, task, jax.random.key(0)).savefig(written[-1])
    Console().print("\n".join(f"written: {path}" for path in written), soft_wrap=True)
    return 0
