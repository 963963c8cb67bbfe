"""Assigning groups (classes, subjects, schools) to training, validation and test."""

from collections.abc import Hashable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from metaprior.tasks.checks import DataError

# Three fractions, three lists of names, or the lists under 'train', 'validation' and 'test'.
Split = Sequence[float] | Sequence[Sequence[Hashable]] | Mapping[str, Sequence[Hashable]]


def split_groups(names: Sequence[Hashable], split: Any, seed: int, kind: str) -> tuple[np.ndarray, ...]:
    """Assigns groups to training, validation and test.

    Args:
        names: The name of each group.
        split: Three fractions that sum to 1, three lists of names, or the lists under 'train', 'validation' and 'test'.
        seed: The seed of the random assignment by fractions.
        kind: What a group is, for errors.

    Returns:
        Three arrays of positions in `names`, disjoint. Random ones are sorted, listed ones keep their order.

    Raises:
        DataError: Not three parts, fractions that do not sum to 1 or leave a part empty, or unknown or repeated names.
    """
    if isinstance(split, Mapping):
        split = [split.get(part, ()) for part in ("train", "validation", "test")]
    if isinstance(split, str) or not isinstance(split, Sequence | np.ndarray):
        raise DataError(f"split must be three parts (training, validation, test), got {split!r}.")
    parts = list(split)
    if len(parts) != 3:
        raise DataError(f"split must be three parts (training, validation, test), got {len(parts)} parts.")
    if all(isinstance(part, Real) for part in parts):
        return _by_fractions(len(names), parts, seed, kind)
    place = {name: i for i, name in enumerate(names)}
    # A recipe may write '308' for a group that is 308 in a table, or the other way round.
    written = {str(name): name for name in names}
    parts = [[name if name in place else written.get(str(name), name) for name in part] for part in parts]
    unknown = [name for part in parts for name in part if name not in place]
    if unknown:
        raise DataError(f"split must list known names ({list(names)[:5]!r} ...), got unknown {kind} {unknown[0]!r}.")
    listed = [name for part in parts for name in part]
    if len(set(listed)) < len(listed):
        twice = next(name for name in listed if listed.count(name) > 1)
        raise DataError(f"split must be disjoint lists, got {kind} {twice!r} twice.")
    return tuple(np.asarray([place[name] for name in part], np.int64) for part in parts)


def rows_of(groups: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the rows of some groups.

    Args:
        groups: The numbers of the groups.
        counts: The number of rows of every group; the groups follow one another.
    """
    return np.flatnonzero(np.isin(np.repeat(np.arange(len(counts)), counts), groups))


def _by_fractions(total: int, fractions: Sequence[float], seed: int, kind: str) -> tuple[np.ndarray, ...]:
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(f"split must be three fractions of at least 0 that sum to 1, got {tuple(fractions)}.")
    edges = np.rint(np.cumsum(fractions)[:2] * total).astype(int)
    order = np.random.default_rng(seed).permutation(total)
    parts = tuple(np.sort(part) for part in np.split(order, edges))
    if not all(len(part) for part in parts):
        sizes = " / ".join(str(len(part)) for part in parts)
        raise DataError(
            f"split must leave at least one group in each part, got {sizes} from fractions {tuple(fractions)} of "
            f"{total} groups ({kind}). Give other fractions or more groups."
        )
    return parts
