"""Grouped tables, some groups left out: learned priors against NUTS and restricted likelihood on new groups.

    grouped.py --tables sleepstudy|radon|radon-all [--folds 3] [--ways NAME ...] [--json PATH]
    grouped.py --tables eight-schools [--json PATH]     both need METAPRIOR_DATA, and the extra `truth`

Every held-out group is judged after 0, 1, 3 and 5 of its own observations (a small one keeps one back to be asked), in
five orders drawn by the seed; intervals are over groups. `gap` is the log score less that of the first way, NUTS.
The noise of the learners is the pooled sd within the groups that they learn from; NUTS and statsmodels infer it.
"""

import time
from dataclasses import asdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from harness import options, write
from metaprior.core.likelihoods import Gaussian
from metaprior.core.runtime import configure
from metaprior.core.types import Batch, Splits, Task
from metaprior.evaluation.figures import figure_of
from metaprior.learners import make_learner
from metaprior.networks import known_noise, linear, mlp
from metaprior.referees.grouped import Fold, folds, held_out_tasks, judge_groups, pooled, rows_of_source
from metaprior.referees.mixed import mixed_by_nuts, mixed_by_statsmodels, new_group, within_sd
from metaprior.tasks import eight_schools, eight_schools_reference
from metaprior.tasks.fixed import FixedTasks
from metaprior.tasks.store import data_folder
from metaprior.tasks.tables.columns import as_numbers, read_columns
from metaprior.tasks.tables.posteriordb import radon_all_table
from metaprior.tasks.tables.table import NAMED
from metaprior.training.loop import Training, fit

VARIATIONAL = {"steps": 30, "test_steps": 100, "rate": 0.2, "samples": 8, "optimizer": "natural"}
VARIATIONAL |= {"log_sd": -1.0, "draws": 0}
LEARNERS = {
    "llama": {"objective": "evidence", "learn_precision": True, "steps": 60, "test_steps": 600, "rate": 0.03},
    "gem_bml": VARIATIONAL,
    "amortized_bml": VARIATIONAL,
    "bmaml": {"particles": 10, "steps": 10, "test_steps": 10, "rate": 0.03, "loss": "mixture"},
}
MODELS = {"linear": mlp(1, ()), "8 tanh": mlp(1, (8,), "tanh")}
# The classical models: intercept and first slope vary; uranium is a county's own, so its coefficient is everyone's.
VARYING = {"sleepstudy": (0, 1), "radon": (0, 1), "radon-all": (0, 1)}


