"""MetaRegressor with its defaults against pooled models and a mixed model, on rows of new groups.

    estimators.py [--quick] [--tables NAME ...] [--ways NAME ...] [--seeds N] [--json PATH]

Four simulated tables of groups, and the classic ones of METAPRIOR_DATA. A quarter of the groups is new: each shows 0, 2
or 5 of its rows (half of them at most), and its last half is asked for. Reported are the RMSE and the nll of the normal
with the predicted mean and sd, both in units of the target's sd, and the seconds that `fit` takes.

* `ridge`, `boosting`: scikit-learn's RidgeCV and HistGradientBoostingRegressor on the features alone, whatever a group
  has shown; the sd is that of cross-validated residuals, whole groups left out.
* `mixed`: random intercept and slopes by restricted likelihood (statsmodels, extra `truth`); a new group is answered by
  the exact posterior of its coefficients.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict

from harness import options, write
from metaprior.core.runtime import configure
from metaprior.estimators.sklearn import MetaRegressor
from metaprior.referees.mixed import Rows, mixed_by_statsmodels
from metaprior.tasks import array_tasks
from metaprior.tasks.store import data_folder
from metaprior.tasks.tables.columns import Columns, read_columns
from metaprior.tasks.tables.table import NAMED
from metaprior.training.loop import Training

SHOWN = (0, 2, 5)
VARYING = {"sleepstudy": [0, 1], "radon": [0, 1], "exam": [0, 1], "hsb82": [0, 1]}  # columns of [1, x]; else all
Table = tuple[np.ndarray, np.ndarray, np.ndarray]
Answer = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def lines(random: np.random.Generator) -> Table:
    """100 groups of 10 rows: intercept and two slopes of each group's own, little noise."""
    group = np.repeat(np.arange(100), 10)
    x = random.normal(size=(1000, 2)) * (3, 0.2) + (10, 0)
    b = random.normal((5, 1, -10), (3, 0.7, 10), (100, 3))[group]
    return x, b[:, 0] + b[:, 1] * (x[:, 0] - 10) + b[:, 2] * x[:, 1] + random.normal(size=1000), group


def waves(random: np.random.Generator) -> Table:
    """300 groups of 20 rows: amplitude, phase and level of a wave of each group's own."""
    group = np.repeat(np.arange(300), 20)
    x = random.uniform(-3, 3, (6000, 1))
    amplitude, phase, level = random.uniform(0.5, 2, 300), random.uniform(0, 2, 300), random.normal(0, 0.5, 300)
    y = amplitude[group] * np.sin(1.5 * x[:, 0] + phase[group]) + level[group]
    return x, y + 0.2 * random.normal(size=6000), group


def levels(random: np.random.Generator) -> Table:
    """30 groups of 5 rows: a level of each group's own under as much noise."""
    group = np.repeat(np.arange(30), 5)
    x = random.normal(size=(150, 1))
    return x, 100 + 8 * x[:, 0] + 10 * random.normal(size=30)[group] + 10 * random.normal(size=150), group


def bends(random: np.random.Generator) -> Table:
    """150 groups of 5 to 15 rows, five features: a common bent surface, a level and a slope of each group's own."""
    group = np.repeat(np.arange(150), random.integers(5, 16, 150))
    x = random.uniform(size=(len(group), 5))
    common = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3]
    level, slope = 3 * random.normal(size=150)[group], 6 * random.normal(size=150)[group]
    return x, common + level + slope * (x[:, 4] - 0.5) + 2 * random.normal(size=len(group)), group


SIMULATED = {"lines": lines, "waves": waves, "levels": levels, "bends": bends}


def classic(name: str) -> Table:
    """A table of METAPRIOR_DATA, categories one-hot."""
    target, group, features = NAMED[name]
    table = read_columns(data_folder("grouped_tables") / f"{name}.csv")
    y, groups = np.asarray(table[target], float), table[group]
    made = array_tasks(Columns({n: table[n] for n in features}), y, groups, classification=False, small="drop")
    return made.train.preparation.encode(Columns({n: table[n] for n in features})).astype(float), y, groups


def pooled(make: Callable) -> Callable[..., Answer]:
    def way(x: np.ndarray, y: np.ndarray, group: np.ndarray, name: str, seed: int) -> Answer:
        sd = np.std(y - cross_val_predict(make(), x, y, groups=group, cv=GroupKFold(5)))
        model = make().fit(x, y)
        return lambda xs, ys, xq: (model.predict(xq), np.full(len(xq), sd))

    return way


