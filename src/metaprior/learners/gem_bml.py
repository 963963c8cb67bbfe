"""Gradient-EM Bayesian meta-learning (Zou & Lu 2020): learns a prior from posteriors, without back-propagation.

Algorithm 1: q_S = VI(prior Theta, support), q_SQ = VI(prior q_S, query). By Theorem 1 the gradient of log p(D | Theta)
is g(q) = E_q grad log p(phi | Theta), which for Gaussians has a closed form.

* GEM-BML ascends log p(support, query): g(q_SQ).
* GEM-BML+ ascends log p(query | support): g(q_SQ) - g(q_S).
* The KL-chaser descends KL(stop(q_SQ) || q_S) through the inference of q_S: the same objective, another estimator.

The paper's line 10 prints a descent on the log likelihood; this is a slip, corrected here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Whole
from metaprior.core.types import Learner, Model, Task
from metaprior.inference.gaussian import DiagonalGaussian, around, cross_entropy, kl
from metaprior.inference.variational import Variational, infer
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.variational import BUDGETS, SILENT, variational_learner
from metaprior.learners.traits import traits


def gem_gradient(
    prior: DiagonalGaussian, posterior: DiagonalGaussian, before: DiagonalGaussian | None = None
) -> DiagonalGaussian:
    """Computes the gradient of log p(D | Theta) with respect to the prior's (mean, log_sd), from posteriors alone.

    It needs no data, so these may be on another machine. It is exact where the posteriors are (Zou & Lu 2020, Theorem
    1). Each leaf of the gradient depends only on the same leaf of the arguments.

    Args:
        prior: Theta.
        posterior: The posterior given all of D.
        before: The posterior given the support. With it the result is the gradient of log p(query | support)
            (GEM-BML+).
    """

    def g(q: DiagonalGaussian) -> DiagonalGaussian:
        mean = jax.tree.map(lambda m, mu, s: (m - mu) * jnp.exp(-2 * s), q.mean, *prior)
        log_sd = jax.tree.map(
            lambda m, t, mu, s: (jnp.exp(2 * t) + (m - mu) ** 2) * jnp.exp(-2 * s) - 1, q.mean, q.log_sd, *prior
        )
        return DiagonalGaussian(mean, log_sd)

    return g(posterior) if before is None else jax.tree.map(jnp.subtract, g(posterior), g(before))


def natural(gradient: DiagonalGaussian, prior: DiagonalGaussian) -> DiagonalGaussian:
    """Computes the natural gradient (Amari 1998).

    It divides by the Fisher information of the prior: a factor of sigma^2 for the mean and 1/2 for log sigma.
    """
    mean = jax.tree.map(lambda g, s: g * jnp.exp(2 * s), gradient.mean, prior.log_sd)
    return DiagonalGaussian(mean, jax.tree.map(lambda g: g / 2, gradient.log_sd))


def ascends(theta: DiagonalGaussian, gradient: DiagonalGaussian) -> Scalar:
    """Returns a scalar of value 0 whose gradient in theta is minus `gradient`, which is held constant."""
    here, gradient = jax.lax.stop_gradient((theta, gradient))
    along = jax.tree.map(lambda t, h, g: (g * (h - t)).sum(), theta, here, gradient)
    return jnp.asarray(sum(jax.tree.leaves(along)))


def two_posteriors(
    model: Model, likelihood: Likelihood, theta: DiagonalGaussian, task: Task, key: PRNGKeyArray, how: Variational
) -> tuple[DiagonalGaussian, DiagonalGaussian]:
    """Returns (q_S, q_SQ), lines 2 and 3 of the subroutine; q_S is the prior of q_SQ. Both are constants to gradients.

    Args:
        model: The network.
        likelihood: Likelihood of the support and the query.
        theta: The prior.
        task: The task.
        key: Random key.
        how: Options of the inference.
    """
    key_support, key_query = jax.random.split(key)
    prior = jax.lax.stop_gradient(theta)
    q_s = infer(model, likelihood, prior, task.support, key_support, how, first_order=True)
    q_sq = infer(model, likelihood, q_s, task.query, key_query, how, first_order=True)
    return jax.lax.stop_gradient((q_s, q_sq))


@traits(
    estimates=True,
    small={"steps": 10, "rate": 0.02, "draws": 4},
    silent=SILENT,
    referees=BUDGETS,
    standard=lambda zero, options, key: around(zero, 0.0),
)
@passes_options_to(Variational, without=("first_order",))
def gem_bml(
    model: Model,
    likelihood: Likelihood,
    *,
    log_sd: float = -3.0,
    draws: Whole = 16,
    predictive: bool = False,
    precondition: bool = True,
    **inference: Any,
) -> Learner:
    """Meta-learns a Gaussian prior over weights by gradient-EM, whose memory does not grow with the inner steps.

    The reported loss is the query's mean nll at the mean of q_S. Its gradient is the gradient-EM estimate, not the
    derivative of that value.

    Args:
        model: The network.
        likelihood: Likelihood of the support and the query.
        log_sd: Logarithm of the prior's standard deviation before training.
        draws: Number of networks that a prediction averages. 0: the linearised predictive, in closed form.
        predictive: Whether to ascend log p(query | support) (GEM-BML+) instead of log p(support, query).
        precondition: Whether to use the natural gradient (times sigma^2 for the mean). False is the paper's formula,
            with which a small sigma makes huge steps.
        inference: Other options of the inference, see `Variational`.

    References:
        Zou & Lu (2020), Algorithm 1 and Theorem 1.
    """
    how = Variational(**inference)

    def loss(theta: DiagonalGaussian, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        q_s, q_sq = two_posteriors(model, likelihood, theta, task, key, how)
        gradient = gem_gradient(theta, q_sq, q_s if predictive else None)
        step = ascends(theta, natural(gradient, theta) if precondition else gradient)
        metrics = jax.lax.stop_gradient(fit_metrics(likelihood, model.apply(q_s.mean, task.query.x), task.query))
        surprise = cross_entropy(q_sq, theta) - (cross_entropy(q_s, theta) if predictive else 0.0)
        return metrics["nll"] + step, metrics | {"cross_entropy": jax.lax.stop_gradient(surprise)}

    return variational_learner(model, likelihood, how, loss, log_sd=log_sd, draws=draws, differentiated=False)


@traits(
    estimates=True,
    small={"steps": 10, "rate": 0.02, "draws": 4},
    silent=SILENT,
    referees={"truth": BUDGETS["truth"]},
)
@passes_options_to(gem_bml, without=("predictive",))
def gem_bml_plus(model: Model, likelihood: Likelihood, **options: Any) -> Learner:
    """Meta-learns a Gaussian prior by gradient-EM of log p(query given support) (GEM-BML+).

    Args:
        model: As in `gem_bml`.
        likelihood: As in `gem_bml`.
        options: As in `gem_bml`, without `predictive`.

    References:
        Zou & Lu (2020), Algorithm 1.
    """
    return gem_bml(model, likelihood, predictive=True, **options)


@traits(
    estimates=True,
    small={"steps": 3, "rate": 0.02, "optimizer": "sgd", "draws": 4},
    silent=SILENT,
    referees={"truth": BUDGETS["truth"]},
)
@passes_options_to(Variational, without=("first_order",))
def kl_chaser(
    model: Model, likelihood: Likelihood, *, log_sd: float = -3.0, draws: Whole = 16, **inference: Any
) -> Learner:
    """Meta-learns a Gaussian prior that moves the support's posterior towards the posterior of all data.

    The loss is KL(stop(q_SQ) || q_S); its gradient flows through the inference of q_S.

    Args:
        model: The network.
        likelihood: Likelihood of the support and the query.
        log_sd: Logarithm of the prior's standard deviation before training.
        draws: Number of networks that a prediction averages. 0: the linearised predictive, in closed form.
        inference: Other options of the inference, see `Variational`.

    References:
        Zou & Lu (2020), Table 1.
    """
    how = Variational(**inference)

    def loss(theta: DiagonalGaussian, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        key_chaser, key_leader = jax.random.split(key)
        q_s = infer(model, likelihood, theta, task.support, key_chaser, how)
        ahead = jax.lax.stop_gradient(q_s)
        leader = infer(model, likelihood, ahead, task.query, key_leader, how, first_order=True, differentiated=True)
        metrics = fit_metrics(likelihood, model.apply(q_s.mean, task.query.x), task.query)
        return kl(jax.lax.stop_gradient(leader), q_s), jax.lax.stop_gradient(metrics)

    return variational_learner(model, likelihood, how, loss, log_sd=log_sd, draws=draws)
