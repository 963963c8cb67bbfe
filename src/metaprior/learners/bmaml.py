"""Bayesian MAML (Yoon, Kim, Dia, Kim, Bengio & Ahn 2018): the initialisation is a set of particles.

Algorithm 2 with the chaser loss, line by line: the chaser is the result of n Stein steps on the support from Theta_0
(line 5), the leader that of s further steps on support and query (line 6). The meta-loss is their squared distance,
with the leader held constant (line 8). loss="mixture" is the query's nll under the particles' mixture instead; with one
particle this is MAML.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count, NonNegative, Whole
from metaprior.core.types import Batch, Learner, Model, Task, counted, joined, weighted_mean
from metaprior.inference.curvature.rows import normal_like
from metaprior.inference.descent import count, descend, half_square, mean_nll, trajectory
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.particles import Particles, predict_with, stein
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.knobs import with_noise
from metaprior.learners.builders.normalised import predicts_alone
from metaprior.learners.traits import traits


# The prior of the particles is only their start, which they forget over many steps: few steps for "nuts prior".
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
@passes_options_to(InnerLoop)
def bmaml(
    model: Model,
    likelihood: Likelihood,
    *,
    particles: Count = 5,
    leader_steps: Whole = 1,
    loss: str = "chaser",
    weight_precision: NonNegative = 0.0,
    **inner: Any,
) -> Learner:
    """Meta-learns M particles, which adapt together by Stein variational gradient descent.

    Params and posterior hold them along a leading axis.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        particles: M, the number of particles. Each has its own random start.
        leader_steps: Number s of further Stein steps of the leader.
        loss: "chaser", the squared distance to the leader, or "mixture", the query's nll under the mixture.
        weight_precision: Precision of a prior N(0, 1 / precision) on each particle's weights. 0: flat.
        inner: Options of the Stein steps, see `InnerLoop`. They descend the mean nll; the kernel's repulsion is divided
            by the number of examples as well.

    References:
        Yoon et al. (2018), Algorithm 2.
    """
    if loss not in ("chaser", "mixture"):
        raise ValueError(f"loss must be 'chaser' or 'mixture', got {loss!r}.")

    loop = InnerLoop(**inner)

    def init(key: PRNGKeyArray, task: Task) -> PyTree:
        return jax.vmap(lambda k: model.init(k, task.support.x))(jax.random.split(key, particles))

    def fit(data: Batch) -> tuple[Callable[[PyTree], Scalar], optax.GradientTransformation]:
        """Returns the sum of the particles' losses (each has its own gradient) and the Stein optimiser for it."""

        def one(phi: PyTree) -> Scalar:
            nll = mean_nll(likelihood, model.apply(phi, data.x), data)
            pull = weight_precision * half_square(phi, jax.tree.map(jnp.zeros_like, phi)) if weight_precision else 0.0
            return nll + pull / count(data)

        return lambda phis: jax.vmap(one)(phis).sum(), optax.chain(stein(data), loop.transformation())

    def adapt(params: PyTree, support: Batch, key: PRNGKeyArray) -> Particles:
        energy, optimizer = fit(support)
        return Particles(descend(energy, params, optimizer, loop.on_new_task).phi)

    def path(params: PyTree, support: Batch, key: PRNGKeyArray) -> Particles:
        energy, optimizer = fit(support)
        return Particles(trajectory(energy, params, optimizer, loop.on_new_task).phi)

    def meta_loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        energy, optimizer = fit(task.support)
        chaser = loop.descend(energy, params, optimizer).phi
        outputs: Array = jax.vmap(lambda phi: model.apply(phi, task.query.x))(chaser)
        metrics = fit_metrics(likelihood, outputs.mean(0), task.query)
        if loss == "mixture":
            logs = likelihood.predictive(outputs).log_prob(counted(task.query).y)
            return -weighted_mean(logs, task.query), metrics
        energy, optimizer = fit(joined(task))
        leader = descend(energy, jax.lax.stop_gradient(chaser), optimizer, leader_steps, first_order=True).phi
        return 2 * half_square(chaser, jax.lax.stop_gradient(leader)), metrics

    def predicting(shown: Likelihood) -> Learner:
        def predictive(model: Model) -> Callable[..., Any]:
            return lambda params, posterior, x, key: predict_with(model.apply, shown, posterior, x)

        learner = Learner(init, adapt, predictive(model), meta_loss, path)
        return learner if loop.transductive else predicts_alone(learner, predictive, model)

    return with_noise(predicting, likelihood)
