"""Tables in CSV and NPZ files, and tasks from them: one column says which task a row belongs to."""

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaprior.tasks.arrays import array_tasks
from metaprior.tasks.checks import DataError
from metaprior.tasks.limits import open_arrays
from metaprior.tasks.store import data_folder, reading
from metaprior.types import Splits

Columns = dict[str, np.ndarray]

# Classic hierarchical data sets: file in grouped_tables/, target, group, features.
NAMED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sleepstudy": ("Y", "G", ("U",)),
    "radon": ("log_radon", "county", ("floor", "log_uranium")),
    "exam": ("Y", "G", ("U", "B", "A")),
    "hsb82": ("Y", "G", ("U", "B", "A", "C", "meanses")),
}
MISSING = {"", "na", "nan", "n/a", "null", "none", "?"}


class Design(NamedTuple):
    """Numeric features of chosen columns: x [N, d] and the name of each feature."""

    x: np.ndarray
    names: list[str]


def read_columns(path: str | Path) -> Columns:
    """The columns of a CSV file (numbers where every value is one, else text) or the arrays of an NPZ file.

    Raises:
        DataError: no such file, no header, rows of another length, or a damaged file.
    """
    path = Path(path).expanduser()
    with reading(path, "correct it, or delete it and copy it again"):
        if path.suffix == ".npz":
            with open_arrays(path) as file:
                return {name: file[name] for name in file.files}
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    if len(rows) < 2:
        raise DataError(f"{path}: came {len(rows)} lines, needs a header and a row at least")
    header = rows[0]
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise DataError(f"{path}: line {line} came {len(row)} values, needs {len(header)}, one a column")
    return {name: _typed(values) for name, *values in zip(*rows, strict=True)}


def _typed(values: list[str]) -> np.ndarray:
    try:
        return np.asarray([np.nan if value.strip().lower() in MISSING else float(value) for value in values])
    except ValueError:
        return np.asarray(values)


def design(columns: Columns, features: Sequence[str]) -> Design:
    """Numeric columns as they are, text columns one-hot (a feature a level, sorted).

    Raises:
        DataError: unknown columns, or a missing value, naming column and row.
    """
    blocks, names = [], []
    for name in features:
        values = column(columns, name, "features")
        missing = _missing(values)
        if missing.any():
            row = int(np.flatnonzero(missing)[0])
            raise DataError(
                f"features: came a missing value or NaN in column {name!r}, row {row} ({missing.sum()} such rows); "
                "fill them in or leave those rows out"
            )
        if values.dtype.kind in "fiub":
            blocks.append(values.reshape(len(values), -1).astype(float))
            names += [name] if blocks[-1].shape[1] == 1 else [f"{name}[{i}]" for i in range(blocks[-1].shape[1])]
        else:
            levels = np.unique(values)
            blocks.append((values[:, None] == levels).astype(float))
            names += [f"{name}={level}" for level in levels]
    if not blocks:
        raise DataError("features: came none, needs one column at least")
    return Design(np.concatenate(blocks, 1), names)


def _missing(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        return np.asarray(~np.isfinite(values.reshape(len(values), -1)).all(1))
    if values.dtype.kind in "US":
        return np.asarray([value.strip().lower() in MISSING for value in values.astype(str)])
    return np.zeros(len(values), bool)


def column(columns: Columns, name: str, argument: str) -> np.ndarray:
    """One column, or a DataError that lists those there are."""
    if name not in columns:
        raise DataError(f"{argument}: came column {name!r}, needs one of {', '.join(columns)}")
    return columns[name]


def table(
    path: str | Path,
    *,
    target: str | None = None,
    group: str | None = None,
    features: Sequence[str] | None = None,
    standardise: bool = True,
    shot: int = 5,
    query: int = 5,
    test_query: int | None = None,
    split: Any = (0.7, 0.15, 0.15),
    seed: int = 0,
    ragged: str = "pad",
    small: str = "error",
    classification: bool | None = None,
) -> Splits:
    """Tasks from a CSV or NPZ file: a row an example, a column that says which task it belongs to.

    Args:
        path: a file, or 'sleepstudy', 'radon', 'exam' or 'hsb82', read from METAPRIOR_DATA/grouped_tables.
        target, group, features: columns; known for the named tables. Without `features`, all the others. Text columns
            become one-hot features.
        standardise: features and real targets to mean 0, deviation 1; `source.scaling.targets` leads back.

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
    goal, groups = column(columns, target, "target"), column(columns, group, "group")
    if features is None:
        features = [name for name in columns if name and name not in (target, group)]
    missing = np.flatnonzero(_missing(goal))
    if len(missing):
        raise DataError(f"target: came a missing value in column {target!r}, row {missing[0]}; leave such rows out")
    x, names = design(columns, features)
    return array_tasks(
        x, goal, groups, shot=shot, query=query, test_query=test_query, split=split, seed=seed, ragged=ragged,
        small=small, standardise=standardise, classification=classification, columns=names,
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
