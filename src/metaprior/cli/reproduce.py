"""metaprior reproduce: train and evaluate a suite, and save the results; metaprior results: pages of such results."""

import json
import re
import shlex
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import tyro
from rich.table import Table

from metaprior.cli.evaluate import evaluate
from metaprior.cli.screen import screen
from metaprior.cli.train import one_name, trained_run
from metaprior.core.files import check_output, write_atomically
from metaprior.core.named import lookup
from metaprior.core.runtime import configure
from metaprior.evaluation.plots import check_plots
from metaprior.evaluation.timing import milliseconds_per_task
from metaprior.experiments.course import environment
from metaprior.experiments.learner_table import write_learner_tables
from metaprior.experiments.opened import load
from metaprior.experiments.pages import headlines as headline_table
from metaprior.experiments.pages import number, with_headlines, write_pages
from metaprior.experiments.recipe import Recipe, as_dict, build, training_of, with_overrides
from metaprior.experiments.reports import name_of, read_report
from metaprior.experiments.results import Result, commit, figures_of, read_result, recipe_hash, statuses
from metaprior.experiments.runs import Run
from metaprior.experiments.suite import Planned, load_suite
from metaprior.training.loop import NonFiniteLoss

UNITS = {"s": 1, "m": 60, "h": 3600}


class Job(NamedTuple):
    """A run of a suite that is to be trained and evaluated.

    Attributes:
        name: Its name in the suite.
        planned: How it is trained and evaluated.
        recipe: The resolved recipe.
        folder: The run's folder.
        path: The file of its result.
        set: The options that replace those of its recipe, by dotted name.
    """

    name: str
    planned: Planned
    recipe: Recipe
    folder: Path
    path: Path
    set: dict[str, Any]


def reproduce(
    suite: Annotated[str, tyro.conf.Positional],
    /,
    budget: str | None = None,
    only: tuple[str, ...] = (),
    results: Path = Path("results"),
    out: Path = Path("runs"),
) -> int:
    """Train and evaluate the runs of a suite (a built-in name or a TOML file), and write their results.

    The result of each run is written to RESULTS/SUITE/RUN.json. Runs that are done are not repeated, and runs that were
    stopped or cut short are continued. The result of a run that was cut short by its budget says so. `metaprior
    results` makes a page of the files.

    Args:
        suite: The suite, see `metaprior list`.
        budget: The time for training, such as 90s, 10m or 2h. Each unfinished run gets an equal share of the remaining
            time, and at least one chunk of meta-steps. Evaluation takes additional time. None trains each run to its
            end.
        only: The names of the runs; all if none is given.
        results: The folder for the results.
        out: The folder for the runs. Runs with the same settings share a folder in it.
    """
    seconds = None if budget is None else duration(budget)
    chosen = load_suite(suite)
    names = [lookup("--only", name, chosen.runs) and name for name in only] or list(chosen.runs)
    check_output(results, "--results")
    check_plots(out, "--out")
    console, codes = screen(), []
    jobs = [_job(name, chosen.runs, results / chosen.name, out) for name in names]
    waiting = []
    for job in jobs:
        if _done(job):
            console.print(f"{job.name}: already done, {job.path}", soft_wrap=True)
        else:
            waiting.append(job)
    for i, job in enumerate(waiting):
        share = None if seconds is None else seconds / (len(waiting) - i)
        began = time.monotonic()
        try:
            code, spent = _make(job, share)
        except NonFiniteLoss as error:
            console.print(f"{job.name}: {error}", soft_wrap=True)
            code, spent = 1, time.monotonic() - began
        codes.append(code)
        if code > 128:
            console.print("stopped; run the same command to continue", soft_wrap=True)
            return code
        seconds = None if seconds is None else max(seconds - spent, 0.0)
        jax.clear_caches()
    console.print(_summary(chosen.title, jobs))
    return max(codes, default=0)


