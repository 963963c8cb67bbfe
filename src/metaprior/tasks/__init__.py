"""Where tasks come from. Every source is a factory that returns three disjoint `Splits`."""

from collections.abc import Callable

from metaprior.tasks.ambiguous import ambiguous, linear, three_families
from metaprior.tasks.arrays import ArrayTasks, Scaling, array_tasks
from metaprior.tasks.augment import Augmented, augmented
from metaprior.tasks.checks import DataError
from metaprior.tasks.fixed import FixedTasks
from metaprior.tasks.images import images, miniimagenet
from metaprior.tasks.labels import check_labels, encode_labels
from metaprior.tasks.linear_gaussian import linear_gaussian
from metaprior.tasks.omniglot import omniglot
from metaprior.tasks.oneshot import one_shot_runs, one_shot_source
from metaprior.tasks.optimisees import digits, quadratics
from metaprior.tasks.pool import ClassPool, class_pool, pool_splits
from metaprior.tasks.reading import Examples, check_same_form, read_examples
from metaprior.tasks.sinusoid import sinusoid, sinusoid_hard
from metaprior.tasks.table import radon, sleepstudy, table
from metaprior.types import Splits

SOURCES: dict[str, Callable[..., Splits]] = {
    "sinusoid": sinusoid,
    "sinusoid_hard": sinusoid_hard,
    "linear": linear,
    "ambiguous": ambiguous,
    "linear_gaussian": linear_gaussian,
    "three_families": three_families,
    "omniglot": omniglot,
    "miniimagenet": miniimagenet,
    "images": images,
    "table": table,
    "sleepstudy": sleepstudy,
    "radon": radon,
    "quadratics": quadratics,
    "digits": digits,
}

__all__ = [
    "SOURCES",
    "ArrayTasks",
    "Augmented",
    "ClassPool",
    "DataError",
    "Examples",
    "FixedTasks",
    "Scaling",
    "ambiguous",
    "array_tasks",
    "augmented",
    "check_labels",
    "check_same_form",
    "class_pool",
    "digits",
    "encode_labels",
    "images",
    "linear",
    "linear_gaussian",
    "miniimagenet",
    "omniglot",
    "one_shot_runs",
    "one_shot_source",
    "pool_splits",
    "quadratics",
    "radon",
    "read_examples",
    "sinusoid",
    "sinusoid_hard",
    "sleepstudy",
    "table",
    "three_families",
]
