"""Checks of arguments that task sources share. Each error names the argument, what is needed and what came."""

from math import inf
from typing import Annotated, Any

from metaprior.core.options import Interval, NonNegative, Ordered, Range, accept


class DataError(ValueError):
    """Data that cannot be used: missing, damaged, too few, or not of the stated form."""


def check_interval(name: str, interval: Any, least: float = -inf) -> Interval:
    """Returns an interval as two floats.

    Args:
        name: The argument's name, for the error.
        interval: A pair (low, high).
        least: The smallest `low` that is allowed.

    Returns:
        (low, high) with least <= low <= high.

    Raises:
        ValueError: Anything else.
    """
    return accept(Annotated[tuple[float, float], Ordered(least)], interval, name)


def check_count(name: str, count: Any, least: int = 1) -> int:
    """Returns an integer of at least `least`.

    Args:
        name: The argument's name, for the error.
        count: The value to check.
        least: The smallest value that is allowed.

    Raises:
        ValueError: Anything else.
    """
    return accept(Annotated[int, Range(least=least)], count, name)


def check_scale(name: str, scale: Any) -> float:
    """Returns a finite number of at least 0.

    Args:
        name: The argument's name, for the error.
        scale: The value to check.

    Raises:
        ValueError: Anything else.
    """
    return accept(NonNegative, scale, name)
