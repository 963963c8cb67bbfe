"""Does a softmax temperature fitted on few tasks raise the nll of new ones?

Queries have Gaussian logits and labels drawn from their softmax, so temperature 1 is right; then logits are multiplied
by `sure`, so temperature `sure` is. Each repeat fits the temperature to a few tasks of five queries, and its expected
nll on new tasks is divided by that of the right temperature. The column 'all right' has the repeats in which every
query was classified right, where the likelihood alone asks for temperature 0.

    python benchmarks/reliability/temperature.py [--quick]
"""

import sys

import numpy as np

from metaprior.evaluation.calibration import PRIOR_SD, fit_temperature


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def main(repeats: int) -> None:
    rng = np.random.default_rng(0)
    new = log_softmax(5 * rng.normal(size=(20_000, 5)))
    print(" tasks  sure prior sd median T  nll ratio: mean   worst  all right")
    for tasks in (5, 16, 80):
        for sure in (0.5, 1.0, 2.5):
            for prior_sd in (0.5, PRIOR_SD, np.inf):
                ratios, found, right = [], [], []
                for _ in range(repeats):
                    logs = log_softmax(5 * rng.normal(size=(5 * tasks, 5)))
                    y = np.array([rng.choice(5, p=p) for p in np.exp(logs)])
                    fitted = fit_temperature(sure * logs, y, np.ones(len(y)), tasks, prior_sd)
                    found.append(fitted.knobs["softmax_temperature"])
                    told = log_softmax(sure * new / found[-1])
                    ratios.append((np.exp(new) * told).sum() / (np.exp(new) * new).sum())
                    right.append((logs.argmax(-1) == y).all())
                ratios, right = np.array(ratios), np.array(right)
                all_right = f"{ratios[right].mean():.2f}" if right.any() else ""
                print(f"{tasks:5d} {sure:5.1f} {prior_sd:8.1f} {np.median(found):8.2f} {ratios.mean():16.3f} "
                      f"{ratios.max():7.2f} {all_right:>10}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(40 if "--quick" in sys.argv else 400)
