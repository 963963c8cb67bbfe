"""Labels of any hashable type, encoded as integers."""

from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from jaxtyping import Int

from metaprior.tasks.checks import DataError


def encode_labels(
    labels: Sequence[Hashable] | np.ndarray, way: int | None = None
) -> tuple[Int[np.ndarray, " n"], list[Hashable]]:
    """Encodes labels as integers 0..k-1.

    Args:
        labels: The label of each example, of any hashable type, [n].
        way: The largest number of classes that is allowed. By default any.

    Returns:
        The codes [n], and the k classes that they stand for. The classes are sorted if they can be compared, else they
            are in order of appearance.

    Raises:
        DataError: No labels, a label that is not hashable, NaN, or more than `way` classes.
    """
    values = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    if not values:
        raise DataError("labels must be one per example, got none.")
    for i, value in enumerate(values):
        if not isinstance(value, Hashable):
            raise DataError(f"labels must be hashable (text, numbers, tuples), got {value!r} in row {i}.")
        if value != value:
            raise DataError(f"labels must not be missing, got NaN in row {i}. Fill it in or leave the row out.")
    classes = list(dict.fromkeys(values))
    with suppress(TypeError):
        classes = sorted(classes)  # type: ignore[type-var]
    if way is not None and len(classes) > way:
        raise DataError(
            f"labels must be of at most {way} classes, the number that the learner was trained for, got {len(classes)} "
            f"({', '.join(map(repr, classes[:6]))} ...). Leave classes out or train with a larger way."
        )
    place = {label: i for i, label in enumerate(classes)}
    return np.asarray([place[value] for value in values], np.int32), classes


def check_labels(labels: Any, way: int) -> Int[np.ndarray, " n"]:
    """Checks labels that are already integers.

    Args:
        labels: Integers 0..way-1, [n].
        way: The number of classes.

    Returns:
        The labels as int32 [n].

    Raises:
        DataError: A label that is not a whole number or is out of range, naming the first. `encode_labels` accepts any
            labels.
    """
    values = np.asarray(labels)
    if values.dtype.kind not in "iu":
        raise DataError(f"labels must be whole numbers, got {values.dtype} values. encode_labels accepts any labels.")
    wrong = np.flatnonzero((values < 0) | (values >= way))
    if len(wrong):
        raise DataError(
            f"labels must be 0 to {way - 1}, got {values[wrong[0]]} in row {wrong[0]}. encode_labels accepts any "
            "labels."
        )
    return values.astype(np.int32)
