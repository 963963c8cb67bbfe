"""The share of targets in each bin of the probability integral transform, where the predictive is the true one.

Every bin should hold 1: for one target, for two (each is a value of its own), and for counts (randomised).

    python benchmarks/reliability/pit.py [--quick]
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from metaprior.core.likelihoods import Counts, Normals
from metaprior.evaluation.protocol import integral_transform


def main(n: int) -> None:
    key, rng = jax.random.key(0), np.random.default_rng(0)
    cases = {
        f"normal, {d} targets": (Normals(jnp.zeros((1, n, d)), jnp.ones((1, n, d))), rng.normal(size=(n, d)))
        for d in (1, 2)
    }
    for rate in (0.3, 2.0, 20.0):
        predictive = Counts(jnp.full((1, n, 1), np.log(rate)))
        cases[f"counts, rate {rate:g}"] = predictive, rng.poisson(rate, size=(n, 1)).astype(float)
    for name, (predictive, y) in cases.items():
        pit = np.asarray(integral_transform(predictive, jnp.asarray(y, float), key)["pit"]).reshape(-1)
        density = np.histogram(pit, 10, (0, 1))[0] / pit.size * 10
        print(f"{name:18}", " ".join(f"{share:.2f}" for share in density), flush=True)


if __name__ == "__main__":
    main(20_000 if "--quick" in sys.argv else 200_000)
