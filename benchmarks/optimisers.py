"""A learned optimiser against SGD, momentum, RMSprop and Adam, each at its best rate: curves with bands over seeds.

Trained on the recipes `quadratics` and `digits`; judged on new quadratics, on the digits network
from new starts, and on networks that training never saw (Andrychowicz et al. 2016, Figures 4 and 5). A hand-tuned
optimiser's rate is the one with the lowest final loss on other seeds of the same problem, searched over a grid; where
the best is an end of the grid, the grid is too short and the script says so.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from harness import options, write
from metaprior import Batch, Categorical, Model, Training, learned_optimizer, mlp, optimise
from metaprior.core.runtime import configure
from metaprior.experiments.recipe import build, load_recipe, with_overrides
from metaprior.inference.descent import drawn, mean_nll, minibatches
from metaprior.networks import linear
from metaprior.tasks import digits, quadratics
from metaprior.training.loop import init_state, run_chunk

STEPS, BATCH = 100, 128
BY_HAND: dict[str, Callable] = {
    "SGD": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "RMSprop": optax.rmsprop,
    "Adam": optax.adam,
}
RATES = 10.0 ** np.arange(-3, 1.01, 0.25)


class Problem(NamedTuple):
    """New optimisees: key -> (start, data of each step), and loss(phi, data of a step)."""

    draw: Callable
    loss: Callable
    trained_on: str
    seeds: int


def quadratic() -> Problem:
    source, model = quadratics().test, linear()

    def draw(key: jax.Array) -> tuple:
        support = jax.tree.map(lambda leaf: leaf[0], source.sample(key, 1)).support
        always = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (STEPS + 1, *leaf.shape)), support)
        return model.init(jax.random.fold_in(key, 1), support.x), always

    def loss(phi: dict, rows: Batch) -> jax.Array:
        return ((model.apply(phi, rows.x) - rows.y) ** 2).sum()

    return Problem(draw, loss, "quadratics", 64)


def network(model: Model) -> Problem:
    """Minibatches of the test split's images: none of them was seen while the optimiser was trained."""
    source = digits().test

    def draw(key: jax.Array) -> tuple:
        support = jax.tree.map(lambda leaf: leaf[0], source.sample(key, 1)).support
        places = minibatches(jax.random.fold_in(key, 2), len(support.y), BATCH, STEPS + 1)
        return model.init(jax.random.fold_in(key, 1), support.x), drawn(support, places)

    def loss(phi: dict, batch: Batch) -> jax.Array:
        return mean_nll(Categorical(), model.apply(phi, batch.x), batch)

    return Problem(draw, loss, "digits", 10)


PROBLEMS = {
    "10-d quadratics": quadratic(),
    "digits, 20 sigmoid units": network(mlp(10, (20,), "sigmoid")),
    "40 units": network(mlp(10, (40,), "sigmoid")),
    "2 layers": network(mlp(10, (20, 20), "sigmoid")),
    "ReLU": network(mlp(10, (20,), "relu")),
}


def trained(name: str, steps: int) -> tuple[object, float]:
    """The learned rule of a recipe after so many meta-steps, and the seconds that took, compiling included."""
    began = time.perf_counter()
    made = build(with_overrides(load_recipe(name), overrides={"training.steps": steps, "training.chunk": steps}))
    training: Training = made.training
    state = init_state(made.learner, made.splits.train, training)
    state, _ = jax.block_until_ready(run_chunk(made.learner, training)(state, made.splits.train, steps))
    return state.params.rule, time.perf_counter() - began


