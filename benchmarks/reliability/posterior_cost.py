"""What the default posterior costs by the number of support rows and of queries, on an MLP of 1,761 parameters.

Seconds of processor time of adapting and predicting once compiled, and XLA's memory for intermediates.

    python benchmarks/reliability/posterior_cost.py [--quick]
"""

import argparse
import time

import jax
import jax.numpy as jnp

from metaprior import Gaussian, implicit
from metaprior.core.types import Batch, Task
from metaprior.learners import maml
from metaprior.networks import mlp


def measure(rows: int, queries: int) -> tuple[float, float]:
    """Seconds and MiB for a support of so many rows and so many queries."""
    learner = maml(mlp(1, (40, 40)), Gaussian(), steps=5, rate=0.01, posterior=implicit())
    x, asked = (jnp.linspace(-5, 5, n)[:, None] for n in (rows, queries))
    support = Batch(x, jnp.sin(x))
    params, key = learner.init(jax.random.key(0), Task(support, support)), jax.random.key(1)

    def answer(params, support, x):
        predictive = learner.predict(params, learner.adapt(params, support, key), x, key)
        return predictive.mean(), predictive.variance()

    run = jax.jit(answer).lower(params, support, asked).compile()
    jax.block_until_ready(run(params, support, asked))
    began = time.process_time()
    jax.block_until_ready(run(params, support, asked))
    return time.process_time() - began, run.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 256 rows, not 100,000")
    most = 256 if parser.parse_args().quick else 100_000
    print("| support rows | queries | CPU seconds | MiB |")
    print("| --- | --- | --- | --- |")
    sizes = [(25, 50), (256, 50), (1_024, 50), (2_048, 50), (10_000, 50), (100_000, 50), (25, 1_000), (25, 10_000)]
    for rows, queries in sizes:
        if max(rows, queries) <= most:
            seconds, memory = measure(rows, queries)
            print(f"| {rows:,} | {queries:,} | {seconds:.2f} | {memory:.0f} |", flush=True)


if __name__ == "__main__":
    main()
