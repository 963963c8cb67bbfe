"""The reports that `evaluate` saves in a run's folder: their names, their settings, and reading them again."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from metaprior.core.options import Positive, Whole, accept
from metaprior.evaluation.report import Report
from metaprior.experiments.course import differences
from metaprior.experiments.runs import Run
from metaprior.training.checkpoint import digest_of

NEEDED = {"posterior", "steps", "draws", "linear", "set", "split", "fitted", "checkpoint"}
KNOBS = ("temperature", "precision", "noise", "softmax_temperature")


class Kept(NamedTuple):
    """A saved report.

    Attributes:
        path: Its file.
        report: The report.
        settings: What was evaluated, how, and the scalars that were fitted by calibration.
    """

    path: Path
    report: Report
    settings: dict[str, Any]


def name_of(
    posterior: str | None, *, calibrated: bool = False, split: str = "test", changed: Sequence[str] = ()
) -> str:
    """Returns the NAME of a report's file, report-NAME.json.

    Args:
        posterior: The posterior, or None for the learner's own.
        calibrated: Whether the learner was calibrated.
        split: The split that was evaluated.
        changed: The options of --set, or another number of inner steps.
    """
    marks = ["calibrated"] * calibrated + [split] * (split != "test")
    return "-".join([posterior or "own", *marks, *(re.sub(r"[^\w.=]+", "_", option) for option in changed)])


def judged(run: Run, params: PyTree) -> dict[str, Any]:
    """Returns what identifies the evaluated parameters: the checkpoint and a hash.

    Args:
        run: The run.
        params: The parameters.
    """
    used = {} if run.used is None else {"which": run.used.which, "step": run.used.step}
    return used | {"params": digest_of(params)}


def read_report(run: Run, name: str) -> Kept:
    """Reads a report that `evaluate` saved.

    Args:
        run: The run.
        name: The NAME in report-NAME.json.

    Raises:
        ValueError: The report does not exist or is damaged. The message has the command that writes it.
    """
    path = run.folder / f"report-{name}.json"
    if not path.is_file():
        others = ", ".join(reports_of(run)) or "none"
        raise ValueError(f"{run.folder} has no {path.name} (its reports: {others}). Run `{command(run, name)}` first.")
    again = f"Run `{command(run, name)}` again."
    try:
        text = path.read_text(encoding="utf-8")
        report, table = Report.from_json(text), json.loads(text)
        settings = accept(dict, table.get("settings", {}), "settings")
        accept(dict, settings.get("checkpoint", {}), "settings.checkpoint")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({str(error).rstrip('.')}). {again}") from error
    if run.preparation is not None and "target" not in table:
        raise ValueError(f"{path} was written by an older version, in other units. {again}")
    return Kept(path, report, settings)


def reports_of(run: Run) -> list[str]:
    """Returns the names of a run's reports, sorted.

    Args:
        run: The run.
    """
    return sorted(map(name_in, run.folder.glob("report-*.json")))


def name_in(path: Path) -> str:
    """Returns the NAME in a report's path FOLDER/report-NAME.json.

    Args:
        path: The path.
    """
    return path.name.removeprefix("report-").removesuffix(".json")


def command(run: Run, name: str) -> str:
    """Returns the command that writes a report, as far as the report's name determines it.

    Args:
        run: The run.
        name: The NAME in report-NAME.json.
    """
    posterior, *marks = name.split("-")
    words = ["metaprior evaluate", str(run.folder)]
    words += ["--posterior", posterior] if posterior in ("point", "implicit", "laplace") else []
    words += ["--calibrated"] if "calibrated" in marks else []
    words += [f"--split {mark}" for mark in marks if mark in ("validation", "one_shot")]
    words += [f"--steps {mark.removeprefix('steps=')}" for mark in marks if mark.startswith("steps=")]
    options = [mark for mark in marks if "." in mark and "=" in mark]
    return " ".join(words + (["--set", *options] if options else []))


def calibrated_report(run: Run, posterior: str | None, steps: int | None) -> Kept:
    """Reads the report of `evaluate --calibrated`.

    Args:
        run: The run.
        posterior: The posterior, or None for the learner's own.
        steps: The number of inner steps, or None for the recipe's.

    Raises:
        ValueError: The report does not exist, is damaged or has other settings. The message has the command that writes
            it.
    """
    name = name_of(posterior, calibrated=True, changed=() if steps is None else (f"steps={steps}",))
    try:
        kept = read_report(run, name)
    except ValueError as error:
        raise ValueError(f"--calibrated: {error}") from error
    again, settings = f"Run `{command(run, name)}` again.", kept.settings
    try:
        if lacking := NEEDED - settings.keys():
            raise ValueError(f"its settings have no {', '.join(sorted(lacking))}, perhaps from an older version")
        fitted = accept(dict, settings["fitted"], "settings.fitted")
        for knob, value in fitted.items():
            if knob not in KNOBS:
                raise ValueError(f"settings.fitted.{knob} is not one of {', '.join(KNOBS)}")
            accept(Positive, value, f"settings.fitted.{knob}")
        if not fitted:
            raise ValueError("settings.fitted is empty")
        accept(Whole | None, settings["draws"], "settings.draws")
        accept(bool | None, settings["linear"], "settings.linear")
    except ValueError as error:
        raise ValueError(f"--calibrated: {kept.path} cannot be used ({str(error).rstrip('.')}). {again}") from error
    asked = {"posterior": posterior, "split": "test", "set": []} | ({} if steps is None else {"steps": steps})
    if other := differences({key: settings[key] for key in asked}, asked):
        raise ValueError(
            f"--calibrated: {kept.path} has other settings than its name says ({'; '.join(other)}). {again}"
        )
    return kept


def check_same(kept: Kept, run: Run, params: PyTree, steps: int | None, knobs: set[str]) -> None:
    """Checks that a calibrated report belongs to the current parameters, inner steps and calibration scalars.

    Args:
        kept: The report.
        run: The run.
        params: The current parameters.
        steps: The current number of inner steps, or None for the learner's.
        knobs: The names of the scalars that calibration fits.

    Raises:
        ValueError: They differ. The message has the command that writes the report again.
    """
    was, now, then = kept.settings["checkpoint"], judged(run, params), kept.settings["steps"]
    what = None
    if (fitted := kept.settings["fitted"]).keys() != knobs:
        what = f"contains fitted {', '.join(fitted)}, but this run needs {', '.join(sorted(knobs))}"
    elif then != steps:
        was_for, now_for = ("the learner's default number of" if n is None else n for n in (then, steps))
        what = f"was fitted with {was_for} inner steps, but the run's recipe now has {now_for} inner steps"
    elif was.get("params") != now["params"]:
        at = (one.get("step", "unknown") for one in (was, now))
        what = "was fitted at meta-step {}, but the run's parameters have changed since (meta-step {})".format(*at)
    if what is not None:
        raise ValueError(f"--calibrated: {kept.path} {what}. Run `{command(run, name_in(kept.path))}` again.")