def judged(problem: Problem, rule: object) -> dict:
    """Each optimiser's losses [seeds, steps + 1], its rate, and the search that found it."""
    draw = jax.jit(lambda keys: jax.lax.map(problem.draw, keys))
    tuning, judging = (draw(jax.random.split(jax.random.key(seed), problem.seeds)) for seed in (1, 2))

    def runner(make: Callable) -> Callable:
        def course(optimizer: optax.GradientTransformation, start: dict, data: Batch) -> jax.Array:
            return optimise(problem.loss, start, optimizer, STEPS + 1, data)[1]

        return jax.jit(lambda setting, drawn: jax.lax.map(lambda one: course(make(setting), *one), drawn))

    result = {"learned": {"losses": runner(learned_optimizer)(rule, judging)}}
    for name, make in BY_HAND.items():
        run = runner(make)
        final = [float(run(rate, tuning)[:, -10:].mean()) for rate in RATES]
        best = int(np.nanargmin(final))
        result[name] = {
            "losses": run(RATES[best], judging),
            "rate": RATES[best],
            "search": dict(zip(RATES.round(5).tolist(), final, strict=True)),
            "at_the_grid's_end": best in (0, len(RATES) - 1),
        }
    return result


def summary(rows: dict) -> dict:
    """Mean final loss (of the last ten steps) and mean over the course, with 95 % half-widths over seeds."""
    table = {}
    for name, row in rows.items():
        losses = np.asarray(row["losses"])
        last, mean = losses[:, -10:].mean(1), losses.mean(1)
        half = [1.96 * v.std() / len(v) ** 0.5 for v in (last, mean)]
        table[name] = {k: v for k, v in row.items() if k != "losses"} | {
            "final": float(last.mean()), "final_half_width": float(half[0]),
            "mean": float(mean.mean()), "mean_half_width": float(half[1]),
            "curve": losses.mean(0)[:: STEPS // 10].tolist(),
        }  # fmt: skip
    return table


def draw(results: dict, path: Path) -> None:
    """Curves by problem; bands are the 10th to 90th percentile over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3.4), layout="constrained")
    for axis, (title, rows) in zip(np.atleast_1d(axes), results.items(), strict=True):
        for name, row in rows.items():
            losses = np.asarray(row["losses"])
            low, high = np.percentile(losses, (10, 90), axis=0)
            (line,) = axis.plot(losses.mean(0), label=name, lw=2 if name == "learned" else 1)
            axis.fill_between(np.arange(losses.shape[1]), low, high, color=line.get_color(), alpha=0.12, lw=0)
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
    np.atleast_1d(axes)[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    chosen = options(
        __doc__,
        steps={"type": int, "nargs": 2, "default": [500, 200], "help": "meta-steps on quadratics and on digits"},
        figure={"type": Path, "help": "draw the curves here (PNG)"},
    )
    configure()
    began = time.perf_counter()
    steps = dict(zip(("quadratics", "digits"), [4, 2] if chosen.quick else chosen.steps, strict=True))
    rules = {name: trained(name, count) for name, count in steps.items()}
    for name, (_, seconds) in rules.items():
        print(f"trained on {name}: {steps[name]} meta-steps in {seconds:.0f} s", flush=True)
    results, tables = {}, {}
    for name, problem in list(PROBLEMS.items())[: 2 if chosen.quick else None]:
        results[name] = judged(problem, rules[problem.trained_on][0])
        tables[name] = summary(results[name])
        print(f"\n{name}: loss of steps {STEPS - 9}-{STEPS}, mean over the course; {problem.seeds} seeds")
        for who, row in tables[name].items():
            end = ", AT THE GRID'S END" if row.get("at_the_grid's_end") else ""
            rate = f"rate {row['rate']:.4f}{end}" if "rate" in row else ""
            print(f"  {who:9s} {row['final']:8.4f} +- {row['final_half_width']:.4f}"
                  f"  {row['mean']:8.4f} +- {row['mean_half_width']:.4f}  {rate}")  # fmt: skip
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    if chosen.figure:
        draw(results, chosen.figure)
    spent = {name: seconds for name, (_, seconds) in rules.items()}
    write(chosen.json, {"meta_steps": steps, "training_seconds": spent, "problems": tables})


if __name__ == "__main__":
    main()