def mixed(x: np.ndarray, y: np.ndarray, group: np.ndarray, name: str, seed: int) -> Answer:
    mean, spread, centre, scale = x.mean(0), x.std(0), y.mean(), y.std()
    numbers = np.unique(group, return_inverse=True)[1]
    rows = Rows((x - mean) / spread, ((y - centre) / scale)[:, None], numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a variance at 0
        found = mixed_by_statsmodels(rows, varying=VARYING.get(name))
    m, sigma, s = (np.asarray(leaf[0], float) for leaf in found)

    def design(rows: np.ndarray) -> np.ndarray:
        return np.column_stack([np.ones(len(rows)), (rows - mean) / spread])

    def answer(xs: np.ndarray, ys: np.ndarray, xq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, b = design(xs), design(xq)
        gain = sigma @ a.T @ np.linalg.inv(a @ sigma @ a.T + s**2 * np.eye(len(a)))
        posterior = sigma - gain @ a @ sigma
        variance = np.einsum("ij,jk,ik->i", b, posterior, b) + s**2
        return (b @ (m + gain @ ((ys - centre) / scale - a @ m))) * scale + centre, np.sqrt(variance) * scale

    return answer


def meta(learner: str, **settings: Any) -> Callable[..., Answer]:
    def way(x: np.ndarray, y: np.ndarray, group: np.ndarray, name: str, seed: int) -> Answer:
        model = MetaRegressor(learner, seed=seed, **settings).fit(x, y, group)

        def answer(xs: np.ndarray, ys: np.ndarray, xq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            if len(xs):
                return model.adapt(xs, ys).predict(xq, return_std=True)
            return model.predict(xq, ["new"] * len(xq), return_std=True)

        return answer

    return way


WAYS = {
    "ridge": pooled(lambda: RidgeCV(np.logspace(-3, 3, 13))),
    "boosting": pooled(lambda: HistGradientBoostingRegressor(max_iter=100, max_leaf_nodes=8)),
    "mixed": mixed,
    "maml": meta("maml"),
    "preconditioned": meta("preconditioned"),
    "amortized_bml": meta("amortized_bml"),
}


def judge(table: Table, way: Callable, name: str, seed: int) -> dict:
    """Scores of one way on the new groups of one split."""
    x, y, group = table
    random, scale = np.random.default_rng(seed), y.std()
    names = random.permutation(np.unique(group))
    new = names[: len(names) // 4]
    old = ~np.isin(group, new)
    began = time.perf_counter()
    answer = way(x[old], y[old], group[old], name, seed)
    seconds, squares, nlls = time.perf_counter() - began, {n: [] for n in SHOWN}, {n: [] for n in SHOWN}
    for one in new:
        rows = random.permutation(np.flatnonzero(group == one))
        cut = len(rows) // 2
        asked = rows[cut:]
        for n in SHOWN:
            seen = rows[: min(n, cut)]
            mean, sd = answer(x[seen], y[seen], x[asked])
            z = (y[asked] - mean) / sd
            squares[n].append(((y[asked] - mean) / scale) ** 2)
            nlls[n].append(0.5 * z**2 + np.log(sd / scale) + 0.5 * np.log(2 * np.pi))
    figures = {str(n): {"rmse": float(np.sqrt(np.concatenate(squares[n]).mean())),
                        "nll": float(np.concatenate(nlls[n]).mean())} for n in SHOWN}  # fmt: skip
    return {"seconds": seconds, **figures}


def main() -> None:
    configure()
    tables = list(SIMULATED) + list(VARYING)
    extra = {
        "tables": {"nargs": "*", "default": tables, "choices": tables},
        "ways": {"nargs": "*", "default": list(WAYS), "choices": list(WAYS)}, "seeds": {"type": int, "default": 3},
    }  # fmt: skip
    args = options(__doc__, **extra)
    ways = WAYS
    if args.quick:
        few = Training(steps=4, meta_batch=2, chunk=2, validate_every=2, validation_tasks=4)
        ways, args.ways = WAYS | {"maml": meta("maml", training=few)}, args.ways[:4:3]
    figures: dict = {}
    print("| table | way | " + " | ".join(f"rmse {n} | nll {n}" for n in SHOWN) + " | s |")
    print("| --- " * (3 + 2 * len(SHOWN)) + "|", flush=True)
    for name in args.tables if not args.quick else args.tables[:1]:
        for way in args.ways:
            found = []
            for seed in range(1 if args.quick else args.seeds):
                table = SIMULATED[name](np.random.default_rng(100 + seed)) if name in SIMULATED else classic(name)
                found.append(judge(table, ways[way], name, seed))
            figures.setdefault(name, {})[way] = found
            cells = [np.mean([f[str(n)][what] for f in found]) for n in SHOWN for what in ("rmse", "nll")]
            seconds = np.median([f["seconds"] for f in found])
            print(f"| {name} | {way} | " + " | ".join(f"{c:.3f}" for c in cells) + f" | {seconds:.1f} |", flush=True)
    write(args.json, figures)


if __name__ == "__main__":
    main()
