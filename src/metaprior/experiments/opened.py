"""Opened runs: a trained run's learner, parameters and tasks, for the command line and for Python."""

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
    """An opened run: the parts of its recipe, and the parameters with the lowest validation nll.

    Attributes:
        run: The run's folder.
        recipe: The recipe, with the options that were changed on opening.
        experiment: The learner before calibration, the network, the likelihood and the tasks.
        params: The meta-learned parameters theta.
        learner: The learner to adapt and predict with, calibrated if requested.
        steps: The number of inner steps on a new task. None means the learner's default.
        options: The requested posterior, by name, and its options.
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
        """The name of the requested posterior, or None for the learner's own."""
        return self.options.get("posterior")

    @property
    def splits(self) -> Splits:
        """The task sources, split as in training."""
        return self.experiment.splits

    @property
    def preparation(self) -> Preparation | None:
        """The conversion between a table's columns and the learner's inputs and targets, or None without a table."""
        return self.experiment.preparation

    def made(self, **options: Any) -> Learner:
        """Makes the recipe's learner for the run's network, or for another one.

        Args:
            **options: Options of `recipe_learner` that replace the run's; `model` replaces its network.
        """
        own = {"model": self.experiment.model, "likelihood": self.experiment.likelihood, "steps": self.steps}
        own |= {"way": most_ways(self.recipe, self.experiment.preparation)} | options
        return recipe_learner(self.recipe, own.pop("model"), own.pop("likelihood"), **own)

    def knobs(self) -> set[str]:
        """Returns the names of the scalars that `calibrate` fits."""
        of_classes = isinstance(self.experiment.likelihood, Categorical | Bernoulli)
        return {*dict(self.experiment.learner.knobs), *([SOFTMAX] if of_classes else [])}

    def calibrate(self, tasks: int, key: PRNGKeyArray) -> Calibration:
        """Fits the learner's knobs on validation tasks. `turned` makes the calibrated learner from them.

        Args:
            tasks: The number of validation tasks.
            key: The random key of the tasks and of the adaptation.

        Raises:
            ValueError: There is no scalar to fit.
        """
        if not self.knobs():
            raise ValueError(
                f"--calibrated must be left out: {self.recipe.learner} with this likelihood has no scalar to fit. Or "
                "give --posterior implicit or laplace too."
            )
        return calibration(
            self.experiment.learner, self.params, self.splits.validation, key,
            tasks=tasks, evaluations=25 if self.options.get("draws") else 40,  # drawn networks are slow
            chunk=self.experiment.training.at_once or 10,
        )  # fmt: skip

    def turned(self, knobs: dict[str, Any]) -> Learner:
        """Returns the learner with other values of its knobs.

        Args:
            knobs: The values by name.
        """
        return turned(self.experiment.learner, knobs)

    def with_fitted(self, kept: Kept) -> "Opened":
        """Returns the run with the scalars of a calibrated report.

        Args:
            kept: The report.

        Raises:
            ValueError: The scalars were fitted for other parameters, inner steps or scalars.
        """
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
    """Opens a run that `metaprior train` wrote, to adapt, predict or continue in Python.

    A table is prepared as in training, and its groups are split as in training, unless `settings` has `tasks.path`,
    `tasks.split` or `tasks.seed`. This turns on float64 if the run was trained in it.

    Args:
        run: The run's folder.
        posterior: "point", "implicit" or "laplace", or None for the learner's own.
        draws: The number of networks to draw from that posterior; 0 gives the linearised predictive.
        linear: Whether the drawn networks are linearised.
        calibrated: Whether to use the scalars that `metaprior evaluate --calibrated` fitted for this posterior. They
            also determine `draws` and `linear`.
        steps: The number of inner steps on a new task, or None for the recipe's.
        settings: Options to change, such as "tasks.shot=5".
        blank: Makes empty tasks of the right shapes for a run on a table, so that the table need not exist.

    Returns:
        The opened run.

    Raises:
        ValueError: There is no run in the folder, it is damaged, an option is unknown, or the scalars were fitted for
            other settings.
    """
    folder = Path(run)
    given: dict[str, Any] = {"posterior": posterior, "draws": draws, "linear": linear}
    options = {name: value for name, value in given.items() if value is not None}
    if draws is not None and posterior in (None, "point"):
        raise ValueError("draws needs a posterior to draw from. Give posterior='implicit' or 'laplace' too.")
    kept = calibrated_report(Run.open(folder), posterior, steps) if calibrated else None
    if kept is not None:
        # The scalars are valid only for the predictive that they were fitted for.
        fitted_for = {name: kept.settings[name] for name in ("draws", "linear") if kept.settings[name] is not None}
        if draws is not None and draws != (needed := fitted_for.get("draws")):
            raise ValueError(
                f"--draws must be {needed} with --calibrated, as in {kept.path}, got {draws}. Leave it out, or run "
                f"`metaprior evaluate {run} --posterior {posterior} --calibrated --draws {draws}` first."
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
            f"{folder} was trained by a version that saved no preparation.json, so columns, levels and scaling are "
            "taken from the current table.",
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
    """Warns if a new split puts groups that the run was trained on into its test tasks."""
    if old is None or new is None or not old.groups or not new.groups or old.groups == new.groups:
        return
    trained = set(old.groups[0])
    leaked = [name for name in new.groups[2] if name in trained]
    if leaked:
        warnings.warn(
            f"tasks.path, tasks.split or tasks.seed has changed: this run was trained on {len(leaked)} of the "
            f"{len(new.groups[2])} test groups ({leaked[0]!r}, ...), so the figures are not for new groups. Leave "
            "these groups out of the table, or name the groups of each part with tasks.split.",
            stacklevel=4,
        )
