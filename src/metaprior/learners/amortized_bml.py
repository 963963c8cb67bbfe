"""Amortised Bayesian meta-learning (Ravi & Beatson 2019): learns a Gaussian prior through variational inference.

Sec. 3: theta = (mu, sigma) is the prior N(mu, sigma^2) *and* the start of every task's variational inference. A task's
variational parameters lambda are the result of k gradient steps on the support's negative ELBO. theta descends the
negative ELBO of *all* the task's data under q(phi; lambda), through those steps, plus the negative log of a
hyper-prior: mu ~ N(0, I), 1 / sigma^2 ~ Gamma(a0, b0).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import NonNegative, Positive, Whole
from metaprior.core.types import Learner, Model, Task, joined
from metaprior.inference.gaussian import DiagonalGaussian, around, kl
from metaprior.inference.variational import Variational, free_energy, infer
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.variational import BUDGETS, SILENT, variational_learner
from metaprior.learners.traits import traits


def hyper_nll(theta: DiagonalGaussian, a0: float, b0: float) -> Scalar:
    """Computes -log p(theta) up to a constant: 1/2 |mu|^2 - sum [(a0 - 1) log tau - b0 tau], tau = 1 / sigma^2.

    Args:
        theta: The prior, in (mean, log_sd).
        a0: Shape of the Gamma hyper-prior of tau.
        b0: Rate of the Gamma hyper-prior of tau.
    """

    def leaf(mean: Any, log_sd: Any) -> Any:
        return (0.5 * mean**2 + 2 * (a0 - 1) * log_sd + b0 * jnp.exp(-2 * log_sd)).sum()

    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(leaf, *theta))))


@traits(
    small={"steps": 3, "rate": 0.02, "draws": 4},
    silent=SILENT,
    referees=BUDGETS,
    standard=lambda zero, options, key: around(zero, 0.0),
)
@passes_options_to(Variational, optimizer="sgd")
def amortized_bml(
    model: Model,
    likelihood: Likelihood,
    *,
    log_sd: float = -3.0,
    hyperprior: NonNegative = 0.0,
    a0: Positive = 2.0,
    b0: Positive = 0.2,
    draws: Whole = 16,
    **inference: Any,
) -> Learner:
    """Meta-learns a Gaussian prior over weights by the ELBO of all data of a task, through the steps of its inference.

    The metrics are those of the query at the posterior's mean.

    Args:
        model: The network.
        likelihood: Likelihood of the support and the query.
        log_sd: Logarithm of the prior's standard deviation before training.
        hyperprior: Weight of -log p(theta). 0 leaves it out; the paper's is 1 / (number of tasks x examples per task).
        a0: Shape of the Gamma hyper-prior of 1 / sigma^2.
        b0: Rate of the Gamma hyper-prior of 1 / sigma^2.
        draws: Number of networks that a prediction averages. 0: the linearised predictive, in closed form.
        inference: Other options of the inference, see `Variational`.

    References:
        Ravi & Beatson (2019), sec. 3.
    """
    how = Variational(**inference)

    def loss(theta: DiagonalGaussian, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        key_inner, key_outer = jax.random.split(key)
        q = infer(model, likelihood, theta, task.support, key_inner, how)
        energy = free_energy(model, likelihood, theta, joined(task), how)(q, key_outer)
        metrics = fit_metrics(likelihood, model.apply(q.mean, task.query.x), task.query) | {"kl": kl(q, theta)}
        return energy + hyperprior * hyper_nll(theta, a0, b0), metrics

    return variational_learner(model, likelihood, how, loss, log_sd=log_sd, draws=draws)
