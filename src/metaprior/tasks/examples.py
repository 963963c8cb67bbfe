"""Examples of one task from the user's files: pictures in folders named by class, CSV files or NPZ files."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaprior.tasks.checks import DataError
from metaprior.tasks.images.decoding import SUFFIXES, check_channels, decode_picture, decode_pictures, find_pictures
from metaprior.tasks.tables.columns import Columns, as_ids, as_text, kind_of, read_columns
from metaprior.tasks.tables.preparation import TARGETS, Column
from metaprior.tasks.tables.scaling import cast


class Examples(NamedTuple):
    """Examples as they were read.

    Attributes:
        x: Float32 [n, h, w, c] in 0..1 (pictures), float32 [n, d] (tables), or int32 [n, length] (texts).
        labels: The label or target of each example; None if there are none.
        names: The name of each example, for reports.
        features: The name of each column of x, in order, for tables. A text column has one feature per level that
            occurs in this file.
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
    """Reads examples from a folder, an archive, a picture, a CSV file or an NPZ file.

    Args:
        path: A folder of class folders, a flat folder of pictures, a zip or tar archive of either, one picture, a CSV
            file or an NPZ file. In an NPZ file, the array `x` or `images` holds the examples. In a CSV file, the
            columns `features` do, or all columns except the target.
        size: Size of the pictures: the side or (height, width) in pixels. By default that of the first picture.
        channels: Channels of the pictures: 1, 3 or 4. By default 1 if the first picture is grey, else 3.
        labelled: Whether labels are required, as for a support set. If False, labels that exist are still returned.
        target: The column or array of labels. By default the first that exists of label, labels, class, target and y.
        features: The feature columns.
        invert: Whether to turn dark on light into light on dark. Recipes for Omniglot need this for ink on paper.

    Returns:
        The examples.

    Raises:
        DataError: Nothing to read, required labels that are missing, NaN (naming column and row), or a damaged file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. Correct the path.")
    if path.suffix.lower() == ".csv":
        found = _from_columns(read_columns(path), path, target, features)
    elif path.suffix.lower() == ".npz" and not {"images", "jpeg"} & set(columns := read_columns(path)):
        found = _from_columns(columns, path, target, features)
    else:
        found = _from_pictures(path, size, channels, invert)
    if labelled and found.labels is None:
        raise DataError(
            f"{path} must have labels, got examples without labels. Put pictures into folders named by class, or add a "
            f"column {target or 'label'!r} to the table."
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
    # A flat folder has no class folders. Its own name is not a label.
    flat = path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in path.iterdir())
    return Examples(1 - x if invert else x, None if flat or not all(labels) else list(labels), _names(path, pictures))


def _coloured(image: np.ndarray) -> bool:
    return bool((image != image[..., :1]).any())


def _names(path: Path, pictures: list) -> list[str]:
    return [picture.place.removeprefix(f"{path}/").removeprefix(f"{path}: ") for picture in pictures]


def _from_columns(columns: Columns, path: Path, target: str | None, features: list[str] | None) -> Examples:
    name = target or next((name for name in TARGETS if name in columns), None)
    goal = None if name is None else columns.get(name)
    if features is None:
        features = ["x"] if "x" in columns and path.suffix == ".npz" else [c for c in columns if c != name]
    if path.suffix == ".npz" and features == ["x"]:
        x, named = _array(columns.find("x", "features"), columns, path), None
    else:
        x, named = _design(columns, features)
    if goal is not None and goal.shape[:1] != (len(x),):
        raise DataError(f"{path} must have one label per example, got labels {goal.shape} for {len(x)} examples.")
    labels = None
    if goal is not None and name is not None:
        labels = as_ids(goal, name, columns, "target") if goal.ndim == 1 else list(goal)
    return Examples(x, labels, [f"row {i}" for i in range(len(x))], named)


def _design(columns: Columns, features: list[str]) -> tuple[np.ndarray, list[str]]:
    """Returns the feature matrix and the name of each feature; text is one-hot, with the levels of this file."""
    blocks, names = [], []
    for name in features:
        kind = kind_of(name, columns)
        levels = tuple(sorted(set(as_text(columns[name])))) if kind == "category" else ()
        raw = Column(name, kind, levels).raw(columns)
        blocks.append(cast(raw, raw, name, columns, "features"))
        names += Column(name, kind, levels, (0.0,) * raw.shape[1]).features
    if not blocks:
        raise DataError("features must name at least one column, got none.")
    return np.concatenate(blocks, 1), names


def _array(x: np.ndarray, columns: Columns, path: Path) -> np.ndarray:
    if x.dtype.kind not in "fiub":
        raise DataError(f"{path}: x must hold numbers, got {x.dtype}.")
    if x.ndim == 0 or 0 in x.shape:
        raise DataError(f"{path}: x must have one row per example and at least one row, got shape {x.shape}.")
    bad = np.argwhere(~np.isfinite(x.astype(float)))
    if len(bad):
        row, *rest = bad[0].tolist()
        raise DataError(
            f"{path}: x must be finite, got NaN or infinity in row {row}, column {rest}. Correct it or leave the row "
            "out."
        )
    flat = x.reshape(len(x), -1).astype(float)
    scaled = cast(flat, flat, "x", columns, "features").astype(np.float32).reshape(x.shape)
    scaled = scaled / 255 if x.dtype == np.uint8 and x.ndim > 2 else scaled
    return scaled[:, None] if scaled.ndim == 1 else scaled


def check_same_form(support: np.ndarray, query: np.ndarray) -> None:
    """Checks that the query's examples have the shape of the support's examples.

    Args:
        support: Examples [n, ...].
        query: Examples [m, ...].

    Raises:
        DataError: Different shapes; the error names both.
    """
    if support.shape[1:] != query.shape[1:]:
        raise DataError(
            f"query must have examples of the support's shape {support.shape[1:]}, got {query.shape[1:]}. Give both "
            "the same size, channels and columns."
        )
