"""The convolution alone: what share of this machine's matrix-product rate a Conv4-64 MAML step reaches, and how.

The step is that of conv4.py: 28x28, 5-way 1-shot, 15 queries a class, 8 tasks, 1 inner step, second order, without the
outer optimiser. Its FLOP are counted in the program that runs: two a multiplication in every convolution and product.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from unittest.mock import patch

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax

from harness import options, write
from metaprior.core.likelihoods import Categorical
from metaprior.core.types import Model, Task
from metaprior.learners.maml import maml
from metaprior.networks.conv4 import conv4
from metaprior.training.loop import meta_gradient
from ours import images

TASKS, SIDE = 8, 2048


@dataclass
class Contender:
    """A compiled program, its arguments, how often it runs a round, and what it computes."""

    run: Callable
    arguments: tuple
    repeats: int
    flop: float
    temporary_mib: float

    def seconds(self) -> float:
        began = time.perf_counter()
        for _ in range(self.repeats):
            jax.block_until_ready(self.run(*self.arguments))
        return (time.perf_counter() - began) / self.repeats


def contender(program: Callable, *arguments: jax.Array, repeats: int = 1) -> Contender:
    compiled = jax.jit(program).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return Contender(compiled, arguments, repeats, flop(jax.make_jaxpr(program)(*arguments).jaxpr), memory)


def flop(jaxpr: jax.extend.core.Jaxpr) -> float:
    """Multiplications and additions of all convolutions and matrix products, loops included."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, times = equation.primitive.name, equation.params.get("length", 1)
        shapes = [v.aval.shape for v in equation.invars]
        if name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            total += 2 * prod(equation.outvars[0].aval.shape) * prod(shapes[0][axis] for axis in contracted)
        elif name == "conv":
            total += conv_flop(equation)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            total += times * flop(inner)
    return total


def conv_flop(equation: jax.extend.core.JaxprEqn) -> float:
    """The same for an output and for either gradient: every output pixel meets every weight once."""
    shape, out = equation.params["shape"], equation.params["out"]
    tensors = dict(zip("xwy".replace(out, "") + out, [*equation.invars, *equation.outvars], strict=True))
    tasks, images, _, _, inputs = tensors["x"].aval.shape
    return 2 * tasks * images * prod(shape.output) * prod(shape.kernel) * inputs * tensors["y"].aval.shape[-1]


def step(tasks: Task, downsample: str, task_chunk: int | None, remat: bool = False, repeats: int = 1) -> Contender:
    """(params, tasks) -> the mean meta-gradient of all tasks, `task_chunk` of them at once."""
    network = conv4(gain=True, downsample=downsample)
    model = Model(network.init, jax.checkpoint(network.apply)) if remat else network
    learner = maml(model, Categorical(), rate=0.4)
    params = learner.init(jax.random.key(1), jax.tree.map(lambda leaf: leaf[0], tasks))
    keys = jax.random.split(jax.random.key(2), len(tasks.query.y))
    program = lambda params, tasks: meta_gradient(learner, params, tasks, keys, task_chunk)[1]  # noqa: E731
    return contender(program, params, tasks, repeats=repeats)


def by_xla(x: jax.Array, w: jax.Array, stride: int = 1) -> jax.Array:
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def xla_pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def naive(tasks: Task, flop: float) -> Contender:
    """The same step through XLA's own convolution and max-pool, differentiated as they are."""
    with patch("metaprior.networks.layers.conv2d", by_xla), patch("metaprior.networks.conv4.max_pool", xla_pool):
        result = step(tasks, "max_pool", 1)
    result.flop = flop
    return result


def contenders(quick: bool) -> dict[str, Contender]:
    """Each way to run the step; quick: two of them and XLA's own, on one small task."""
    side, tasks = (256, images(1, queries=1).tasks) if quick else (SIDE, images(TASKS).tasks)
    square = jax.random.normal(jax.random.key(0), (side, side))
    made = {
        "matrix product": contender(jnp.matmul, square, square, repeats=3),
        "max-pool, scan over tasks": step(tasks, "max_pool", 1),
        "max-pool, scan, forward pass recomputed": step(tasks, "max_pool", 1, remat=True),
    }
    if not quick:
        made |= {
            "max-pool, 4 tasks at once": step(tasks, "max_pool", 4),
            "max-pool, vmap over tasks": step(tasks, "max_pool", None),
            "stride, scan over tasks": step(tasks, "stride", 1, repeats=3),
            "stride, vmap over tasks": step(tasks, "stride", None, repeats=3),
        }
    made["max-pool, scan, XLA's own convolution"] = naive(tasks, made["max-pool, scan over tasks"].flop)
    return made


def main() -> None:
    chosen = options(__doc__)
    made = contenders(chosen.quick)
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(1 if chosen.quick else 7):
        for name, one in made.items():
            if turn < 2 or "own" not in name:
                times[name].append(one.seconds())
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    peak = made["matrix product"].flop / medians["matrix product"]
    figures = {
        name: {
            "seconds": medians[name],
            "fastest": min(times[name]),
            "gflop": one.flop / 1e9,
            "share_of_matrix_product_rate": one.flop / medians[name] / peak,
            "temporary_mib": one.temporary_mib,
        }
        for name, one in made.items()
    }
    print(f"float32 matrix product: {peak / 1e9:.0f} GFLOP/s")
    for name, row in figures.items():
        print(f"  {name:42s} {1e3 * row['seconds']:9.1f} ms, {row['gflop']:6.1f} GFLOP,"
              f" {row['share_of_matrix_product_rate']:5.0%} of it, {row['temporary_mib']:6.0f} MiB")  # fmt: skip
    write(chosen.json, {"matrix_product_gflops": peak / 1e9, "steps": figures})


if __name__ == "__main__":
    main()
