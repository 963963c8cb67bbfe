"""metaprior truth: is a learner's posterior true? Learners against exact answers."""

import json
from pathlib import Path

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
    learners: tuple[str, ...] = tuple(SETTINGS),
    steps: int = 2000,
    tasks: int = 200,
    shot: int = 5,
    seed: int = 0,
    out: Path = Path("truth"),
) -> int:
    """Train learners on the conjugate linear-Gaussian hierarchy and hold their posteriors against the exact ones.

    Args:
        learners: which ones.
        steps: meta-steps each.
        tasks: new tasks to judge by.
        shot: observations a task shows.
        seed: of everything random.
        out: folder for the figures (truth.json) and each learner's PIT histogram.
    """
    configure()
    console = Console()

    def tell(name: str, verdict: Verdict) -> None:
        console.print(f"{name}: NLL {verdict.nll:+.4f} over the exact predictive", highlight=False)

    verdicts = referee(learners, steps=steps, tasks=tasks, seed=seed, shot=shot, report=tell)
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
