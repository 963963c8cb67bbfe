"""phi by gradient steps from theta: the inner loop that every gradient-based learner shares.

An `Adaptation` says what a task's parameters are, how they make outputs, and which optimiser fits them. `descend` runs
the steps. Where the meta-gradient flows is the caller's choice: through all of it (MAML), stopped at each inner
gradient (first order), or around it (iMAML, Reptile).
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Scalar

from metaprior.likelihoods import Likelihood
from metaprior.networks.statistics import by_support
from metaprior.types import (
    PLAIN,
    Batch,
    Call,
    Model,
    Task,
    check_known,
    check_rows,
    counted,
    examples,
    weighted_mean,
    weights,
)

SEGMENTS = 4  # of a rematerialised descent, of each of its segments, and so on
UNROLLED = 5  # inner steps up to this many are unrolled: XLA then fuses across them; more are a loop


class Adaptation(NamedTuple):
    """What is adapted, and by which optimiser.

    model:     the network, which `network` calls
    init:      (key, task) -> params              theta and whatever else is meta-learned
    start:     (params) -> phi                    the task parameters before the first step
    network:   (params, phi, x, call) -> [n, c]   how phi makes outputs; evaluated by `outputs`
    optimizer: (params) -> optax transformation   its learned rates, if any, are read from params
    penalty:   (params, phi, support) -> scalar   added to the mean support nll, e.g. a proximal term
    root:      (params) -> S                      where each update is -S S' gradient: shaped as phi, or a `steps.Root`
    by_tensor: each update is linear in the gradients and treats the elements of a tensor alike
    local:     (params, support, key) -> params   theta as a task begins with it, which may depend on its support;
               applied before everything else in `adapt`, `path` and `loss`
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

    def outputs(self, params: PyTree, phi: PyTree, x: PyTree, call: Call = PLAIN) -> Array:
        """phi's outputs; batch norm goes by the support where the model was told one, however it is called."""
        return by_support(partial(self.network, params, phi), self.model.support)(x, call)


def adapt_all(model: Model, optimizer: optax.GradientTransformation) -> Adaptation:
    """Every parameter of the model is adapted, from a meta-learned initialisation, by a fixed optimiser."""

    return Adaptation(
        model,
        init=lambda key, task: model.init(key, task.support.x),
        start=lambda params: params,
        network=lambda params, phi, x, call: model.outputs(phi, x, call),
        optimizer=lambda params: optimizer,
    )


def count(batch: Batch) -> Scalar | int:
    """How many examples the rows stand for, the sum of their weights; 1 where none counts, so that it can divide."""
    if batch.weight is None:
        return max(examples(batch), 1)
    total = weights(batch).sum()
    return jnp.where(total == 0, 1, total)


def joined(task: Task) -> Batch:
    """Support and query as one batch; with weights if either has some.

    Raises:
        ValueError: targets whose shapes differ in more than the rows.
    """
    check_known(task.support)
    for batch in task:
        check_rows(batch)
    for s, q in zip(jax.tree.leaves(task.support.y), jax.tree.leaves(task.query.y), strict=True):
        if s.shape[1:] != q.shape[1:]:
            raise ValueError(f"y: the support's has shape {tuple(s.shape)}, the query's has shape {tuple(q.shape)}.")
    if (task.support.weight is None) != (task.query.weight is None):
        task = Task(*(batch._replace(weight=weights(batch)) for batch in task))
    concrete = not any(isinstance(leaf, Tracer) for batch in task for leaf in jax.tree.leaves(batch.y))
    together = np.concatenate if concrete else jnp.concatenate  # numpy: what is concrete stays so inside a trace
    both = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), *(batch._replace(y=None) for batch in task))
    return both._replace(y=jax.tree.map(lambda s, q: together([s, q]), task.support.y, task.query.y))


def mean_nll(likelihood: Likelihood, outputs: Array, batch: Batch) -> Scalar:
    """The weighted mean of the examples' nll; 0 for an empty batch, so that nothing is learned from nothing."""
    return weighted_mean(likelihood.nll(outputs, counted(batch).y), batch)


def support_loss(adaptation: Adaptation, likelihood: Likelihood, params: PyTree, support: Batch) -> Callable:
    """phi -> mean nll of the support set (plus the penalty, if any): what the inner loop descends."""

    def loss(phi: PyTree) -> Scalar:
        fit = mean_nll(likelihood, adaptation.outputs(params, phi, support.x), support)
        return fit if adaptation.penalty is None else fit + adaptation.penalty(params, phi, support)

    return loss


