"""How many programs the estimators compile, and the seconds they take, at the first call and at the second.

python benchmarks/reliability/compile_counts.py [--quick]
"""

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np

from metaprior import MetaRegressor, Training

PROGRAMS: list[str] = []


def count(name: str, *_: object, **__: object) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
        PROGRAMS.append(name)


def measured(call: Callable[[], object]) -> tuple[int, float]:
    """Programs compiled and seconds of processor time of a call."""
    before, began = len(PROGRAMS), time.process_time()
    call()
    return len(PROGRAMS) - before, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="50 groups, not 1,000, 20,000 and 100,000 besides")
    quick = parser.parse_args().quick
    jax.monitoring.register_event_duration_secs_listener(count)
    rng = np.random.default_rng(0)
    x, group = rng.normal(size=(500, 1)), np.repeat(np.arange(50), 10)
    steps = 3 if quick else 300
    training = Training(steps=steps, chunk=steps // 3, validate_every=steps // 3, validation_tasks=20)
    model = MetaRegressor("maml", training=training)
    calls = {
        "fit": lambda: model.fit(x, x[:, 0] + group, group),
        "predict, with sd": lambda: model.predict(x, group, return_std=True),
        "predict_interval": lambda: model.predict_interval(x, group),
        "adapt and predict": lambda: model.adapt(x[:3], x[:3, 0]).predict(x[3:10]),
    }
    print("| call | programs, first | seconds | programs, second | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for name, call in calls.items():
        (first, cold), (second, warm) = measured(call), measured(call)
        print(f"| {name} | {first} | {cold:.2f} | {second} | {warm:.2f} |", flush=True)
    few = MetaRegressor("maml", training=Training(steps=2, meta_batch=2, chunk=2, validation_tasks=2))
    for groups in () if quick else (1_000, 20_000, 100_000):
        rows, ids = rng.normal(size=(3 * groups, 1)), np.repeat(np.arange(groups), 3)
        _, seconds = measured(lambda rows=rows, ids=ids: few.fit(rows, rows[:, 0], ids))
        print(f"| fit of {groups:,} groups of 3 rows, 2 meta-steps | | {seconds:.1f} | | |", flush=True)


if __name__ == "__main__":
    main()
