"""Log density of new rows by the number of rows that a group has shown, for every learner: it should not fall.

Each group is a line with its own slope and offset, the groups' prior being the same in training and later. The same new
groups and the same rows are predicted with 0, 1, 2, 3 and 5 rows shown; the gain of each number over the one before is
paired by group. 'falls' marks a learner with a loss beyond its 95 % interval.

    python benchmarks/reliability/shown_rows.py [--quick] [--learners maml gem_bml ...]
"""

import argparse
import time
import warnings

import numpy as np
from scipy.stats import norm

from metaprior import LEARNERS, MetaRegressor, Training
from metaprior.evaluation.figures import figure_of
from metaprior.learners.registry import traits_of

SHOWN = (0, 1, 2, 3, 5)


def lines(groups: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [N, 1], y [N] and groups [N] of lines y = 20 + 2 offset + (5 + slope) x + noise."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), rows)
    slope, offset = rng.normal(5, 1, groups)[group], rng.normal(20, 2, groups)[group]
    x = rng.uniform(-3, 3, len(group))
    return x[:, None], slope * x + offset + 0.5 * rng.normal(size=len(group)), group


def log_densities(model: MetaRegressor, groups: int) -> np.ndarray:
    """[groups, numbers shown]: the mean log density of a group's new rows, by a normal of the predicted mean and sd."""
    x, y, group = lines(groups, 15, seed=1)
    found = np.zeros((groups, len(SHOWN)))
    for g in range(groups):
        rows = np.flatnonzero(group == g)
        for i, n in enumerate(SHOWN):
            known = model.adapt(x[rows[:n]], y[rows[:n]]) if n else model
            mean, sd = known.predict(x[rows[5:]], return_std=True)
            found[g, i] = norm.logpdf(y[rows[5:]], mean, sd).mean()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one learner, 20 meta-steps, 2 groups")
    parser.add_argument("--learners", nargs="*", default=[name for name in LEARNERS if not traits_of(name).of_classes])
    asked = parser.parse_args()
    steps, groups, most = (20, 2, 1) if asked.quick else (3_000, 200, None)
    training = Training(steps=steps, meta_batch=8, clip_norm=1.0, chunk=steps // 5, validate_every=steps // 5,
                        validation_tasks=50)  # fmt: skip
    print("| learner | " + " | ".join(f"{n} shown" for n in SHOWN) + " | verdict | seconds |")
    print("| --- |" + " --- |" * (len(SHOWN) + 2))
    x, y, group = lines(120, 12, seed=0)
    for name in asked.learners[:most]:
        began = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = MetaRegressor(name, hidden=(16,), training=training).fit(x, y, group)
                found = log_densities(model, groups)
        except Exception as error:  # a learner that cannot be fitted so is a row of its own
            print(f"| `{name}` | {type(error).__name__}: {str(error)[:100]} |", flush=True)
            continue
        gains = [figure_of(found[:, i] - found[:, i - 1]) for i in range(1, len(SHOWN))]
        falls = any(gain.mean + gain.interval < 0 for gain in gains)
        means = " | ".join(f"{value:.3f}" for value in found.mean(0))
        verdict, seconds = "falls" if falls else "rises", time.process_time() - began
        print(f"| `{name}` | {means} | {verdict} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
