"""The reports that `evaluate` keeps in a run's folder: their names, what was judged, and how they are read again."""

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
    """A report, and its settings: what was judged, how, and the scalars that were fitted first."""

    path: Path
    report: Report
    settings: dict[str, Any]


def name_of(
    posterior: str | None, *, calibrated: bool = False, split: str = "test", changed: Sequence[str] = ()
) -> str:
    """A report's name, report-NAME.json; changed: options of --set, or other steps."""
    marks = ["calibrated"] * calibrated + [split] * (split != "test")
    return "-".join([posterior or "own", *marks, *(re.sub(r"[^\w.=]+", "_", option) for option in changed)])


def judged(run: Run, params: PyTree) -> dict[str, Any]:
    """What a report is of: the checkpoint, and a hash of its parameters."""
    used = {} if run.used is None else {"which": run.used.which, "step": run.used.step}
    return used | {"params": digest_of(params)}


def read_report(run: Run, name: str) -> Kept:
    """A report that `evaluate` wrote.

    Raises:
        ValueError: there is none, with those that there are and the command that writes it; or it is damaged.
    """
    path = run.folder / f"report-{name}.json"
    if not path.is_file():
        others = ", ".join(reports_of(run)) or "none"
        raise ValueError(f"{run.folder} holds no {path.name} (it has {others}); run `{command(run, name)}` first")
    again = f"run `{command(run, name)}` again"
    try:
        text = path.read_text(encoding="utf-8")
        report, table = Report.from_json(text), json.loads(text)
        settings = accept(dict, table.get("settings", {}), "settings")
        accept(dict, settings.get("checkpoint", {}), "settings.checkpoint")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: is damaged ({str(error).rstrip('.')}); {again}") from error
    if run.preparation is not None and "target" not in table:
        raise ValueError(f"{path}: is of an older version, in other units; {again}")
    return Kept(path, report, settings)


def reports_of(run: Run) -> list[str]:
    """The names of a run's reports."""
    return sorted(map(name_in, run.folder.glob("report-*.json")))


def name_in(path: Path) -> str:
    """The NAME of a report's path, FOLDER/report-NAME.json."""
    return path.name.removeprefix("report-").removesuffix(".json")


def command(run: Run, name: str) -> str:
    """The command that writes a report, as far as its name tells."""
    posterior, *marks = name.split("-")
    words = ["metaprior evaluate", str(run.folder)]
    words += ["--posterior", posterior] if posterior in ("point", "implicit", "laplace") else []
    words += ["--calibrated"] if "calibrated" in marks else []
    words += [f"--split {mark}" for mark in marks if mark in ("validation", "one_shot")]
    words += [f"--steps {mark.removeprefix('steps=')}" for mark in marks if mark.startswith("steps=")]
    options = [mark for mark in marks if "." in mark and "=" in mark]
    return " ".join(words + (["--set", *options] if options else []))


def calibrated_report(run: Run, posterior: str | None, steps: int | None) -> Kept:
    """The report of `evaluate --calibrated` for a posterior and a number of inner steps (None: the recipe's own).

    Raises:
        ValueError: there is none, or it is damaged, or of other settings; with the command that writes it.
    """
    name = name_of(posterior, calibrated=True, changed=() if steps is None else (f"steps={steps}",))
    try:
        kept = read_report(run, name)
    except ValueError as error:
        raise ValueError(f"--calibrated: {error}") from error
    again, settings = f"run `{command(run, name)}` again", kept.settings
    try:
        if lacking := NEEDED - settings.keys():
            raise ValueError(f"its settings lack {', '.join(sorted(lacking))}, as those of an older version do")
        fitted = accept(dict, settings["fitted"], "settings.fitted")
        for knob, value in fitted.items():
            if knob not in KNOBS:
                raise ValueError(f"settings.fitted.{knob} is none of {', '.join(KNOBS)}")
            accept(Positive, value, f"settings.fitted.{knob}")
        if not fitted:
            raise ValueError("settings.fitted is empty")
        accept(Whole | None, settings["draws"], "settings.draws")
        accept(bool | None, settings["linear"], "settings.linear")
    except ValueError as error:
        raise ValueError(f"--calibrated: {kept.path}: cannot be used ({str(error).rstrip('.')}); {again}") from error
    asked = {"posterior": posterior, "split": "test", "set": []} | ({} if steps is None else {"steps": steps})
    if other := differences({key: settings[key] for key in asked}, asked):
        raise ValueError(
            f"--calibrated: {kept.path}: is of other settings than its name says ({'; '.join(other)}); {again}"
        )
    return kept


def check_same(kept: Kept, run: Run, params: PyTree, steps: int | None, knobs: set[str]) -> None:
    """A ValueError where scalars were fitted for other parameters, inner steps or knobs than now predict."""
    was, now, then = kept.settings["checkpoint"], judged(run, params), kept.settings["steps"]
    what = None
    if (fitted := kept.settings["fitted"]).keys() != knobs:
        what = f"has fitted {', '.join(fitted)}, but this run needs {', '.join(sorted(knobs))}"
    elif then != steps:
        was_for, now_for = ("the learner's own number" if n is None else n for n in (then, steps))
        what = f"was fitted for inner steps: {was_for}; the run's recipe now asks for {now_for}"
    elif was.get("params") != now["params"]:
        at = (one.get("step", "unknown") for one in (was, now))
        what = "was fitted at meta-step {}, but the run's parameters are now others, of meta-step {}".format(*at)
    if what is not None:
        raise ValueError(f"--calibrated: {kept.path}: {what}; run `{command(run, name_in(kept.path))}` again")
