"""Optimisation as a model for few-shot learning (Ravi & Larochelle 2017): the update rule is an LSTM's cell.

Gradient descent is the cell update with forget gate 1 and input gate a. Here both gates are learned (eqs. 2-4):

    theta_t = f_t * theta_t-1 - i_t * grad L_t
    i_t = sigmoid(W_I [h_t, theta_t-1, i_t-1] + b_I),    f_t = sigmoid(W_F [h_t, theta_t-1, f_t-1] + b_F)

where h_t is the output of an ordinary LSTM that reads the gradient and the loss, both after log-sign preprocessing
(sec. 3.3). All coordinates share the weights, and each has its own state. The first value theta_0 of the cell is
meta-learned. Gradients and losses are constants to the meta-gradient (sec. 3.2). The input gate is the learning rate of
a parameter, so the posterior implied by the steps is defined as for any gradient descent.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count, Positive
from metaprior.core.types import Batch, Learner, Model, Task
from metaprior.inference.descent import trajectory
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.learned_optimizers import P, log_sign
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.learners.builders.gradient import Adaptation, adapt_all, query_learner, support_loss
from metaprior.learners.traits import traits
from metaprior.networks.lstm import LSTMState, lstm, lstm_init, lstm_start
from metaprior.networks.statistics import beside

TOGETHER = 1024  # coordinates processed at once, so that their gates stay in cache; the backward pass recomputes them


class CellRule(NamedTuple):
    """Weights of the update rule.

    Attributes:
        layer: The LSTM layer.
        forget: The forget gate, on [h, theta, previous forget gate].
        input: The input gate, on [h, theta, previous input gate].
    """

    layer: dict[str, Array]
    forget: dict[str, Array]
    input: dict[str, Array]


class CellState(NamedTuple):
    """State of each coordinate.

    Attributes:
        lstm: State of its LSTM.
        forget: Its forget gate; 1 before the first step.
        input: Its input gate; 0 before the first step.
    """

    lstm: LSTMState
    forget: Float[Array, " p"]
    input: Float[Array, " p"]


class MetaLSTM(NamedTuple):
    """What meta_lstm meta-learns.

    Attributes:
        theta: The cell's first value, where phi starts.
        rule: Weights of the update rule.
    """

    theta: PyTree
    rule: CellRule


class Gates(NamedTuple):
    """Both gates after each step, in leaves shaped as phi's with a leading axis of steps.

    Attributes:
        forget: The forget gates.
        input: The input gates.
    """

    forget: PyTree
    input: PyTree


def init_cell(key: PRNGKeyArray, units: int, rate: float) -> CellRule:
    """Draws weights that start near gradient descent with little decay: forget gate near 1, input gate near `rate`."""
    keys = jax.random.split(key, 3)
    w = [jax.random.uniform(k, (units + 2,), minval=-0.01, maxval=0.01) for k in keys[:2]]
    bias = jnp.log(rate) - jnp.log1p(-rate)
    return CellRule(lstm_init(keys[2], 4, units), {"w": w[0], "b": jnp.asarray(6.0)}, {"w": w[1], "b": bias})


def cell_optimizer(rule: CellRule, *, p: float = P) -> optax.GradientTransformationExtraArgs:
    """Returns the rule as an optax transformation, whose update needs the parameters and the loss.

    Args:
        rule: Weights of the rule.
        p: Constant of the log-sign preprocessing.
    """

    def init(phi: PyTree) -> CellState:
        flat = ravel_pytree(phi)[0]
        start = lstm_start(rule.layer, flat.size)
        return CellState(start, jnp.ones_like(flat), jnp.zeros_like(flat))

    def update(
        gradient: PyTree, state: CellState, phi: PyTree = None, *, value: Scalar | None = None, **_: PyTree
    ) -> tuple[PyTree, CellState]:
        if phi is None or value is None:
            raise ValueError(
                "params and value must be given at each step: update(gradient, state, params, value=loss), got None."
            )
        (g, unravel), theta = ravel_pytree(gradient), ravel_pytree(phi)[0]
        shown = jax.lax.stop_gradient((log_sign(g, p), log_sign(value[None], p)[0]))

        def coordinate(at: tuple[Array, Array, CellState]) -> CellState:
            slope, theta, state = at
            after = lstm(rule.layer, state.lstm, jnp.concatenate([slope, shown[1]]))

            def gate(weights: dict[str, Array], before: Array) -> Array:
                seen = jnp.concatenate([after.h, theta[None], before[None]])
                return jax.nn.sigmoid(seen @ weights["w"] + weights["b"])

            return CellState(after, gate(rule.forget, state.forget), gate(rule.input, state.input))

        after = jax.lax.map(jax.checkpoint(coordinate), (shown[0], theta, state), batch_size=TOGETHER)
        return unravel((after.forget - 1) * theta - after.input * g), after

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _adaptation(model: Model, units: int, rate: float, p: float) -> Adaptation:
    def init(key: PRNGKeyArray, task: Task) -> MetaLSTM:
        here, there = jax.random.split(key)
        return MetaLSTM(model.init(here, task.support.x), init_cell(there, units, rate))

    free = adapt_all(model, optax.identity())
    return free._replace(
        init=init, start=lambda params: params.theta, optimizer=lambda params: cell_optimizer(params.rule, p=p)
    )


@traits(estimates=True, gates=lambda *args, **options: gates(*args, **options))
@passes_options_to(InnerLoop, without=("optimizer", "first_order", "remat"), steps=5)
def meta_lstm(
    model: Model,
    likelihood: Likelihood,
    *,
    units: Count = 20,
    p: Positive = P,
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns an initialisation and the LSTM gates that set each inner step.

    The meta-gradient is first order, as published.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        units: Width of the LSTM that reads gradient and loss.
        p: Constant of the log-sign preprocessing.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`. The paper's `steps` are 12 for one shot and 5 for five.
            `rate` is the input gate's start, between 0 and 1. `transductive=False` is closest to the paper's batch norm
            at test, which uses the support's statistics.

    Raises:
        ValueError: `rate` is not between 0 and 1.

    References:
        Ravi & Larochelle (2017), eqs. 2-4, sec. 3.2 and 3.3.
    """
    loop = InnerLoop(first_order=True, **inner)
    if not 0 < loop.rate < 1:
        raise ValueError(f"rate must be between 0 and 1, where the input gate starts, got {loop.rate}.")
    return query_learner(_adaptation(model, units, loop.rate, p), likelihood, loop, posterior)


def gates(model: Model, likelihood: Likelihood, params: MetaLSTM, support: Batch, steps: int, *, p: float = P) -> Gates:
    """Returns the forget and input gates of every parameter at each step on a support (the paper's Figure 2).

    Args:
        model: The network.
        likelihood: Likelihood of the support.
        params: What `meta_lstm` has meta-learned.
        support: The support.
        steps: Number of inner steps.
        p: Constant of the log-sign preprocessing, as in training.
    """
    if model.statistics == "task":
        model = beside(model, support)
    adaptation = _adaptation(model, 1, 0.5, p)
    fit = support_loss(adaptation, likelihood, params, support)
    course = trajectory(fit, params.theta, adaptation.optimizer(params), steps).state
    unravel = jax.vmap(ravel_pytree(params.theta)[1])
    return Gates(unravel(course.forget[1:]), unravel(course.input[1:]))
