"""Predictions in the units of the user's target.

Learners see a standardised target z. The user's target is y = offset + scale * z, separately for each target.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from metaprior.core.types import Predictive

Floats = tuple[float, ...]


@partial(jax.jit, static_argnums=1)
def _quantile(predictive: Any, q: float) -> Array:
    return predictive.quantile(q)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rescaled:
    """The predictive of y = offset + scale * z, given the predictive of z [n, d].

        mean(y) = offset + scale mean(z),   p(y) = p(z) / prod(scale),   F(y) = F(z),   z = (y - offset) / scale

    Offset and scale are exact (float64) and static. Results are numpy float64 if `base` holds concrete numbers, because
    with an offset such as 1.7e9 float32 has no digits left. Inside compiled code they are arrays of the compiled type.

    Attributes:
        base: Any predictive of d real targets z.
        offset: One number per target, in the target's units.
        scale: One number above 0 per target, in the target's units.
    """

    base: Any
    offset: Floats = field(metadata={"static": True})
    scale: Floats = field(metadata={"static": True})

    def mean(self) -> Float[Array, "n d"]:
        """Returns the mean of each target, in its units."""
        return self._raw(self.base.mean())

    def variance(self) -> Float[Array, "n d"]:
        """Returns the variance of each target, in its units squared."""
        return self._stretched(self.base.variance(), 2)

    def quantile(self, q: float) -> Float[Array, "n d"]:
        """Returns the marginal quantile of each target, in its units.

        Args:
            q: Probability, 0 < q < 1.
        """
        return self._raw(_quantile(self.base, q))

    def cdf(self, y: Any) -> Float[Array, "n d"]:
        """Returns the marginal distribution function of each target.

        Args:
            y: Targets [n, d], in their units.
        """
        return self.base.cdf(self._standardised(y))

    def log_prob(self, y: Any) -> Float[Array, " n"]:
        """Returns the log density of each example per unit of its targets: log p(z) - sum(log scale).

        Args:
            y: Targets [n, d], in their units.
        """
        return self.base.log_prob(self._standardised(y)) - float(np.log(self.scale).sum())

    def _raw(self, z: Array) -> Any:
        return self._stretched(z, 1) + np.asarray(self.offset, _type(z))

    def _stretched(self, z: Array, power: int) -> Any:
        dtype = _type(z)
        return (z if isinstance(z, Tracer) else np.asarray(z, dtype)) * np.asarray(self.scale, dtype) ** power

    def _standardised(self, y: Any) -> Array:
        y = y if isinstance(y, Tracer) else np.asarray(y, float)
        return jnp.asarray((y - np.asarray(self.offset, _type(y))) / np.asarray(self.scale, _type(y)), float)


def _type(values: Any) -> Any:
    return values.dtype if isinstance(values, Tracer) else np.float64


def in_units(predictive: Predictive, offset: Any, scale: Any) -> Predictive:
    """Converts the predictive of a standardised target to that of offset + scale * target; see `Rescaled`.

    Args:
        predictive: Predictive of d real targets.
        offset: [d], e.g. each target's mean over the training groups.
        scale: [d], e.g. each target's standard deviation over the training groups.
    """
    offset, scale = (tuple(np.asarray(v, float).reshape(-1).tolist()) for v in (offset, scale))
    return Rescaled(predictive, offset, scale)


__all__ = ["Rescaled", "in_units"]
