"""Where tasks come from. Every source is a factory that returns three disjoint `Splits`."""

from collections.abc import Callable

from metaprior.tasks.ambiguous import ambiguous, linear
from metaprior.tasks.checks import DataError
from metaprior.tasks.fixed import FixedTasks
from metaprior.tasks.linear_gaussian import linear_gaussian
from metaprior.tasks.omniglot import omniglot
from metaprior.tasks.oneshot import one_shot_runs, one_shot_source
from metaprior.tasks.pool import ClassPool, class_pool, pool_splits
from metaprior.tasks.sinusoid import sinusoid, sinusoid_hard
from metaprior.types import Splits

SOURCES: dict[str, Callable[..., Splits]] = {
    "sinusoid": sinusoid,
    "sinusoid_hard": sinusoid_hard,
    "linear": linear,
    "ambiguous": ambiguous,
    "linear_gaussian": linear_gaussian,
    "omniglot": omniglot,
}

__all__ = [
    "SOURCES",
    "ClassPool",
    "DataError",
    "FixedTasks",
    "ambiguous",
    "class_pool",
    "linear",
    "linear_gaussian",
    "omniglot",
    "one_shot_runs",
    "one_shot_source",
    "pool_splits",
    "sinusoid",
    "sinusoid_hard",
]
