"""Scores of a predictive at the targets, in the units of a table's target."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from metaprior.core.likelihoods import Categories, Counts
from metaprior.core.types import NumericPredictive
from metaprior.core.units import in_units
from metaprior.evaluation.calibration import brier
from metaprior.tasks import preparation_of

LEVELS = (0.5, 0.9, 0.95)  # the central predictive intervals whose coverage is reported


def score(predictive: Any, y: Array) -> dict[str, Array]:
    """Computes the scores of each query example.

    Args:
        predictive: The predictive distribution of n examples.
        y: Their targets, [n] class labels or [n, d] numbers.

    Returns:
        Scores [n] by name. For classes: accuracy, nll, brier and confidence. Otherwise: mse, nll, the coverage and
        width of central intervals at `LEVELS`, and the variance, as means over the d targets (nll: their sum).
    """
    scores = brief_score(predictive, y)
    nll = scores["nll"]
    if isinstance(predictive, Categories):
        p = predictive.mean()
        return scores | {"brier": brier(p, y), "confidence": p.max(-1)}
    rest = tuple(range(1, y.ndim))
    for level in LEVELS:
        low, high = (predictive.quantile(q) for q in ((1 - level) / 2, (1 + level) / 2))
        inside = (low <= y) & (y <= high)
        covered = jnp.where(jnp.isnan(low) | jnp.isnan(high), jnp.nan, inside.astype(nll.dtype))
        scores[f"coverage_{100 * level:.0f}"] = covered.mean(rest)
        scores[f"width_{100 * level:.0f}"] = (high - low).mean(rest)
    scores["variance"] = predictive.variance().mean(rest)
    return scores


def brief_score(predictive: Any, y: Array) -> dict[str, Array]:
    """Computes the scores that are reported after each inner step: accuracy or mse, and nll.

    Args:
        predictive: The predictive distribution of n examples.
        y: Their targets.

    Returns:
        Scores [n] by name.
    """
    nll = -predictive.log_prob(y)
    if isinstance(predictive, Categories):
        hit = (predictive.mean().argmax(-1) == y).astype(nll.dtype)
        return {"accuracy": jnp.where(jnp.isnan(nll), jnp.nan, hit), "nll": nll}
    if not isinstance(predictive, NumericPredictive):
        raise ValueError(
            f"predictive must have variance, cdf and quantile (`NumericPredictive`), got {type(predictive).__name__}."
        )
    return {"mse": ((predictive.mean() - y) ** 2).mean(tuple(range(1, y.ndim))), "nll": nll}


def integral_transform(predictive: Any, y: Array, key: PRNGKeyArray) -> dict[str, Array]:
    """Computes the probability integral transform (PIT) of each target.

    Args:
        predictive: The predictive distribution of n examples.
        y: Their targets [n, d].
        key: The random key for counts, whose PIT is randomised.

    Returns:
        "pit": [n, d], or nothing for classes.
    """
    if isinstance(predictive, Categories):
        return {}
    return {"pit": predictive.pit(y, key) if isinstance(predictive, Counts) else predictive.cdf(y)}


@dataclass(frozen=True)
class Units:
    """The units of a table's target.

    Scores are computed with scales relative to the largest one, so that none is above 1, and then multiplied in
    float64, in which the square of a scale does not overflow.

    Attributes:
        target: The name of the target, or None if there is no table.
        scale: For each target, how many of its units are one standardised unit.
    """

    target: str | None = None
    scale: tuple[float, ...] = ()

    @classmethod
    def of(cls, source: Any) -> "Units":
        """Returns the units of a source's table, which are empty for classes and where there is no table.

        Args:
            source: A task source.
        """
        preparation = preparation_of(source)
        if preparation is None or preparation.target.kind == "class":
            return cls()
        return cls(preparation.target.name, preparation.target.deviation)

    def score(self, predictive: Any, y: Array, by: Callable[..., dict[str, Array]] | None = None) -> dict[str, Array]:
        """Computes scores of a predictive of standardised targets, in units relative to the largest scale.

        Args:
            predictive: The predictive distribution of n examples.
            y: Their standardised targets [n, d].
            by: The function that computes the scores. The default is `score`.

        Returns:
            Scores [n] by name.
        """
        if set(self.scale) - {1.0}:
            relative = np.asarray(self.scale) / max(self.scale)
            predictive, y = in_units(predictive, 0 * relative, relative), y * relative.astype(y.dtype)
        return (score if by is None else by)(predictive, y)

    def scaled(self, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts the results of `score` to the target's own units.

        Args:
            scores: The scores by name.
        """
        if not set(self.scale) - {1.0}:
            return scores
        largest, own = max(self.scale), {name: np.asarray(values, float) for name, values in scores.items()}
        own |= {name: own[name] * largest**2 for name in ("mse", "variance") if name in own}
        own |= {name: own[name] * largest for name in own if name.startswith("width_")}
        return own | ({"nll": own["nll"] + len(self.scale) * float(np.log(largest))} if "nll" in own else {})
