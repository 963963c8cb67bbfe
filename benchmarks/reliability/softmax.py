"""The closed-form predictive of a softmax under Gaussian logits against Monte Carlo: the largest gap of a probability.

python benchmarks/reliability/softmax.py [--quick]
"""

import sys

import jax.numpy as jnp
import numpy as np

from metaprior.core.likelihoods import Categorical

VARIANCES = (0.1, 1.0, 4.0, 9.0, 25.0, 100.0, 400.0)


def monte_carlo(mean: np.ndarray, variance: float, draws: int, rng: np.random.Generator) -> np.ndarray:
    total = np.zeros(len(mean))
    for _ in range(20):
        logits = mean + variance**0.5 * rng.normal(size=(draws // 20, len(mean)))
        p = np.exp(logits - logits.max(1, keepdims=True))
        total += (p / p.sum(1, keepdims=True)).mean(0) / 20
    return total


def main(draws: int) -> None:
    rng = np.random.default_rng(0)
    print("classes  leading 3, v 4 |" + "".join(f" v {v:<6g}" for v in VARIANCES))
    for classes in (2, 3, 5, 20, 100):
        lead = jnp.zeros((1, 1, classes)).at[..., 0].set(3.0)
        first = Categorical().predictive(lead, jnp.full_like(lead, 4.0)).mean()[0, 0]
        gaps = []
        for variance in VARIANCES:
            mean = 3 * rng.normal(size=classes)
            given = jnp.asarray(mean, float)[None, None]
            found = np.asarray(Categorical().predictive(given, jnp.full_like(given, variance)).mean()[0])
            gaps.append(np.abs(found - monte_carlo(mean, variance, draws, rng)).max())
        print(f"{classes:7d} {first:15.3f} |" + "".join(f" {gap:8.4f}" for gap in gaps), flush=True)


if __name__ == "__main__":
    main(100_000 if "--quick" in sys.argv else 1_000_000)
