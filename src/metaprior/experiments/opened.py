"""A run, opened to be used: its learner, its parameters and its tasks, as the command line and Python see them."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Bernoulli, Categorical
from metaprior.core.runtime import configure
from metaprior.core.types import Learner, Splits
from metaprior.evaluation.calibration import Calibration, calibration
from metaprior.experiments.recipe import (
    Experiment,
    Recipe,
    build,
    evaluation_of,
    most_ways,
    own_table,
    parse_overrides,
    recipe_learner,
    recipe_of,
    training_of,
    with_overrides,
)
from metaprior.experiments.reports import Kept, calibrated_report, check_same
from metaprior.experiments.runs import Run
from metaprior.learners.builders.knobs import SOFTMAX, turned
from metaprior.learners.builders.normalised import gathered
from metaprior.networks import statistics
from metaprior.tasks import Preparation
from metaprior.training.loop import init_state


@dataclass(frozen=True)
class Opened:
    """A run, opened: what its recipe builds, and the parameters that validated best.

    Args:
        run: its folder.
        recipe: with the options that were set anew.
        experiment: the learner before calibration, the network, the likelihood and the tasks.
        params: theta.
        learner: to adapt and predict with; calibrated, if that was asked for.
        steps: inner steps on a new task, None for the learner's own number.
        options: the posterior that was asked for, by name, and its options.
    """

    run: Run
    recipe: Recipe
    experiment: Experiment
    params: PyTree
    learner: Learner
    steps: int | None
    options: dict[str, Any]

    @property
    def posterior(self) -> str | None:
        """The name of the posterior that was asked for, None for the learner's own."""
        return self.options.get("posterior")

    @property
    def splits(self) -> Splits:
        """Its tasks, shared out as they were for training."""
        return self.experiment.splits

    @property
    def preparation(self) -> Preparation | None:
        """What makes tasks of a table's columns, and predictions in its units; None for other tasks."""
        return self.experiment.preparation

    def made(self, **options: Any) -> Learner:
        """The recipe's learner over the run's network, with other options of `recipe_learner`."""
        own = {"likelihood": self.experiment.likelihood, "steps": self.steps}
        own |= {"way": most_ways(self.recipe, self.experiment.preparation)} | options
        return recipe_learner(self.recipe, self.experiment.model, own.pop("likelihood"), **own)

    def knobs(self) -> set[str]:
        """The names of the scalars that `calibrate` fits."""
        of_classes = isinstance(self.experiment.likelihood, Categorical | Bernoulli)
        return {*dict(self.experiment.learner.knobs), *([SOFTMAX] if of_classes else [])}

    def calibrate(self, tasks: int, key: PRNGKeyArray) -> Calibration:
        """Fits the learner's knobs to `tasks` validation tasks.

        Raises:
            ValueError: There is no scalar to fit.
        """
        if not self.knobs():
            raise ValueError(
                f"--calibrated: {self.recipe.learner} with this likelihood has no scalar to fit; leave it out, or give "
                "--posterior implicit or laplace"
            )
        return calibration(
            self.experiment.learner, self.params, self.splits.validation, key,
            tasks=tasks, evaluations=25 if self.options.get("draws") else 40,  # drawn networks are dear
            chunk=self.experiment.training.at_once or 10,
        )  # fmt: skip

    def turned(self, knobs: dict[str, Any]) -> Learner:
        """The learner with these values of its knobs."""
        return turned(self.experiment.learner, knobs)

    def with_fitted(self, kept: Kept) -> "Opened":
        """The run with the scalars of a calibrated report, if they were fitted for what now predicts."""
        check_same(kept, self.run, self.params, self.steps, self.knobs())
        return replace(self, learner=self.turned(kept.settings["fitted"]))


