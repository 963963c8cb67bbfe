"""Gradient steps from theta to phi: the inner loop of all gradient-based learners.

`descend` runs the steps. The caller decides where the meta-gradient flows: through all steps (MAML), stopped at each
inner gradient (first order), or around the steps (iMAML, Reptile).
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

SEGMENTS = 4  # number of segments of a rematerialised descent, of parts of each segment, and so on
UNROLLED = 5  # up to this many inner steps are unrolled, so that XLA fuses across them; more are a loop


def count(batch: Batch) -> Scalar | int:
    """Returns the number of examples: the sum of the weights, or 1 if it is 0, so that one can divide by it.

    Args:
        batch: The batch.
    """
    if batch.weight is None:
        return max(examples(batch), 1)
    total = weights(batch).sum()
    return jnp.where(total == 0, 1, total)


def mean_nll(likelihood: Likelihood, outputs: Array, batch: Batch) -> Scalar:
    """Computes the weighted mean of the examples' nll. It is 0 for an empty batch.

    Args:
        likelihood: The likelihood.
        outputs: The network's outputs [n, c].
        batch: The n examples.
    """
    return weighted_mean(likelihood.nll(outputs, counted(batch).y), batch)


def half_square(a: PyTree, b: PyTree) -> Scalar:
    """Computes 1/2 |a - b|^2 over all leaves.

    Args:
        a: A pytree.
        b: A pytree of the same structure.
    """
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.asarray(0.5 * sum(((u - v) ** 2).sum() for u, v in pairs))


class Descent(NamedTuple):
    """The state of an inner loop.

    Attributes:
        phi: The parameters of the task.
        state: The optimiser's state.
    """

    phi: PyTree
    state: PyTree


def optimizer_step(
    loss: Callable[..., Scalar],
    at: Descent,
    optimizer: optax.GradientTransformation,
    *batch: PyTree,
    first_order: bool = False,
) -> tuple[Descent, Scalar]:
    """Takes one step on loss(phi, *batch). A line search gets the arguments that it needs.

    Args:
        loss: The loss to minimise.
        at: The state before the step.
        optimizer: The optimiser.
        batch: Further arguments of the loss.
        first_order: Stop the gradient at the loss's value and gradient.

    Returns:
        The state after the step, and the loss before it.
    """
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
    """Takes k optimiser steps on loss(phi), or on loss(phi, data[t]) if there are data.

    Args:
        loss: The loss to minimise.
        phi: The starting point.
        optimizer: The optimiser.
        steps: Number of steps k.
        first_order: Stop the gradient at each inner gradient (Finn et al. 2017, sec. 5.2).
        remat: Keep 4 log4(k) values of phi for the backward pass instead of all intermediates of k steps, and recompute
            the rest, with log4(k) more forward passes.
        data: A pytree whose leaves have one leading entry per step.
        collect: Function (phi) or (phi, data[t]) -> data that depend on phi, such as a policy's trajectories. Step t
            then descends loss(phi, collect(phi_t, data[t])), where data[t] may be a random key. The collected data are
            a constant for the inner gradient. The meta-gradient flows through them, unless `collect` stops it.

    Returns:
        The state after the last step.
    """

    def step(at: Descent, batch: PyTree) -> Descent:
        given = _given(at, batch, data is not None, collect)
        return optimizer_step(loss, at, optimizer, *given, first_order=first_order)[0]

    start = Descent(phi, optimizer.init(phi))
    if remat and steps > 1 and not first_order:
        return _rematerialised(step, start, steps, data)
    # If no gradient flows through the steps, fusion has no advantage, and a loop reuses its buffers.
    if steps <= UNROLLED and not first_order:
        for t in range(steps):
            start = step(start, jax.tree.map(lambda leaf, t=t: leaf[t], data))
        return start
    return jax.lax.scan(lambda at, batch: (step(at, batch), None), start, data, length=steps)[0]


def _given(at: Descent, batch: PyTree, some: bool, collect: Callable[..., PyTree] | None) -> tuple[PyTree, ...]:
    """Returns the arguments of a step's loss besides phi."""
    given = (batch,) if some else ()
    return given if collect is None else (collect(at.phi, *given),)


