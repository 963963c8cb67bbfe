"""Reptile (Nichol, Achiam & Schulman 2018): moves theta towards the result of a few optimiser steps on each task.

Algorithm 1 (serial) and its batched version: phi = U^k(theta) by k inner steps on minibatches of the task's data, then
theta <- theta + e (phi - theta). The loss 1/2 |theta - stop(phi)|^2 has the gradient theta - phi, so outer SGD with a
rate e that decays linearly to 0 is the paper's update. Support and query together are the task's training set.
"""

from typing import Any

import jax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count, Fraction
from metaprior.core.types import Learner, Model, Task, examples, joined
from metaprior.inference.descent import descend, drawn, half_square, mean_nll, minibatches
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, implicit, point
from metaprior.learners.builders.gradient import adapt_all, fit_metrics, gradient_learner
from metaprior.learners.traits import traits


# The outer rate multiplies phi - theta, so a rate of 1 moves theta all the way to phi.
@traits(
    estimates=True,
    training={"optimizer": "sgd", "rate": 1.0, "schedule": "linear"},
    small={"optimizer": "sgd", "rate": 0.02, "steps": 10, "test_steps": 10},
    referees={
        "truth": {
            "steps": 5, "rate": 0.05, "optimizer": "sgd", "minibatch": None, "test_steps": 5, "posterior": implicit()
        }
    },
)  # fmt: skip
@passes_options_to(InnerLoop, without=("first_order", "remat"), steps=5, rate=1e-3, optimizer="adam", test_steps=50)
def reptile(
    model: Model,
    likelihood: Likelihood,
    *,
    b1: Fraction | None = 0.0,
    minibatch: Count | None = 10,
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns an initialisation without a query set or second derivatives.

    Its params have the same form as the model's. The reported loss is 1/2 |theta - phi|^2; the metrics are those of the
    task's data at phi. The paper's main table has `transductive=False`.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        b1: Decay rate of the first moment of the inner Adam, 0 in the paper. None: optax's default. The optimiser's
            state starts anew in each task; the authors' code carries it over from task to task.
        minibatch: Number of examples per inner step in training. None: all.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`.

    References:
        Nichol, Achiam & Schulman (2018), Algorithm 1.
    """
    loop = InnerLoop(**inner)
    options = {"b1": b1} if loop.optimizer == "adam" and b1 is not None else {}
    adaptation = adapt_all(model, loop.transformation(differentiated=False, **options))

    def loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        data = joined(task)

        def fit(phi: PyTree, places: Int[Array, " n"]) -> Scalar:
            batch = drawn(data, places)
            return mean_nll(likelihood, adaptation.outputs(params, phi, batch.x), batch)

        size = examples(data) if minibatch is None else min(minibatch, examples(data))
        order = minibatches(key, examples(data), size, loop.steps)
        start = jax.lax.stop_gradient(params)
        at = descend(fit, start, adaptation.optimizer(params), loop.steps, first_order=True, data=order)
        phi = jax.lax.stop_gradient(at.phi)
        outputs: Array = adaptation.outputs(params, phi, data.x)
        return half_square(params, phi), jax.lax.stop_gradient(fit_metrics(likelihood, outputs, data))

    return gradient_learner(adaptation, likelihood, loss, loop, posterior=posterior)
