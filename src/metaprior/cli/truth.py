"""metaprior truth: compare learners' posteriors with exact answers."""

import json
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from metaprior.cli.screen import screen
from metaprior.core.files import write_atomically
from metaprior.core.runtime import configure
from metaprior.evaluation.plots import check_plots, pit_histogram, save
from metaprior.referees.truth import Verdict, referee

COLUMNS = {
    "prior mean": ("prior_mean", "root mean square difference from the exact empirical-Bayes optimum"),
    "posterior mean": ("posterior_mean", "root mean square difference, in exact posterior standard deviations"),
    "sd ratio": ("sd_ratio", "posterior standard deviation divided by the exact one, geometric mean"),
    "log marginal": ("log_marginal", "log p(support) minus the exact one, in nats per task"),
    "NLL": ("nll", "of the queries, minus that of the exact predictive, in nats per query"),
    "KS": ("ks", "largest difference of the distribution of the queries' PIT from the uniform one"),
}


def truth(
    learners: tuple[str, ...] = (),
    steps: int = 2000,
    tasks: int = 200,
    shot: int = 5,
    seen: int = 400,
    seed: int = 0,
    family: Literal["gaussian", "bernoulli", "poisson"] = "gaussian",
    out: Path = Path("truth"),
) -> int:
    """Compare learners' posteriors with exact ones (linear-Gaussian hierarchy) or with NUTS.

    "gaussian" trains each learner on tasks of the conjugate linear-Gaussian hierarchy. "bernoulli" and "poisson" (which
    need the extra `truth`) compare posteriors of new tasks with those of NUTS twice: with the true prior, and with a
    prior that each learner has learned from `seen` tasks, where NUTS sees the whole hierarchy of the same tasks.

    Args:
        learners: The learners; if none is given, all with options for this comparison.
        steps: The number of meta-steps of each learner.
        tasks: The number of new tasks.
        shot: The number of observations of each task.
        seen: The number of tasks to learn the prior from ("bernoulli" and "poisson"; "gaussian" draws new tasks at each
            meta-step).
        seed: The seed of everything random.
        family: The family of the observations.
        out: The folder for the results: truth.json and each learner's PIT histogram, or FAMILY.json.
    """
    configure()
    check_plots(out, "--out")
    console = screen()
    if family != "gaussian":
        return _by_nuts(console, family, learners, steps, tasks, shot, seen, seed, out)

    def tell(name: str, verdict: Verdict) -> None:
        console.print(f"{name}: NLL {verdict.nll:+.4f} relative to the exact predictive")

    verdicts = referee(learners or None, steps=steps, tasks=tasks, seed=seed, shot=shot, report=tell)
    table = Table(title=f"comparison with exact answers, {tasks} new tasks", title_justify="left", header_style="bold")
    table.add_column("learner")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    table.add_row("the truth", *("1.000" if field == "sd_ratio" else "0.000" for field, _ in COLUMNS.values()))
    for name, verdict in verdicts.items():
        table.add_row(name, *(f"{getattr(verdict, field):.3f}" for field, _ in COLUMNS.values()))
    console.print(table)
    for column, (_, meaning) in COLUMNS.items():
        console.print(f"{column}: {meaning}", soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    found = {n: v._asdict() for n, v in verdicts.items()}
    write_atomically(out / "truth.json", json.dumps(found, indent=2) + "\n")
    for name, verdict in verdicts.items():
        save(pit_histogram(verdict.pit), out / f"{name}-pit.png")
    console.print(f"written: {out}", soft_wrap=True)
    return 0


def _by_nuts(
    console: Console,
    family: str,
    learners: tuple[str, ...],
    steps: int,
    tasks: int,
    shot: int,
    seen: int,
    seed: int,
    out: Path,
) -> int:
    from metaprior.referees.nuts import against_nuts, learned_against_nuts  # which needs the extra `truth`

    given = against_nuts(family, learners or None, tasks=tasks, shot=shot, seed=seed)
    sizes = {"tasks": tasks, "shot": shot, "seen": seen}
    learned = learned_against_nuts(family, learners or None, steps=steps, seed=seed, **sizes)
    columns = ("bias", "sd ratio", "coverage of 90 %")
    rows = {name: tuple(row) for name, row in given.items()}
    console.print(_figures(f"{family}, with the true prior: comparison with NUTS on {tasks} new tasks", columns, rows))
    console.print(
        "bias: root mean square difference of the means, in standard deviations (sd) of NUTS; sd ratio: sd divided by "
        "that of NUTS"
    )
    rows = {name: (*prior, *posterior) for name, (prior, posterior) in learned.items()}
    both = (*(f"prior's {column}" for column in columns), *columns)
    title = f"{family}, with a prior learned from {seen} tasks: comparison with NUTS on the whole hierarchy"
    console.print(_figures(title, both, rows))
    console.print("the prior's bias is in sds of the prior; its coverage is the share inside NUTS' 90 % intervals")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{family}.json"
    figures = {"given": {name: row._asdict() for name, row in given.items()}} | {
        "learned": {n: {"prior": p._asdict(), "posterior": q._asdict()} for n, (p, q) in learned.items()}
    }
    write_atomically(path, json.dumps(figures, indent=2) + "\n")
    console.print(f"written: {path}", soft_wrap=True)
    return 0


def _figures(title: str, columns: tuple[str, ...], rows: dict[str, tuple[float, ...]]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("posterior", *columns):
        table.add_column(column, justify="left" if column == "posterior" else "right")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    return table
