"""Results as data: a JSON file a judged run, published figures in the recipes, and the status that follows from both.

    results/SUITE/RUN.json

A result is the report of `evaluate` and all that it depends on. Its status is computed, never written down.
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
from metaprior.core.options import NonNegative, Seed, Whole, accept
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

LOWER = ("nll", "mse", "rmse", "ece", "mce", "brier")  # the less the better; of other figures the more
OF_CALIBRATION = ("nll", "brier", "ece", "mce")  # papers give them without a temperature fitted afterwards
SHARES = ("accuracy", "verification", "instance_")  # figures from 0 to 1
# Options of [tasks] that say how a learner is trained or how precisely it is judged, not what it is asked.
FREE = ("query", "test_query", "train_way")
CLOSE = 1e-9  # 0.9836 + 0.0021 is 0.9857, whatever binary fractions make of it


@dataclass(frozen=True)
class Result:
    """A judged run.

    Attributes:
        learner, recipe: their names; recipe is None where no recipe trained it.
        report: what `evaluate` found.
        recipe_hash: of the resolved recipe (see `recipe_hash`).
        overrides: options over the recipe in training. judged: those over it in judging.
        split, posterior, calibrated: as `evaluate` was asked.
        steps: meta-steps done. asked: those that training was to have; more than `steps` if it was cut short.
        seed: of training. minutes: of training steps. device: what trained. commit: of the code.
        command: lines that make it. run: the run's id and the checkpoint judged; None where no run was kept.
        title, table, note: how its row is shown, in which table, and what else there is to say.
        digits: decimals of figures that were written down with fewer than is usual.
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
        """Whether training ended before the meta-steps that it was to have."""
        return self.steps is not None and self.asked is not None and self.steps < self.asked

    def source(self) -> Recipe | None:
        """The recipe as it stands, with the run's learner; None where there is none of that name or path."""
        if self.recipe is None or not (self.recipe in recipe_names() or Path(self.recipe).is_file()):
            return None
        return with_overrides(load_recipe(self.recipe), self.learner)

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")


class Published(NamedTuple):
    """A paper's figures for a learner on a recipe's tasks: an entry of [[published.NAME]]."""

    figures: dict[str, Figure]
    when: dict[str, Any]
    split: str = "test"
    source: str = ""


class Status(NamedTuple):
    """What a result is beside a published figure.

    kind: "reached" (as good or better), "within the interval" (either figure lies in the other's 95 % interval),
    "below" (worse than that), or "not comparable".
    reason: why not comparable, or how much of the recipe's training it had.
    cut: training was cut short, so the kind is a state on the way and no verdict.
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
    """A result from its file.

    Raises:
        ValueError: other or damaged text, with the path.
    """
    try:
        table = dict(accept(dict, json.loads(path.read_text(encoding="utf-8")), "a result"))
        known = {f.name: f.type for f in fields(Result)}
        for name in table:
            if name not in known:
                raise ValueError(f"{name} is not part of a result{nearest(name, list(known))}")
        if lacking := [name for name in ("learner", "recipe", "report") if name not in table]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        report = Report.from_json(json.dumps(table.pop("report")))
        for name, value in table.items():
            accept(known[name], value, name)
        return Result(report=report, **table)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a result ({str(error).rstrip('.')})") from error


def read_suite(folder: Path) -> dict[str, Result]:
    """The results of a suite's folder, by the names of their files."""
    return {path.stem: read_result(path) for path in sorted(folder.glob("*.json"), key=natural)}


