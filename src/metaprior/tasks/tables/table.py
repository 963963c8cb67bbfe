"""Tables in CSV and NPZ files, and tasks from them: one column says which task a row belongs to."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from metaprior.core.options import Count, Seed, checked
from metaprior.core.types import Splits
from metaprior.tasks.checks import DataError
from metaprior.tasks.store import data_folder
from metaprior.tasks.tables.arrays import array_tasks
from metaprior.tasks.tables.columns import Columns, read_columns
from metaprior.tasks.tables.preparation import Preparation

# Classic hierarchical data sets: file in grouped_tables/, target, group, features.
NAMED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sleepstudy": ("Y", "G", ("U",)),
    "radon": ("log_radon", "county", ("floor", "log_uranium")),
    "exam": ("Y", "G", ("U", "B", "A")),
    "hsb82": ("Y", "G", ("U", "B", "A", "C", "meanses")),
}


@checked
def table(
    path: str | Path,
    *,
    target: str | None = None,
    group: str | None = None,
    features: Sequence[str] | None = None,
    categories: Sequence[str] = (),
    standardise: bool = True,
    shot: Count = 5,
    query: Count = 5,
    test_query: Count | None = None,
    split: Any = (0.7, 0.15, 0.15),
    seed: Seed = 0,
    ragged: Literal["pad", "resample", "exact"] = "pad",
    small: Literal["error", "drop"] = "error",
    classification: bool | None = None,
    counts: bool = False,
    preparation: Preparation | None = None,
) -> Splits:
    """Tasks from a CSV or NPZ file: a row an example, a column that says which task it belongs to.

    A feature column is a number where every cell is one (digits, a point, an exponent), a truth value where every cell
    is true or false, else a category with a feature a level. Numbers beside words, decimal commas, dates and text with
    a level for most rows are errors. Group and class columns are never read as floats: they are integers where all are
    written as such, else text, so 007 and 7 are two groups.

    Args:
        path: a file, or 'sleepstudy', 'radon', 'exam' or 'hsb82', read from METAPRIOR_DATA/grouped_tables.
        target, group, features: columns; known for the named tables. Without `features`, all the others.
        categories: features that are categories although they hold numbers, dates or many levels.
        standardise: features and real targets to mean 0, deviation 1 over the training groups; counts stay as they are.
        classification, counts: what the target holds; by default classes if it is text or truth values, else numbers. A
            recipe sets them by its likelihood.
        preparation: of an earlier run, in place of one fitted here.

    The other options, and errors, are those of `array_tasks`; besides, a DataError for a column that is not there.
    """
    file = Path(path)
    if str(path) in NAMED:
        file = _named(str(path))
        known = NAMED[str(path)]
        target, group, features = target or known[0], group or known[1], known[2] if features is None else features
    columns = read_columns(file)
    if target is None or group is None:
        raise DataError(f"target, group: came {target!r}, {group!r}, needs columns of {file}: {', '.join(columns)}")
    if target == group:
        raise DataError(f"target and group must be two columns, got {target!r} for both.")
    goal, groups = columns.find(target, "target"), columns.find(group, "group")
    if features is None:
        features = [name for name in columns if name not in (target, group)]
    if held := [name for name in features if name in (target, group)]:
        raise DataError(f"features: came {held[0]!r}, which is the target or the group; leave it out")
    if not features:
        raise DataError("features: came none, needs one column at least")
    return array_tasks(
        Columns({name: columns.find(name, "features") for name in features}, columns.path, columns.lines),
        goal, groups, shot=shot, query=query, test_query=test_query, split=split, seed=seed, ragged=ragged, small=small,
        standardise=standardise, classification=classification, counts=counts, categories=categories,
        names=(target, group), preparation=preparation,
    )  # fmt: skip


def _named(name: str) -> Path:
    folder = data_folder("grouped_tables")
    if folder is None or not (folder / f"{name}.csv").is_file():
        raise DataError(
            f"{name}: needs {name}.csv in a folder grouped_tables/ inside the one that METAPRIOR_DATA names; or give "
            "table() the path of your own file"
        )
    return folder / f"{name}.csv"


sleepstudy = partial(table, "sleepstudy")
radon = partial(table, "radon", small="drop")
