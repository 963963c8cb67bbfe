"""Labels of any hashable kind as the integers that learners use."""

from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from jaxtyping import Int

from metaprior.tasks.checks import DataError


def encode_labels(
    labels: Sequence[Hashable] | np.ndarray, way: int | None = None
) -> tuple[Int[np.ndarray, " n"], list[Hashable]]:
    """Integers 0..k-1 for labels of any hashable kind, and the k classes that they stand for.

    Classes are sorted where they can be compared, else in order of appearance.

    Raises:
        DataError: no labels, a label that is not hashable, NaN, or more classes than `way`.
    """
    values = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    if not values:
        raise DataError("labels: came none, needs one an example")
    for i, value in enumerate(values):
        if not isinstance(value, Hashable):
            raise DataError(f"labels: came {value!r} in row {i}, needs hashable values (text, numbers, tuples)")
        if value != value:
            raise DataError(f"labels: came NaN in row {i}; fill it in or leave the row out")
    classes = list(dict.fromkeys(values))
    with suppress(TypeError):
        classes = sorted(classes)  # type: ignore[type-var]
    if way is not None and len(classes) > way:
        raise DataError(
            f"labels: came {len(classes)} classes ({', '.join(map(repr, classes[:6]))} ...), needs at most {way}, as "
            "many as the learner was trained for; leave classes out or train with a larger way"
        )
    place = {label: i for i, label in enumerate(classes)}
    return np.asarray([place[value] for value in values], np.int32), classes


def check_labels(labels: Any, way: int) -> Int[np.ndarray, " n"]:
    """Labels that are already integers 0..way-1.

    Raises:
        DataError: numbers that are not whole or out of range, naming the first; `encode_labels` takes any labels.
    """
    values = np.asarray(labels)
    if values.dtype.kind not in "iu":
        raise DataError(f"labels: came {values.dtype} values, needs whole numbers; encode_labels takes any labels")
    wrong = np.flatnonzero((values < 0) | (values >= way))
    if len(wrong):
        raise DataError(
            f"labels: came {values[wrong[0]]} in row {wrong[0]}, needs 0 to {way - 1}; encode_labels takes any labels"
        )
    return values.astype(np.int32)
