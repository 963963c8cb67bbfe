"""metaprior compare: the reports of several runs beside each other."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from metaprior.cli.screen import screen
from metaprior.evaluation import Report, title_of
from metaprior.files import check_output, write_atomically
from metaprior.plots import compared_curves, save
from metaprior.recipe import own_table
from metaprior.runs import Run, told_apart

SHOWN = ("accuracy", "mse", "nll", "coverage_90", "ece", "mce")


def compare(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, report: str = "own", out: Path = Path("compared")
) -> int:
    """Hold the reports of several runs beside each other: a table, and a picture of their courses by inner steps.

    Args:
        runs: the folders that `train` wrote, each judged by `evaluate`.
        report: which of a run's reports: own, own-calibrated, implicit, ..., as in report-NAME.json.
        out: folder of compared.json and compared.png.
    """
    check_output(out, "--out")
    named = told_apart([Run.open(folder) for folder in runs])
    reports = {name: report_of(run, report) for name, run in named.items()}
    if len(kinds := sorted({it.kind for it in reports.values()})) > 1:
        raise ValueError(f"runs: came reports of {' and of '.join(kinds)}, need to be of one kind")
    if len(targets := sorted({it.target or "no table" for it in reports.values()})) > 1:
        raise ValueError(f"runs: came reports on {' and on '.join(targets)}, need to be on one target")
    found = {name: asdict(it) | trained(named[name]) for name, it in reports.items()}
    console, shown = screen(), [n for n in SHOWN if any(n in it.figures or n in it.pooled for it in reports.values())]
    title = f"report-{report}" + "".join({f"; in units of {it.target}" for it in reports.values() if it.target})
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in ("learner", "steps", "min", "tasks", *map(title_of, shown)):
        table.add_column(column, justify="left" if column == "learner" else "right", no_wrap=True)
    for name, it in reports.items():
        figures = [f"{it.figures[n]:.3f}" if n in it.figures else f"{it.pooled[n]:.4f}" for n in shown]
        row = found[name]
        table.add_row(name, str(row["meta_steps"]), f"{row['minutes']:.1f}", str(it.tasks), *figures)
    console.print(table)
    if len(protocols := {json.dumps(protocol(run), sort_keys=True) for run in named.values()}) > 1:
        console.print(f"note: the runs were judged on {len(protocols)} kinds of tasks")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "compared.json", json.dumps(found, indent=2) + "\n")
    save(compared_curves(reports), out / "compared.png")
    console.print(f"written: {out}/compared.json and {out}/compared.png", soft_wrap=True)
    return 0


def report_of(run: Run, name: str) -> Report:
    """A report that `evaluate` wrote; ValueError with the command that writes it where there is none."""
    path = run.folder / f"report-{name}.json"
    if not path.is_file():
        has = ", ".join(sorted(p.stem.removeprefix("report-") for p in run.folder.glob("report-*.json"))) or "none"
        raise ValueError(f"report: {run.folder} holds no {path.name} (it has {has}); run `metaprior evaluate` first")
    text = path.read_text()
    if run.preparation is not None and "target" not in json.loads(text):
        raise ValueError(f"report: {path} is of an older version, in other units; run `metaprior evaluate` again")
    return Report.from_json(text)


def trained(run: Run) -> dict[str, Any]:
    """The meta-step of the parameters that are judged, those that validated best, and the minutes up to it."""
    rows = run.metrics()
    validated = [row for row in rows if "validation/nll" in row] or rows[-1:]
    step = int(min(validated, key=lambda row: row.get("validation/nll", 0.0))["step"]) if validated else 0
    return {"meta_steps": step, "minutes": sum(row["seconds"] for row in rows if row["step"] <= step) / 60}


def protocol(run: Run) -> dict[str, Any]:
    """What makes figures comparable: the tasks that are judged, whatever a learner drew to train on."""
    tasks = own_table(run.recipe["tasks"], "")
    return {name: value for name, value in tasks.items() if name not in ("query", "train_way")} | {
        "seed": run.recipe.get("evaluation", {}).get("seed")
    }