def half_square(a: PyTree, b: PyTree) -> Scalar:
    """1/2 |a - b|^2 over all leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.asarray(0.5 * sum(((u - v) ** 2).sum() for u, v in pairs))


class Descent(NamedTuple):
    """Where an inner loop stands: phi and its optimiser's state."""

    phi: PyTree
    state: PyTree


def optimizer_step(
    loss: Callable[..., Scalar],
    at: Descent,
    optimizer: optax.GradientTransformation,
    *batch: PyTree,
    first_order: bool = False,
) -> tuple[Descent, Scalar]:
    """One step on loss(phi, *batch), and the loss before it; a line search gets from optax's extra what it asks for."""
    value, g = jax.value_and_grad(loss)(at.phi, *batch)
    if first_order:
        value, g = jax.lax.stop_gradient((value, g))
    asked = {"value": value, "grad": g, "value_fn": lambda phi: loss(phi, *batch)}
    update, state = optax.with_extra_args_support(optimizer).update(g, at.state, at.phi, **asked)
    return Descent(jax.tree.map(jnp.add, at.phi, update), state), value


def descend(
    loss: Callable[..., Scalar],
    phi: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    first_order: bool = False,
    remat: bool = False,
    data: PyTree = None,
) -> Descent:
    """k optimiser steps on loss(phi), or on loss(phi, data[t]) where data has one leading entry a step.

    first_order stops the gradient at each inner gradient (Finn et al. 2017, sec. 5.2). remat keeps 4 log4(k) phis for
    the backward pass instead of all that k steps computed, and recomputes the rest: log4(k) more forward passes.
    """

    def step(at: Descent, batch: PyTree) -> Descent:
        given = () if data is None else (batch,)
        return optimizer_step(loss, at, optimizer, *given, first_order=first_order)[0]

    start = Descent(phi, optimizer.init(phi))
    if remat and steps > 1 and not first_order:
        return _rematerialised(step, start, steps, data)
    # Where no gradient flows through the steps there is nothing to fuse for, and a loop reuses its buffers.
    if steps <= UNROLLED and not first_order:
        for t in range(steps):
            start = step(start, jax.tree.map(lambda leaf, t=t: leaf[t], data))
        return start
    return jax.lax.scan(lambda at, batch: (step(at, batch), None), start, data, length=steps)[0]


def _rematerialised(step: Callable, start: Descent, steps: int, data: PyTree) -> Descent:
    """A tree of segments (Griewank 1992): each is recomputed in the backward pass, in segments of its own."""
    length = 1
    while length * SEGMENTS < steps:
        length *= SEGMENTS
    whole, rest = divmod(steps, length)

    def segment(at: Descent, batches: PyTree) -> Descent:
        if length > 1:
            return _rematerialised(step, at, length, batches)
        return step(at, jax.tree.map(lambda leaf: leaf[0], batches))

    split = whole * length
    batches = jax.tree.map(lambda leaf: leaf[:split].reshape(whole, length, *leaf.shape[1:]), data)
    kept = jax.checkpoint(segment)
    at = jax.lax.scan(lambda a, b: (kept(a, b), None), start, batches, length=whole)[0]
    return _rematerialised(step, at, rest, jax.tree.map(lambda leaf: leaf[split:], data)) if rest else at


