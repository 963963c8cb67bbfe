"""Each convolution of conv4.py's step by itself: our kernels against oneDNN's, as torch calls them.

The sum over the step's convolutions is what the step would take if a foreign function of that quality did them and all
else cost nothing: whether to write one is read off it.
"""

import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from math import prod

import jax

from harness import HERE, PEERS, environment, options, write
from metaprior.core.likelihoods import Categorical
from metaprior.kernels.conv import AXES, Geometry, conv_p
from metaprior.learners.maml import maml
from metaprior.networks.conv4 import conv4
from metaprior.training.loop import meta_gradient
from ours import images

TASKS = 8


def convolutions(jaxpr: jax.extend.core.Jaxpr, times: int = 1) -> Counter:
    """How often each convolution runs: (wanted tensor, its geometry, tasks, images, channels in, channels out)."""
    found: Counter = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive is conv_p:
            out = equation.params["out"]
            names = ["xwy".replace(out, "")[0], "xwy".replace(out, "")[1], out]
            sizes: dict[str, int] = {}
            for name, variable in zip(names, [*equation.invars, *equation.outvars], strict=True):
                sizes |= dict(zip(AXES[name], variable.aval.shape, strict=True))
            found[out, equation.params["shape"], *(sizes[axis] for axis in "tnio")] += times
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += convolutions(inner, times * equation.params.get("length", 1))
    return found


def shapes(out: str, shape: Geometry, t: int, n: int, i: int, o: int) -> list[tuple[int, ...]]:
    """Of the two given tensors."""
    every = {"x": (t, n, *shape.image, i), "w": (t, *shape.kernel, i, o), "y": (t, n, *shape.output, o)}
    return [every[name] for name in "xwy" if name != out]


def ours(kernels: list[tuple]) -> list[float]:
    """Seconds of each kernel, the fastest of some."""
    found = []
    for out, shape, *sizes in kernels:
        keys = jax.random.split(jax.random.key(0))
        a, b = (jax.random.normal(k, s) for k, s in zip(keys, shapes(out, shape, *sizes), strict=True))
        run = jax.jit(lambda a, b, out=out, shape=shape: conv_p.bind(a, b, out=out, shape=shape))
        jax.block_until_ready(run(a, b))
        times = []
        for _ in range(7):
            began = time.perf_counter()
            jax.block_until_ready(run(a, b))
            times.append(time.perf_counter() - began)
        found.append(min(times))
    return found


def theirs(kernels: list[tuple]) -> list[float]:
    """The same by torch, in its own environment."""
    command = [str(PEERS), str(HERE / "kernels_torch.py"), json.dumps(kernels)]
    said = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def main() -> None:
    chosen = options(__doc__)
    learner, tasks = maml(conv4(gain=True), Categorical(), rate=0.4), images(TASKS).tasks
    params = learner.init(jax.random.key(1), jax.tree.map(lambda leaf: leaf[0], tasks))
    keys = jax.random.split(jax.random.key(2), TASKS)
    counts = convolutions(jax.make_jaxpr(lambda p: meta_gradient(learner, p, tasks, keys, 1)[1])(params).jaxpr)
    kernels = list(counts)
    rounds = [(ours(kernels), theirs(kernels)) for _ in range(1 if chosen.quick else 3)]
    mine, peer = ([statistics.median(times) for times in zip(*side, strict=True)] for side in zip(*rounds, strict=True))
    print("wanted, image, kernel, tasks, images, in, out | times a step | GFLOP/s, ours | oneDNN")
    rows, totals = [], [0.0, 0.0, 0.0]
    for kernel, a, b in sorted(zip(kernels, mine, peer, strict=True), key=lambda row: -counts[row[0]] * row[1]):
        out, shape, t, n, i, o = kernel
        gflop = 2e-9 * t * n * prod(shape.output) * prod(shape.kernel) * i * o
        print(f"  {out} {shape.image} {shape.kernel} {t} {n:3d} {i:3d} {o:3d} | {counts[kernel]:3d} |", end="")
        print(f" {gflop / a:6.0f} | {gflop / b:6.0f}")
        rows.append({"kernel": [out, list(shape.image), t, n, i, o], "times": counts[kernel], "ours": a, "onednn": b})
        totals = [x + counts[kernel] * y for x, y in zip(totals, (a, b, min(a, b)), strict=True)]
    names = ("ours", "onednn", "the better of the two, kernel by kernel")
    for name, total in zip(names, totals, strict=True):
        print(f"{name}: {1e3 * total:.0f} ms a step")
    write(chosen.json, {"kernels": rows, "seconds": dict(zip(names, totals, strict=True))})


if __name__ == "__main__":
    sys.exit(main())
