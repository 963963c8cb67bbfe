"""Learning to learn by gradient descent by gradient descent (Andrychowicz et al. 2016): an LSTM is the optimiser.

Each coordinate of phi has a small LSTM with its own state; all share the same weights (sec. 2.1). The LSTM reads the
logarithm and the sign of the coordinate's gradient (appendix A) and outputs its update,
phi_t+1 = phi_t + rate * m(gradient_t, state_t). The objective is that of eq. 3 with all weights 1: the mean over t of
f(phi_t). Its gradient stops at each inner gradient (the dotted lines of Figure 2) and after every `unroll` steps. f is
the query's nll; it equals the optimisee's loss in expectation where query and support have the same distribution. All
unrolls of one optimisation make one meta-step.
"""

from typing import Any, NamedTuple

import jax
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count, Positive
from metaprior.core.types import Batch, Learner, Model, Task, examples
from metaprior.inference.descent import drawn, mean_nll, minibatches
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.learned_optimizers import P, log_sign, unrolled
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.learners.builders.gradient import adapt_all, fit_metrics, gradient_learner, support_loss
from metaprior.learners.traits import traits
from metaprior.networks.layers import dense, dense_init
from metaprior.networks.lstm import LSTMState, lstm, lstm_init, lstm_start

RATE = 0.1


class Rule(NamedTuple):
    """Weights of the optimiser.

    Attributes:
        layers: The LSTM layers.
        out: Linear map from the last layer's output to the update.
    """

    layers: tuple[dict[str, Array], ...]
    out: dict[str, Array]


class Learned(NamedTuple):
    """What l2l meta-learns.

    Attributes:
        theta: The start of every optimisation. None: each starts at random.
        rule: Weights of the optimiser.
    """

    theta: PyTree
    rule: Rule


def init_rule(key: PRNGKeyArray, units: int = 20, depth: int = 2) -> Rule:
    """Draws the weights of an untrained optimiser."""
    keys = jax.random.split(key, depth + 1)
    layers = tuple(lstm_init(k, units if i else 2, units) for i, k in enumerate(keys[:-1]))
    return Rule(layers, dense_init(keys[-1], units, 1))


def learned_optimizer(rule: Rule, *, rate: float = RATE, p: float = P) -> optax.GradientTransformation:
    """Returns the optimiser as an optax transformation, for any parameters and any loss.

    Args:
        rule: Weights of the optimiser.
        rate: Factor of the LSTM's output, as in training.
        p: Constant of the log-sign preprocessing, as in training.
    """

    def init(phi: PyTree) -> tuple[LSTMState, ...]:
        flat = ravel_pytree(phi)[0]
        return tuple(lstm_start(layer, flat.size) for layer in rule.layers)

    def update(gradient: PyTree, state: tuple[LSTMState, ...], phi: PyTree = None) -> tuple[PyTree, PyTree]:
        flat, unravel = ravel_pytree(gradient)
        x, after = log_sign(flat, p), []
        for layer, before in zip(rule.layers, state, strict=True):
            after.append(lstm(layer, before, x))
            x = after[-1].h
        return unravel(rate * dense("out", rule.out, x)[:, 0]), tuple(after)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


@traits(estimates=True, descends=False, small={"start": "learned", "steps": 10, "unroll": 5})
@passes_options_to(InnerLoop, without=("optimizer", "remat"), steps=100, rate=RATE, first_order=True)
def l2l(
    model: Model,
    likelihood: Likelihood,
    *,
    unroll: Count = 20,
    minibatch: Count | None = None,
    units: Count = 20,
    depth: Count = 2,
    p: Positive = P,
    start: str = "random",
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns an LSTM as the optimiser that fits phi to the support.

    `learned_optimizer(params.rule)` applies it to other losses.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        unroll: Number of steps that are back-propagated through at once; it must divide `steps`.
        minibatch: Number of support examples per step in training. None: all, as on a new task.
        units: Width of the LSTM.
        depth: Number of LSTM layers.
        p: Constant of the log-sign preprocessing.
        start: "random" draws phi_0 anew for each task, as in the paper; "learned" meta-learns it.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`; `rate` is a factor of the LSTM's output.

    References:
        Andrychowicz et al. (2016), eq. 3, sec. 2.1 and appendix A.
    """
    loop = InnerLoop(**inner)
    steps = loop.steps
    if start not in ("random", "learned"):
        raise ValueError(f"start must be 'random' or 'learned', got {start!r}.")
    if steps < 1 or unroll < 1 or steps % unroll:
        raise ValueError(f"steps must be a multiple of unroll, e.g. 100 and 20, got {steps} and {unroll}.")
    free = adapt_all(model, optax.identity())

    def init(key: PRNGKeyArray, task: Task) -> Learned:
        here, there = jax.random.split(key)
        theta = model.init(here, task.support.x) if start == "learned" else None
        return Learned(theta, init_rule(there, units, depth))

    def begun(params: Learned, support: Batch, key: PRNGKeyArray) -> Learned:
        return params._replace(theta=model.init(key, support.x))

    def optimizer(params: Learned) -> optax.GradientTransformation:
        return learned_optimizer(params.rule, rate=loop.rate, p=p)

    adaptation = free._replace(
        init=init, start=lambda params: params.theta, optimizer=optimizer, local=begun if start == "random" else None
    )

    def loss(params: Learned, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        support, query = task
        data = None
        if minibatch is not None:
            data = minibatches(key, examples(support), min(minibatch, examples(support)), steps)

        def fit(phi: PyTree, places: Int[Array, " n"] | None = None) -> Scalar:
            seen = support if places is None else drawn(support, places)
            return support_loss(adaptation, likelihood, params, seen)(phi)

        def judge(phi: PyTree) -> Scalar:
            return mean_nll(likelihood, adaptation.outputs(params, phi, query.x), query)

        at, values = unrolled(
            fit, judge, params.theta, optimizer(params), steps, unroll, first_order=loop.first_order, data=data
        )
        return values.mean(), fit_metrics(likelihood, adaptation.outputs(params, at.phi, query.x), query)

    return gradient_learner(adaptation, likelihood, loss, loop, posterior=posterior, descends=False)
