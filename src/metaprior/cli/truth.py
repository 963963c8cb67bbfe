"""metaprior truth: is a learner's posterior true? Learners against exact answers."""

import json
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from metaprior.plots import pit_histogram
from metaprior.runtime import configure
from metaprior.truth import SETTINGS, Verdict, referee

COLUMNS = {
    "prior mean": ("prior_mean", "rms gap to the exact empirical-Bayes optimum"),
    "posterior mean": ("posterior_mean", "rms gap in exact posterior sds"),
    "sd ratio": ("sd_ratio", "posterior sd over the exact one, geometric mean"),
    "log marginal": ("log_marginal", "log p(support) less the exact one, nats a task"),
    "NLL": ("nll", "of the queries, over the exact predictive's, nats a point"),
    "KS": ("ks", "greatest gap of the queries' PIT from uniform"),
}


def truth(
    learners: tuple[str, ...] = (),
    steps: int = 2000,
    tasks: int = 200,
    shot: int = 5,
    seed: int = 0,
    family: Literal["gaussian", "bernoulli", "poisson"] = "gaussian",
    out: Path = Path("truth"),
) -> int:
    """Hold learners' posteriors against exact ones: of the conjugate hierarchy, or of NUTS.

    "gaussian" trains each learner on tasks of the conjugate linear-Gaussian hierarchy. "bernoulli" and "poisson" give
    each the true prior and compare its posteriors of new tasks with those of NUTS (needs the extra `truth`).

    Args:
        learners: which ones (default: all there are settings for).
        steps: meta-steps each.
        tasks: new tasks to judge by.
        shot: observations a task shows.
        seed: of everything random.
        family: of the observations.
        out: folder for the figures (truth.json) and each learner's PIT histogram.
    """
    configure()
    console = Console()
    if family != "gaussian":
        return _by_nuts(console, family, learners, tasks, shot, seed, out)

    def tell(name: str, verdict: Verdict) -> None:
        console.print(f"{name}: NLL {verdict.nll:+.4f} over the exact predictive", highlight=False)

    verdicts = referee(learners or tuple(SETTINGS), steps=steps, tasks=tasks, seed=seed, shot=shot, report=tell)
    table = Table(title=f"against exact answers, {tasks} new tasks", title_justify="left", header_style="bold")
    table.add_column("learner")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    table.add_row("the truth", *("1.000" if field == "sd_ratio" else "0.000" for field, _ in COLUMNS.values()))
    for name, verdict in verdicts.items():
        table.add_row(name, *(f"{getattr(verdict, field):.3f}" for field, _ in COLUMNS.values()))
    console.print(table)
    for column, (_, meaning) in COLUMNS.items():
        console.print(f"{column}: {meaning}", highlight=False, soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "truth.json").write_text(json.dumps({n: v._asdict() for n, v in verdicts.items()}, indent=2) + "\n")
    for name, verdict in verdicts.items():
        pit_histogram(verdict.pit).savefig(out / f"{name}-pit.png")
    console.print(f"written: {out}", soft_wrap=True)
    return 0


def _by_nuts(
    console: Console, family: str, learners: tuple[str, ...], tasks: int, shot: int, seed: int, out: Path
) -> int:
    try:
        from metaprior.nuts import INFERENCE, against_nuts

        found = against_nuts(family, learners or tuple(INFERENCE), tasks=tasks, shot=shot, seed=seed)
    except ModuleNotFoundError as error:
        raise ValueError(f"--family {family}: needs NumPyro ({error}); pip install 'metaprior[truth]'") from error
    table = Table(title=f"{family}, {tasks} new tasks, against NUTS", title_justify="left", header_style="bold")
    for column in ("posterior", "bias", "sd ratio", "coverage of 90 %"):
        table.add_column(column, justify="left" if column == "posterior" else "right")
    for name, row in found.items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)
    console.print("bias: rms gap of the means, in NUTS sds; sd ratio: sds over those of NUTS", highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{family}.json"
    path.write_text(json.dumps({name: row._asdict() for name, row in found.items()}, indent=2) + "\n")
    console.print(f"written: {path}", soft_wrap=True)
    return 0
