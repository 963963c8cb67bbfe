"""metaprior study: compare trained learners on one question, see docs/studies.md."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

import jax
import tyro
from rich.table import Table

from metaprior.cli.screen import screen
from metaprior.core.files import write_atomically
from metaprior.core.named import option_names
from metaprior.core.types import Learner
from metaprior.evaluation.figures import Figure
from metaprior.evaluation.plots import check_plots, save
from metaprior.experiments.opened import load
from metaprior.experiments.recipe import recipe_of
from metaprior.experiments.runs import Run, told_apart
from metaprior.learners import LEARNERS
from metaprior.studies import active, ambiguity, novelty, referee
from metaprior.studies.plots import acquisitions, explanations, novelty_bars

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional]
Posterior = Literal["point", "implicit", "laplace"] | None
MOST_SHOWN = 6  # learners in a plot of draws
TRUTH = "the truth"


def study_ambiguity(
    runs: Runs,
    /,
    out: Path = Path("study"),
    tasks: int = 600,
    near: float = 1 / 3,
    posterior: Posterior = None,
    draws: int | None = None,
    seed: int = 1234,
    set: tuple[str, ...] = (),
) -> int:
    """Does the posterior contain both explanations of a task? Needs runs of the recipes ambiguous or ambiguous-2d.

    Args:
        runs: The folders that `train` wrote.
        out: The folder for ambiguity.json and ambiguity.png.
        tasks: The number of new tasks.
        near: A draw is close to an explanation if it is within this share of the explanations' distance. Must be below
            1/2.
        posterior: The posterior around the adapted parameters phi_k. None means each learner's own.
        draws: How many networks to draw from that posterior.
        seed: The seed of tasks and draws.
        set: Options of the tasks or the learners by name, e.g. --set tasks.noise=0.1
    """
    check_plots(out, "--out")
    opened, key = _open(runs, set, posterior, draws), jax.random.key(seed)
    source = next(iter(opened.values())).source
    found = {TRUTH: referee(source, key, tasks=tasks, near=near)}
    for name, it in opened.items():
        found[name] = ambiguity(it.learner, it.params, it.source, key, tasks=tasks, near=near)
    table = _table(f"two explanations, {tasks} tasks", "covered", "explaining", "NLL", "joint NLL", "draws")
    for name, row in found.items():
        table.add_row(name, *map(_shown, row))
    shown = {name: (it.learner, it.params) for name, it in list(opened.items())[:MOST_SHOWN]}
    plot = explanations(source, shown, key)
    return _keep(out, "ambiguity", {n: row._asdict() for n, row in found.items()}, plot, table)


def study_active(
    runs: Runs,
    /,
    out: Path = Path("study"),
    tasks: int = 200,
    start: int = 2,
    pool: int = 50,
    points: int = 8,
    posterior: Posterior = None,
    draws: int | None = None,
    steps: int | None = None,
    seed: int = 1234,
    set: tuple[str, ...] = (),
) -> int:
    """Is choosing the next point by predictive variance better than at random? Needs runs on regression tasks.

    Args:
        runs: The folders that `train` wrote.
        out: The folder for active.json and active.png.
        tasks: The number of new tasks.
        start: The number of labelled points at the start.
        pool: The number of candidates, taken from the task's query. The other points of the query are for testing.
        points: The number of points to choose, one by one.
        posterior: The posterior around the adapted parameters phi_k. None means each learner's own. A point
            has no variance to choose by.
        draws: How many networks to draw from that posterior; 0 gives the linearised predictive in closed form.
        steps: The number of inner steps on a new task.
        seed: The seed of tasks and choices.
        set: Options of the tasks or the learners by name, e.g. --set tasks.noise=0.1
    """
    check_plots(out, "--out")
    opened, key = _open(runs, set, posterior, draws, steps), jax.random.key(seed)
    found = {
        name: active(it.learner, it.params, it.source, key, tasks=tasks, start=start, pool=pool, points=points)
        for name, it in opened.items()
    }
    table = _table(f"MSE by points seen, {tasks} tasks", "points", "at random", "by variance", "difference")
    for name, result in found.items():
        for row in zip(*result._asdict().values(), strict=True):
            seen, informed, random, difference = map(_shown, row)
            table.add_row(name, seen, random, informed, difference)
    return _keep(out, "active", {n: row._asdict() for n, row in found.items()}, acquisitions(found), table)


def study_novelty(
    runs: Runs,
    /,
    out: Path = Path("study"),
    tasks: int = 200,
    posterior: Posterior = None,
    draws: int | None = None,
    transductive: bool = False,
    seed: int = 1234,
    set: tuple[str, ...] = (),
) -> int:
    """Does uncertainty tell known classes from other classes, rotated images and noise? Needs runs on images.

    Args:
        runs: The folders that `train` wrote.
        out: The folder for novelty.json and novelty.png.
        tasks: The number of new tasks.
        posterior: The posterior around the adapted parameters phi_k. None means each learner's own.
        draws: How many networks to draw from that posterior.
        transductive: Normalise queries together (and inputs of no known class together). The default is to normalise
            each one alone.
        seed: The seed of tasks and draws.
        set: Options of the tasks or the learners by name, e.g. --set tasks.test_query=5
    """
    check_plots(out, "--out")
    opened = _open(runs, set, posterior, draws, transductive=None if transductive else False)
    found = {
        name: novelty(it.learner, it.params, it.source, jax.random.key(seed), tasks=tasks)
        for name, it in opened.items()
    }
    kinds = list(next(iter(next(iter(found.values())).auroc.values())))
    table = _table(f"AUROC of uncertainty, {tasks} tasks", "accuracy", "score", *kinds)
    for name, result in found.items():
        for score, row in result.auroc.items():
            table.add_row(name, _shown(result.accuracy), score, *map(_shown, row.values()))
    return _keep(out, "novelty", {n: row._asdict() for n, row in found.items()}, novelty_bars(found), table)


Study = Union[  # noqa: UP007 (a union of subcommands, which tyro reads at run time)
    Annotated[Any, tyro.conf.subcommand(name="ambiguity", constructor=study_ambiguity)],
    Annotated[Any, tyro.conf.subcommand(name="active", constructor=study_active)],
    Annotated[Any, tyro.conf.subcommand(name="novelty", constructor=study_novelty)],
]


def study(status: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[Study]]) -> int:
    """Compare trained learners on one question."""
    return status


class Subject(NamedTuple):
    """A trained learner as the studies need it.

    Attributes:
        learner: The learner.
        params: Its meta-learned parameters.
        source: The test tasks.
    """

    learner: Learner
    params: Any
    source: Any


def _open(
    runs: tuple[Path, ...],
    overrides: tuple[str, ...],
    posterior: str | None,
    draws: int | None,
    steps: int | None = None,
    transductive: bool | None = None,
) -> dict[str, Subject]:
    options: dict[str, Any] = {} if posterior is None else {"posterior": posterior}
    if draws is not None and posterior not in (None, "point"):
        options["draws"] = draws
    opened = {}
    for name, run in told_apart([Run.open(folder) for folder in runs]).items():
        learner = recipe_of(run).learner
        alone = transductive is not None and "transductive" in option_names(LEARNERS[learner])
        settings = (*overrides, f"learner.transductive={str(transductive).lower()}") if alone else overrides
        subject = load(run.folder, steps=steps, settings=settings, **options)
        opened[name] = Subject(subject.learner, subject.params, subject.splits.test)
    return opened


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("learner")
    for column in columns:
        table.add_column(column, justify="left" if column == "score" else "right")
    return table


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, Figure) else str(value)


def _keep(out: Path, name: str, found: dict[str, Any], plot: Any, table: Table) -> int:
    console = screen()
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{name}.json", json.dumps(found, indent=2, default=_plain) + "\n")
    save(plot, out / f"{name}.png")
    console.print(f"written: {out / name}.json and {out / name}.png", soft_wrap=True)
    return 0


def _plain(value: Any) -> Any:
    if isinstance(value, Figure):
        return {"mean": value.mean, "interval": value.interval}
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
