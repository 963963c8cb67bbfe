"""A mean over tasks with the half-width of its 95 % interval."""

from dataclasses import dataclass

import numpy as np

# With fewer groups or tasks than this, the interval of a skewed figure covers less than 90 % (docs/reliability.md).
FEW = 30


@dataclass(frozen=True)
class Figure:
    """A mean over tasks with the half-width of its 95 % interval.

    Attributes:
        mean: The mean.
        interval: The half-width, or None if there is a single task or group.
    """

    mean: float
    interval: float | None

    def __format__(self, digits: str) -> str:
        digits = (digits or ".4f") if digits_of(self.mean) == ".4f" else ".3g"
        return f"{self.mean:{digits}}" + ("" if self.interval is None else f" ± {self.interval:{digits}}")

    def __str__(self) -> str:
        return format(self)


def digits_of(value: float) -> str:
    """Returns the format of a number: four decimals, or four significant digits if it is very small or large.

    Args:
        value: The number.
    """
    return ".4f" if value == 0 or 1e-2 <= abs(value) < 1e5 else ".4g"


def title_of(name: str) -> str:
    """Returns a figure's name as it is printed.

    Args:
        name: Its key in a report, e.g. 'nll', or that of a family's figure, e.g. 'mse of line'.
    """
    special = {"nll": "NLL", "mse": "MSE", "rmse": "RMSE", "ece": "ECE", "mce": "MCE"}
    figure, of, family = name.partition(" of ")
    return special.get(figure, figure.replace("_", " ")) + of + family


def figure_of(per_task: np.ndarray, groups: np.ndarray | None = None, families: np.ndarray | None = None) -> Figure:
    """Computes the mean of one number per task, and the half-width t_{g-1} sd / sqrt(g) of its 95 % interval.

    Without groups, g is the number of tasks. With groups, g is the number of groups, and the mean and the sd are those
    of the groups' means, so each group counts once however often it was drawn. With F families that were drawn equally
    often, the sd is the one within families, and t has g - F degrees of freedom, since how many tasks each family has
    is not random.

    Args:
        per_task: The numbers [tasks].
        groups: The group of each task [tasks].
        families: The family of each task [tasks], where each family has the same number of tasks up to one.

    Returns:
        The figure. It is infinite or NaN if a task diverged, and has no interval if there is one task or group.
    """
    from scipy.special import stdtrit  # imported here because it takes a quarter of a second

    values = np.asarray(per_task, float)
    if groups is not None:
        _, place = np.unique(groups, return_inverse=True)
        values = np.bincount(place, values) / np.bincount(place)
    with np.errstate(over="ignore", invalid="ignore"):
        g = values.size
        if g < 2:
            return Figure(float(values.mean()), None)
        within, strata = values, 1
        if families is not None and len(np.unique(families)) < g:
            names, place = np.unique(families, return_inverse=True)
            within, strata = values - (np.bincount(place, values) / np.bincount(place))[place], len(names)
        deviation = within.std(ddof=strata)
        return Figure(float(values.mean()), float(stdtrit(g - strata, 0.975) * deviation / np.sqrt(g)))
