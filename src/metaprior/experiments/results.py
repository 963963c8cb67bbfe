"""Results as data: one JSON file per evaluated run, and a status computed from it and the published figures.

    results/SUITE/RUN.json

A result is the report of `evaluate` and everything that it depends on. Published figures are in the recipes. The status
is always computed, never stored.
"""

import json
import math
import re
import subprocess
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from metaprior.core.files import write_atomically
from metaprior.core.named import nearest
from metaprior.core.options import NonNegative, Positive, Seed, Whole, accept
from metaprior.evaluation.figures import Figure
from metaprior.evaluation.report import Report
from metaprior.experiments.recipe import (
    Recipe,
    as_dict,
    evaluation_of,
    load_recipe,
    own_table,
    recipe_names,
    training_of,
    with_overrides,
)

LOWER = ("nll", "mse", "rmse", "ece", "mce", "brier")  # lower is better; for other figures higher is better
OF_CALIBRATION = ("nll", "brier", "ece", "mce")  # papers report them without a temperature fitted afterwards
SHARES = ("accuracy", "verification", "instance_")  # figures from 0 to 1
# Options of [tasks] that affect how a learner is trained or how precisely it is evaluated, not the test problem.
FREE = ("query", "test_query", "train_way")
CLOSE = 1e-9  # allows for rounding: 0.9836 + 0.0021 counts as 0.9857


