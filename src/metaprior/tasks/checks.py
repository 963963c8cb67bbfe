"""Checks of the arguments that task sources share: each error names the argument, what came and what is needed."""

from math import isfinite
from typing import Any

from metaprior.options import Interval


class DataError(ValueError):
    """Data that cannot be used as asked: missing, damaged, too few, or not of the stated form."""


def check_interval(name: str, interval: Interval, least: float = -float("inf")) -> Interval:
    """(low, high) as floats with least <= low <= high."""
    try:
        low, high = (float(edge) for edge in interval)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: came {interval!r}, needs two numbers (low, high)") from None
    if not (isfinite(low) and isfinite(high) and least <= low <= high):
        raise ValueError(f"{name}: came {interval!r}, needs finite numbers with {least:g} <= low <= high")
    return low, high


def check_count(name: str, count: int, least: int = 1) -> int:
    """A whole number of at least `least`."""
    if isinstance(count, bool) or not _whole(count) or int(count) < least:
        raise ValueError(f"{name}: came {count!r}, needs a whole number of at least {least}")
    return int(count)


def _whole(count: Any) -> bool:
    try:
        return int(count) == count
    except (TypeError, ValueError, OverflowError):
        return False


def check_scale(name: str, scale: float) -> float:
    """A finite number >= 0."""
    try:
        value = float(scale)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: came {scale!r}, needs a number >= 0") from None
    if not (isfinite(value) and value >= 0):
        raise ValueError(f"{name}: came {scale!r}, needs a finite number >= 0")
    return value
