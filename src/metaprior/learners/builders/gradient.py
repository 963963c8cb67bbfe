"""Builds gradient-based learners from three parts: an adaptation, a meta-objective and a posterior rule.

An `Adaptation` defines a task's parameters phi, the outputs that they give, and the optimiser that fits them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Gaussian, Likelihood
from metaprior.core.types import PLAIN, AtMean, Batch, Call, Learner, Model, Task, joined, weighted_mean
from metaprior.inference.descent import Descent, count, descend, inner_rates, mean_nll, trajectory
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import Implied, PosteriorRule
from metaprior.networks.statistics import by_support


class Adaptation(NamedTuple):
    """What is adapted, and by which optimiser.

    Attributes:
        model: The network, which `network` calls.
        init: (key, task) -> params, theta and whatever else is meta-learned.
        start: (params) -> phi, the task's parameters before the first step.
        network: (params, phi, x, call) -> [n, c], the outputs for phi; `outputs` evaluates it.
        optimizer: (params) -> optax transformation; learned rates, if any, come from params.
        penalty: (params, phi, support) -> scalar, added to the mean support nll, e.g. a proximal term.
        root: (params) -> S, where each update is -S S' gradient. S is shaped as phi, or a `Root`.
        by_tensor: Whether each update is linear in the gradients and treats all elements of a tensor alike.
        local: (params, support, key) -> params, the start of a task, which may depend on its support. It is applied
            before everything else in `adapt`, `path` and `loss`.
        kinds: (params) -> weights [k], see `Learner.kinds`; the params are those that `local` returns.
    """

    model: Model
    init: Callable[[PRNGKeyArray, Task], PyTree]
    start: Callable[[PyTree], PyTree]
    network: Callable[[PyTree, PyTree, PyTree, Call], Array]
    optimizer: Callable[[PyTree], optax.GradientTransformation]
    penalty: Callable[[PyTree, PyTree, Batch], Scalar] | None = None
    root: Callable[[PyTree], PyTree] | None = None
    by_tensor: bool = False
    local: Callable[[PyTree, Batch, PRNGKeyArray], PyTree] | None = None
    kinds: Callable[[PyTree], Array] | None = None

    def outputs(self, params: PyTree, phi: PyTree, x: PyTree, call: Call = PLAIN) -> Array:
        """Computes the outputs for phi; batch norm uses the statistics of the support where the model holds one."""
        return by_support(partial(self.network, params, phi), self.model.support)(x, call)


def adapt_all(model: Model, optimizer: optax.GradientTransformation) -> Adaptation:
    """Returns the adaptation of all parameters of the model from a meta-learned initialisation.

    Args:
        model: The network.
        optimizer: The inner optimiser.
    """
    return Adaptation(
        model,
        init=lambda key, task: model.init(key, task.support.x),
        start=lambda params: params,
        network=lambda params, phi, x, call: model.outputs(phi, x, call),
        optimizer=lambda params: optimizer,
    )


def one_by_one(outputs: Callable[..., Array], context: PyTree) -> Callable[..., Array]:
    """Computes the outputs of each input in a separate batch with the support (Nichol et al. 2018, sec. 6.1).

    Args:
        outputs: (phi, x, call) -> [n, c].
        context: The support's inputs.
    """

    def singly(phi: PyTree, x: PyTree, call: Call = PLAIN) -> Array:
        def one(xi: PyTree) -> Array:
            return outputs(phi, jax.tree.map(lambda s, q: jnp.concatenate([s, q[None]]), context, xi), call)[-1]

        return jax.lax.map(one, x)

    return singly


def support_loss(adaptation: Adaptation, likelihood: Likelihood, params: PyTree, support: Batch) -> Callable:
    """Returns the inner loop's objective: phi -> mean nll of the support set, plus the penalty if there is one.

    Args:
        adaptation: What is adapted.
        likelihood: Likelihood of the support.
        params: The meta-learned parameters.
        support: The support set.
    """

    def loss(phi: PyTree) -> Scalar:
        fit = mean_nll(likelihood, adaptation.outputs(params, phi, support.x), support)
        return fit if adaptation.penalty is None else fit + adaptation.penalty(params, phi, support)

    return loss


Loss = Callable[[PyTree, Task, PRNGKeyArray], tuple[Scalar, dict[str, Scalar]]]


class Adapted(NamedTuple):
    """The posterior over a task's phi.

    Attributes:
        posterior: What the posterior rule infers.
        context: The support's inputs, where each query is predicted in a batch with them alone. None: one batch.
        params: The params that the task started from, where these differ between tasks (`Adaptation.local`).
    """

    posterior: PyTree
    context: PyTree = None
    params: PyTree = None


def gradient_learner(
    adaptation: Adaptation,
    likelihood: Likelihood,
    loss: Loss,
    loop: InnerLoop,
    *,
    posterior: PosteriorRule,
    implied_precision: Callable[[PyTree, Batch], Scalar | float] | None = None,
    descends: bool = True,
) -> Learner:
    """Builds a learner that infers phi by optimiser steps.

    Args:
        adaptation: What is adapted.
        likelihood: Likelihood of the support and the query.
        loss: The meta-objective.
        loop: The inner loop; on a new task it runs `loop.on_new_task` steps.
        posterior: Rule that forms the posterior at the last phi.
        implied_precision: (params, support) -> the precision of an explicit prior N(theta, 1 / precision) that the
            inner loop optimises, in units of the summed nll (iMAML). None: the steps imply the prior.
        descends: False where a network chooses the steps: they then imply no prior.
    """
    steps, transductive = loop.on_new_task, loop.transductive

    def outputs(params: PyTree, context: PyTree) -> Callable:
        def jointly(phi: PyTree, x: PyTree, call: Call = PLAIN) -> Array:
            return adaptation.outputs(params, phi, x, call)

        return jointly if context is None else one_by_one(jointly, context)

    def implied(params: PyTree, support: Batch, at: Descent, k: int | Array) -> Implied:
        if not descends:
            return Implied(None, k)
        if implied_precision is not None:
            precision = implied_precision(params, support)
            return Implied(jax.tree.map(lambda leaf: jnp.full_like(leaf, precision**-0.5), at.phi), k, precision)
        # The inner loss is a mean: a rate a on it is a rate a/N on the sum, which is the negative log likelihood.
        unit = jnp.asarray(count(support), float) ** -0.5
        if adaptation.root is not None:
            return Implied(jax.tree.map(lambda root: root * unit.astype(root.dtype), adaptation.root(params)), k)
        optimizer = adaptation.optimizer(params)
        rates = inner_rates(support_loss(adaptation, likelihood, params, support), at, optimizer)
        scale = jax.tree.map(lambda r: jnp.sqrt(jnp.maximum(r, 0)) * unit.astype(r.dtype), rates)
        return Implied(scale, k, None, optimizer, steps, unit, adaptation.by_tensor)

    def infer(params: PyTree, support: Batch, at: Descent, k: int | Array) -> Adapted:
        around = posterior.infer(outputs(params, None), likelihood, at.phi, support, implied(params, support, at, k))
        kept = None if adaptation.local is None else params
        return Adapted(around, None if transductive else support.x, kept)

    def begun(params: PyTree, support: Batch, key: PRNGKeyArray) -> PyTree:
        return params if adaptation.local is None else adaptation.local(params, support, key)

    def adapt(params: PyTree, support: Batch, key: PRNGKeyArray) -> Adapted:
        params = begun(params, support, key)
        fit = support_loss(adaptation, likelihood, params, support)
        at = descend(fit, adaptation.start(params), adaptation.optimizer(params), steps)
        return infer(params, support, at, steps)

    def path(params: PyTree, support: Batch, key: PRNGKeyArray) -> Adapted:
        params = begun(params, support, key)
        fit = support_loss(adaptation, likelihood, params, support)
        course = trajectory(fit, adaptation.start(params), adaptation.optimizer(params), steps)
        return jax.vmap(lambda at, k: infer(params, support, at, k))(course, jnp.arange(steps + 1))

    def predict(params: PyTree, adapted: Adapted, x: PyTree, key: PRNGKeyArray) -> Any:
        params = params if adapted.params is None else adapted.params
        return posterior.predict(outputs(params, adapted.context), likelihood, adapted.posterior, x, key)

    def begun_loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        here, key = jax.random.split(key)
        return loss(begun(params, task.support, here), task, key)

    def network(params: PyTree, support: Batch, key: PRNGKeyArray) -> Callable[..., Array]:
        params = begun(params, support, key)
        return partial(adaptation.outputs, params, adaptation.start(params))

    def at_mean(params: PyTree, adapted: Adapted) -> AtMean:
        params = params if adapted.params is None else adapted.params
        phi = adapted.posterior.mean
        return AtMean(phi, partial(adaptation.outputs, params, phi))

    def kinds(params: PyTree, support: Batch, key: PRNGKeyArray) -> Array:
        assert adaptation.kinds is not None
        return adaptation.kinds(begun(params, support, key))

    def turned(knobs: Mapping[str, Any]) -> Learner:
        rule = posterior.turned(knobs)
        return gradient_learner(
            adaptation, likelihood, loss, loop, posterior=rule, implied_precision=implied_precision, descends=descends
        )

    whole, knobs = loss if adaptation.local is None else begun_loss, posterior.scalars(likelihood)
    return Learner(
        adaptation.init, adapt, predict, whole, path, network,
        knobs=knobs, turn=turned if knobs else None, at_mean=at_mean,
        kinds=None if adaptation.kinds is None else kinds,
    )  # fmt: skip


def query_learner(
    adaptation: Adaptation,
    likelihood: Likelihood,
    loop: InnerLoop,
    posterior: PosteriorRule,
) -> Learner:
    """Builds MAML with any adaptation: a learner trained by `query_loss`.

    Args:
        adaptation: What is adapted.
        likelihood: Likelihood of the support and the query.
        loop: The inner loop.
        posterior: Rule that forms the posterior at the last phi.
    """
    return gradient_learner(adaptation, likelihood, query_loss(adaptation, likelihood, loop), loop, posterior=posterior)


def query_loss(adaptation: Adaptation, likelihood: Likelihood, loop: InnerLoop) -> Loss:
    """Returns the meta-objective of MAML: the query's mean nll after the inner steps on the support.

    Args:
        adaptation: What is adapted.
        likelihood: Likelihood of the support and the query.
        loop: The inner loop.

    References:
        Finn, Abbeel & Levine (2017), Algorithm 2.
    """

    def loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        fit = support_loss(adaptation, likelihood, params, task.support)
        phi = loop.descend(fit, adaptation.start(params), adaptation.optimizer(params)).phi
        outputs = adaptation.outputs(params, phi, task.query.x)
        return mean_nll(likelihood, outputs, task.query), fit_metrics(likelihood, outputs, task.query)

    return loss


def pretraining_loss(model: Model, likelihood: Likelihood) -> Loss:
    """Returns the objective of pretraining: the model's mean nll of support and query together, without adaptation."""

    def loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        data = joined(task)
        outputs = model.apply(params, data.x)
        return mean_nll(likelihood, outputs, data), fit_metrics(likelihood, outputs, data)

    return loss


def fit_metrics(likelihood: Likelihood, outputs: Array, batch: Batch) -> dict[str, Scalar]:
    """Computes the metrics of a training curve: the mean nll, and the accuracy or the mean squared error."""
    metrics = {"nll": mean_nll(likelihood, outputs, batch)}
    if isinstance(likelihood, Categorical):
        metrics["accuracy"] = weighted_mean((outputs.argmax(-1) == batch.y).astype(outputs.dtype), batch)
    elif isinstance(likelihood, Gaussian):
        error = ((likelihood.predictive(outputs[None]).mean() - batch.y) ** 2).mean(-1)
        metrics["mse"] = weighted_mean(error, batch)
    return metrics
