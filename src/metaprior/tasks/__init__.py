"""Where tasks come from. Every source is a factory that returns three disjoint `Splits`."""

from collections.abc import Callable

from metaprior.tasks.ambiguous import ambiguous, linear, three_families
from metaprior.tasks.arrays import ArrayTasks, Scaling, array_tasks
from metaprior.tasks.checks import DataError
from metaprior.tasks.cloze import ClozePool, cloze
from metaprior.tasks.fixed import FixedTasks
from metaprior.tasks.images import images, miniimagenet
from metaprior.tasks.labelled import Texts, read_texts
from metaprior.tasks.labels import check_labels, encode_labels
from metaprior.tasks.linear_gaussian import linear_gaussian
from metaprior.tasks.omniglot import omniglot
from metaprior.tasks.oneshot import one_shot_runs, one_shot_source
from metaprior.tasks.optimisees import digits, quadratics
from metaprior.tasks.pool import ClassPool, class_pool, pool_splits
from metaprior.tasks.reading import Examples, check_same_form, read_examples
from metaprior.tasks.sinusoid import sinusoid, sinusoid_hard
from metaprior.tasks.table import radon, sleepstudy, table
from metaprior.tasks.texts import TextPool, banking77, clinc150, texts
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
    "texts": texts,
    "clinc150": clinc150,
    "banking77": banking77,
    "cloze": cloze,
    "sleepstudy": sleepstudy,
    "radon": radon,
    "quadratics": quadratics,
    "digits": digits,
}

__all__ = [
    "SOURCES",
    "ArrayTasks",
    "ClassPool",
    "ClozePool",
    "DataError",
    "Examples",
    "FixedTasks",
    "Scaling",
    "TextPool",
    "Texts",
    "ambiguous",
    "array_tasks",
    "banking77",
    "check_labels",
    "check_same_form",
    "class_pool",
    "clinc150",
    "cloze",
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
    "read_texts",
    "sinusoid",
    "sinusoid_hard",
    "sleepstudy",
    "table",
    "texts",
    "three_families",
]
