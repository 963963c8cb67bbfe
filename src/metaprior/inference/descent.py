"""phi by gradient steps from theta: the inner loop that every gradient-based learner shares.

`descend` runs the steps. Where the meta-gradient flows is the caller's choice: through all of it (MAML), stopped at
each inner gradient (first order), or around it (iMAML, Reptile).
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.types import Batch, counted, examples, weighted_mean, weights

SEGMENTS = 4  # of a rematerialised descent, of each of its segments, and so on
UNROLLED = 5  # inner steps up to this many are unrolled: XLA then fuses across them; more are a loop


def count(batch: Batch) -> Scalar | int:
    """How many examples the rows stand for, the sum of their weights; 1 where none counts, so that it can divide."""
    if batch.weight is None:
        return max(examples(batch), 1)
    total = weights(batch).sum()
    return jnp.where(total == 0, 1, total)


def mean_nll(likelihood: Likelihood, outputs: Array, batch: Batch) -> Scalar:
    """The weighted mean of the examples' nll; 0 for an empty batch, so that nothing is learned from nothing."""
    return weighted_mean(likelihood.nll(outputs, counted(batch).y), batch)


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
    collect: Callable[..., PyTree] | None = None,
) -> Descent:
    """k optimiser steps on loss(phi), or on loss(phi, data[t]) where data has one leading entry a step.

    With `collect`, data depend on phi (a policy's trajectories): step t descends loss(phi, collect(phi_t, data[t])),
    where data[t] is a random key, say. What is collected is a constant to the inner gradient; the meta-gradient
    flows through it unless `collect` stops it.

    first_order stops the gradient at each inner gradient (Finn et al. 2017, sec. 5.2). remat keeps 4 log4(k) phis for
    the backward pass instead of all that k steps computed, and recomputes the rest: log4(k) more forward passes.
    """

    def step(at: Descent, batch: PyTree) -> Descent:
        given = _given(at, batch, data is not None, collect)
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


def _given(at: Descent, batch: PyTree, some: bool, collect: Callable[..., PyTree] | None) -> tuple[PyTree, ...]:
    """What a step's loss takes besides phi."""
    given = (batch,) if some else ()
    return given if collect is None else (collect(at.phi, *given),)


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
    collect: Callable[..., PyTree] | None = None,
) -> Descent:
    """The descents after 0, 1, ..., k steps, stacked along a new leading axis; `data` and `collect` as in `descend`."""

    def step(at: Descent, batch: PyTree) -> tuple[Descent, Descent]:
        given = _given(at, batch, data is not None, collect)
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