def minibatches(key: PRNGKeyArray, n: int, size: int, steps: int) -> Int[Array, "steps size"]:
    """Which of n examples each step sees: they cycle through the shuffled data without replacement in each pass.

    Places, not the examples themselves, whose memory would grow with the steps; `drawn` gets a step's examples.
    """
    passes = -(-steps * size // n)
    order = jax.vmap(lambda k: jax.random.permutation(k, n))(jax.random.split(key, passes)).reshape(-1)
    return order[: steps * size].reshape(steps, size)


def drawn(data: Batch, places: Int[Array, " size"]) -> Batch:
    """The examples at those places."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[places], data)


def trajectory(
    loss: Callable[..., Scalar],
    phi: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    data: PyTree = None,
) -> Descent:
    """The descents after 0, 1, ..., k steps, stacked along a new leading axis; `data` as in `descend`."""

    def step(at: Descent, batch: PyTree) -> tuple[Descent, Descent]:
        given = () if data is None else (batch,)
        after = optimizer_step(loss, at, optimizer, *given)[0]
        return after, after

    start = Descent(phi, optimizer.init(phi))
    later = jax.lax.scan(step, start, data, length=steps)[1]
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, later)


def inner_rates(
    loss: Callable[[PyTree], Scalar], at: Descent, optimizer: optax.GradientTransformation, probes: int = 1
) -> PyTree:
    """The rate at which each parameter follows its gradient at one step: the diagonal of -d update / d gradient.

    It is 0 where the gradient is exactly 0: the parameter does not move (and Adam's rate there would be 1 / eps).
    Exact for every optimiser that treats parameters one by one (SGD, learned rates, Adam); otherwise Hutchinson's
    estimate z * (B z) over random signs z.
    """
    value, g = jax.value_and_grad(loss)(at.phi)
    told, asked = optax.with_extra_args_support(optimizer), {"value": value, "grad": g, "value_fn": loss}
    leaves, treedef = jax.tree.flatten(g)

    def probe(key: PRNGKeyArray) -> PyTree:
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
        z = jax.tree.unflatten(treedef, signs)
        response = jax.jvp(lambda v: told.update(v, at.state, at.phi, **asked)[0], (g,), (z,))[1]
        return jax.tree.map(lambda a, b, d: jnp.where((d == 0) | ~jnp.isfinite(b), 0, -a * b), z, response, g)

    estimates = [probe(key) for key in jax.random.split(jax.random.key(0), probes)]
    return jax.tree.map(lambda *e: sum(e) / probes, *estimates)


def line_search(rate: float | Array) -> optax.GradientTransformationExtraArgs:
    """Gradient descent whose rate, `rate` at most, is halved until the loss falls as its slope promises (Armijo 1966).

    Twelve times at most. It cannot be differentiated in reverse: for inner loops around which the meta-gradient flows.
    """
    search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=12, slope_rtol=1e-4, decrease_factor=0.5, increase_factor=2.0, rtol=1e-6
    )
    return optax.chain(optax.scale_by_learning_rate(rate), search)


# Optimisers whose own derivative does not exist where a gradient or a tensor is exactly zero: they have no eps_root, or
# one that does not reach there (optax 0.2.8).
NO_META_GRADIENT = {
    "adafactor": "its root mean square of a tensor has no derivative at zero",
    "lamb": "its norm of a tensor has no derivative at zero",
    "lars": "its norm of a tensor has no derivative at zero",
    "novograd": "its norm of a tensor has no derivative at zero",
    "radam": "its rectification has no derivative in the first steps",
    "polyak_sgd": "its rate, the loss over the squared gradient, has no derivative at zero",
    "lbfgs": "its line search cannot be differentiated in reverse",
    "line_search": "its halving cannot be differentiated in reverse",
}
EPS_ROOT = 1e-8  # added to Adam's second moment where the meta-gradient flows: sqrt has no derivative at 0


def make_optimizer(
    name: str, rate: float | Array, *, differentiated: bool = True, **options: Any
) -> optax.GradientTransformation:
    """An optax optimiser by name, e.g. make_optimizer("adam", 1e-3, b1=0.0), or "line_search".

    A parameter whose gradient is exactly zero (a dead ReLU unit, an input column of zeros) has a second moment of zero,
    whose square root has no derivative: the meta-gradient through Adam's steps would be NaN. Where the meta-gradient
    flows, optimisers that have `eps_root` get 1e-8: a step answers a gradient below 1e-4 in proportion, and a change of
    it by 1e4 at most, so that a few steps stay finite in float32.

    Args:
        name: of an optax optimiser, whose first argument is its rate.
        rate: the learning rate on the mean loss.
        differentiated: whether the meta-gradient flows through the steps.
        options: of the optimiser.

    Raises:
        ValueError: unknown names, and with `differentiated` optimisers whose derivative does not exist at zero.
    """
    factory = line_search if name == "line_search" else getattr(optax, name, None)
    known = [] if factory is None or name.startswith(("_", "scale_by_")) else _parameters(factory)
    if factory is None or not known or known[0] not in ("rate", "learning_rate", "max_learning_rate"):
        raise ValueError(f"optimizer: came {name!r}, needs the name of an optax optimiser, e.g. 'sgd' or 'adam'")
    if differentiated and name in NO_META_GRADIENT:
        raise ValueError(
            f"optimizer: the meta-gradient flows through the inner steps, and that of {name!r} is not finite: "
            f"{NO_META_GRADIENT[name]}; use 'sgd' or 'adam', or first_order=True where the learner has it."
        )
    if differentiated and "eps_root" in known:
        options.setdefault("eps_root", EPS_ROOT)
    return factory(rate, **options)


def _parameters(factory: Callable) -> list[str]:
    try:
        return list(signature(factory).parameters)
    except (TypeError, ValueError):
        return []
