"""Tasks from CSV and NPZ files. One column states which task a row belongs to."""

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

# Classic hierarchical data sets: name of the file in grouped_tables/, then target, group and features.
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
    """Makes tasks from a CSV or NPZ file with one row per example and a group column.

    The type of a feature column follows from its cells. It holds numbers if every cell is one (digits, a decimal point,
    an exponent), truth values if every cell is true or false, else categories, with one feature per level. Numbers
    beside words, decimal commas, dates and text with a different level in most rows are errors. Group and class columns
    are never read as floats. They are integers if every cell is written as one, else text, so 007 and 7 are two groups.

    Args:
        path: A file, or 'sleepstudy', 'radon', 'exam' or 'hsb82', which are read from METAPRIOR_DATA/grouped_tables.
        target: The target column. By default that of the named table.
        group: The group column. By default that of the named table.
        features: The feature columns. By default those of the named table, else all other columns.
        categories: Features that are categories although they hold numbers, dates or many levels.
        standardise: Whether to scale features and real targets to mean 0 and standard deviation 1 over the training
            groups. Counts are never scaled.
        shot: As in `array_tasks`.
        query: As in `array_tasks`.
        test_query: As in `array_tasks`.
        split: As in `array_tasks`.
        seed: As in `array_tasks`.
        ragged: As in `array_tasks`.
        small: As in `array_tasks`.
        classification: Whether the target holds classes. By default it does if it is text or truth values. A recipe
            sets it by its likelihood.
        counts: Whether the target holds counts. A recipe sets it by its likelihood.
        preparation: The preparation of an earlier run. By default one is fitted here.

    Returns:
        Tasks of the training, validation and test groups.

    Raises:
        DataError: A column that does not exist, or an argument that `read_columns` or `array_tasks` rejects.
    """
    file = Path(path)
    if str(path) in NAMED:
        file = _named(str(path))
        known = NAMED[str(path)]
        target, group, features = target or known[0], group or known[1], known[2] if features is None else features
    columns = read_columns(file)
    if target is None or group is None:
        raise DataError(
            f"target and group must be columns of {file} ({', '.join(columns)}), got {target!r} and {group!r}."
        )
    if target == group:
        raise DataError(f"target and group must be two columns, got {target!r} for both.")
    goal, groups = columns.find(target, "target"), columns.find(group, "group")
    if features is None:
        features = [name for name in columns if name not in (target, group)]
    if held := [name for name in features if name in (target, group)]:
        raise DataError(f"features must not include the target or the group, got {held[0]!r}. Leave it out.")
    if not features:
        raise DataError("features must name at least one column, got none.")
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
            f"{name}: no file {name}.csv. Put it into a folder grouped_tables/ inside METAPRIOR_DATA, or give table() "
            "the path of your own file."
        )
    return folder / f"{name}.csv"


sleepstudy = partial(table, "sleepstudy")
radon = partial(table, "radon", small="drop")
