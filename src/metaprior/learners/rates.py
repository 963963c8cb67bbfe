"""MAML with learned inner steps: the learning rates are meta-learned together with the initialisation.

* Meta-SGD (Li, Zhou, Chen & Li 2017): phi = theta - a * grad L_S(theta), one rate per parameter, of either sign.
* Per-layer per-step rates (Antoniou, Edwards & Storkey 2019, "LSLR"): one rate per tensor and per inner step.
* Preconditioned (Grant et al. 2018, sec. 3.2 eq. 8): phi = theta - B grad L_S with B = diag(exp d) + U U', positive
  definite. B is the prior covariance that the inner loop implies, up to the curvature of the data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Positive, Whole
from metaprior.core.types import Learner, Model, Task
from metaprior.inference.curvature.rows import safe_sqrt
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.linear_descent import Root
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.learners.builders.gradient import Adaptation, query_learner
from metaprior.learners.traits import five_steps, traits


class Stepped(NamedTuple):
    """What these learners meta-learn.

    Attributes:
        theta: The initialisation.
        rule: The learned rates, or the `Preconditioner`.
    """

    theta: PyTree
    rule: PyTree


def _learner(
    model: Model,
    likelihood: Likelihood,
    init_rule: Callable[[PRNGKeyArray, PyTree], PyTree],
    update: Callable[[PyTree, Array, PyTree], PyTree],
    root: Callable[[Stepped], PyTree] | None,
    loop: InnerLoop,
    posterior: PosteriorRule,
) -> Learner:
    """Builds MAML whose t-th inner update is update(rule, t, gradient).

    Args:
        model: The network.
        likelihood: Likelihood of the support and the query.
        init_rule: (key, theta) -> rule.
        update: (rule, t, gradient) -> update.
        root: As in `Adaptation`, for rates that do not depend on t. None: rates are shared within each tensor.
        loop: The inner loop.
        posterior: Rule that forms the posterior at the last phi.
    """

    def init(key: PRNGKeyArray, task: Task) -> Stepped:
        here, there = jax.random.split(key)
        theta = model.init(here, task.support.x)
        return Stepped(theta, init_rule(there, theta))

    def optimizer(params: Stepped) -> optax.GradientTransformation:
        def step(gradient: PyTree, t: Any, _: PyTree = None) -> tuple[PyTree, Any]:
            return update(params.rule, t, gradient), t + 1

        return optax.GradientTransformation(lambda _: jnp.zeros((), int), step)  # pyright: ignore[reportArgumentType]

    adaptation = Adaptation(
        model,
        init,
        start=lambda params: params.theta,
        network=lambda params, phi, x, call: model.outputs(phi, x, call),
        optimizer=optimizer,
        root=root,
        by_tensor=root is None,
    )
    return query_learner(adaptation, likelihood, loop, posterior)


@passes_options_to(InnerLoop, without=("optimizer",))
def meta_sgd(model: Model, likelihood: Likelihood, *, posterior: PosteriorRule = point(), **inner: Any) -> Learner:
    """Meta-learns an initialisation and one learning rate per parameter.

    The paper takes one inner step.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`; `rate` is the value that all learned rates start from.

    References:
        Li, Zhou, Chen & Li (2017).
    """
    loop = InnerLoop(**inner)
    return _learner(
        model,
        likelihood,
        lambda key, theta: jax.tree.map(lambda leaf: jnp.full_like(leaf, loop.rate), theta),
        lambda rates, t, g: jax.tree.map(lambda a, gi: -a * gi, rates, g),
        lambda params: jax.tree.map(safe_sqrt, params.rule),
        loop,
        posterior,
    )


@traits(on_table=five_steps, small={"steps": 2, "rate": 0.02})
@passes_options_to(InnerLoop, without=("optimizer",), steps=5)
def lslr(model: Model, likelihood: Likelihood, *, posterior: PosteriorRule = point(), **inner: Any) -> Learner:
    """Meta-learns an initialisation and one learning rate per tensor and inner step.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`; `rate` is the value that all learned rates start from. Steps
            on a new task beyond the trained ones repeat the last rates.

    References:
        Antoniou, Edwards & Storkey (2019).
    """
    loop = InnerLoop(**inner)
    return _learner(
        model,
        likelihood,
        lambda key, theta: jax.tree.map(lambda leaf: jnp.full(max(loop.steps, 1), loop.rate, leaf.dtype), theta),
        lambda rates, t, g: jax.tree.map(lambda a, gi: -a[jnp.minimum(t, a.shape[0] - 1)] * gi, rates, g),
        None,
        loop,
        posterior,
    )


class Preconditioner(NamedTuple):
    """The preconditioner B = diag(exp log_diagonal) + factor factor'."""

    log_diagonal: Float[Array, " p"]
    factor: Float[Array, "p r"]


@traits(on_table=five_steps, small={"rank": 2, "rate": 0.02}, silent={"rank": 0})
@passes_options_to(InnerLoop, without=("optimizer",))
def preconditioned(
    model: Model,
    likelihood: Likelihood,
    *,
    rate: Positive = 0.01,
    rank: Whole = 0,
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns an initialisation and a positive definite matrix B that multiplies inner gradients.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        rate: B starts near rate * I; exactly there with rank 0.
        rank: Rank of the part of B that is not diagonal; 0 learns a diagonal B.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Other options of the inner loop, see `InnerLoop`.

    References:
        Grant et al. (2018), sec. 3.2, eq. 8.
    """

    def init_rule(key: PRNGKeyArray, theta: PyTree) -> Preconditioner:
        flat = ravel_pytree(theta)[0]
        # Columns of length 0.1 rate^(1/2): B's eigenvalues are within a few hundredths of `rate`.
        factor = 0.1 * (rate / max(flat.size, rank)) ** 0.5 * jax.random.normal(key, (flat.size, rank), flat.dtype)
        return Preconditioner(jnp.full_like(flat, jnp.log(rate)), factor)

    def update(rule: Preconditioner, t: Array, gradient: PyTree) -> PyTree:
        g, unravel = ravel_pytree(gradient)
        return unravel(-jnp.exp(rule.log_diagonal) * g - rule.factor @ (rule.factor.T @ g))

    def root(params: Stepped) -> PyTree:
        unravel = ravel_pytree(params.theta)[1]
        diagonal = unravel(jnp.exp(params.rule.log_diagonal / 2))
        return Root(diagonal, params.rule.factor) if rank else diagonal

    return _learner(model, likelihood, init_rule, update, root, InnerLoop(rate=rate, **inner), posterior)
