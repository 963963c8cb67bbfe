"""Task sources. Every source is a factory that returns three disjoint `Splits`."""

from metaprior.core.named import Registry
from metaprior.core.options import Fraction, checked
from metaprior.core.types import Splits, TaskSource, innermost
from metaprior.tasks.checks import DataError
from metaprior.tasks.examples import Examples, check_same_form, read_examples
from metaprior.tasks.fixed import FixedTasks
from metaprior.tasks.hidden import HiddenLabels, ask_for, hide_labels
from metaprior.tasks.images.augment import Augmented, augmented
from metaprior.tasks.images.clusters import ClusterTasks, clustered
from metaprior.tasks.images.filters import FilteredTasks, filtered, miniimagenet_art
from metaprior.tasks.images.folders import images, miniimagenet
from metaprior.tasks.images.omniglot import omniglot
from metaprior.tasks.images.oneshot import one_shot_runs, one_shot_source
from metaprior.tasks.images.strokes import DescribedTasks, omniglot_strokes
from metaprior.tasks.mixture import MixtureTasks, mixture, mixture_of
from metaprior.tasks.pool import ClassPool, class_pool, pool_splits
from metaprior.tasks.synthetic.ambiguous import ambiguous, linear, three_families
from metaprior.tasks.synthetic.explained import two_circles, wave_or_line
from metaprior.tasks.synthetic.families_2d import families_2d
from metaprior.tasks.synthetic.linear_gaussian import linear_gaussian
from metaprior.tasks.synthetic.optimisees import digits, quadratics
from metaprior.tasks.synthetic.polynomial import polynomial
from metaprior.tasks.synthetic.sinusoid import sinusoid, sinusoid_hard
from metaprior.tasks.synthetic.sinusoid_nme import sinusoid_nme
from metaprior.tasks.tables.arrays import ArrayTasks, array_tasks
from metaprior.tasks.tables.classes import check_labels, encode_labels
from metaprior.tasks.tables.columns import read_columns
from metaprior.tasks.tables.posteriordb import eight_schools, eight_schools_reference, radon_all
from metaprior.tasks.tables.preparation import Preparation
from metaprior.tasks.tables.scaling import Scaling
from metaprior.tasks.tables.table import radon, sleepstudy, table
from metaprior.tasks.texts.cloze import ClozePool, cloze
from metaprior.tasks.texts.reading import Texts, read_texts
from metaprior.tasks.texts.sources import TextPool, banking77, clinc150, texts

SOURCES = Registry(
    "tasks",
    {
        "sinusoid": sinusoid,
        "sinusoid_hard": sinusoid_hard,
        "sinusoid_nme": sinusoid_nme,
        "polynomial": polynomial,
        "linear": linear,
        "ambiguous": ambiguous,
        "wave_or_line": wave_or_line,
        "two_circles": two_circles,
        "linear_gaussian": linear_gaussian,
        "three_families": three_families,
        "families_2d": families_2d,
        "mixture": mixture,
        "omniglot": omniglot,
        "omniglot_strokes": omniglot_strokes,
        "miniimagenet": miniimagenet,
        "miniimagenet_art": miniimagenet_art,
        "images": images,
        "table": table,
        "texts": texts,
        "clinc150": clinc150,
        "banking77": banking77,
        "cloze": cloze,
        "sleepstudy": sleepstudy,
        "radon": radon,
        "radon_all": radon_all,
        "quadratics": quadratics,
        "digits": digits,
    },
)

# Sources whose support holds class attributes instead of examples.
DESCRIBED_SOURCES = ("omniglot_strokes",)

# Sources whose images are light ink on black, where a user's scans are dark ink on light paper.
INVERTED_SOURCES = ("omniglot",)


@checked
def with_hidden_labels(splits: Splits, *, labelled: Fraction = 1.0, unlabelled: str = "shown") -> Splits:
    """Wraps the splits of a source of classes so that some support labels are hidden.

    Args:
        splits: The splits of any source of classes.
        labelled: The fraction of support labels per class that stay known; see `hide_labels`.
        unlabelled: How the other examples appear; see `hide_labels`.

    Returns:
        The splits of `hide_labels`; with the defaults, `splits` themselves.

    Raises:
        ValueError: A value that `hide_labels` rejects.
    """
    return splits if (labelled, unlabelled) == (1, "shown") else hide_labels(splits, labelled, unlabelled)


around = with_hidden_labels  # its former name


def preparation_of(source: TaskSource) -> Preparation | None:
    """Returns the preparation of a table's tasks.

    Args:
        source: A task source. Sources that wrap another one are unwrapped first.

    Returns:
        The `Preparation`; None if the tasks do not come from a table.
    """
    within = innermost(source)
    return within.preparation if isinstance(within, ArrayTasks) else None


__all__ = [
    "DESCRIBED_SOURCES",
    "INVERTED_SOURCES",
    "SOURCES",
    "ArrayTasks",
    "Augmented",
    "ClassPool",
    "ClozePool",
    "ClusterTasks",
    "DataError",
    "DescribedTasks",
    "Examples",
    "FilteredTasks",
    "FixedTasks",
    "HiddenLabels",
    "MixtureTasks",
    "Preparation",
    "Scaling",
    "TextPool",
    "Texts",
    "ambiguous",
    "around",
    "array_tasks",
    "ask_for",
    "augmented",
    "banking77",
    "check_labels",
    "check_same_form",
    "class_pool",
    "clinc150",
    "cloze",
    "clustered",
    "digits",
    "eight_schools",
    "eight_schools_reference",
    "encode_labels",
    "families_2d",
    "filtered",
    "hide_labels",
    "images",
    "linear",
    "linear_gaussian",
    "miniimagenet",
    "miniimagenet_art",
    "mixture",
    "mixture_of",
    "omniglot",
    "omniglot_strokes",
    "one_shot_runs",
    "one_shot_source",
    "polynomial",
    "pool_splits",
    "preparation_of",
    "quadratics",
    "radon",
    "radon_all",
    "read_columns",
    "read_examples",
    "read_texts",
    "sinusoid",
    "sinusoid_hard",
    "sinusoid_nme",
    "sleepstudy",
    "table",
    "texts",
    "three_families",
    "two_circles",
    "wave_or_line",
    "with_hidden_labels",
]
