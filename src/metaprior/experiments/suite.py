"""Suites: runs that belong together, and how each is trained and evaluated. Each suite is a TOML file in `suites/`.

    title = "Omniglot, 5 ways, 1 shot"
    recipe = "omniglot-5way-1shot"

    [runs.maml]

    [runs.protonet]
    recipe = "omniglot-protonet"
    set = {"training.steps" = 6500}
    judge = {"tasks.shot" = 5}

A run may have `recipe`, `learner` (the default is the learner with the run's name, or else the recipe's), `set`
(options that replace the recipe's), `judge` (options for evaluation only), `split`, `posterior` and `calibrated`
(as in `metaprior evaluate`), `start`, an earlier run whose network this one starts from, and `minutes`, a limit of the
training. `title` labels its row on a page; the default is the learner's name. `recipe` and `minutes` before the runs
are the defaults of all runs.
"""

import tomllib
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from metaprior.core.named import lookup
from metaprior.core.options import Positive, Word, accept, accept_options, check_fields
from metaprior.experiments.recipe import Recipe, check_options, check_support, load_recipe, with_overrides
from metaprior.learners.registry import LEARNERS


@dataclass(frozen=True)
class Planned:
    """One run of a suite: how it is trained and evaluated.

    Attributes:
        recipe: The recipe's name or path.
        learner: The learner's name, or None for the recipe's.
        set: Options by dotted name that replace the recipe's.
        judge: Options by dotted name that replace them in evaluation only.
        split: The split to evaluate.
        posterior: The posterior to evaluate, or None for the learner's own.
        calibrated: Whether to calibrate on validation tasks first.
        start: The name of an earlier run of the suite whose network this one starts from. None: as the recipe states.
        minutes: The time of training in minutes of a processor core, compiling included. None trains to the end.
        title: The label of its row on a page of results; the learner's name if empty.
    """

    recipe: str
    learner: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)
    split: Literal["validation", "test", "one_shot"] = "test"
    posterior: Literal["point", "implicit", "laplace"] | None = None
    calibrated: bool = False
    start: str | None = None
    minutes: Positive | None = None
    title: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "runs.")

    def resolved(self) -> Recipe:
        """Returns the recipe of the training, with `learner` and `set`."""
        return with_overrides(load_recipe(self.recipe), self.learner, self.set)


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        name: Its name, which is also the name of its folder of results.
        title: Its title.
        runs: Its runs by name.
    """

    name: str
    title: Word
    runs: dict[str, Planned]


def suite_names() -> list[str]:
    """Returns the names of the library's suites, sorted."""
    found = [f.name for f in files("metaprior.experiments.suites").iterdir()]
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def load_suite(name: str) -> Suite:
    """Loads a suite, and checks its recipes and their options.

    Args:
        name: The name of one of the library's suites, or the path of a TOML file.

    Raises:
        ValueError: A suite, recipe, learner or option is unknown, or the file is not valid TOML.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"suite must be the path of a TOML file or a built-in name, got {name}: no such file.")
        text, name, where = path.read_text(encoding="utf-8-sig"), path.stem, f"{path}: "
    else:
        lookup("suite", name, dict.fromkeys(suite_names()))
        text, where = (files("metaprior.experiments.suites") / f"{name}.toml").read_text(), ""
    try:
        return _suite(name, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}not valid TOML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _suite(name: str, table: dict[str, Any]) -> Suite:
    table = dict(table)
    common, runs = {name: table.pop(name) for name in ("recipe", "minutes") if name in table}, {}
    for run, given in accept(dict, table.pop("runs", {}), "runs").items():
        options = common | accept(dict, given, f"runs.{run}")
        options = ({"learner": run} if run in LEARNERS else {}) | options
        planned = Planned(**accept_options(Planned, options, f"runs.{run}."))
        for recipe in (planned.resolved(), with_overrides(planned.resolved(), None, planned.judge)):
            check_options(recipe)
            check_support(recipe)
        if planned.start is not None and planned.start not in runs:
            raise ValueError(
                f"runs.{run}.start must be an earlier run of the suite, {', '.join(runs)}, got {planned.start}."
            )
        runs[run] = planned
    if not runs:
        raise ValueError("runs is missing: a suite needs a table [runs.NAME] for each of its runs.")
    return Suite(**accept_options(Suite, table | {"name": name, "runs": runs}, "suite."))
