"""Cost of one task against the number of inner steps, Conv4-32 at 84x84x3, 5-way 1-shot: time and temporary memory.

The figure 2b of Zou & Lu 2020: gradient-EM and the first-order learners need no backward pass through the inner loop.
Each figure comes from a fresh process; --figure draws both.
"""

import json
import math
import statistics
import time
from pathlib import Path

from harness import alone, options, write

STEPS = (1, 4, 16, 64)
LEARNERS = ("maml", "amortized_bml", "bmaml", "fomaml", "reptile", "imaml", "gem_bml", "gem_bml_plus")
SETTINGS = {"reptile": {"minibatch": None}, "bmaml": {"particles": 5}}
LIMIT_MIB = 8192  # what needs more is compiled but not run
FLAT = ("fomaml", "reptile", "imaml", "gem_bml", "gem_bml_plus")


def measure(name: str, steps: int) -> dict[str, float]:
    import jax

    from metaprior.core.likelihoods import Categorical
    from metaprior.core.types import Batch, Task
    from metaprior.learners import make_learner
    from metaprior.networks.conv4 import conv4

    keys = jax.random.split(jax.random.key(0))
    labels = jax.numpy.arange(5)
    task = Task(*(Batch(jax.random.uniform(key, (5, 84, 84, 3)), labels) for key in keys))
    learner = make_learner(name, conv4(filters=32), Categorical(), steps=steps, rate=1e-3, **SETTINGS.get(name, {}))
    params = learner.init(jax.random.key(1), task)
    gradient = jax.jit(jax.grad(lambda p, k: learner.loss(p, task, k)[0]))
    compiled = gradient.lower(params, keys[0]).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    if memory > LIMIT_MIB:
        return {"seconds": math.nan, "temp_mib": memory}
    times = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(compiled(params, keys[0]))
        times.append(time.perf_counter() - began)
    return {"seconds": statistics.median(times[1:]), "temp_mib": memory}


def draw(result: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, field, label in zip(axes, ("seconds", "temp_mib"), ("seconds a task", "temporary MiB"), strict=True):
        for name, rows in result.items():
            style = "o-" if name in FLAT else "s--"
            ax.plot([int(k) for k in rows], [row[field] for row in rows.values()], style, markersize=4, label=name)
        ax.set(xlabel="inner steps", ylabel=label, xscale="log", yscale="log")
        ax.grid(color="#e6e6e6", linewidth=0.6)
    axes[1].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    chosen = options(
        __doc__,
        learners={"nargs": "+", "default": list(LEARNERS), "help": "of those measured by default"},
        one={"nargs": 2, "help": "LEARNER STEPS: this process measures one figure"},
        figure={"type": Path, "help": "draw time and memory against steps here"},
    )
    if chosen.one:
        print(json.dumps(measure(chosen.one[0], int(chosen.one[1]))))
        return
    result = {}
    for name in chosen.learners[: 1 if chosen.quick else None]:
        result[name] = {}
        for steps in (1,) if chosen.quick else STEPS:
            row = result[name][str(steps)] = alone("inner_steps.py", name, steps)
            print(f"{name:14s} {steps:3d} steps: {1e3 * row['seconds']:9.1f} ms, {row['temp_mib']:8.1f} MiB")
    many = [k for k in next(iter(result.values())) if int(k) >= 4]
    flat = {name: [result[name][k]["temp_mib"] for k in many] for name in FLAT if name in result}
    judged = {"flat_from_4_steps": {name: max(mib) / min(mib) for name, mib in flat.items()}}
    if {"gem_bml", "amortized_bml"} <= set(result):
        for field in ("seconds", "temp_mib"):
            gem, amortized = ({k: result[name][k][field] for k in many} for name in ("gem_bml", "amortized_bml"))
            judged[f"gem_over_amortized_{field}"] = {k: gem[k] / amortized[k] for k in many}
    print(json.dumps(judged, indent=1))
    if chosen.figure:
        draw(result, chosen.figure)
    write(chosen.json, {"cost": result, "verdicts": judged})


if __name__ == "__main__":
    main()
