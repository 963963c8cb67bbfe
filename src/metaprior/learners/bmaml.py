"""Bayesian MAML (Yoon, Kim, Dia, Kim, Bengio & Ahn 2018): a set of particles as initialisation, moved together.

Algorithm 2 with the chaser loss, line by line: the chaser is n Stein steps on the support from Theta_0 (line 5), the
leader s further steps on support and query (line 6), and the meta-loss their squared distance with the leader held
still (line 8). loss="mixture" scores the query under the particles' mixture instead, which for one particle is MAML.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.options import Count, InnerOptimizer, NonNegative, Whole, checked
from metaprior.core.types import Batch, Learner, Model, Task, counted, joined, weighted_mean
from metaprior.inference.curvature.rows import normal_like
from metaprior.inference.descent import count, descend, half_square, make_optimizer, mean_nll, trajectory
from metaprior.inference.particles import Particles, predict_with, stein
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.traits import traits


# On the whole prior its particles forget where they started, which is all that their prior is: few steps there.
@traits(
    estimates=True,
    small={"particles": 3, "steps": 2, "rate": 0.05},
    referees={
        "truth": {"particles": 10, "steps": 20, "leader_steps": 20, "rate": 0.05},
        "nuts": {"particles": 20, "steps": 1000, "rate": 0.1, "weight_precision": 1.0},
        "nuts prior": {"particles": 10, "steps": 20, "leader_steps": 20, "rate": 0.1},
    },
    standard=lambda zero, options, key: normal_like(
        key, jax.tree.map(lambda leaf: jnp.zeros((options["particles"], *leaf.shape)), zero)
    ),
)
@checked
def bmaml(
    model: Model,
    likelihood: Likelihood,
    *,
    particles: Count = 5,
    steps: Whole = 1,
    leader_steps: Whole = 1,
    rate: NonNegative = 0.01,
    optimizer: InnerOptimizer = "sgd",
    loss: str = "chaser",
    weight_precision: NonNegative = 0.0,
    test_steps: Whole | None = None,
    remat: bool = False,
) -> Learner:
    """Meta-learn M particles; params and posterior hold them along a leading axis.

    particles: M, each from its own random start. steps, leader_steps: n and s. rate, optimizer: of the inner Stein
    steps, on the mean nll, the kernel's repulsion divided by the number of examples with it. loss: "chaser" or
    "mixture". weight_precision: of a prior N(0, 1 / precision) on each particle's weights (0: flat).
    """
    if loss not in ("chaser", "mixture"):
        raise ValueError(f"loss: came {loss!r}, needs 'chaser' or 'mixture'")

    at_test = steps if test_steps is None else test_steps

    def init(key: PRNGKeyArray, task: Task) -> PyTree:
        return jax.vmap(lambda k: model.init(k, task.support.x))(jax.random.split(key, particles))

    def fit(data: Batch) -> tuple[Callable[[PyTree], Scalar], optax.GradientTransformation]:
        """The sum of the particles' losses (each has its own gradient), and the Stein optimiser on it."""

        def one(phi: PyTree) -> Scalar:
            nll = mean_nll(likelihood, model.apply(phi, data.x), data)
            pull = weight_precision * half_square(phi, jax.tree.map(jnp.zeros_like, phi)) if weight_precision else 0.0
            return nll + pull / count(data)

        return lambda phis: jax.vmap(one)(phis).sum(), optax.chain(stein(data), make_optimizer(optimizer, rate))

    def adapt(params: PyTree, support: Batch, key: PRNGKeyArray) -> Particles:
        energy, optimizer = fit(support)
        return Particles(descend(energy, params, optimizer, at_test).phi)

    def path(params: PyTree, support: Batch, key: PRNGKeyArray) -> Particles:
        energy, optimizer = fit(support)
        return Particles(trajectory(energy, params, optimizer, at_test).phi)

    def predict(params: PyTree, posterior: Particles, x: PyTree, key: PRNGKeyArray) -> Any:
        return predict_with(model.apply, likelihood, posterior, x)

    def meta_loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        energy, optimizer = fit(task.support)
        chaser = descend(energy, params, optimizer, steps, remat=remat).phi
        outputs: Array = jax.vmap(lambda phi: model.apply(phi, task.query.x))(chaser)
        metrics = fit_metrics(likelihood, outputs.mean(0), task.query)
        if loss == "mixture":
            logs = likelihood.predictive(outputs).log_prob(counted(task.query).y)
            return -weighted_mean(logs, task.query), metrics
        energy, optimizer = fit(joined(task))
        leader = descend(energy, jax.lax.stop_gradient(chaser), optimizer, leader_steps, first_order=True).phi
        return 2 * half_square(chaser, jax.lax.stop_gradient(leader)), metrics

    return Learner(init, adapt, predict, meta_loss, path)
