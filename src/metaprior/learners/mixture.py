"""Gradient-EM with a mixture of Gaussians as the prior, for families of tasks with several modes.

p(phi | Theta) = sum_k w_k N(phi; mu_k, sigma_k^2). Each component has its own posterior q_k. A task's responsibilities
r_k are proportional to w_k exp(ELBO_k). The gradient of log p(D | Theta) is r_k g(q_k) in component k and r_k - w_k in
log w_k. The E step is that of Dempster, Laird & Rubin (1977); the rest is Zou & Lu (2020), see `gem_bml`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count
from metaprior.core.types import Batch, Learner, Model, Task, counted, weighted_mean
from metaprior.inference.descent import count
from metaprior.inference.gaussian import DiagonalGaussian, around
from metaprior.inference.variational import Variational, free_energy, infer
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.knobs import with_noise
from metaprior.learners.builders.normalised import predicts_alone
from metaprior.learners.builders.variational import SILENT
from metaprior.learners.gem_bml import ascends, gem_gradient, natural
from metaprior.learners.traits import traits


class Mixture(NamedTuple):
    """A mixture of K Gaussians: the prior, or a posterior.

    Attributes:
        components: The Gaussians, stacked along a leading axis.
        logits: Logarithms of their weights, up to a constant.
    """

    components: DiagonalGaussian
    logits: Float[Array, " k"]

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws one phi."""
        key_which, key_phi = jax.random.split(key)
        which = jax.random.categorical(key_which, self.logits)
        return jax.tree.map(lambda leaf: leaf[which], self.components).sample(key_phi)


@traits(estimates=True, small={"components": 2, "steps": 10, "rate": 0.02, "draws": 8}, silent=SILENT)
@passes_options_to(Variational, without=("first_order",))
def gem_mixture(
    model: Model,
    likelihood: Likelihood,
    *,
    components: Count = 3,
    log_sd: float = -3.0,
    draws: Count = 32,
    **inference: Any,
) -> Learner:
    """Meta-learns a mixture of Gaussians over weights, for families of tasks with several modes.

    It uses gradient-EM. The posterior is a mixture of as many Gaussians.

    Args:
        model: The network.
        likelihood: Likelihood of the support and the query.
        components: K, the number of Gaussians.
        log_sd: Logarithm of each component's standard deviation before training.
        draws: Number of networks that a prediction averages.
        inference: Other options of the inference, see `Variational`.

    References:
        Zou & Lu (2020), Theorem 1; Dempster, Laird & Rubin (1977).
    """
    how = Variational(**inference)

    def init(key: PRNGKeyArray, task: Task) -> Mixture:
        keys = jax.random.split(key, components)
        return Mixture(jax.vmap(lambda k: around(model.init(k, task.support.x), log_sd))(keys), jnp.zeros(components))

    def posterior(prior: Mixture, batch: Batch, key: PRNGKeyArray, steps: int) -> Mixture:
        """Returns the posterior of each component, with the responsibilities as weights."""
        key_fit, key_judge = jax.random.split(key)

        def one(component: DiagonalGaussian) -> tuple[DiagonalGaussian, Scalar]:
            q = infer(model, likelihood, component, batch, key_fit, how, steps=steps, first_order=True)
            evidence = -count(batch) * free_energy(model, likelihood, component, batch, how)(q, key_judge)
            return q, evidence

        q, evidence = jax.vmap(one)(prior.components)
        return Mixture(q, jax.nn.log_softmax(prior.logits + evidence))

    def adapt(params: Mixture, support: Batch, key: PRNGKeyArray) -> Mixture:
        return posterior(params, support, key, how.on_new_task)

    def kinds(params: Mixture, support: Batch, key: PRNGKeyArray) -> Float[Array, " k"]:
        return jnp.exp(adapt(params, support, key).logits)

    def drawn(model: Model, adapted: Mixture, x: PyTree, key: PRNGKeyArray) -> Array:
        """Returns the outputs of `draws` networks, [draws, n, c]."""
        return jax.vmap(lambda k: model.apply(adapted.sample(k), x))(jax.random.split(key, draws))

    def loss(params: Mixture, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        key_support, key_query, key_show = jax.random.split(key, 3)
        theta = jax.lax.stop_gradient(params)
        after_support = posterior(theta, task.support, key_support, how.steps)
        found = jax.lax.stop_gradient(posterior(after_support, task.query, key_query, how.steps))
        share = jnp.exp(found.logits)

        def component(prior: DiagonalGaussian, q: DiagonalGaussian, r: Scalar) -> Scalar:
            gradient = natural(gem_gradient(prior, q), prior)
            return ascends(prior, jax.tree.map(lambda g: r * g, gradient))

        pull = jax.vmap(component)(params.components, found.components, share).sum()
        weights = -(share * jax.nn.log_softmax(params.logits)).sum()
        mixed = likelihood.predictive(drawn(model, after_support, task.query.x, key_show))
        shown = mixed.log_prob(counted(task.query).y)
        best = jax.tree.map(lambda leaf: leaf[share.argmax()], after_support.components.mean)
        metrics = fit_metrics(likelihood, model.apply(best, task.query.x), task.query)
        nll = -weighted_mean(shown, task.query)
        held = jax.lax.stop_gradient(nll - weights)
        return pull + weights + held, jax.lax.stop_gradient(metrics | {"nll": nll, "largest_share": share.max()})

    def predicting(shown: Likelihood) -> Learner:
        def predictive(model: Model) -> Callable[..., Any]:
            return lambda params, adapted, x, key: shown.predictive(drawn(model, adapted, x, key))

        learner = Learner(init, adapt, predictive(model), loss, kinds=kinds)
        return learner if how.transductive else predicts_alone(learner, predictive, model)

    return with_noise(predicting, likelihood)