def load(
    run: Path | str,
    *,
    posterior: str | None = None,
    draws: int | None = None,
    linear: bool | None = None,
    calibrated: bool = False,
    steps: int | None = None,
    settings: Sequence[str] = (),
    blank: bool = False,
) -> Opened:
    """Open a run that `train` wrote, to adapt and predict, or to go on with it in Python.

    A table is prepared as it was for training, and its groups are shared out as they were, unless `tasks.path`,
    `tasks.split` or `tasks.seed` is set anew. Turns on float64 where the run was trained in it.

    Args:
        run: the folder that `train` wrote.
        posterior: "point", "implicit" or "laplace"; None: the learner's own.
        draws, linear: options of that posterior.
        calibrated: with the scalars that `metaprior evaluate --calibrated` fitted for this posterior, which also say
            its draws.
        steps: inner steps on a new task; None: as the recipe says.
        settings: options to set anew, "tasks.shot=5".
        blank: the tasks of a table are of the right shapes and empty, so that the table need not be there.

    Raises:
        ValueError: no run there, or a damaged one; unknown options; scalars that were fitted for other settings.
    """
    folder = Path(run)
    given: dict[str, Any] = {"posterior": posterior, "draws": draws, "linear": linear}
    options = {name: value for name, value in given.items() if value is not None}
    if draws is not None and posterior in (None, "point"):
        raise ValueError("draws needs a posterior to draw from: give posterior implicit or laplace too.")
    kept = calibrated_report(Run.open(folder), posterior, steps) if calibrated else None
    if kept is not None:
        # The scalars are right for the predictive that they were fitted for, and for no other.
        fitted_for = {name: kept.settings[name] for name in ("draws", "linear") if kept.settings[name] is not None}
        if draws is not None and draws != (needed := fitted_for.get("draws")):
            raise ValueError(
                f"--draws must be {needed} with --calibrated, as {kept.path} was fitted with so many, got {draws}; "
                f"leave it out, or run `metaprior evaluate {run} --posterior {posterior} --calibrated --draws {draws}` "
                "first."
            )
        options |= fitted_for
    opened = _opened(folder, steps, tuple(settings), blank, options)
    return opened if kept is None else opened.with_fitted(kept)


def _opened(folder: Path, steps: int | None, settings: tuple[str, ...], blank: bool, options: dict[str, Any]) -> Opened:
    run = Run.open(folder)
    run.warn_if_edited()
    recipe = with_overrides(recipe_of(run), None, parse_overrides(settings))
    configure(float64=training_of(recipe).float64)
    steps = evaluation_of(recipe).steps if steps is None else steps
    preparation, tasks = run.preparation, own_table(recipe.tasks, recipe.learner)
    if preparation is not None and any(re.match(r"tasks\.(path|split|seed)=", option) for option in settings):
        preparation = replace(preparation, groups=None)
    splits = None
    if blank and preparation is not None and recipe.network.get("norm") != "running":
        shot, query = tasks.get("shot", 5), tasks.get("query", 5)
        splits = preparation.blank(shot, query, padded=tasks.get("ragged", "pad") == "pad")
    experiment = build(recipe, steps=steps, splits=splits, preparation=preparation, **options)
    if preparation is None and experiment.preparation is not None:
        warnings.warn(
            f"{folder} was trained by a version that kept no preparation.json; columns, levels and scaling are taken "
            "from the table as it is today",
            stacklevel=3,
        )
    _warn_of_leaks(run.preparation, experiment.preparation)
    params = run.params(init_state(experiment.learner, experiment.splits.train, experiment.training))
    opened = Opened(run, recipe, experiment, params, experiment.learner, steps, options)
    if experiment.model.statistics != "running":
        return opened
    gather = jax.jit(partial(gathered, experiment.learner, experiment.model))
    seen = gather(params, experiment.splits.train, jax.random.key(experiment.training.seed))
    opened = replace(opened, experiment=experiment._replace(model=statistics.given(experiment.model, seen)))
    learner = opened.made(**options)
    return replace(opened, learner=learner, experiment=opened.experiment._replace(learner=learner))


def _warn_of_leaks(old: Preparation | None, new: Preparation | None) -> None:
    """Warn where groups that trained the run are to judge it, as its groups were shared out anew."""
    if old is None or new is None or not old.groups or not new.groups or old.groups == new.groups:
        return
    trained = set(old.groups[0])
    leaked = [name for name in new.groups[2] if name in trained]
    if leaked:
        warnings.warn(
            f"tasks.path, tasks.split or tasks.seed was set anew: {len(leaked)} of {len(new.groups[2])} test groups "
            f"trained this run ({leaked[0]!r}, ...), so figures on them are not of new groups. Leave them out of the "
            "table, or name the groups of each part by tasks.split.",
            stacklevel=4,
        )