def results(
    results: Path = Path("results"),
    benchmarks: Path = Path("benchmarks/results"),
    out: Path = Path("docs/results"),
    headlines: Path | None = None,
    learners: Path | None = None,
) -> int:
    """Write a Markdown page of each suite's results, with a status relative to the published figures.

    Args:
        results: The folder that `metaprior reproduce` wrote, with a folder for each suite.
        benchmarks: A folder of benchmark results, for the page speed.md. It need not exist.
        out: The folder for the pages.
        headlines: A Markdown file. The lines between its two marks are replaced by the table of the best rows.
        learners: The root of a checkout. The tables of learners in its README.md and docs/learners.md are written anew.
    """
    check_output(out, "--out")
    for path in write_pages(results, benchmarks, out):
        screen().print(f"written: {path}", soft_wrap=True)
    if headlines is not None:
        text = headlines.read_text(encoding="utf-8")
        write_atomically(headlines, with_headlines(text, headline_table(results, f"{out.as_posix()}/")))
    for path in write_learner_tables(learners) if learners is not None else []:
        screen().print(f"written: {path}", soft_wrap=True)
    return 0


def duration(text: str) -> float:
    """Converts a text such as '90s', '10m' or '1.5h' to seconds.

    Args:
        text: The text.

    Raises:
        ValueError: The text is not a time above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"--budget must be a time such as 90s, 10m or 2h, got {text!r}.")
    return float(found[1]) * UNITS[found[2]]


def _job(name: str, runs: dict[str, Planned], results: Path, out: Path) -> Job:
    planned = runs[name]
    options = dict(planned.set)
    if planned.start is not None:
        options["start.run"] = str(_job(planned.start, runs, results, out).folder)
    recipe = with_overrides(planned.resolved(), None, options)
    folder = out / one_name(f"{recipe.name}-{recipe.learner}-{recipe_hash(recipe)[:8]}")
    return Job(name, planned, recipe, folder, results / f"{one_name(name)}.json", options)


def _done(job: Job) -> bool:
    """Whether the result exists, is complete and has the job's settings."""
    if not job.path.is_file():
        return False
    kept = read_result(job.path)
    if kept.run is None:
        raise ValueError(
            f"{job.path} would be overwritten, but its run was not kept. Rename the file, or give another --results."
        )
    same = (kept.recipe_hash, kept.judged, kept.split, kept.posterior, kept.calibrated) == (
        recipe_hash(job.recipe), job.planned.judge, job.planned.split, job.planned.posterior, job.planned.calibrated,
    )  # fmt: skip
    return same and not kept.cut


