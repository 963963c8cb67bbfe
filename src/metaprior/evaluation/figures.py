"""A mean over tasks with the half-width of its 95 % interval."""

from dataclasses import dataclass

import numpy as np

FEW = 30  # groups or tasks, below which the interval of a skewed figure covers less than 90 % (docs/reliability.md)


@dataclass(frozen=True)
class Figure:
    """A mean over tasks with the half-width of its 95 % interval, None where one task or group leaves it unknown."""

    mean: float
    interval: float | None

    def __format__(self, digits: str) -> str:
        digits = (digits or ".4f") if digits_of(self.mean) == ".4f" else ".3g"
        return f"{self.mean:{digits}}" + ("" if self.interval is None else f" ± {self.interval:{digits}}")

    def __str__(self) -> str:
        return format(self)


def digits_of(value: float) -> str:
    """Four decimals, or four digits for figures of tables in units that are very small or large."""
    return ".4f" if value == 0 or 1e-2 <= abs(value) < 1e5 else ".4g"


def title_of(name: str) -> str:
    """A figure's name as it is printed."""
    special = {"nll": "NLL", "mse": "MSE", "rmse": "RMSE", "ece": "ECE", "mce": "MCE"}
    return special.get(name, name.replace("_", " "))


def figure_of(per_task: np.ndarray, groups: np.ndarray | None = None) -> Figure:
    """Mean and 95 % half-width t_{g-1} sd / sqrt(g) of one number a task; inf or NaN where a task diverged.

    groups: each task's group. g is then their number, and sd that of the groups' means; else g counts tasks. The mean
    is over g means, so that each group counts once however often it was shown. One group or task has no interval.
    """
    from scipy.special import stdtrit  # not above: it takes a quarter of a second

    values = np.asarray(per_task, float)
    if groups is not None:
        _, place = np.unique(groups, return_inverse=True)
        values = np.bincount(place, values) / np.bincount(place)
    with np.errstate(over="ignore", invalid="ignore"):
        g = values.size
        if g < 2:
            return Figure(float(values.mean()), None)
        return Figure(float(values.mean()), float(stdtrit(g - 1, 0.975) * values.std(ddof=1) / np.sqrt(g)))
