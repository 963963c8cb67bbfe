"""Where tasks come from. Every source is a factory that returns three disjoint `Splits`."""

from collections.abc import Callable

from metaprior.tasks.ambiguous import ambiguous, linear
from metaprior.tasks.checks import DataError
from metaprior.tasks.linear_gaussian import linear_gaussian
from metaprior.tasks.sinusoid import sinusoid, sinusoid_hard
from metaprior.types import Splits

SOURCES: dict[str, Callable[..., Splits]] = {
    "sinusoid": sinusoid,
    "sinusoid_hard": sinusoid_hard,
    "linear": linear,
    "ambiguous": ambiguous,
    "linear_gaussian": linear_gaussian,
}

__all__ = ["SOURCES", "DataError", "ambiguous", "linear", "linear_gaussian", "sinusoid", "sinusoid_hard"]
