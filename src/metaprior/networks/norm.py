"""Normalisation between layers. Its statistics decide on which other examples a prediction depends.

Batch norm uses statistics of the current batch ("batch"), of the training tasks ("running") or of the support
("task"). The other norms use each example alone ("layer", "group"). docs/networks.md describes the consequences.

Automatic differentiation of batch norm computes four sums over all pixels, each of a product that is first written to
memory. The derivative below needs two sums of arrays that exist already. On a CPU this is twice as fast, with a tenth
of the buffers.
"""

from collections.abc import Mapping
from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-5
NORMS = ("batch", "running", "task", "layer", "group", "none")
OF_A_BATCH = NORMS[:3]  # their statistics are over many examples; those of the others are over one
NOT_ITS_OWN = {"task": "the support", "running": "training tasks"}
GROUP_CHANNELS = 16  # channels per group; Wu & He 2018, table 3


class Statistics(NamedTuple):
    """Mean and variance of each channel.

    Attributes:
        mean: Means [c].
        variance: Variances [c].
    """

    mean: Float[Array, " c"]
    variance: Float[Array, " c"]


AT_HAND = "at hand"
# The statistics of a batch norm: given ones for each layer by its name, those of the current examples with weights, or
# those of the current examples with equal weights (AT_HAND). None means AT_HAND for norm="batch", and is an error for
# "running" and "task".
By = Mapping[str, Statistics] | Float[Array, " n"] | str | None


def check_norm(norm: str) -> None:
    """Checks the name of a norm.

    Args:
        norm: The name.

    Raises:
        ValueError: It is not one of NORMS.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}.")


def source_of(norm: str) -> str:
    """Returns the value of `Model.statistics` for a norm.

    Args:
        norm: The norm's name.

    Returns:
        "task" or "running" if the statistics must be provided from outside the network, else "batch".
    """
    return norm if norm in NOT_ITS_OWN else "batch"


def norm_init(width: int, gain: bool) -> dict[str, Array]:
    """Initialises a norm's parameters: a shift of 0 and a gain of 1 per channel.

    Args:
        width: Number of channels.
        gain: Whether there is a gain.
    """
    return {"shift": jnp.zeros(width)} | ({"gain": jnp.ones(width)} if gain else {})


def normalise(
    norm: str, name: str, layer: Mapping[str, Array], x: Float[Array, "n *space c"], by: By = None
) -> Float[Array, "n *space c"]:
    """Normalises x, then applies the layer's gain (if it has one) and shift.

    Args:
        norm: The norm's name.
        name: The layer's name.
        layer: Its parameters, with "shift" [c] and perhaps "gain" [c].
        x: The layer's outputs [n, ..., c].
        by: The statistics of a batch norm, see `Call.by`.

    Raises:
        ValueError: The norm is "task" or "running", and `by` is None.
    """
    shift, gain = layer["shift"], layer.get("gain")
    if by is None and norm in NOT_ITS_OWN:
        raise ValueError(
            f"norm {norm!r} needs the statistics of {NOT_ITS_OWN[norm]}, but the network was called without them. "
            "Make the learner with make_learner(name, model, ...), which provides them, or use norm='batch'."
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
    """Computes each channel's weighted mean and variance over the examples (and space).

    Args:
        x: Outputs of a layer [n, ..., c].
        weight: Weights of the examples [n].

    Returns:
        The statistics; mean 0 and variance 1 if all weights are 0.
    """
    total = weight.sum()
    share = (weight / jnp.where(total > 0, total, 1)).reshape(-1, *[1] * (x.ndim - 1))
    space = tuple(range(1, x.ndim - 1))
    mean = (share * x).sum(0).mean(tuple(a - 1 for a in space))
    variance = (share * (x - mean) ** 2).sum(0).mean(tuple(a - 1 for a in space))
    return Statistics(mean, jnp.where(total > 0, variance, 1.0))


def group_norm(x: Float[Array, "n *space c"], groups: int) -> Float[Array, "n *space c"]:
    """Normalises each example and group of channels alone (Wu & He 2018). One group is layer norm of an image.

    Args:
        x: Outputs of a layer [n, ..., c].
        groups: Number of groups, which divides c.
    """
    split = x.reshape(*x.shape[:-1], groups, -1)
    axes = (*range(1, x.ndim - 1), x.ndim)
    centred = split - split.mean(axes, keepdims=True)
    normal = centred * jax.lax.rsqrt((centred**2).mean(axes, keepdims=True) + EPSILON)
    return normal.reshape(x.shape)


def batch_norm(
    x: Float[Array, "n *space c"], shift: Float[Array, " c"], gain: Float[Array, " c"] | None = None
) -> Float[Array, "n *space c"]:
    """Normalises each channel with the statistics of the current batch, then scales and shifts it.

    A query set is normalised with its own statistics, so predictions are transductive, as in MAML (Finn et al. 2017).
    An epsilon of 1e-5 is added to the variance.

    Args:
        x: Outputs of a layer [n, ..., c].
        shift: Shift of each channel [c].
        gain: Scale of each channel [c]. None is 1.

    References:
        Ioffe & Szegedy 2015, Batch normalization, algorithm 1.
    """
    return _normalise(x, shift, jnp.ones_like(shift) if gain is None else gain)


def _statistics(x: Array) -> tuple[Array, Array]:
    """Computes mean and 1 / sd of each channel in two passes: E x^2 - (E x)^2 loses digits if the mean is large."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jax.lax.rsqrt(((x - mean) ** 2).mean(axes) + EPSILON)


@jax.custom_jvp
def _normalise(x: Array, shift: Array, gain: Array) -> Array:
    mean, rate = _statistics(x)
    return (x - mean) * (rate * gain) + shift


@_normalise.defjvp
def _normalise_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """Computes dy = a dx + b x + c with a, b, c per channel. Its transpose needs only sum(dy) and sum(x dy)."""
    (x, shift, gain), (dx, dshift, dgain) = primals, tangents
    axes = tuple(range(x.ndim - 1))
    mean, rate = _statistics(x)
    mean_dx = dx.mean(axes)
    covariance = (x * dx).mean(axes) - mean * mean_dx
    slope = rate * (dgain - gain * rate**2 * covariance)
    offset = dshift - gain * rate * mean_dx - slope * mean
    return _normalise(x, shift, gain), dx * (gain * rate) + x * slope + offset
