"""metaprior compare: compare the reports of several runs."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from metaprior.cli.screen import screen
from metaprior.core.files import write_atomically
from metaprior.core.options import Whole, accept
from metaprior.evaluation.figures import title_of
from metaprior.evaluation.plots import check_plots, compared_curves, save
from metaprior.evaluation.report import Report
from metaprior.experiments.recipe import own_table
from metaprior.experiments.reports import Kept, command, name_in, read_report, reports_of
from metaprior.experiments.runs import Run, told_apart

SHOWN = ("accuracy", "mse", "nll", "coverage_90", "ece", "mce")


def compare(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, report: str = "own", out: Path = Path("compared")
) -> int:
    """Compare the reports of several runs in a table and a plot of their figures after each inner step.

    Args:
        runs: The folders that `train` wrote, each with a report by `evaluate`.
        report: Which reports to compare: own, own-calibrated, implicit, ..., as in report-NAME.json.
        out: The folder for compared.json and compared.png.
    """
    check_plots(out, "--out")
    named = told_apart([Run.open(folder) for folder in runs])
    kept = {name: report_of(run, report) for name, run in named.items()}
    reports = {name: one.report for name, one in kept.items()}
    if len(kinds := sorted({it.kind for it in reports.values()})) > 1:
        raise ValueError(f"runs must have reports of one kind, got {' and '.join(kinds)}.")
    if len(targets := sorted({it.target or "no table" for it in reports.values()})) > 1:
        raise ValueError(f"runs must have reports on one target, got {' and '.join(targets)}.")
    for name, one in kept.items():
        warn_if_older(one, named[name])
    found = {name: asdict(it) | trained(named[name], judged_at(kept[name])) for name, it in reports.items()}
    console, shown = screen(), [n for n in SHOWN if any(n in it.figures or n in it.pooled for it in reports.values())]
    title = f"report-{report}" + "".join({f"; in units of {it.target}" for it in reports.values() if it.target})
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in ("learner", "steps", "min", "tasks", *map(title_of, shown)):
        table.add_column(column, justify="left" if column == "learner" else "right", no_wrap=True)
    for name, it in reports.items():
        figures = [f"{it.figures[n]:.3f}" if n in it.figures else pooled(it, n) for n in shown]
        row = found[name]
        table.add_row(name, str(row["meta_steps"]), f"{row['minutes']:.1f}", str(it.tasks), *figures)
    console.print(table)
    protocols = {json.dumps(protocol(run, kept[name]), sort_keys=True) for name, run in named.items()}
    if len(protocols) > 1:
        console.print(f"note: the runs were evaluated on {len(protocols)} different kinds of tasks")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "compared.json", json.dumps(found, indent=2) + "\n")
    save(compared_curves(reports), out / "compared.png")
    console.print(f"written: {out}/compared.json and {out}/compared.png", soft_wrap=True)
    return 0


def pooled(report: Report, name: str) -> str:
    """Formats a figure without an interval, or '-' if the report does not have it.

    Args:
        report: The report.
        name: The figure's name.
    """
    return f"{report.pooled[name]:.4f}" if name in report.pooled else "-"


def report_of(run: Run, name: str) -> Kept:
    """Reads a report of a run.

    Args:
        run: The run.
        name: The NAME in report-NAME.json.

    Raises:
        ValueError: The report does not exist or is damaged. The message names the run's other reports.
    """
    if not (run.folder / f"report-{name}.json").is_file() and (others := reports_of(run)):
        raise ValueError(
            f"--report must name a report of each run, got {name}: {run.folder} has no report-{name}.json (its reports"
            f": {', '.join(others)}). Give --report {others[0]}, or run `{command(run, name)}` first."
        )
    run.warn_if_edited()
    return read_report(run, name)


def judged_at(kept: Kept) -> int | None:
    """Returns the meta-step of the checkpoint that a report evaluated, or None if the report does not state it.

    Args:
        kept: The report.
    """
    step = kept.settings.get("checkpoint", {}).get("step")
    return None if step is None else accept(Whole, step, f"{kept.path}: settings.checkpoint.step")


def warn_if_older(kept: Kept, run: Run) -> None:
    """Warns, with both meta-steps, if a run was trained further after its report.

    Args:
        kept: The report.
        run: The run.
    """
    then, now = judged_at(kept), run.newest
    if then is not None and now is not None and then != now:
        again = command(run, name_in(kept.path))
        warnings.warn(
            f"{kept.path} evaluated meta-step {then}, but the run is now at meta-step {now}. Run `{again}` again.",
            stacklevel=2,
        )


def trained(run: Run, step: int | None = None) -> dict[str, Any]:
    """Returns the meta-step of the evaluated parameters and the training time up to it, in minutes.

    Args:
        run: The run.
        step: The meta-step, or None for the one with the lowest validation nll.
    """
    rows = run.metrics()
    if step is None:
        validated = [row for row in rows if "validation/nll" in row] or rows[-1:]
        step = int(min(validated, key=lambda row: row.get("validation/nll", 0.0))["step"]) if validated else 0
    return {"meta_steps": step, "minutes": sum(row.get("seconds", 0.0) for row in rows if row["step"] <= step) / 60}


def protocol(run: Run, kept: Kept) -> dict[str, Any]:
    """Returns the options that must agree for figures to be comparable: those of the test tasks.

    Args:
        run: The run.
        kept: Its report.
    """
    tasks, settings = own_table(run.recipe["tasks"], ""), kept.settings
    seed = settings.get("seed", run.recipe.get("evaluation", {}).get("seed"))
    judged = {"seed": seed, "split": settings.get("split"), "set": settings.get("set")}
    return {name: value for name, value in tasks.items() if name not in ("query", "train_way")} | judged
