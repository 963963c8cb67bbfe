"""Examples for one task from the user's files: pictures in class-named folders, CSV or NPZ."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaprior.tasks.checks import DataError
from metaprior.tasks.images.decoding import SUFFIXES, check_channels, decode_picture, decode_pictures, find_pictures
from metaprior.tasks.tables.columns import Columns, as_ids, as_text, kind_of, read_columns
from metaprior.tasks.tables.preparation import LABELS, Column
from metaprior.tasks.tables.scaling import cast


class Examples(NamedTuple):
    """Examples as read: x float32 [n, h, w, c] in 0..1 or [n, d], or int32 [n, length]; a label and a name for each.

    `features` names the columns of a table, in order; a text column's are those of the levels that this file has.
    """

    x: np.ndarray
    labels: list[Any] | None
    names: list[str]
    features: list[str] | None = None


def read_examples(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    labelled: bool = True,
    target: str | None = None,
    features: list[str] | None = None,
    invert: bool = False,
) -> Examples:
    """Examples from a folder of class folders, a flat folder, an archive, one picture, a CSV or an NPZ file.

    Args:
        size, channels: of pictures; by default those of the first one (and 3 channels, or 1 if it is grey).
        labelled: whether labels are needed (support) or not (query; labels that are there are given all the same).
        target: the column or array of labels; by default label, labels, class, target or y. In an NPZ file `x` or
            `images` are the examples; in a CSV file `features`, or all other columns.
        invert: dark on light becomes light on dark, as Omniglot's recipes need for ink on paper.

    Raises:
        DataError: nothing to read, no labels where they are needed, NaN (naming column and row), damaged files.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; correct the path")
    if path.suffix.lower() == ".csv":
        found = _from_columns(read_columns(path), path, target, features)
    elif path.suffix.lower() == ".npz" and not {"images", "jpeg"} & set(columns := read_columns(path)):
        found = _from_columns(columns, path, target, features)
    else:
        found = _from_pictures(path, size, channels, invert)
    if labelled and found.labels is None:
        raise DataError(
            f"{path}: came examples without labels, needs pictures in folders named by their class, or a column "
            f"{target or 'label'!r} in the table"
        )
    return found


def _from_pictures(path: Path, size: Any, channels: int | None, invert: bool) -> Examples:
    pictures = find_pictures(path)
    if channels is None:
        channels = 3 if _coloured(decode_picture(pictures[0], None, 3)) else 1
    check_channels(channels)
    if size is None:
        size = decode_picture(pictures[0], None, channels).shape[:2]
    shape = (size, size) if isinstance(size, int) else tuple(size)
    x = decode_pictures(pictures, shape, channels).astype(np.float32) / 255
    labels = [picture.group for picture in pictures]
    # A flat folder has no class folders: its own name is not a label.
    flat = path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in path.iterdir())
    return Examples(1 - x if invert else x, None if flat or not all(labels) else list(labels), _names(path, pictures))


def _coloured(image: np.ndarray) -> bool:
    return bool((image != image[..., :1]).any())


def _names(path: Path, pictures: list) -> list[str]:
    return [picture.place.removeprefix(f"{path}/").removeprefix(f"{path}: ") for picture in pictures]


def _from_columns(columns: Columns, path: Path, target: str | None, features: list[str] | None) -> Examples:
    name = target or next((name for name in LABELS if name in columns), None)
    goal = None if name is None else columns.get(name)
    if features is None:
        features = ["x"] if "x" in columns and path.suffix == ".npz" else [c for c in columns if c != name]
    if path.suffix == ".npz" and features == ["x"]:
        x, named = _array(columns.find("x", "features"), columns, path), None
    else:
        x, named = _design(columns, features)
    if goal is not None and goal.shape[:1] != (len(x),):
        raise DataError(f"{path}: came labels {goal.shape} for {len(x)} examples, needs one an example")
    labels = None
    if goal is not None and name is not None:
        labels = as_ids(goal, name, columns, "target") if goal.ndim == 1 else list(goal)
    return Examples(x, labels, [f"row {i}" for i in range(len(x))], named)


def _design(columns: Columns, features: list[str]) -> tuple[np.ndarray, list[str]]:
    """Numbers as they are, text one-hot with the levels of this file, and the name of each feature."""
    blocks, names = [], []
    for name in features:
        kind = kind_of(name, columns)
        levels = tuple(sorted(set(as_text(columns[name])))) if kind == "category" else ()
        raw = Column(name, kind, levels).raw(columns)
        blocks.append(cast(raw, raw, name, columns, "features"))
        names += Column(name, kind, levels, (0.0,) * raw.shape[1]).features
    if not blocks:
        raise DataError("features: came none, needs one column at least")
    return np.concatenate(blocks, 1), names


def _array(x: np.ndarray, columns: Columns, path: Path) -> np.ndarray:
    if x.dtype.kind not in "fiub":
        raise DataError(f"{path}: x came {x.dtype}, needs numbers")
    if x.ndim == 0 or 0 in x.shape:
        raise DataError(f"{path}: x came {x.shape}, needs a row an example, one at least")
    bad = np.argwhere(~np.isfinite(x.astype(float)))
    if len(bad):
        row, *rest = bad[0].tolist()
        raise DataError(f"{path}: x came a NaN in row {row}, column {rest}; fill it in or leave the row out")
    flat = x.reshape(len(x), -1).astype(float)
    scaled = cast(flat, flat, "x", columns, "features").astype(np.float32).reshape(x.shape)
    scaled = scaled / 255 if x.dtype == np.uint8 and x.ndim > 2 else scaled
    return scaled[:, None] if scaled.ndim == 1 else scaled


def check_same_form(support: np.ndarray, query: np.ndarray) -> None:
    """Refuses a query whose examples have another shape than the support's.

    Raises:
        DataError: naming both shapes.
    """
    if support.shape[1:] != query.shape[1:]:
        raise DataError(
            f"query: came examples of shape {query.shape[1:]}, but the support's have {support.shape[1:]}; give both "
            "the same size, channels and columns"
        )
