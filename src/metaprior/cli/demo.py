"""metaprior demo: training, adaptation and evaluation on sinusoids, in a minute."""

from pathlib import Path

import jax
from rich.table import Table

from metaprior.cli.progress import Progress
from metaprior.cli.screen import screen
from metaprior.core.likelihoods import Gaussian
from metaprior.core.runtime import configure
from metaprior.evaluation.calibration import calibrate
from metaprior.evaluation.plots import (
    check_plots,
    pit_histogram,
    prior_functions,
    regression_tasks,
    save,
    training_curve,
)
from metaprior.evaluation.protocol import evaluate
from metaprior.inference.posteriors import implicit, point
from metaprior.learners import maml
from metaprior.networks import mlp
from metaprior.tasks import sinusoid
from metaprior.training.loop import Training, fit


def demo(out: Path = Path("demo"), steps: int = 10_000) -> int:
    """Meta-train MAML on sinusoids, adapt it to new ones from 5 and 10 points, and plot its uncertainty.

    Args:
        out: The folder for the plots.
        steps: The number of meta-steps.
    """
    configure()
    check_plots(out, "--out")
    console = screen()
    out.mkdir(parents=True, exist_ok=True)
    splits = {shot: sinusoid(shot=shot, query=10, test_query=100) for shot in (5, 10)}
    model = mlp(1, (40, 40))

    def learner(rule=point()):
        return maml(model, Gaussian(), steps=5, rate=0.01, posterior=rule)

    console.print(f"training MAML (5 inner steps) on sinusoids: {steps} meta-steps of 25 tasks")
    training = Training(steps=steps, meta_batch=25, chunk=min(1000, steps), validate_every=2000, clip_norm=1.0)
    with Progress(steps, console) as progress:
        fitted = fit(learner(), splits[10], training, report=progress.report)
    params, key = fitted.best, jax.random.key(1)

    table = Table(title="600 new sinusoids, each from a few points", title_justify="left", header_style="bold")
    for column in ("points", "posterior", "MSE", "NLL", "90 % interval covers"):
        table.add_column(column, justify="left" if column == "posterior" else "right")
    for shot, source in splits.items():
        for name, rule in {"point": point(noise=0.5), "implicit": implicit(noise=0.5)}.items():
            # The noise (and the temperature of the covariance) are fitted on validation tasks, as a user would do.
            told = calibrate(learner(rule), params, source.validation, key, tasks=100)
            report = evaluate(told, params, source.test, key, course=told._replace(path=None))
            figures = (report.figures[k] for k in ("mse", "nll", "coverage_90"))
            table.add_row(str(shot), name, *map(str, figures))
            if name == "implicit":
                tasks = source.test.sample(jax.random.key(7), 3)
                save(regression_tasks(told, params, tasks, key, each=True), out / f"posterior-{shot}-points.png")
                save(pit_histogram(report.pit), out / f"calibration-{shot}-points.png")
    save(prior_functions(learner(), params, splits[10].test.sample(jax.random.key(8), 12), key), out / "prior.png")
    save(training_curve(fitted.history), out / "training.png")
    console.print(table)
    said = "'point' is MAML with a constant error bar; 'implicit' is the posterior that its inner steps imply."
    console.print(said, soft_wrap=True)
    console.print("plots: " + ", ".join(str(p) for p in sorted(out.glob("*.png"))), soft_wrap=True)
    return 0