def _rematerialised(step: Callable, start: Descent, steps: int, data: PyTree) -> Descent:
    """Runs the steps as a tree of segments (Griewank 1992), each of which is recomputed in the backward pass."""
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
    """Draws the indices of the examples for each step. Each pass goes through the shuffled data once.

    The result holds indices, because the memory of the examples themselves would grow with the steps. `drawn` returns
    a step's examples.

    Args:
        key: Random key.
        n: Number of examples.
        size: Examples per step.
        steps: Number of steps.
    """
    passes = -(-steps * size // n)
    order = jax.vmap(lambda k: jax.random.permutation(k, n))(jax.random.split(key, passes)).reshape(-1)
    return order[: steps * size].reshape(steps, size)


def drawn(data: Batch, places: Int[Array, " size"]) -> Batch:
    """Returns the examples with the given indices.

    Args:
        data: The examples.
        places: Indices [size].
    """
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
    """Computes the states after 0, 1, ..., k steps, stacked along a new leading axis.

    Args:
        loss: The loss to minimise.
        phi: The starting point.
        optimizer: The optimiser.
        steps: Number of steps k.
        data: As in `descend`.
        collect: As in `descend`.
    """

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
    """Computes each parameter's learning rate at one step: the diagonal of -d update / d gradient.

    It is 0 where the gradient is exactly 0, because the parameter does not move (Adam's rate would be 1 / eps there).
    It is exact for every optimiser that treats parameters one by one (SGD, learned rates, Adam). Otherwise it is
    Hutchinson's estimate z * (B z) with random signs z.

    Args:
        loss: The loss of the step.
        at: The state before the step.
        optimizer: The optimiser.
        probes: Number of draws of z.

    Returns:
        The rates, shaped as phi.
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
    """Returns gradient descent with a backtracking line search.

    The rate is halved, at most twelve times, until the loss decreases sufficiently relative to its slope (Armijo 1966).
    Reverse-mode differentiation through it is not possible, so it is for inner loops around which the meta-gradient
    flows.

    Args:
        rate: The largest learning rate.
    """
    search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=12, slope_rtol=1e-4, decrease_factor=0.5, increase_factor=2.0, rtol=1e-6
    )
    return optax.chain(optax.scale_by_learning_rate(rate), search)


# Optimisers that are not differentiable where a gradient or a tensor is exactly zero: they have no eps_root, or one
# that does not help (optax 0.2.8).
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
EPS_ROOT = 1e-8  # added to Adam's second moment if the meta-gradient flows: sqrt has no derivative at 0


def make_optimizer(
    name: str, rate: float | Array, *, differentiated: bool = True, **options: Any
) -> optax.GradientTransformation:
    """Makes an optax optimiser, or "line_search", by its name.

    An example is make_optimizer("adam", 1e-3, b1=0.0).

    A parameter whose gradient is exactly zero (a dead ReLU unit, an input column of zeros) has a second moment of zero,
    whose square root has no derivative, so the meta-gradient through Adam's steps would be NaN. If the meta-gradient
    flows, optimisers with an option `eps_root` get 1e-8. A step is then proportional to a gradient below 1e-4, and its
    derivative in the gradient is at most 1e4 times the rate, so that a few steps stay finite in float32.

    Args:
        name: Name of an optax optimiser, whose first argument is its learning rate.
        rate: The learning rate on the mean loss.
        differentiated: Whether the meta-gradient flows through the steps.
        options: Further options of the optimiser.

    Returns:
        The optimiser.

    Raises:
        ValueError: The name is unknown, or `differentiated` is True and the optimiser is not differentiable at zero.
    """
    factory = line_search if name == "line_search" else getattr(optax, name, None)
    known = [] if factory is None or name.startswith(("_", "scale_by_")) else _parameters(factory)
    if factory is None or not known or known[0] not in ("rate", "learning_rate", "max_learning_rate"):
        raise ValueError(f"optimizer must be the name of an optax optimiser, e.g. 'sgd' or 'adam', got {name!r}.")
    if differentiated and name in NO_META_GRADIENT:
        raise ValueError(
            f"optimizer must have a finite meta-gradient through its steps, got {name!r}: {NO_META_GRADIENT[name]}. "
            "Use 'sgd' or 'adam', or first_order=True if the learner has it."
        )
    if differentiated and "eps_root" in known:
        options.setdefault("eps_root", EPS_ROOT)
    return factory(rate, **options)


def _parameters(factory: Callable) -> list[str]:
    try:
        return list(signature(factory).parameters)
    except (TypeError, ValueError):
        return []
