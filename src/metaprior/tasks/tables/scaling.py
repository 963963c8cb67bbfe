"""Standardising columns without losing their digits: moments, and the cast to what learners compute in."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from metaprior.core.types import Predictive
from metaprior.core.units import in_units
from metaprior.tasks.checks import DataError
from metaprior.tasks.tables.columns import LOST, Columns

CONSTANT = 1e-14  # of a column's size: a deviation below it is rounding


class Scaling(NamedTuple):
    """How raw features and targets were standardised, in float64: (raw - mean) / deviation, by the training groups.

    Centre with it before anything is cast to float32: 1.7e9 + 1 and 1.7e9 are one float32 number. A feature that was
    constant in training has an infinite deviation: whatever its value, a learner sees 0.
    """

    x_mean: Float[np.ndarray, " d"]
    x_deviation: Float[np.ndarray, " d"]
    y_mean: Float[np.ndarray, " c"]
    y_deviation: Float[np.ndarray, " c"]

    def features(self, raw: Any) -> Float[np.ndarray, "... d"]:
        """Raw features as a learner sees them, in float64."""
        return (np.asarray(raw, float) - self.x_mean) / self.x_deviation

    def raw_features(self, x: Any) -> Float[np.ndarray, "... d"]:
        """Features that a learner sees in original units, in float64."""
        return np.asarray(x, float) * np.where(np.isfinite(self.x_deviation), self.x_deviation, 0) + self.x_mean

    def standardised(self, y: Any) -> Float[np.ndarray, "... c"]:
        """Raw targets as a learner sees them, in float64."""
        return (np.asarray(y, float) - self.y_mean) / self.y_deviation

    def targets(self, y: Any) -> Float[np.ndarray, "... c"]:
        """Standardised targets or predicted means in original units, in float64."""
        return np.asarray(y, float) * self.y_deviation + self.y_mean

    def variances(self, variance: Any) -> Float[np.ndarray, "... c"]:
        """Predicted variances in original units."""
        return np.asarray(variance, float) * self.y_deviation**2

    def predictive(self, predictive: Predictive) -> Predictive:
        """A predictive of standardised targets as one in original units."""
        return in_units(predictive, self.y_mean, self.y_deviation)


def moments(values: Float[np.ndarray, "n k"], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each column; a constant one, up to rounding, has deviation 1.

    Raises:
        DataError: numbers whose mean or variance overflows.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean = values.mean(0)
        mean = mean + (values - mean).mean(0)  # what a sum of large numbers rounds away
        size = np.abs(values - mean).max(0)
        # By the largest difference first, so that neither 1e200 squared overflows nor 1e-200 squared vanishes.
        deviation = size * np.sqrt((((values - mean) / np.where(size > 0, size, 1.0)) ** 2).mean(0))
    if not (np.isfinite(mean).all() and np.isfinite(deviation).all()):
        worst = values.flat[np.abs(values).argmax()]
        raise DataError(f"standardise: column {name!r} has {worst:g}, whose mean or variance overflows; rescale it.")
    constant = deviation <= CONSTANT * np.abs(values).max(0)
    return mean, np.where(constant, 1.0, deviation)


def cast(
    scaled: Float[np.ndarray, "n k"], raw: Float[np.ndarray, "n k"], name: str, columns: Columns, argument: str
) -> np.ndarray:
    """Standardised values in the type that learners compute in.

    Raises:
        DataError: a value that is too large for it, naming column, row and value.
    """
    with np.errstate(over="ignore"):
        small = scaled.astype(jax.dtypes.canonicalize_dtype(float))
    bad = np.argwhere(~np.isfinite(small))
    if len(bad):
        row, at = bad[0].tolist()
        raise DataError(
            f"{argument}: column {name!r} has {raw[row, at]:g} in {columns.place(row)}, too large for {small.dtype}; "
            "rescale it or correct it."
        )
    return small


def check_digits(
    raw: Float[np.ndarray, "n k"], mean: np.ndarray, deviation: np.ndarray, names: Sequence[str], columns: Columns,
    argument: str,
) -> None:  # fmt: skip
    """Refuse columns whose rows float32 can no longer tell apart, for an offset or for one huge value.

    The median rounding error of the values that a learner sees is held against the spread of the middle 80 %.

    Raises:
        DataError: naming the column and its largest value.
    """
    for at, name in enumerate(names):
        values = raw[:, at]
        with np.errstate(over="ignore", invalid="ignore"):
            seen = ((values - mean[at]) / deviation[at]).astype(jax.dtypes.canonicalize_dtype(float)).astype(float)
            error = np.median(np.abs(seen * deviation[at] + mean[at] - values))
            low, high = np.percentile(values, (10, 90))
            spread = high - low if high > low else np.ptp(values)
        if spread > 0 and not error <= LOST * spread:
            row = int(np.abs(values - np.median(values)).argmax())
            standardised = deviation[at] != 1 or mean[at] != 0
            fix = "rescale it or correct that value" if standardised else "set standardise=True or subtract an offset"
            raise DataError(
                f"{argument}: column {name!r} loses its digits: most values lie between {low:.17g} and {high:.17g}, "
                f"the farthest is {values[row]:.17g} in {columns.place(row)}; float32 cannot tell them apart. To mend "
                f"it, {fix}."
            )