def table_of(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, target and group of every row."""
    if name == "radon-all":
        return radon_all_table()
    target, group, features = NAMED[name]
    columns = read_columns(data_folder("grouped_tables") / f"{name}.csv")
    x, y = ([as_numbers(columns[n], n, columns) for n in names] for names in (features, [target]))
    return np.concatenate(x, 1), y[0], columns[group]


def by_nuts(name: str, fold: Fold, steps: int, seed: int) -> tuple:
    """The draws of NUTS, and how they predict."""
    return mixed_by_nuts(rows_of_source(fold.seen), jax.random.key(seed), varying=VARYING[name]), new_group


def by_statsmodels(name: str, fold: Fold, steps: int, seed: int) -> tuple:
    return mixed_by_statsmodels(rows_of_source(fold.seen), varying=VARYING[name]), new_group


def by_learner(learner: str, model: str, name: str, fold: Fold, steps: int, seed: int) -> tuple:
    """The learned prior, and how it predicts."""
    # Two digits, so that folds share their compiled code.
    noise = float(f"{within_sd(rows_of_source(fold.seen)):.2g}")
    made = make_learner(learner, MODELS[model], Gaussian(noise), **LEARNERS[learner])
    training = Training(meta_batch=min(16, len(fold.seen.starts)), rate=1e-2, clip_norm=100.0, **outer(steps, seed))
    params = fit(made, Splits(fold.seen, fold.seen, fold.held_out), training, name=learner).params
    return params, lambda params, support, x, key: made.predict(params, made.adapt(params, support, key), x, key)


WAYS = {"NUTS": by_nuts, "statsmodels": by_statsmodels} | {
    f"{learner}, {model}": partial(by_learner, learner, model) for model in MODELS for learner in LEARNERS
}


def grouped(name: str, ways: list[str], count: int, used: int, steps: int, seed: int) -> dict:
    """Scores of the ways on every held-out group."""
    x, y, groups = table_of(name)
    found, seconds = {way: [] for way in ways}, dict.fromkeys(ways, 0.0)
    for at, fold in enumerate(list(folds(x, y, groups, count, seed=seed, shot=5, query=5))[:used]):
        held = held_out_tasks(fold.held_out, seed=seed)
        deviation = float(fold.seen.scaling.y_deviation[0])
        for way in ways:
            began = time.perf_counter()
            state, answer = WAYS[way](name, fold, steps, seed)
            seconds[way] += time.perf_counter() - began
            found[way].append(judge_groups(answer, state, held, deviation, jax.random.key(seed)))
            print(f"{name}, fold {at + 1}, {way}: {time.perf_counter() - began:.0f} s", flush=True)
    return report(name, {way: pooled(parts) for way, parts in found.items()}, seconds)


def outer(steps: int, seed: int) -> dict:
    """What every training here shares; there is nothing to validate on, so the last parameters are used."""
    common = {"schedule": "cosine", "chunk": min(steps, 250), "validate_every": steps, "validation_tasks": 1}
    return common | {"steps": steps, "seed": seed}


def report(name: str, scores: dict, seconds: dict) -> dict:
    """Prints the table; returns its figures."""
    rows = {}
    first = next(iter(scores))
    columns = ("way", "shown", "groups", "log score", f"gap to {first}", "RMSE", "90 % coverage", "s")
    print(f"\n{name}\n| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")
    for way, by_size in scores.items():
        for n, got in by_size.items():
            figures = got.figures()
            gap = figure_of(scores[first][n].nll - got.nll)
            log_score, rmse, coverage = (f"{f.mean:.3f} ± {f.interval:.3f}" for f in figures.values())
            print(f"| {way} | {n} | {len(got.nll)} | {log_score} | {gap.mean:+.3f} ± {gap.interval:.3f} | {rmse} | "
                  f"{coverage} | {seconds[way]:.0f} |")  # fmt: skip
            kept = {k: asdict(f) for k, f in figures.items()} | {"gap": asdict(gap), "groups": len(got.nll)}
            rows.setdefault(way, {})[n] = kept
    return {"scores": rows, "seconds": seconds}


def schools(steps: int, seed: int) -> dict:
    """Posteriors of the eight schools and the learned (mu, tau) against the reference draws."""
    batch, reference = eight_schools(), eight_schools_reference()
    exact = {k: (v.mean(0), v.std(0)) for k, v in reference.items()}
    # One observation a school: all of it is support, and nothing is left to ask.
    tasks = FixedTasks(Task(batch._replace(weight=jnp.ones((8, 1))), batch._replace(weight=jnp.zeros((8, 1)))))
    mean, sd = exact["theta"]
    rows = {"reference": {"mu": exact["mu"][0], "tau": exact["tau"][0], "mean": mean.tolist(), "sd": sd.tolist()}}
    slow = {"steps": 100, "test_steps": 1000}
    ways = {
        "llama": ("llama", LEARNERS["llama"] | slow | {"rate": 1.0, "precision": 0.02}),
        "gem_bml": ("gem_bml", VARIATIONAL | slow | {"rate": 0.3, "log_sd": 2.0, "precondition": False}),
        "amortized_bml": ("amortized_bml", VARIATIONAL | slow | {"rate": 0.3, "log_sd": 2.0}),
    }
    for way, (name, settings) in ways.items():
        learner = make_learner(name, known_noise(linear()), Gaussian(None), **settings)
        training = Training(meta_batch=8, rate=0.2, **outer(steps, seed))
        params = fit(learner, Splits(tasks, tasks, tasks), training, name=name).params
        # At an input of 1 with a noise sd of 0 the predictive is the posterior of the school's effect.
        at = jnp.asarray([[1.0, 1e-3]])

        def effect(support: Batch, key, learner=learner, params=params, at=at):
            predictive = learner.predict(params, learner.adapt(params, support, key), at, key)
            return predictive.mean()[0, 0], jnp.sqrt(predictive.variance()[0, 0])

        # The eight schools, and after them one that shows nothing: the prior.
        ninth = jax.tree.map(lambda s, q: jnp.concatenate([s, q[:1]]), *tasks.tasks)
        mean, sd = jax.jit(jax.vmap(effect))(ninth, jax.random.split(jax.random.key(seed), 9))
        rows[way] = {"mu": float(mean[8]), "tau": float(sd[8]), "mean": mean[:8].tolist(), "sd": sd[:8].tolist()}
    print("\neight schools\n| way | mu | tau | " + " | ".join("ABCDEFGH") + " |\n" + "| --- " * 11 + "|")
    for way, row in rows.items():
        effects = " | ".join(f"{m:.1f} ± {s:.1f}" for m, s in zip(row["mean"], row["sd"], strict=True))
        print(f"| {way} | {row['mu']:.2f} | {row['tau']:.2f} | {effects} |")
    return rows


def main() -> None:
    configure()
    tables = {"nargs": "*", "default": ["sleepstudy", "radon", "radon-all", "eight-schools"]}
    extra = {
        "tables": tables, "folds": {"type": int, "default": 3}, "used": {"type": int, "default": 3},
        "ways": {"nargs": "*", "default": list(WAYS), "choices": list(WAYS)},
        "steps": {"type": int, "default": 400}, "seed": {"type": int, "default": 0},
    }  # fmt: skip
    args = options(__doc__, **extra)
    steps = 20 if args.quick else args.steps
    if args.quick:
        del args.ways[3:], args.ways[0]  # without NUTS
    figures = {}
    for name in args.tables[: 1 if args.quick else None]:
        if name == "eight-schools":
            figures[name] = schools(steps, args.seed)
        else:
            figures[name] = grouped(name, args.ways, args.folds, 1 if args.quick else args.used, steps, args.seed)
    write(args.json, figures)


if __name__ == "__main__":
    main()
