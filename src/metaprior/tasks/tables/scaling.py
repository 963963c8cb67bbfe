"""Standardising columns without loss of digits: moments, and the cast to the type that learners use."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from metaprior.core.types import Predictive
from metaprior.core.units import in_units
from metaprior.tasks.checks import DataError
from metaprior.tasks.tables.columns import LOST, Columns

CONSTANT = 1e-14  # a deviation below this fraction of a column's largest value is a rounding error


class Scaling(NamedTuple):
    """How raw features and targets were standardised: (raw - mean) / deviation, by the training groups, in float64.

    Apply it before casting to float32, because 1.7e9 + 1 and 1.7e9 are the same float32 number. A feature that was
    constant in training has an infinite deviation, so that a learner sees 0 for any value.

    Attributes:
        x_mean: Mean of each feature.
        x_deviation: Standard deviation of each feature.
        y_mean: Mean of each target.
        y_deviation: Standard deviation of each target.
    """

    x_mean: Float[np.ndarray, " d"]
    x_deviation: Float[np.ndarray, " d"]
    y_mean: Float[np.ndarray, " c"]
    y_deviation: Float[np.ndarray, " c"]

    def features(self, raw: Any) -> Float[np.ndarray, "... d"]:
        """Standardises raw features [..., d]; returns float64."""
        return (np.asarray(raw, float) - self.x_mean) / self.x_deviation

    def raw_features(self, x: Any) -> Float[np.ndarray, "... d"]:
        """Converts standardised features [..., d] to original units; returns float64."""
        return np.asarray(x, float) * np.where(np.isfinite(self.x_deviation), self.x_deviation, 0) + self.x_mean

    def standardised(self, y: Any) -> Float[np.ndarray, "... c"]:
        """Standardises raw targets [..., c]; returns float64."""
        return (np.asarray(y, float) - self.y_mean) / self.y_deviation

    def targets(self, y: Any) -> Float[np.ndarray, "... c"]:
        """Converts standardised targets or predicted means [..., c] to original units; returns float64."""
        return np.asarray(y, float) * self.y_deviation + self.y_mean

    def variances(self, variance: Any) -> Float[np.ndarray, "... c"]:
        """Converts predicted variances [..., c] to original units."""
        return np.asarray(variance, float) * self.y_deviation**2

    def predictive(self, predictive: Predictive) -> Predictive:
        """Converts a predictive of standardised targets to original units."""
        return in_units(predictive, self.y_mean, self.y_deviation)


def moments(values: Float[np.ndarray, "n k"], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Computes mean and standard deviation of each column.

    Args:
        values: The columns, [n, k].
        name: Their name, for the error.

    Returns:
        The means [k] and the standard deviations [k], which are 1 for a column that is constant up to rounding.

    Raises:
        DataError: Numbers whose mean or variance overflows.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        mean = values.mean(0)
        mean = mean + (values - mean).mean(0)  # corrects the rounding of a sum of large numbers
        size = np.abs(values - mean).max(0)
        # Dividing by the largest difference first, so that 1e200 squared does not overflow and 1e-200 squared is not 0.
        deviation = size * np.sqrt((((values - mean) / np.where(size > 0, size, 1.0)) ** 2).mean(0))
    if not (np.isfinite(mean).all() and np.isfinite(deviation).all()):
        worst = values.flat[np.abs(values).argmax()]
        raise DataError(f"standardise: column {name!r} has {worst:g}, whose mean or variance overflows. Rescale it.")
    constant = deviation <= CONSTANT * np.abs(values).max(0)
    return mean, np.where(constant, 1.0, deviation)


def cast(
    scaled: Float[np.ndarray, "n k"], raw: Float[np.ndarray, "n k"], name: str, columns: Columns, argument: str
) -> np.ndarray:
    """Casts standardised values to the type that learners use.

    Args:
        scaled: Standardised values, [n, k].
        raw: The same values before scaling, for the error.
        name: The name of the column.
        columns: The table, for the place of a row.
        argument: The argument that holds the column, for the error.

    Raises:
        DataError: A value that is too large for that type, naming column, row and value.
    """
    with np.errstate(over="ignore"):
        small = scaled.astype(jax.dtypes.canonicalize_dtype(float))
    bad = np.argwhere(~np.isfinite(small))
    if len(bad):
        row, at = bad[0].tolist()
        raise DataError(
            f"{argument}: column {name!r} has {raw[row, at]:g} in {columns.place(row)}, too large for {small.dtype}. "
            "Rescale it or correct it."
        )
    return small


def check_digits(
    raw: Float[np.ndarray, "n k"], mean: np.ndarray, deviation: np.ndarray, names: Sequence[str], columns: Columns,
    argument: str,
) -> None:  # fmt: skip
    """Checks that float32 can distinguish the rows of each column, despite an offset or a single huge value.

    The median rounding error of the values that a learner sees is compared with the range of the middle 80 %.

    Args:
        raw: Values before scaling, [n, k].
        mean: What is subtracted, [k].
        deviation: What is divided by, [k].
        names: The name of each column.
        columns: The table, for the place of a row.
        argument: The argument that holds the columns, for the error.

    Raises:
        DataError: A column whose rows float32 cannot distinguish, naming it and its most extreme value.
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
            fix = "Rescale it or correct that value." if standardised else "Set standardise=True or subtract an offset."
            raise DataError(
                f"{argument}: column {name!r} loses its digits: most values lie between {low:.17g} and {high:.17g}, "
                f"the farthest is {values[row]:.17g} in {columns.place(row)}. float32 cannot distinguish them. "
                f"{fix}"
            )