@dataclass(frozen=True)
class Result:
    """The result of an evaluated run.

    Attributes:
        learner: The learner's name.
        recipe: The recipe's name or path, or None if no recipe trained the learner.
        report: The report of `evaluate`.
        recipe_hash: The hash of the resolved recipe (see `recipe_hash`).
        overrides: Options by dotted name that replaced the recipe's in training.
        judged: Options by dotted name that replaced the recipe's in evaluation.
        split: The split that was evaluated.
        posterior: The posterior that was evaluated, or None for the learner's own.
        calibrated: Whether the learner was calibrated on validation tasks first.
        steps: The number of completed meta-steps.
        asked: The planned number of meta-steps, more than `steps` if training was cut short.
        seed: The seed of training.
        minutes: The time of the training steps. If the run had a `budget`, minutes of a processor core.
        budget: The limit of the training in minutes of a processor core, or None.
        milliseconds: The median time of one compiled adaptation to a task and prediction of its queries.
        device: The device that trained.
        commit: The commit of the code.
        command: The command lines that reproduce the result.
        run: The run's id and the evaluated checkpoint, or None if no run was kept.
        title: The label of the result's row.
        table: The title of the table that the row belongs to.
        note: Further remarks.
        digits: Decimals of figures that were recorded with fewer than usual, by name.
    """

    learner: str
    recipe: str | None
    report: Report
    recipe_hash: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    judged: dict[str, Any] = field(default_factory=dict)
    split: str = "test"
    posterior: str | None = None
    calibrated: bool = False
    steps: Whole | None = None
    asked: Whole | None = None
    seed: Seed | None = None
    minutes: NonNegative | None = None
    budget: Positive | None = None
    milliseconds: NonNegative | None = None
    device: str | None = None
    commit: str | None = None
    command: list[str] = field(default_factory=list)
    run: dict[str, Any] | None = None
    title: str = ""
    table: str = ""
    note: str = ""
    digits: dict[str, int] = field(default_factory=dict)

    @property
    def cut(self) -> bool:
        """Whether training ended before its planned number of meta-steps."""
        return self.steps is not None and self.asked is not None and self.steps < self.asked

    def source(self) -> Recipe | None:
        """Returns the current recipe with the result's learner, or None if there is no such recipe any more."""
        if self.recipe is None or not (self.recipe in recipe_names() or Path(self.recipe).is_file()):
            return None
        return with_overrides(load_recipe(self.recipe), self.learner)

    def save(self, path: Path) -> None:
        """Writes the result to a JSON file, atomically.

        Args:
            path: The file. Its folder is created if needed.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")


class Published(NamedTuple):
    """A paper's figures for a learner on a recipe's tasks: an entry of [[published.NAME]].

    Attributes:
        figures: The figures, with the names and units of a report.
        when: The options by dotted name that the figures belong to, if they are not the recipe's.
        split: The split that was evaluated.
        source: The paper.
    """

    figures: dict[str, Figure]
    when: dict[str, Any]
    split: str = "test"
    source: str = ""


class Status(NamedTuple):
    """The comparison of a result with a published figure.

    Attributes:
        kind: "reached" (as good or better), "within the interval" (worse, but one figure lies in the other's 95 %
            interval), "below" (worse than that), or "not comparable".
        reason: Why they are not comparable, or how much of the recipe's training was done.
        cut: Whether training was cut short, so that `kind` is an intermediate state and not final.
    """

    kind: str
    reason: str = ""
    cut: bool = False

    def __str__(self) -> str:
        if self.kind == "not comparable":
            return f"not comparable: {self.reason}" + ("; cut short" if self.cut else "")
        said = f"cut short ({self.kind} so far)" if self.cut else self.kind
        return said + (f", {self.reason}" if self.reason else "")


def read_result(path: Path) -> Result:
    """Reads a result from its file.

    Args:
        path: The JSON file.

    Raises:
        ValueError: The file is damaged or not a result. The message begins with the path.
    """
    try:
        table = dict(accept(dict, json.loads(path.read_text(encoding="utf-8")), "a result"))
        known = {f.name: f.type for f in fields(Result)}
        for name in table:
            if name not in known:
                raise ValueError(f"{name} is not part of a result{nearest(name, list(known))}")
        if lacking := [name for name in ("learner", "recipe", "report") if name not in table]:
            raise ValueError(f"the result has no {', '.join(lacking)}")
        report = Report.from_json(json.dumps(table.pop("report")))
        for name, value in table.items():
            accept(known[name], value, name)
        return Result(report=report, **table)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a result ({str(error).rstrip('.')})") from error


def read_suite(folder: Path) -> dict[str, Result]:
    """Reads the results of a suite.

    Args:
        folder: The folder of its results.

    Returns:
        The results by the names of their files, without the suffix.
    """
    return {path.stem: read_result(path) for path in sorted(folder.glob("*.json"), key=natural)}


def natural(path: Path) -> list[tuple[int, str]]:
    """Returns a sort key with which a-900 precedes a-1000.

    Args:
        path: The file.
    """
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.stem)]


def recipe_hash(recipe: Recipe) -> str:
    """Returns a hash of a recipe's training and evaluation.

    Its description, its published figures and the options of other learners do not affect the hash.

    Args:
        recipe: The recipe.

    Returns:
        16 hexadecimal digits of the SHA-256.
    """
    table = {name: value for name, value in as_dict(recipe).items() if name not in ("description", "published")}
    table["learners"] = table["learners"].get(recipe.learner, {})
    table |= {name: own_table(table[name], recipe.learner) for name in ("tasks", "likelihood", "start", "training")}
    start = table.pop("start")  # its run is known by the name of its folder, wherever that lies
    table |= {"start": start | ({"run": Path(start["run"]).name} if start.get("run") else {})} if start else {}
    if not table["clusters"]:
        del table["clusters"]  # hashes from before this table stay valid
    return sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def published_in(recipe: Recipe, learner: str) -> list[Published]:
    """Reads a learner's entries of [[published.NAME]] in a recipe.

    Figures have the names and units of a report: `accuracy = 0.987`, or `{mean = 0.987, interval = 0.004}` with the
    half-width of the 95 % interval. `when` holds the options that the figures belong to, if they are not the recipe's.

    Args:
        recipe: The recipe.
        learner: The learner's name.

    Raises:
        ValueError: An entry is not valid. The message names it.
    """
    found = []
    for entry in accept(list, recipe.published.get(learner, []), f"published.{learner}"):
        table = dict(accept(dict, entry, f"published.{learner}"))
        when = accept(dict, table.pop("when", {}), f"published.{learner}.when")
        defaults = Published._field_defaults.items()
        texts = {name: accept(str, table.pop(name, word), f"published.{learner}.{name}") for name, word in defaults}
        figures = {}
        for name, value in table.items():
            where = f"published.{learner}.{name}"
            part = value if isinstance(value, dict) else {"mean": value}
            if part.keys() - {"mean", "interval"} or "mean" not in part:
                raise ValueError(f"{where} must be a number or have a mean and an interval, got {', '.join(part)}.")
            mean, interval = float(accept(float, part["mean"], where)), part.get("interval")
            if name.startswith(SHARES) and not 0 <= mean <= 1:
                raise ValueError(f"{where} must be a share from 0 to 1, got {mean:g}.")
            figures[name] = Figure(mean, None if interval is None else float(accept(NonNegative, interval, where)))
        found.append(Published(figures, when, **texts))
    return found


def published_for(recipe: Recipe, base: Recipe, split: str = "test") -> Published | str:
    """Returns the published figures to compare a recipe's learner with, or the reason why there are none.

    Args:
        recipe: The recipe of the evaluation, with all options set.
        base: The recipe without overrides. A published entry without `when` belongs to its tasks.
        split: The split that was evaluated.
    """
    entries = published_in(recipe, recipe.learner)
    if not entries:
        return "no published figure"
    options = {option for entry in entries for option in entry.when}
    options |= {f"tasks.{name}" for table in (base, recipe) for name in own_table(table.tasks, recipe.learner)}
    options -= {f"tasks.{name}" for name in FREE}
    # Training on true classes or on random ones is another experiment than training on clusters.
    options |= {"clusters.partition" for table in (base, recipe) if "partition" in table.clusters}
    fits, reasons = [], []
    for entry in entries:
        wanted = with_overrides(base, recipe.learner, entry.when)
        other = [
            f"{option} is {ours!r}, the published figure is for {theirs!r}" for option in sorted(options)
            if (ours := option_of(recipe, option)) != (theirs := option_of(wanted, option))
        ]  # fmt: skip
        other += [f"evaluated on split {split!r}, published for {entry.split!r}"] if entry.split != split else []
        reasons.append(other)
        if not other:
            fits.append(entry)
    return max(fits, key=lambda entry: len(entry.when)) if fits else "; ".join(min(reasons, key=len))


def option_of(recipe: Recipe, name: str) -> Any:
    """Returns the value of a recipe's option, or None if the recipe does not set it.

    Args:
        recipe: The recipe.
        name: The option's dotted name.
    """
    table, _, option = name.partition(".")
    tables = recipe.learners.get(recipe.learner, {}) if table == "learner" else getattr(recipe, table)
    return own_table(tables, recipe.learner).get(option)


def lower_is_better(name: str) -> bool:
    """Whether lower values of a figure are better.

    Args:
        name: The figure's name, e.g. 'mse', or that of a family's figure, e.g. 'mse of line'.
    """
    return name.partition(" of ")[0] in LOWER


def status_of(ours: Figure, published: Figure, *, lower: bool = False) -> str:
    """Compares a figure with a published one.

    Args:
        ours: The figure. If it is not finite, it is "below".
        published: The published figure. A missing interval, here or in `ours`, counts as 0.
        lower: Whether lower is better.

    Returns:
        "reached", "within the interval" or "below".
    """
    if not math.isfinite(ours.mean):
        return "below"
    gap = (ours.mean - published.mean) * (-1 if lower else 1)
    if gap >= -CLOSE:
        return "reached"
    return "within the interval" if -gap <= max(ours.interval or 0, published.interval or 0) + CLOSE else "below"


def statuses(result: Result) -> dict[str, tuple[Figure, Status]]:
    """Compares a result with the published figures.

    Args:
        result: The result.

    Returns:
        The published figure and the status by the figure's name, or {"": ...} with the reason if nothing is comparable.
    """
    base, nothing = result.source(), Figure(math.nan, None)
    found: Published | str = "no published figure"
    if base is not None:
        trained = with_overrides(base, None, result.overrides)
        if result.recipe_hash in (None, recipe_hash(trained)):
            found = published_for(with_overrides(trained, None, result.judged), base, result.split)
        else:
            found = "the recipe has changed since"
    if base is None or isinstance(found, str):
        return {"": (nothing, Status("not comparable", str(found), result.cut))}
    report, less = figures_of(result), how_much_less(result, base)
    compared = {
        name: (theirs, Status(status_of(report[name], theirs, lower=lower_is_better(name)), less, result.cut))
        for name, theirs in found.figures.items()
        if name in report and not (result.calibrated and name in OF_CALIBRATION)
    }
    missing = f"the only published figures are {', '.join(found.figures)}"
    return compared or {"": (nothing, Status("not comparable", missing, result.cut))}


def figures_of(result: Result) -> dict[str, Figure]:
    """Returns all figures of a result's report, including those without an interval and those of families.

    Args:
        result: The result.
    """
    pooled = {n: Figure(v, None) for n, v in result.report.pooled.items() if v is not None}
    return result.report.figures | pooled | result.report.of_families()


def how_much_less(result: Result, base: Recipe) -> str:
    """Returns how much less training or evaluation a result had than its recipe asks for.

    Args:
        result: The result.
        base: The recipe without overrides.

    Returns:
        A text such as 'after 2.5 % of the recipe's tasks, evaluated on 200 of 600 tasks', or ''.
    """
    parts, own, judged = [], training_of(base), evaluation_of(base)
    if result.steps is not None:
        batch = training_of(with_overrides(base, None, result.overrides)).meta_batch
        share = result.steps * batch / (own.steps * own.meta_batch)
        parts += [] if share >= 1 - CLOSE else [f"after {100 * share:.2g} % of the recipe's tasks"]
    if result.split == "test" and judged.tasks is not None and result.report.tasks < judged.tasks:
        parts.append(f"evaluated on {result.report.tasks} of {judged.tasks} tasks")
    return ", ".join(parts)


def commit() -> str | None:
    """Returns the commit of this code, or None if the code is not in a git checkout of the project.

    '-changed' is appended if files differ from the commit.
    """
    here = Path(__file__)
    package = here.parents[1]

    def git(*words: str) -> str:
        asked = ["git", "-C", str(package), *words]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", str(here))  # fails for an environment inside another repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