def natural(path: Path) -> list[tuple[int, str]]:
    """A key by which a-900 sorts before a-1000."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.stem)]


def recipe_hash(recipe: Recipe) -> str:
    """A hash of what a recipe trains and judges.

    Its description, published figures and the options of other learners do not count.
    """
    table = {name: value for name, value in as_dict(recipe).items() if name not in ("description", "published")}
    table["learners"] = table["learners"].get(recipe.learner, {})
    table |= {name: own_table(table[name], recipe.learner) for name in ("tasks", "likelihood", "training")}
    return sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def published_in(recipe: Recipe, learner: str) -> list[Published]:
    """A learner's entries of [[published.NAME]].

    Figures have the names and units of a report: `accuracy = 0.987`, or `{mean = 0.987, interval = 0.004}` with the
    half-width of the 95 % interval. `when` has the options that the figure is of, where they are not the recipe's own.

    Raises:
        ValueError: something else, by its name.
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
    """The published figures that a recipe's learner compares with, or the reason why there are none.

    Args:
        recipe: what was judged, with all options set.
        base: the recipe before any option was set, to whose tasks a figure belongs that has no `when`.
        split: of the tasks.
    """
    entries = published_in(recipe, recipe.learner)
    if not entries:
        return "no published figure"
    options = {option for entry in entries for option in entry.when}
    options |= {f"tasks.{name}" for table in (base, recipe) for name in own_table(table.tasks, recipe.learner)}
    options -= {f"tasks.{name}" for name in FREE}
    fits, reasons = [], []
    for entry in entries:
        wanted = with_overrides(base, recipe.learner, entry.when)
        other = [
            f"{option} is {ours!r}, the published figure is of {theirs!r}" for option in sorted(options)
            if (ours := option_of(recipe, option)) != (theirs := option_of(wanted, option))
        ]  # fmt: skip
        other += [f"judged on split {split!r}, published on {entry.split!r}"] if entry.split != split else []
        reasons.append(other)
        if not other:
            fits.append(entry)
    return max(fits, key=lambda entry: len(entry.when)) if fits else "; ".join(min(reasons, key=len))


def option_of(recipe: Recipe, name: str) -> Any:
    """The value of an option by its dotted name, None where the recipe leaves it to the component."""
    table, _, option = name.partition(".")
    tables = recipe.learners.get(recipe.learner, {}) if table == "learner" else getattr(recipe, table)
    return own_table(tables, recipe.learner).get(option)


def status_of(ours: Figure, published: Figure, *, lower: bool = False) -> str:
    """ "reached", "within the interval" or "below".

    lower: whether less is better. An unknown interval counts as none, and a figure that is not finite is below.
    """
    if not math.isfinite(ours.mean):
        return "below"
    gap = (ours.mean - published.mean) * (-1 if lower else 1)
    if gap >= -CLOSE:
        return "reached"
    return "within the interval" if -gap <= max(ours.interval or 0, published.interval or 0) + CLOSE else "below"


def statuses(result: Result) -> dict[str, tuple[Figure, Status]]:
    """By figure, the published one and the status beside it; {"": ...} with the reason where nothing compares."""
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
        name: (theirs, Status(status_of(report[name], theirs, lower=name in LOWER), less, result.cut))
        for name, theirs in found.figures.items()
        if name in report and not (result.calibrated and name in OF_CALIBRATION)
    }
    missing = f"the published figures are of {', '.join(found.figures)}"
    return compared or {"": (nothing, Status("not comparable", missing, result.cut))}


def figures_of(result: Result) -> dict[str, Figure]:
    """All figures of a report, those without an interval among them."""
    return result.report.figures | {n: Figure(v, None) for n, v in result.report.pooled.items() if v is not None}


def how_much_less(result: Result, base: Recipe) -> str:
    """'after 2.5 % of the recipe's tasks, judged on 200 of 600', where a run had less than its recipe; or ''."""
    parts, own, judged = [], training_of(base), evaluation_of(base)
    if result.steps is not None:
        batch = training_of(with_overrides(base, None, result.overrides)).meta_batch
        share = result.steps * batch / (own.steps * own.meta_batch)
        parts += [] if share >= 1 - CLOSE else [f"after {100 * share:.2g} % of the recipe's tasks"]
    if result.split == "test" and judged.tasks is not None and result.report.tasks < judged.tasks:
        parts.append(f"judged on {result.report.tasks} of {judged.tasks} tasks")
    return ", ".join(parts)


def commit() -> str | None:
    """The commit of this code, with '-changed' where files differ from it; None where it is no checkout of its own."""
    here = Path(__file__)
    package = here.parents[1]

    def git(*words: str) -> str:
        asked = ["git", "-C", str(package), *words]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", str(here))  # an environment inside another repository is none of ours
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
