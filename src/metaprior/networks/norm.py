"""Batch normalisation whose derivatives take few passes over the images.

Left to itself, differentiation takes four sums over all pixels, each of a product that is first written to memory,
where two sums of what is already there will do: on a CPU twice as fast, with a tenth of the buffers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-5


def batch_norm(
    x: Float[Array, "n *space c"], shift: Float[Array, " c"], gain: Float[Array, " c"] | None = None
) -> Float[Array, "n *space c"]:
    """Normalise each channel with the statistics of the batch at hand, then stretch and shift.

    No running statistics: a query set is normalised by itself, which makes predictions transductive, as in MAML (Finn
    et al. 2017). Ioffe & Szegedy 2015, algorithm 1; their epsilon, 1e-5 here, is added to the variance.
    """
    return _normalise(x, shift, jnp.ones_like(shift) if gain is None else gain)


def _statistics(x: Array) -> tuple[Array, Array]:
    """Mean and 1 / sd of each channel; in two passes, since E x^2 - (E x)^2 cancels where the mean is large."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jax.lax.rsqrt(((x - mean) ** 2).mean(axes) + EPSILON)


@jax.custom_jvp
def _normalise(x: Array, shift: Array, gain: Array) -> Array:
    mean, rate = _statistics(x)
    return (x - mean) * (rate * gain) + shift


@_normalise.defjvp
def _normalise_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """dy = a dx + b x + c with a, b, c per channel: its transpose needs just sum(dy) and sum(x dy)."""
    (x, shift, gain), (dx, dshift, dgain) = primals, tangents
    axes = tuple(range(x.ndim - 1))
    mean, rate = _statistics(x)
    mean_dx = dx.mean(axes)
    covariance = (x * dx).mean(axes) - mean * mean_dx
    slope = rate * (dgain - gain * rate**2 * covariance)
    offset = dshift - gain * rate * mean_dx - slope * mean
    return _normalise(x, shift, gain), dx * (gain * rate) + x * slope + offset
