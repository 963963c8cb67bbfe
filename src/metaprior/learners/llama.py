"""LLAMA (Grant, Finn, Levine, Darrell & Griffiths 2018): MAML as hierarchical Bayes, with Laplace's approximation.

Algorithm 2 with subroutine 4 (ML-LAPLACE): phi is the result of k gradient steps from theta. The task's negative log
marginal likelihood is its query loss plus eta log det H-hat, where H-hat is the curvature of the negative log
*posterior* at phi: Gauss-Newton or K-FAC of the data, plus the prior's precision. The gradient flows through both
terms. objective="evidence" is the full Laplace approximation, in which eta is 1/2:
-log p(D | phi) - log p(phi | theta) + 1/2 log det(H / 2 pi).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import lookup, passes_options_to
from metaprior.core.options import NonNegative, Positive, Whole
from metaprior.core.types import PLAIN, Batch, Call, Learner, Model, Task, joined
from metaprior.inference.curvature import CURVATURES, descent_spectrum, dual
from metaprior.inference.descent import count, half_square, mean_nll
from metaprior.inference.evidence import negative_log_evidence
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, laplace
from metaprior.learners.builders.gradient import adapt_all, fit_metrics, gradient_learner, support_loss
from metaprior.learners.traits import traits


class Prior(NamedTuple):
    """The prior p(phi | theta) = N(theta, I / exp(log_precision))."""

    theta: PyTree
    log_precision: Scalar


@traits(
    small={"steps": 2, "rate": 0.02},
    referees={
        "truth": {"objective": "evidence", "learn_precision": True, "steps": 60, "rate": 0.05},
        "nuts": {"objective": "evidence", "steps": 1000, "rate": 0.1},
        "nuts prior": {
            "objective": "evidence", "learn_precision": True, "steps": 200, "test_steps": 1000, "rate": 0.1
        },
    },
    standard=lambda zero, options, key: Prior(zero, jnp.zeros(())),
)  # fmt: skip
@passes_options_to(InnerLoop, without=("optimizer",), steps=5)
def llama(
    model: Model,
    likelihood: Likelihood,
    *,
    eta: NonNegative = 1e-6,
    precision: Positive = 1.0,
    curvature: str = "dual",
    curvature_on: str = "support",
    prior: str = "isotropic",
    objective: str = "query",
    learn_precision: bool = False,
    draws: Whole = 0,
    posterior: PosteriorRule | None = None,
    **inner: Any,
) -> Learner:
    """Meta-learns a prior N(theta, I / precision) by Laplace's approximation of each task's marginal likelihood.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        eta: Weight of log det (the paper's 1e-6 with mean losses). "evidence" ignores it: there it is 1/2.
        precision: Precision of the prior before training.
        curvature: "dual" (exact Gauss-Newton), "kfac" (the paper's), "diagonal" or "lanczos".
        curvature_on: The data of the curvature: "support", or "query" (the paper's text).
        prior: "isotropic", or "implicit", the prior that k steps of gradient descent imply (section 3.2; "dual" only).
        objective: "query" as published, or "evidence": phi is fitted to support and query under the prior, and the loss
            is -log marginal per example, from which `learn_precision` learns the precision too.
        learn_precision: Whether the precision is meta-learned ("evidence" only).
        draws: Number of networks drawn from N(phi, H^-1) in a prediction, as in the paper's Figure 5. 0 linearises.
        posterior: Rule that forms the posterior at the last phi. None: Laplace's approximation with that precision.
        inner: Options of the inner loop, see `InnerLoop`.

    Raises:
        ValueError: An option is unknown, or two options do not fit together.

    References:
        Grant et al. (2018), Algorithm 2 and subroutine 4.
    """
    if objective not in ("query", "evidence"):
        raise ValueError(f"objective must be 'query' or 'evidence', got {objective!r}.")
    if curvature_on not in ("support", "query"):
        raise ValueError(f"curvature_on must be 'support' or 'query', got {curvature_on!r}.")
    if prior not in ("isotropic", "implicit"):
        raise ValueError(f"prior must be 'isotropic' or 'implicit', got {prior!r}.")
    if learn_precision and objective != "evidence":
        raise ValueError(
            "learn_precision must be False unless objective='evidence', got True: the query's loss has no precision."
        )
    if prior == "implicit" and (curvature != "dual" or objective != "query"):
        raise ValueError("prior must be 'isotropic' unless curvature='dual' and objective='query', got 'implicit'.")
    curve = lookup("curvature", curvature, CURVATURES)
    loop = InnerLoop(**inner)
    free = adapt_all(model, loop.transformation())
    explicit = objective == "evidence"

    def init(key: PRNGKeyArray, task: Task) -> Prior:
        return Prior(model.init(key, task.support.x), jnp.log(jnp.asarray(precision, float)))

    def tau(params: Prior) -> Scalar:
        return jnp.exp(params.log_precision if learn_precision else jax.lax.stop_gradient(params.log_precision))

    def pull(params: Prior, phi: PyTree, data: Batch) -> Scalar:
        return tau(params) * half_square(phi, params.theta) / count(data)

    adaptation = free._replace(init=init, start=lambda params: params.theta, penalty=pull if explicit else None)

    def outputs(phi: PyTree, x: PyTree, call: Call = PLAIN) -> Array:
        return free.outputs(None, phi, x, call)

    def log_det(params: Prior, phi: PyTree, batch: Batch, key: PRNGKeyArray) -> Scalar:
        """Computes log det(I + H / tau), with H of the *summed* nll; "implicit": posterior over prior precision."""
        if prior == "implicit":
            scale = jnp.sqrt(loop.rate / count(batch))
            values = jnp.maximum(jnp.linalg.eigvalsh(dual(outputs, likelihood, phi, batch, scale).gram), 0)
            flat, drop, _ = descent_spectrum(values, loop.steps)
            return -jnp.log1p(values * drop / flat).sum()
        return curve(outputs, likelihood, phi, batch, tau(params) ** -0.5, key).log_det()

    def query_objective(params: Prior, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        fit = support_loss(adaptation, likelihood, params, task.support)
        phi = loop.descend(fit, params.theta, adaptation.optimizer(params)).phi
        predicted = outputs(phi, task.query.x)
        volume = log_det(params, phi, task.support if curvature_on == "support" else task.query, key)
        metrics = fit_metrics(likelihood, predicted, task.query) | {"log_det": volume}
        return mean_nll(likelihood, predicted, task.query) + eta * volume, metrics

    def evidence_objective(params: Prior, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        data = joined(task)
        fit = support_loss(adaptation, likelihood, params, data)
        phi = loop.descend(fit, params.theta, adaptation.optimizer(params)).phi
        surprise = negative_log_evidence(
            outputs, likelihood, phi, params.theta, data, tau(params) ** -0.5, curvature=curve, key=key
        )
        return surprise / count(data), fit_metrics(likelihood, outputs(phi, data.x), data)

    return gradient_learner(
        adaptation,
        likelihood,
        evidence_objective if explicit else query_objective,
        loop,
        posterior=laplace(None if explicit else precision, draws=draws) if posterior is None else posterior,
        implied_precision=(lambda params, support: tau(params)) if explicit else None,
    )
