"""TAML (Jamal & Qi 2019): MAML whose initial model is not biased towards some tasks.

Entropy form (classes): the meta-loss of a task is L_Q(phi) + w (H(phi) - H(theta)), where H is the mean entropy of the
predictions for the task's examples. The initial model is then undecided, and the adapted one is not.

Inequality form (any likelihood): the meta-loss is mean_i L_Q(phi_i) + w I(l_1, ..., l_J), where l_i = L_S(theta) is the
initial model's loss on task i, and I is a measure of inequality from economics.
"""

from functools import partial
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Bernoulli, Categorical, Categories, Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import NonNegative, Range, checked
from metaprior.core.types import Joint, Learner, Model, Task, joined, weighted_mean
from metaprior.inference.descent import mean_nll
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.learners.builders.gradient import (
    adapt_all,
    fit_metrics,
    gradient_learner,
    query_learner,
    support_loss,
)
from metaprior.learners.traits import five_steps, traits

Measure = Literal["theil", "generalised_entropy", "atkinson", "gini", "log_variance"]
Order = Annotated[float, Range(least=-100, most=100)]
Centre = Literal["geometric", "arithmetic"]


@checked
def inequality(
    losses: Float[Array, " J"],
    measure: Measure = "theil",
    *,
    order: Order = 0.5,
    centre: Centre = "geometric",
) -> Scalar:
    """Measures how unequal the losses of J tasks are: 0 if they are equal, and the same for all multiples of them.

    With r = l / mean(l):

    * "theil": mean(r log r).
    * "generalised_entropy" of order a: mean(r^a - 1) / (a (a - 1)); for a = 1 Theil's, for a = 0 -mean(log r).
    * "atkinson" of order e > 0: 1 - mean(r^(1 - e))^(1 / (1 - e)); for e = 1, 1 - exp(mean log r).
    * "gini": sum_ij |l_i - l_j| / (2 J^2 mean(l)).
    * "log_variance": mean((log l - log m)^2), where m is the geometric or the arithmetic mean of l (`centre`).

    Args:
        losses: The losses, at least two and all above 0.
        measure: The measure.
        order: The order of "generalised_entropy" or "atkinson".
        centre: The mean m of "log_variance".

    Raises:
        ValueError: There are fewer than two losses, one is not above 0 (compiled code, which cannot raise, returns
            NaN), or the order is not above 0 for "atkinson".
    """
    _check_order(measure, order)
    if losses.shape[0] < 2:
        raise ValueError(
            f"losses must be those of at least 2 tasks, got {losses.shape[0]}. Give training.meta_batch of at least 2."
        )
    if not isinstance(losses, Tracer) and (bad := np.asarray(losses)[~(np.asarray(losses) > 0)]).size:
        raise ValueError(
            f"losses must be above 0, got {bad[0]:g}. An inequality of losses has no meaning otherwise: give every "
            "support an example, and a likelihood whose nll is above 0."
        )
    fine = (losses > 0).all()
    losses = jnp.where(fine, losses, 1.0)  # so that no derivative is infinite
    r = losses / losses.mean()
    log = jnp.log(r)
    if measure == "theil" or (measure == "generalised_entropy" and order == 1):
        found = (r * log).mean()
    elif measure == "generalised_entropy":
        found = _generalised_entropy(r, log, order)
    elif measure == "atkinson":
        power = log.mean() if order == 1 else jnp.log1p(jnp.expm1((1 - order) * log).mean()) / (1 - order)
        found = -jnp.expm1(power)
    elif measure == "gini":
        found = jnp.abs(r[:, None] - r).mean() / 2
    else:
        found = ((log - (log.mean() if centre == "geometric" else 0)) ** 2).mean()
    return jnp.where(fine, found, jnp.nan)


def _generalised_entropy(r: Array, log: Array, a: float) -> Scalar:
    """Computes mean(r^a - 1) / (a (a - 1)) without cancellation near a = 0 and, as mean(r) = 1, near a = 1."""
    if a == 0:
        return -log.mean()
    near = jnp.expm1(a * log) if abs(a) < abs(a - 1) else r * jnp.expm1((a - 1) * log)
    return near.mean() / (a * (a - 1))


def _check_order(measure: str, order: float) -> None:
    if measure == "atkinson" and order <= 0:
        raise ValueError(f"order must be above 0 for 'atkinson', got {order:g}.")


@traits(on_table=five_steps)
@passes_options_to(InnerLoop)
def taml(
    model: Model,
    likelihood: Likelihood,
    *,
    measure: Measure | Literal["entropy"] = "theil",
    weight: NonNegative = 0.1,
    order: Order = 0.5,
    centre: Centre = "geometric",
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns an initialisation that is not biased towards some tasks: MAML with a penalty on unequal losses.

    Its params have the same form as the model's. The losses l are those of the supports before adaptation: the mean
    squared error of a `Gaussian`, otherwise the mean nll.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query; `Categorical` or `Bernoulli` for "entropy".
        measure: The measure of inequality, see `inequality`, or "entropy" for the entropy form.
        weight: The weight of the entropy or the inequality. With 0, this is MAML.
        order: The order of "generalised_entropy" or "atkinson".
        centre: The mean of "log_variance".
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`.

    Raises:
        ValueError: The measure is "entropy", and the likelihood is not of classes; or the order is not above 0 for
            "atkinson".

    References:
        Jamal & Qi (2019), Task Agnostic Meta-Learning for Few-Shot Learning.
    """
    loop = InnerLoop(**inner)
    adaptation = adapt_all(model, loop.transformation())
    _check_order(measure, order)
    if measure != "entropy":

        def score(params: PyTree, task: Task, key: PRNGKeyArray) -> Scalar:
            outputs = adaptation.outputs(params, adaptation.start(params), task.support.x)
            metrics = fit_metrics(likelihood, outputs, task.support)
            return metrics.get("mse", metrics["nll"])

        unequal = partial(inequality, measure=measure, order=order, centre=centre)
        joint = Joint("inequality", score, lambda losses: weight * unequal(losses))
        learner = query_learner(adaptation, likelihood, loop, posterior)
        return learner.changed(lambda other: other._replace(joint=joint), joint=joint)
    if not isinstance(likelihood, Categorical | Bernoulli):
        raise ValueError(
            f"measure must be an inequality, e.g. 'theil', for {type(likelihood).__name__}, got 'entropy'. The entropy "
            "form is defined for classes only."
        )

    def entropy(params: PyTree, phi: PyTree, task: Task) -> Scalar:
        data = joined(task)
        predictive = likelihood.predictive(adaptation.outputs(params, phi, data.x)[None])
        assert isinstance(predictive, Categories)
        log_p = predictive.log_probs[0]
        return weighted_mean(-(jnp.exp(log_p) * log_p).sum(-1), data)

    def loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        start = adaptation.start(params)
        fit = support_loss(adaptation, likelihood, params, task.support)
        phi = loop.descend(fit, start, adaptation.optimizer(params)).phi
        outputs = adaptation.outputs(params, phi, task.query.x)
        before, after = entropy(params, start, task), entropy(params, phi, task)
        metrics = fit_metrics(likelihood, outputs, task.query) | {"entropy_before": before, "entropy_after": after}
        return mean_nll(likelihood, outputs, task.query) + weight * (after - before), metrics

    return gradient_learner(adaptation, likelihood, loss, loop, posterior=posterior)
