"""What learned optimisers share: how a gradient is shown to a network, truncated unrolls, and use on any loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, Scalar

from metaprior.inference.descent import Descent, optimizer_step

P = 10.0


def log_sign(g: Float[Array, " n"], p: float = P) -> Float[Array, "n 2"]:
    """Magnitude and direction of a number of any size, both in about -1..1 (Andrychowicz et al. 2016, appendix A).

    (log|g| / p, sign g) where |g| >= exp(-p), else (-1, exp(p) g).
    """
    least = jnp.exp(-jnp.asarray(p, g.dtype))
    large = jnp.abs(g) >= least
    # What is not chosen must be finite too: its derivative is multiplied by 0, not left out.
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
    """`steps` optimiser steps on fit (as `descend`), and judge(phi) after each; back-propagation stops every `unroll`.

    Each step is recomputed in the backward pass: an LSTM's gates are many times larger than its state.
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
    """Minimise loss(phi), or loss(phi, data[t]) with one leading entry of data a step, by any optax transformation.

    Returns phi after `steps` steps and the loss before each of them.
    """

    def step(at: Descent, batch: PyTree) -> tuple[Descent, Scalar]:
        given = () if data is None else (batch,)
        return optimizer_step(loss, at, optimizer, *given)

    at, losses = jax.lax.scan(step, Descent(start, optimizer.init(start)), data, length=steps)
    return at.phi, losses
