"""Normalisation between layers: what an image is measured by decides what a prediction depends on.

Batch norm by the batch at hand ("batch"), by statistics of the training tasks ("running") or of the support ("task"),
and norms of each example by itself ("layer", "group"). docs/networks.md says what follows from the choice.

Left to itself, differentiation of batch norm takes four sums over all pixels, each of a product that is first written
to memory, where two sums of what is already there will do: on a CPU twice as fast, with a tenth of the buffers.
"""

from collections.abc import Mapping
from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-5
NORMS = ("batch", "running", "task", "layer", "group", "none")
OF_A_BATCH = NORMS[:3]  # their statistics are of many examples; the others' of one
NOT_ITS_OWN = {"task": "the support", "running": "training tasks"}
GROUP_CHANNELS = 16  # of one group; Wu & He 2018, table 3


class Statistics(NamedTuple):
    """Mean and variance of each channel."""

    mean: Float[Array, " c"]
    variance: Float[Array, " c"]


AT_HAND = "at hand"
# What a batch norm goes by: statistics for each layer by its name, the weights of the examples at hand, or AT_HAND,
# those examples all alike. None is the last for norm="batch"; "running" and "task" have to be told.
By = Mapping[str, Statistics] | Float[Array, " n"] | str | None


def check_norm(norm: str) -> None:
    """A ValueError unless `norm` is one of NORMS."""
    if norm not in NORMS:
        raise ValueError(f"norm: came {norm!r}, needs one of {', '.join(NORMS)}")


def source_of(norm: str) -> str:
    """What `Model.statistics` is under this norm: whose statistics somebody else has to provide."""
    return norm if norm in NOT_ITS_OWN else "batch"


def norm_init(width: int, gain: bool) -> dict[str, Array]:
    """A shift of 0 and, if asked for, a gain of 1 a channel."""
    return {"shift": jnp.zeros(width)} | ({"gain": jnp.ones(width)} if gain else {})


def normalise(
    norm: str, name: str, layer: Mapping[str, Array], x: Float[Array, "n *space c"], by: By = None
) -> Float[Array, "n *space c"]:
    """The layer's norm of x, then its gain (if it has one) and shift.

    Raises ValueError where the norm is "task" or "running" and nothing is said to go by.
    """
    shift, gain = layer["shift"], layer.get("gain")
    if by is None and norm in NOT_ITS_OWN:
        raise ValueError(
            f"norm: {norm!r} goes by the statistics of {NOT_ITS_OWN[norm]}, which the network does not know; make the "
            "learner by make_learner(name, model, ...), which tells it, or give the network norm='batch'"
        )
    if norm in OF_A_BATCH:
        if by is None or isinstance(by, str):
            return batch_norm(x, shift, gain)
        mean, variance = by[name] if isinstance(by, Mapping) else moments(x, by)
        x = (x - mean) * jax.lax.rsqrt(variance + EPSILON)
    elif norm != "none":
        width = x.shape[-1]
        x = group_norm(x, 1 if norm == "layer" else width // gcd(width, GROUP_CHANNELS))
    return x * gain + shift if gain is not None else x + shift


def moments(x: Float[Array, "n *space c"], weight: Float[Array, " n"]) -> Statistics:
    """Each channel's mean and variance over the examples, in proportion to their weights; 0 and 1 over none."""
    total = weight.sum()
    share = (weight / jnp.where(total > 0, total, 1)).reshape(-1, *[1] * (x.ndim - 1))
    space = tuple(range(1, x.ndim - 1))
    mean = (share * x).sum(0).mean(tuple(a - 1 for a in space))
    variance = (share * (x - mean) ** 2).sum(0).mean(tuple(a - 1 for a in space))
    return Statistics(mean, jnp.where(total > 0, variance, 1.0))


def group_norm(x: Float[Array, "n *space c"], groups: int) -> Float[Array, "n *space c"]:
    """Each example and group of channels normalised by itself (Wu & He 2018); one group is layer norm of an image."""
    split = x.reshape(*x.shape[:-1], groups, -1)
    axes = (*range(1, x.ndim - 1), x.ndim)
    centred = split - split.mean(axes, keepdims=True)
    normal = centred * jax.lax.rsqrt((centred**2).mean(axes, keepdims=True) + EPSILON)
    return normal.reshape(x.shape)


def batch_norm(
    x: Float[Array, "n *space c"], shift: Float[Array, " c"], gain: Float[Array, " c"] | None = None
) -> Float[Array, "n *space c"]:
    """Normalise each channel with the statistics of the batch at hand, then stretch and shift.

    A query set is normalised by itself, which makes predictions transductive, as in MAML (Finn et al. 2017). Ioffe &
    Szegedy 2015, algorithm 1; their epsilon, 1e-5 here, is added to the variance.
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
