"""The variance that the implicit posterior gives over the exact one, by inner optimiser, on linear-Gaussian tasks.

    python benchmarks/reliability/implicit.py [--quick]

The exact one is a dense recursion in NumPy: phi after k steps on 1/2 phi' H phi - b' phi is A theta + C b, and C is the
covariance. Each task has 8 weights in three tensors, 3 to 12 rows and 8 random directions; rates are so small that no
step overshoots. Figures are in float64.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from metaprior.core.likelihoods import Gaussian
from metaprior.core.types import Batch, Learner, Model, Task
from metaprior.inference.posteriors import implicit
from metaprior.learners import anil, lslr, maml, meta_sgd, preconditioned

SD, STEPS, KEY = 0.7, 4, jax.random.key(0)
LSLR = np.array([0.10, 0.08, 0.05, 0.005])


def init(key, x):
    return {"body": {"b": jnp.zeros(()), "w": jnp.zeros((4, 1))}, "head": {"w": jnp.zeros((3, 1))}}


MODEL = Model(init, lambda phi, x: x[:, :4] @ phi["body"]["w"] + phi["body"]["b"] + x[:, 4:] @ phi["head"]["w"])
SIZE, TENSORS = 8, np.repeat([0, 1, 2], [1, 4, 3])  # of the flattened phi


def exact(h: np.ndarray, rates: list[np.ndarray], momentum: float = 0.0, nesterov: bool = False) -> np.ndarray:
    """C for steps C <- C - B v, v <- (H C - I) + momentum v; its symmetric part."""
    c = v = np.zeros_like(h)
    for b in rates:
        g = h @ c - np.eye(len(h))
        v = g + momentum * v
        c = c - b @ (g + momentum * v if nesterov else v)
    return (c + c.T) / 2


def cases(rate: float, rng: np.random.Generator) -> dict[str, tuple[Learner, object, list[np.ndarray], dict]]:
    """Learner, its rule of rates (None: theta is all there is), B of each step, and momentum; by optimiser."""
    rule, schedule = implicit(), optax.cosine_decay_schedule(rate, STEPS + 2)
    eye, unravel = np.eye(SIZE), ravel_pytree(init(None, None))[1]

    def descent(optimizer):
        return maml(MODEL, Gaussian(SD), steps=STEPS, optimizer=optimizer, posterior=rule)

    falling = [float(schedule(t)) * eye for t in range(STEPS)]
    heavy = {"momentum": 0.9, "nesterov": True}
    head, own = (make(MODEL, Gaussian(SD), steps=STEPS, rate=rate, posterior=rule) for make in (anil, meta_sgd))
    fixed, slow = [rate * eye] * STEPS, [rate / 10 * eye] * STEPS
    each = rate * rng.uniform(0.1, 1, SIZE)
    tables = LSLR[[rng.permutation(4) for _ in range(3)]] * rate / LSLR.max()
    built = {
        "`maml`, SGD": (descent(optax.sgd(rate)), None, fixed, {}),
        "SGD, cosine schedule": (descent(optax.sgd(schedule)), None, falling, {}),
        "SGD, momentum 0.9": (descent(optax.sgd(rate / 10, momentum=0.9)), None, slow, {"momentum": 0.9}),
        "SGD, Nesterov 0.9": (descent(optax.sgd(rate / 10, momentum=0.9, nesterov=True)), None, slow, heavy),
        "`anil`": (head, None, [rate * np.eye(3)] * STEPS, {}),
        "`meta_sgd`": (own, unravel(each), [np.diag(each)] * STEPS, {}),
        "`lslr`": (
            lslr(MODEL, Gaussian(SD), steps=STEPS, posterior=rule),
            jax.tree.unflatten(jax.tree.structure(init(None, None)), [jnp.array(row) for row in tables]),
            [np.diag(tables[TENSORS, t]) for t in range(STEPS)],
            {},
        ),
    }
    for rank in (0, 2):
        learner = preconditioned(MODEL, Gaussian(SD), steps=STEPS, rank=rank, posterior=rule)
        factor = (rate / 40) ** 0.5 * rng.normal(size=(SIZE, rank))
        b = np.diag(each / 2) + factor @ factor.T
        made = learner.init(KEY, Task(*[Batch(jnp.zeros((1, SIZE)), jnp.zeros((1, 1)))] * 2)).rule
        made = made._replace(log_diagonal=jnp.log(each / 2), factor=jnp.asarray(factor))
        built[f"`preconditioned`, rank {rank}"] = learner, made, [b] * STEPS, {}
    return built


def ratios(name: str, case: tuple, x: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Given over exact variance in 8 random directions, and the asymmetry that the posterior reports."""
    learner, rule, rates, momentum = case
    params = init(None, None)
    if rule is not None:
        made = learner.init(KEY, Task(*[Batch(jnp.zeros((1, SIZE)), jnp.zeros((1, 1)))] * 2))
        params = made._replace(theta=params, rule=rule)
    batch = Batch(jnp.asarray(x[:, 1:]), jnp.asarray(rng.normal(size=(len(x), 1))))
    posterior = jax.jit(learner.adapt)(params, batch, KEY).posterior
    kept = TENSORS == 2 if name == "`anil`" else TENSORS >= 0
    h = (x.T @ x / SD**2 / len(x))[np.ix_(kept, kept)]
    c = exact(h, rates, **momentum) / len(x)
    unravel = ravel_pytree(posterior.mean)[1]
    rows = rng.normal(size=(8, len(h)))
    given = np.array([posterior.quadratic(unravel(jnp.asarray(row))) for row in rows])
    return given / np.einsum("np,pq,nq->n", rows, c, rows), float(getattr(posterior, "asymmetry", 0.0))


def main(tasks: int) -> None:
    rng, found = np.random.default_rng(0), {}
    for _ in range(tasks):
        # The flattened phi is b, w of the body, w of the head: the first column of x is 1.
        x = rng.normal(size=(rng.integers(3, 13), SIZE))
        x[:, 0] = 1
        rate = 0.9 / np.linalg.eigvalsh(x.T @ x / SD**2 / len(x))[-1]
        for name, case in cases(rate, rng).items():
            found.setdefault(name, []).append(ratios(name, case, x, rng))
    print("| optimiser | largest gap of given / exact from 1 | asymmetry |\n| --- | --- | --- |")
    for name, several in found.items():
        gap = max(np.abs(r - 1).max() for r, _ in several)
        print(f"| {name} | {gap:.0e} | {max(a for _, a in several):.2g} |", flush=True)


if __name__ == "__main__":
    with jax.enable_x64(True):
        main(1 if "--quick" in sys.argv else 20)
