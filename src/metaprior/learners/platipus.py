"""PLATIPUS, probabilistic MAML (Finn, Xu & Levine 2018): a Gaussian over the initialisation, a point after adaptation.

Algorithm 1 (training), line by line: q = N(mu - gamma_q grad L_Q(mu), v_q) from the query; theta ~ q; phi by k gradient
steps on the support from theta; p = N(mu - gamma_p grad L_S(mu), sigma^2) from the support; loss L_Q(phi) + KL(q || p).
Algorithm 2 (test): theta ~ p, and phi by k steps from theta. Each draw is one explanation of the support.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import NonNegative, Whole
from metaprior.core.types import Batch, Learner, Model, Task
from metaprior.inference.descent import Descent, count, descend, trajectory
from metaprior.inference.gaussian import DiagonalGaussian, around, kl
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.particles import Particles, predict_with
from metaprior.learners.builders.gradient import Adaptation, Loss, adapt_all, query_loss, support_loss
from metaprior.learners.builders.knobs import with_noise
from metaprior.learners.builders.normalised import predicts_alone
from metaprior.learners.traits import traits


class Initialisation(NamedTuple):
    """What PLATIPUS meta-learns.

    Attributes:
        prior: N(mu, sigma^2).
        log_sd_q: Logarithm of q's standard deviation, one per weight.
        log_rate_p: log gamma_p.
        log_rate_q: log gamma_q.
    """

    prior: DiagonalGaussian
    log_sd_q: PyTree
    log_rate_p: Scalar
    log_rate_q: Scalar


def _one_step(adaptation: Adaptation, likelihood: Likelihood, mu: PyTree, log_rate: Scalar, data: Batch) -> PyTree:
    """Computes mu - gamma grad L(mu)."""
    gradient = jax.grad(support_loss(adaptation, likelihood, None, data))(mu)
    return jax.tree.map(lambda m, g: m - jnp.exp(log_rate) * g, mu, gradient)


@traits(
    small={"steps": 2, "rate": 0.02, "draws": 4},
    silent={"log_sd": -15.0},
    referees={"truth": {"steps": 5, "rate": 0.05, "kl_weight": 1.0, "log_sd": -1.0, "draws": 100}},
)
@passes_options_to(InnerLoop, steps=5)
def platipus(
    model: Model,
    likelihood: Likelihood,
    *,
    kl_weight: NonNegative = 0.1,
    log_sd: float = -3.0,
    inference_rate: NonNegative = 0.01,
    draws: Whole = 16,
    **inner: Any,
) -> Learner:
    """Meta-learns a Gaussian over initialisations; a posterior is several adapted networks.

    The meta-learned parameters are mu, sigma, v_q and both inference rates.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        kl_weight: Weight of the KL, which is summed over weights and divided by the number of query examples. 1 is the
            variational bound; the paper uses 0.1.
        log_sd: Logarithm of the standard deviations of p and q before training.
        inference_rate: gamma_p and gamma_q before training.
        draws: Number of networks in a posterior, at least 1.
        inner: Options of the inner loop, see `InnerLoop`.

    Raises:
        ValueError: An option is out of range.

    References:
        Finn, Xu & Levine (2018), Algorithms 1 and 2.
    """
    loop = InnerLoop(**inner)
    adaptation = adapt_all(model, loop.transformation())

    def init(key: PRNGKeyArray, task: Task) -> Initialisation:
        prior = around(model.init(key, task.support.x), log_sd)
        step = jnp.log(jnp.asarray(inference_rate, float))
        return Initialisation(prior, prior.log_sd, step, step)

    def initial(params: Initialisation, support: Batch) -> DiagonalGaussian:
        mean = _one_step(adaptation, likelihood, params.prior.mean, params.log_rate_p, support)
        return DiagonalGaussian(mean, params.prior.log_sd)

    def loss(params: Initialisation, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        p = initial(params, task.support)
        mean = _one_step(adaptation, likelihood, params.prior.mean, params.log_rate_q, task.query)
        q = DiagonalGaussian(mean, params.log_sd_q)
        objective = query_loss(adaptation._replace(start=lambda _: q.sample(key)), likelihood, loop)
        nll, metrics = objective(None, task, key)
        gap = kl(q, p)
        return nll + kl_weight * gap / count(task.query), metrics | {"kl": gap}

    return _drawing(adaptation, model, likelihood, init, initial, loss, loop, draws)


@traits(
    small={"steps": 2, "rate": 0.02, "draws": 4},
    silent={"noise": 1e-6},
    referees={"truth": {"steps": 5, "rate": 0.05, "noise": 0.3, "draws": 100}},
)
@passes_options_to(InnerLoop, steps=5)
def maml_noise(
    model: Model, likelihood: Likelihood, *, noise: NonNegative = 0.05, draws: Whole = 16, **inner: Any
) -> Learner:
    """Trains as MAML and adds noise to the initialisation at test: an ablation of PLATIPUS.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        noise: Standard deviation of the noise, above 0.
        draws: Number of networks in a posterior, at least 1.
        inner: Options of the inner loop, see `InnerLoop`.

    Raises:
        ValueError: An option is out of range.

    References:
        Finn, Xu & Levine (2018).
    """
    if noise <= 0:
        raise ValueError(f"noise must be above 0, got {noise}.")
    loop = InnerLoop(**inner)
    adaptation = adapt_all(model, loop.transformation())

    def initial(params: PyTree, support: Batch) -> DiagonalGaussian:
        return around(params, jnp.log(noise))

    loss = query_loss(adaptation, likelihood, loop)
    return _drawing(adaptation, model, likelihood, adaptation.init, initial, loss, loop, draws)


def _drawing(
    adaptation: Adaptation,
    model: Model,
    likelihood: Likelihood,
    init: Callable[[PRNGKeyArray, Task], PyTree],
    initial: Callable[[PyTree, Batch], DiagonalGaussian],
    loss: Loss,
    loop: InnerLoop,
    draws: int,
) -> Learner:
    """Builds a learner whose posterior is `draws` networks, each adapted from a draw of initial(params, support)."""
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}.")

    def run(walk: Callable[..., Descent], params: PyTree, support: Batch, key: PRNGKeyArray) -> PyTree:
        start, fit = initial(params, support), support_loss(adaptation, likelihood, None, support)
        thetas = jax.vmap(start.sample)(jax.random.split(key, draws))
        return jax.vmap(lambda theta: walk(fit, theta, adaptation.optimizer(None), loop.on_new_task).phi)(thetas)

    def path(params: PyTree, support: Batch, key: PRNGKeyArray) -> Particles:
        course = run(trajectory, params, support, key)
        return Particles(jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), course))

    def adapt(params: PyTree, support: Batch, key: PRNGKeyArray) -> Particles:
        return Particles(run(descend, params, support, key))

    def predicting(shown: Likelihood) -> Learner:
        def predictive(model: Model) -> Callable[..., Any]:
            return lambda params, posterior, x, key: predict_with(model.apply, shown, posterior, x)

        learner = Learner(init, adapt, predictive(model), loss, path)
        return learner if loop.transductive else predicts_alone(learner, predictive, model)

    return with_noise(predicting, likelihood)
