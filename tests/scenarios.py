"""Shared problems, small enough to train in a second."""

import jax

from metaprior.learners import maml
from metaprior.likelihoods import Gaussian
from metaprior.networks import mlp
from metaprior.tasks import sinusoid
from metaprior.training import Training
from metaprior.types import Learner, Splits

TINY = Training(steps=12, meta_batch=4, chunk=4, validate_every=4, validation_tasks=6, rate=1e-2)


def tiny_learner(hidden: int = 8, rate: float = 0.01) -> Learner:
    """MAML with one hidden layer."""
    return maml(mlp(1, (hidden,), "tanh"), Gaussian(), rate=rate)


def tiny_splits() -> Splits:
    """Sinusoids from five points."""
    return sinusoid(shot=5, query=5, test_query=5)


def same_bits(a, b) -> bool:
    """Whether two pytrees hold the same arrays, to the bit."""
    return all(
        (u == v).all() for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
