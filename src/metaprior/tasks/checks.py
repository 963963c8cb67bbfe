"""Checks of the arguments that task sources share: each error names the argument, what came and what is needed."""

from math import inf
from typing import Annotated, Any

from metaprior.core.options import Interval, NonNegative, Ordered, Range, accept


class DataError(ValueError):
    """Data that cannot be used as asked: missing, damaged, too few, or not of the stated form."""


def check_interval(name: str, interval: Any, least: float = -inf) -> Interval:
    """(low, high) as floats with least <= low <= high."""
    return accept(Annotated[tuple[float, float], Ordered(least)], interval, name)


def check_count(name: str, count: Any, least: int = 1) -> int:
    """An integer of at least `least`."""
    return accept(Annotated[int, Range(least=least)], count, name)


def check_scale(name: str, scale: Any) -> float:
    """A finite number of at least 0."""
    return accept(NonNegative, scale, name)
