"""Shared parts of learned optimisers: the encoding of gradients, truncated unrolls, and use on any loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, Scalar

from metaprior.inference.descent import Descent, optimizer_step

P = 10.0


def log_sign(g: Float[Array, " n"], p: float = P) -> Float[Array, "n 2"]:
    """Encodes numbers of any magnitude as two numbers of about -1..1.

    They are (log|g| / p, sign g) if |g| >= exp(-p), else (-1, exp(p) g).

    Args:
        g: Numbers [n], e.g. gradients.
        p: Sets the smallest magnitude that is encoded by its logarithm.

    References:
        Andrychowicz et al. 2016, Learning to learn by gradient descent by gradient descent, appendix A.
    """
    least = jnp.exp(-jnp.asarray(p, g.dtype))
    large = jnp.abs(g) >= least
    # The branch that is not chosen must be finite too: its derivative is multiplied by 0, not omitted.
    size = jnp.log(jnp.where(large, jnp.abs(g), 1.0)) / p
    return jnp.stack([jnp.where(large, size, -1.0), jnp.where(large, jnp.sign(g), g / least)], -1)


def unrolled(
    fit: Callable[..., Scalar],
    judge: Callable[[PyTree], Scalar],
    phi: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int,
    unroll: int,
    *,
    first_order: bool = True,
    data: PyTree = None,
) -> tuple[Descent, Float[Array, " steps"]]:
    """Takes optimiser steps with truncated back-propagation through time.

    Each step is recomputed in the backward pass, because an LSTM's gates are many times larger than its state.

    Args:
        fit: The loss to minimise, as in `descend`.
        judge: Function of phi that is evaluated after each step.
        phi: The starting point.
        optimizer: The optimiser.
        steps: Number of steps, a multiple of `unroll`.
        unroll: Number of steps after which back-propagation stops.
        first_order: Stop the gradient at each inner gradient.
        data: As in `descend`.

    Returns:
        The state after the last step, and the values of `judge` [steps].
    """

    def step(at: Descent, batch: PyTree) -> tuple[Descent, Scalar]:
        given = () if data is None else (batch,)
        after, _ = optimizer_step(fit, at, optimizer, *given, first_order=first_order)
        return after, judge(after.phi)

    def segment(at: Descent, batches: PyTree) -> tuple[Descent, Array]:
        return jax.lax.scan(jax.checkpoint(step), at, batches, length=unroll)

    def cut(at: Descent, batches: PyTree) -> tuple[Descent, Array]:
        after, values = segment(at, batches)
        return jax.lax.stop_gradient(after), values

    split = jax.tree.map(lambda leaf: leaf.reshape(steps // unroll, unroll, *leaf.shape[1:]), data)
    at, values = jax.lax.scan(cut, Descent(phi, optimizer.init(phi)), split, length=steps // unroll)
    return at, values.reshape(-1)


def optimise(
    loss: Callable[..., Scalar],
    start: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int,
    data: PyTree = None,
) -> tuple[PyTree, Float[Array, " steps"]]:
    """Minimises loss(phi), or loss(phi, data[t]) if there are data, by any optax transformation.

    Args:
        loss: The loss.
        start: The starting point.
        optimizer: The optimiser, e.g. a learned one.
        steps: Number of steps.
        data: A pytree whose leaves have one leading entry per step.

    Returns:
        phi after the last step, and the loss before each step [steps].
    """

    def step(at: Descent, batch: PyTree) -> tuple[Descent, Scalar]:
        given = () if data is None else (batch,)
        return optimizer_step(loss, at, optimizer, *given)

    at, losses = jax.lax.scan(step, Descent(start, optimizer.init(start)), data, length=steps)
    return at.phi, losses