def _make(job: Job, seconds: float | None) -> tuple[int, float]:
    """Trains a run within the time, evaluates it and writes the result.

    Returns the exit status (0, or that of a signal) and the seconds of training.
    """
    console, planned, began = screen(), job.planned, time.monotonic()
    training = training_of(job.recipe)
    configure(float64=training.float64)
    clock = time.monotonic
    if planned.minutes is not None:
        if seconds is not None:
            raise ValueError(
                f"--budget must be left out for {job.name}, whose suite gives it {planned.minutes:g} minutes of a core."
            )
        clock, seconds = time.process_time, 60 * planned.minutes
    console.print(f"{job.name}: up to {seconds:.0f} s of training" if seconds is not None else job.name)
    resume = (job.folder / "recipe.json").is_file()
    with Run.resume(job.folder) if resume else Run.create(job.folder, as_dict(job.recipe), job.set) as run:
        if planned.minutes is not None:
            seconds = max(60 * planned.minutes - sum(row["seconds"] for row in run.metrics()), 0.0)
        experiment = build(job.recipe, preparation=run.preparation)
        try:
            fitted = trained_run(run, job.recipe, experiment, resume, seconds, clock)
        finally:
            run.discard()
    spent, done = time.monotonic() - began, int(fitted.state.step)
    if fitted.interrupted:
        return 128 + fitted.interrupted, spent
    if done < training.steps and planned.minutes is None:
        at = f"{done:,} of {training.steps:,} meta-steps"
        console.print(f"{job.name}: cut short by its budget at {at}", soft_wrap=True)
    options = as_options(planned.judge)
    evaluate(
        job.folder, planned.posterior, calibrated=planned.calibrated, split=planned.split, set=options
    )  # fmt: skip
    name = name_of(planned.posterior, calibrated=planned.calibrated, split=planned.split, changed=options)
    kept = read_report(run, name)
    checkpoint = kept.settings["checkpoint"]
    result = Result(
        learner=job.recipe.learner,
        recipe=planned.recipe,
        report=kept.report,
        recipe_hash=recipe_hash(job.recipe),
        overrides=job.set,
        judged=planned.judge,
        split=planned.split,
        posterior=planned.posterior,
        calibrated=planned.calibrated,
        steps=done,
        asked=training.steps if planned.minutes is None else done,
        seed=training.seed,
        minutes=round(sum(row["seconds"] for row in run.metrics()) / 60, 3),
        budget=planned.minutes,
        milliseconds=None if planned.minutes is None else _milliseconds(job, options),
        device=_device(),
        commit=commit(),
        title=planned.title,
        command=_commands(job, options),
        run={"id": run.started.get("id"), "checkpoint": checkpoint, "jax": jax.__version__},
    )
    result.save(job.path)
    console.print(f"written: {job.path}", soft_wrap=True)
    return 0, spent


def _milliseconds(job: Job, options: tuple[str, ...]) -> float:
    """The processor time of one test task."""
    opened, planned = load(job.folder, posterior=job.planned.posterior, settings=options), job.planned
    source = opened.splits.validation if planned.split == "validation" else opened.splits.test
    key = jax.random.key(opened.experiment.evaluation.seed)
    return round(milliseconds_per_task(opened.learner, opened.params, source, key), 3)


def as_options(table: dict[str, Any]) -> tuple[str, ...]:
    """Converts options to the arguments of --set.

    Args:
        table: The options by dotted name.
    """
    return tuple(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in table.items())


def _commands(job: Job, judged: tuple[str, ...]) -> list[str]:
    """The command lines that reproduce the run and its report."""
    options, folder = as_options(job.set), f"runs/{job.folder.name}"
    train = ["metaprior", "train", job.planned.recipe, "--learner", job.recipe.learner, "--out", folder]
    judge = ["metaprior", "evaluate", folder]
    judge += ["--posterior", job.planned.posterior] if job.planned.posterior else []
    judge += ["--calibrated"] if job.planned.calibrated else []
    judge += ["--split", job.planned.split] if job.planned.split != "test" else []
    lines = train + (["--set", *options] if options else []), judge + (["--set", *judged] if judged else [])
    return [shlex.join(line) for line in lines]


def _device() -> str:
    """The device of this process: '2 threads of AMD EPYC', or the accelerator's name."""
    now, model = environment(), "a processor"
    if jax.devices()[0].platform != "cpu":
        return now["devices"]
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text(errors="replace"))):
        model = found[1].strip()
    return f"{now['threads']} threads of {model}"


def _summary(title: str, jobs: list[Job]) -> Table:
    """A table of the result of each run of a suite."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("run", "meta-steps", "figure", "published", "status"):
        table.add_column(column, justify="left" if column in ("run", "status") else "right")
    for job in jobs:
        if not job.path.is_file():
            table.add_row(job.name, "", "", "", "no result")
            continue
        result = read_result(job.path)
        for name, (theirs, status) in statuses(result).items():
            name = name or next(iter(result.report.figures))
            own = figures_of(result).get(name)
            published = "" if status.kind == "not comparable" else number(theirs.mean, 4)
            table.add_row(job.name, f"{result.steps:,} of {result.asked:,}", f"{name} {own}", published, str(status))
    return table
