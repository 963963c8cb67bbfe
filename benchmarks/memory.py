"""Memory of one meta-gradient against the number of inner steps; each figure from a fresh process.

temp: the compiled program's temporary buffers. peak: the rise of resident memory while it runs.
"""

import json
import re
from pathlib import Path

from harness import alone, options, write

STEPS = (1, 4, 16, 64)
FLAT = ("fomaml", "reptile", "imaml")
LEARNERS = ("maml", "maml with remat", *FLAT)


def resident(field: str) -> float:
    """MiB of a field of the process's status, e.g. VmRSS; NaN where there is none (not Linux)."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else float("nan")


def measure(name: str, steps: int) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from metaprior.core.likelihoods import Gaussian
    from metaprior.learners.registry import make_learner
    from metaprior.networks.mlp import mlp
    from metaprior.tasks.synthetic.sinusoid import sinusoid
    from metaprior.training.loop import meta_gradient

    # Minibatches would be data of size k: reptile sees its whole task at each step here.
    settings = {"maml with remat": {"remat": True}, "reptile": {"minibatch": None}}
    learner = make_learner(
        name.split()[0], mlp(hidden=(256, 256)), Gaussian(), steps=steps, rate=1e-3, **settings.get(name, {})
    )
    tasks = sinusoid().train.sample(jax.random.key(0), 25)
    params = learner.init(jax.random.key(1), jax.tree.map(lambda leaf: leaf[0], tasks))
    keys = jax.random.split(jax.random.key(2), 25)
    compiled = jax.jit(lambda p, t, k: meta_gradient(learner, p, t, k, None)).lower(params, tasks, keys).compile()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the high-water mark starts anew: compiling is left out
    before = resident("VmRSS")
    _, gradient = jax.block_until_ready(compiled(params, tasks, keys))
    finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    return {
        "temp_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "peak_mib": resident("VmHWM") - before,
        "finite": finite,
    }


def verdicts(result: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """Largest over smallest temp for the flat ones; growth over sqrt(k) for rematerialised MAML."""
    spread = {}
    for name in (name for name in FLAT if name in result):
        temp = [row["temp_mib"] for row in result[name].values()]
        spread[name] = {"max_over_min": max(temp) / min(temp), "met": max(temp) <= 1.05 * min(temp)}
    remat = {int(k): row["temp_mib"] for k, row in result["maml with remat"].items()}
    low, high = min(remat), max(remat)
    growth, allowed = remat[high] / remat[low], (high / low) ** 0.5
    return spread | {"maml with remat": {"growth": growth, "sqrt": allowed, "met": growth <= allowed}}


def main() -> None:
    chosen = options(__doc__, one={"nargs": 2, "help": "LEARNER STEPS: this process measures one figure"})
    if chosen.one:
        print(json.dumps(measure(chosen.one[0], int(chosen.one[1]))))
        return
    result = {}
    for name in LEARNERS[1:3] if chosen.quick else LEARNERS:
        result[name] = {}
        for steps in (1,) if chosen.quick else STEPS:
            row = result[name][str(steps)] = alone("memory.py", name, steps)
            print(f"{name:18s} {steps:3d} steps: temp {row['temp_mib']:8.1f} MiB, peak {row['peak_mib']:8.1f} MiB")
    judged = verdicts(result)
    for name, verdict in judged.items():
        print(name, verdict)
    write(chosen.json, {"memory": result, "verdicts": judged})


if __name__ == "__main__":
    main()
