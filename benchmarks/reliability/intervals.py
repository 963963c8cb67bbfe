"""How often the interval that `evaluate` prints covers the true mean over all groups.

Groups have a level of their own (normal, or log-normal for a skewed figure), tasks of a group scatter about it. Each
repeat draws g groups and judges 600 tasks of them (or each group once), and asks whether the interval holds the mean
over all groups. 'as if independent' is 1.96 sd / sqrt(tasks), which takes repeats of a group for new evidence.

    python benchmarks/reliability/intervals.py [--quick]
"""

import sys

import numpy as np

from metaprior.evaluation.figures import figure_of

FIGURES = {"normal": (lambda z: z, 0.0), "skewed": (np.exp, np.exp(0.5))}


def main(repeats: int) -> None:
    rng = np.random.default_rng(0)
    print("figure groups tasks  half-width  covers  as if independent")
    for name, (level, truth) in FIGURES.items():
        for groups in (5, 8, 30, 100):
            for tasks in (groups, 600):
                covered, plain, widths = [], [], []
                for _ in range(repeats):
                    members = np.resize(rng.permutation(groups), tasks)
                    values = level(rng.normal(size=groups))[members] + 0.3 * rng.normal(size=tasks)
                    figure = figure_of(values, members)
                    assert figure.interval is not None
                    covered.append(abs(figure.mean - truth) <= figure.interval)
                    plain.append(abs(values.mean() - truth) <= 1.96 * values.std() / tasks**0.5)
                    widths.append(figure.interval)
                print(f"{name} {groups:6d} {tasks:5d} {np.mean(widths):11.3f} {np.mean(covered):7.1%} "
                      f"{np.mean(plain):18.1%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(200 if "--quick" in sys.argv else 4000)
