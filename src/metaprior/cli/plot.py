"""metaprior plot: plot a run."""

from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import tyro
from jaxtyping import PyTree

from metaprior.cli.screen import screen
from metaprior.core.types import Learner, Task
from metaprior.evaluation.plots import check_plots, gate_values, regression_tasks, save, training_curve
from metaprior.experiments.opened import load
from metaprior.learners.registry import traits_of


def plot(run: Annotated[Path, tyro.conf.Positional], /) -> int:
    """Plot a run's training curve, its predictions on new tasks (regression on one input) and learned gates.

    Gates are plotted for learners that have them.

    Args:
        run: The folder that `train` wrote.
    """
    check_plots(run, "run")
    opened = load(run)
    recipe, experiment, params = opened.recipe, opened.experiment, opened.params
    plots = opened.run.folder / "plots"
    plots.mkdir(exist_ok=True)
    written = [plots / "training.png"]
    preparation = experiment.preparation
    save(training_curve(opened.run.metrics(), preparation and preparation.standardised), written[0])
    task = experiment.splits.test.sample(jax.random.key(experiment.evaluation.seed), 3)
    x = task.support.x
    if recipe.likelihood["name"] == "gaussian" and getattr(x, "shape", (0,))[-1] == 1 and x.ndim == 3:
        written.append(plots / "tasks.png")
        drawn = regression_tasks(experiment.learner, params, task, jax.random.key(0), preparation=preparation)
        save(drawn, written[-1])
    if (gates := traits_of(recipe.learner).gates) is not None:
        said = {name: value for name, value in recipe.learners.get(recipe.learner, {}).items() if name == "p"}
        steps = steps_of(experiment.learner, params, task)
        of_task = partial(gates, experiment.model, experiment.likelihood, params, steps=steps, **said)
        shown = jax.jit(jax.vmap(of_task))(task.support)
        written.append(plots / "gates.png")
        save(gate_values(*shown), written[-1])
    screen().print("\n".join(f"written: {path}" for path in written), soft_wrap=True)
    return 0


def steps_of(learner: Learner, params: PyTree, tasks: Task) -> int:
    """Returns the number of inner steps of a learner.

    Args:
        learner: A learner with a `path`.
        params: Its meta-learned parameters.
        tasks: A stack of tasks.
    """
    assert learner.path is not None
    support = jax.tree.map(lambda leaf: leaf[0], tasks.support)
    course = jax.eval_shape(learner.path, params, support, jax.random.key(0))
    return jax.tree.leaves(course)[0].shape[0] - 1
