"""Training that starts from the network of another run: a recipe's table [start]."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from metaprior.core.options import parameters_of
from metaprior.core.types import settled
from metaprior.experiments.course import differences
from metaprior.experiments.opened import load
from metaprior.experiments.recipe import Experiment, Recipe, own_table, start_of
from metaprior.learners.builders.start import part_of, started_from
from metaprior.networks import NETWORKS
from metaprior.tasks import SOURCES
from metaprior.training.checkpoint import digest_of
from metaprior.training.loop import init_state, outer_optimizer

SPLITTING = ("split", "seed", "path", "group")  # options that decide which tasks are training tasks
COLUMNS = ("features", "categories")  # options that decide what a number of the input means
TRAINED_ALIKE = ("batch", "running")  # norms with the same training


def begun(recipe: Recipe, experiment: Experiment) -> tuple[Experiment, dict[str, Any]]:
    """Returns the experiment with the start that its recipe states, and a record of it.

    Args:
        recipe: The recipe.
        experiment: Its parts.

    Returns:
        The experiment, whose learner starts from the network of the run `start.run`, and the run's folder, id,
        meta-step and the hash of its network; the same experiment and nothing if the recipe states no run.

    Raises:
        ValueError: There is no such run, its network differs in more than the head, its tasks are split in another way,
            or the outer optimiser would change a frozen network.
    """
    asked = start_of(recipe)
    if asked.run is None:
        if asked.freeze:
            raise ValueError(
                "start.run must be the folder of a run with start.freeze, got none: the network would stay as it was "
                f"drawn. Train one first, e.g. `metaprior train {recipe.name} --learner fine_tune`, and give its "
                "folder with --start-from."
            )
        return experiment, {}
    # In this process everything is computed in the precision of this recipe, whatever that of the other run is.
    other = load(asked.run, settings=[f"training.float64={str(experiment.training.float64).lower()}"])
    check_network(recipe, other.recipe)
    check_split(recipe, other.recipe)
    trained = part_of(other.experiment.model, other.params, _inputs(other.experiment))
    learner = started_from(experiment.learner, experiment.model, trained, freeze=asked.freeze)
    experiment, used = experiment._replace(learner=learner), other.run.used
    record = {"run": str(asked.run), "id": other.run.started.get("id"), "network": digest_of(trained)}
    record |= {"checkpoint": used.which, "step": used.step} if used else {}
    return (_held(experiment) if asked.freeze else experiment), record


def _inputs(experiment: Experiment) -> Any:
    task = jax.tree.map(lambda leaf: leaf[0], experiment.splits.train.sample(jax.random.key(0), 1))
    return task.query.x


def _held(experiment: Experiment) -> Experiment:
    """Checks that the outer optimiser leaves a frozen network as it is, and fixes its running statistics.

    A frozen network with norm="running" uses in training the statistics that it has afterwards.
    """
    training, splits = experiment.training, experiment.splits
    params = init_state(experiment.learner, splits.train, training).params
    optimizer = optax.with_extra_args_support(outer_optimizer(training))
    zero = jax.tree.map(jnp.zeros_like, params)
    update = optimizer.update(zero, optimizer.init(params), params, value=jnp.zeros(()))[0]
    if any(bool((leaf != 0).any()) for leaf in jax.tree.leaves(part_of(experiment.model, update, _inputs(experiment)))):
        raise ValueError(
            "training.optimizer must not change parameters whose gradient is 0 with start.freeze, as a decay of "
            f"weights does, got {training.optimizer!r}. Use adam or sgd."
        )
    return experiment._replace(learner=settled(experiment.learner, params, splits.train, jax.random.key(training.seed)))


def check_network(recipe: Recipe, other: Recipe) -> None:
    """Checks that two recipes have the same network, but for its head.

    Args:
        recipe: The recipe to train.
        other: The recipe of the run to start from.

    Raises:
        ValueError: They differ. The message lists the differences.
    """
    here, there = (_whole(each.network, NETWORKS) for each in (recipe, other))
    for table in (here, there):
        for name in ("outputs", "head"):
            table.pop(name, None)
    if here.get("norm") in TRAINED_ALIKE and there.get("norm") in TRAINED_ALIKE:
        there["norm"] = here["norm"]
    if found := differences(there, here, "network."):
        raise ValueError(
            f"start.run must have the network of this recipe, except for its head, got another one (there -> here): "
            f"{'; '.join(found)}. Set these options as they are there."
        )


def check_split(recipe: Recipe, other: Recipe) -> None:
    """Checks that two recipes of one data set split it in the same way, so that no test class was trained on.

    Args:
        recipe: The recipe to train.
        other: The recipe of the run to start from.

    Raises:
        ValueError: The split, its seed, the groups or the columns of a table differ.
    """
    here, there = (_whole(own_table(each.tasks, each.learner), SOURCES) for each in (recipe, other))
    if here.get("name") != there.get("name"):
        return
    before, now = ({name: table.get(name) for name in SPLITTING} for table in (there, here))
    if found := differences(before, now, "tasks."):
        raise ValueError(
            "start.run must be trained on the training classes of this recipe, got other ones, among which may be test "
            f"classes (there -> here): {'; '.join(found)}. Set these options as they are there."
        )
    before, now = ({name: table.get(name) for name in COLUMNS} for table in (there, here))
    if found := differences(before, now, "tasks."):
        raise ValueError(
            "start.run must read the same columns in the same order as this recipe, got other ones (there -> here): "
            f"{'; '.join(found)}. Set these options as they are there."
        )


def _whole(table: dict[str, Any], registry: dict[str, Any]) -> dict[str, Any]:
    """A table of options with the defaults of the factory that it names."""
    parameters = parameters_of(registry[table["name"]])
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty} | table
