"""Tasks from arrays: features, targets and a group for every row; a group (subject, school, assay) is a task."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metaprior.core.options import Count, Seed, checked
from metaprior.core.types import Batch, Splits, Task
from metaprior.tasks.checks import DataError
from metaprior.tasks.drawing import distinct
from metaprior.tasks.splitting import split_groups
from metaprior.tasks.tables.classes import encode_labels
from metaprior.tasks.tables.columns import Columns, as_array, as_ids, is_categorical, is_text, missing, refuse_missing
from metaprior.tasks.tables.preparation import Preparation, target_of
from metaprior.tasks.tables.scaling import Scaling, cast

RAGGED = ("pad", "resample", "exact")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ArrayTasks:
    """Tasks that are groups of rows; group i's rows are starts[i] .. starts[i] + counts[i] of x and y.

    A draw picks a group and shares its rows out anew. A group of fewer than shot + query rows ('pad', 'resample') gives
    up to `shot` of them to the support, but one at least to the query; what lacks is padding of weight 0 ('pad') or the
    same rows again ('resample'). Support and query never share a row.
    """

    x: Float[Array, "total ..."]
    y: Array
    groups: Int[Array, " groups"]
    starts: Int[Array, " groups"]
    counts: Int[Array, " groups"]
    preparation: Preparation | None = field(metadata={"static": True})
    shot: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    ragged: str = field(metadata={"static": True})
    shots: str = field(default="fixed", metadata={"static": True})

    @property
    def scaling(self) -> Scaling | None:
        """How features and targets were standardised; None for features that are no columns, such as images."""
        return None if self.preparation is None else self.preparation.scaling

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n tasks: x [n, shot, ...], y [n, shot, c] or labels [n, shot], weight [n, shot] where padded; query alike.

        Groups are different ones while they last, so n = the number of groups visits each once.
        """
        key_group, key_rows = jax.random.split(key)
        total = self.starts.shape[0]
        rounds = jax.vmap(lambda k: distinct(k, total, min(total, n)))(jax.random.split(key_group, -(-n // total)))
        return jax.vmap(self.of_group)(jax.random.split(key_rows, n), rounds.reshape(-1)[:n])

    @property
    def group_count(self) -> int:
        """How many groups the tasks come from."""
        return self.starts.shape[0]

    def of_group(self, key: PRNGKeyArray, group: Int[Array, ""]) -> Task:
        """A task of the group with this number, its rows shared out anew."""
        count = self.counts[group]
        rows = distinct(key, count, self.shot + self.query)
        most = jnp.minimum(self.shot, count - 1)
        shown = jnp.minimum(self.query, count - most)
        seen = most
        if self.shots == "uniform":
            seen = jax.random.randint(jax.random.fold_in(key, 1), (), 0, most + 1)
        return Task(self._batch(group, rows, 0, seen, self.shot), self._batch(group, rows, most, shown, self.query))

    def _batch(self, group: Array, rows: Array, first: Array | int, present: Array, size: int) -> Batch:
        place = jnp.arange(size)
        # What lacks repeats rows that are there: padding must be finite numbers too.
        index = self.starts[group] + rows[first + place % jnp.maximum(present, 1)]
        weight = (place < present).astype(self.x.dtype) if self.ragged == "pad" else None
        return Batch(self.x[index], self.y[index], weight)


@checked
def array_tasks(
    x: Any,
    y: Any,
    groups: Any,
    *,
    shot: Count = 5,
    query: Count = 5,
    test_query: Count | None = None,
    split: Any = (0.7, 0.15, 0.15),
    seed: Seed = 0,
    ragged: Literal["pad", "resample", "exact"] = "pad",
    small: Literal["error", "drop"] = "error",
    shots: Literal["fixed", "uniform"] = "fixed",
    standardise: bool = False,
    classification: bool | None = None,
    counts: bool = False,
    columns: Sequence[str] | None = None,
    categories: Sequence[str] = (),
    names: tuple[str, str] = ("y", "group"),
    preparation: Preparation | None = None,
) -> Splits:
    """Tasks from rows with a group column.

    Args:
        x: features [N, d] (or [N], or any [N, ...] without standardising), or a mapping of columns by name, where text
            is a category with a feature a level. y: targets [N] or [N, c], or labels [N].
        groups: [N], any hashable values; the rows of a group need not be adjacent.
        shot, query, test_query: rows of the support, of the query in training, and in validation and test (as `query`).
        split: three fractions of the groups, or lists of groups; `seed` shares out at random.
        ragged: groups of fewer than shot + query rows are padded with weight 0 ('pad'), filled with their own rows
            again ('resample') or count as too small ('exact').
        small: groups too small for a task (below 2 rows, or shot + query with 'exact') are an 'error' or 'drop'ped.
        shots: a task shows `shot` rows ('fixed'), or any number from 0 to `shot`, equally likely ('uniform'), so that a
            learner learns to predict from few rows too; needs ragged='pad'.
        standardise: features and real targets to mean 0, deviation 1 over the training groups; see `.scaling`. Counts
            are never standardised, but only `counts` says that numbers are some: without it, a Poisson likelihood would
            be given standardised ones.
        classification: whether y holds labels; by default if it is text or truth values. Whole numbers could be either,
            so it must be said of them. Labels become 0..k-1, sorted.
        counts: whether y holds counts, for a Poisson likelihood.
        columns: names of the features. categories: columns by name that are categories although they hold numbers, as
            pandas Categoricals are.
        names: of the target and of the group, for errors and reports.
        preparation: of an earlier run, in place of one fitted here: its levels, classes, scaling and groups' shares.

    Raises:
        DataError: lengths that differ, NaN (naming column and row), groups too small, a split that does not fit,
            numbers that float32 cannot tell apart.
    """
    for name, values in (("x", x), ("y", y), ("groups", groups)):
        if values is None:
            raise DataError(f"{name} must be an array with one entry a row, got None.")
    if shots == "uniform" and ragged != "pad":
        raise ValueError(f"shots must be 'fixed' where ragged is not 'pad', got {shots!r} with {ragged!r}.")
    if len(set(names)) < 2:
        raise ValueError(f"names must be two different ones, of the target and of the group, got {names}.")
    if preparation is not None:
        _check_same_table(preparation, names)
    test_query = query if test_query is None else test_query
    named = x.items() if isinstance(x, Mapping) or hasattr(x, "columns") else ()
    categories = (*categories, *(str(name) for name, values in named if is_categorical(values)))
    raw, images = (x, None) if isinstance(x, Columns) else _as_columns(x, columns)
    goal, ids = _one_dimensional(y, names[0], raw), _one_dimensional(groups, names[1], raw)
    if not raw.rows == len(goal) == len(ids):
        raise DataError(f"x, y, groups: came {raw.rows}, {len(goal)}, {len(ids)} rows, needs as many of each")
    for column in raw:
        refuse_missing(raw[column], column, raw, "features")
    integers = "number" if isinstance(x, Columns) else "error"
    target = None if preparation is None else preparation.target
    if target is None:
        target = target_of(goal, names[0], raw, classification=classification, counts=counts, integers=integers)
    codes, group_names = encode_labels(as_ids(ids, names[1], raw, "groups"))
    counted = np.bincount(codes)
    shares = split if preparation is None or preparation.groups is None else _known(preparation.groups, group_names)
    parts = split_groups(group_names, shares, seed, "group")
    sizes = (query, test_query, test_query)
    kept = [
        _large_enough(part, counted, group_names, shot + size if ragged == "exact" else 2, small)
        for part, size in zip(parts, sizes, strict=True)
    ]
    if preparation is None:
        preparation = Preparation.fit(
            raw, target, goal, np.isin(codes, kept[0]), standardise=standardise, categories=categories, group=names[1],
            groups=tuple(tuple(group_names[g] for g in part) for part in parts),
        )  # fmt: skip
    elif preparation.groups is None:
        preparation = replace(preparation, groups=tuple(tuple(group_names[g] for g in part) for part in parts))
    if images is not None and standardise:
        raise DataError(f"standardise: came features {images.shape}, needs [N, d]")
    features = preparation.encode(raw, strict=False) if images is None else images
    targets = preparation.encode_target(goal, raw)
    order, starts = np.argsort(codes, kind="stable"), np.cumsum(counted) - counted
    x_all, y_all = jnp.asarray(features[order]), jnp.asarray(targets[order])
    return Splits(*(
        ArrayTasks(x_all, y_all, jnp.asarray(part, jnp.int32), jnp.asarray(starts[part], jnp.int32),
                   jnp.asarray(counted[part], jnp.int32), preparation if images is None else None, shot, size, ragged,
                   shots)
        for part, size in zip(kept, sizes, strict=True)
    ))  # fmt: skip


def _check_same_table(preparation: Preparation, names: tuple[str, str]) -> None:
    if not isinstance(preparation, Preparation):
        raise ValueError(f"preparation: came {preparation!r}, needs the Preparation of a run")
    if names[0] != preparation.target.name:
        raise DataError(f"target: came {names[0]!r}, but the run learned to predict {preparation.target.name!r}")


def _as_columns(x: Any, names: Sequence[str] | None) -> tuple[Columns, np.ndarray | None]:
    """Features by name; those that are no columns, such as images, are returned as they are."""
    if isinstance(x, Mapping) or hasattr(x, "columns"):  # a DataFrame
        names_of = [str(name) for name in getattr(x, "columns", x)]
        if len(set(names_of)) < len(names_of):
            twice = next(name for name in names_of if names_of.count(name) > 1)
            raise DataError(f"x: {names_of.count(twice)} columns are named {twice!r}; give each its own name.")
        return Columns(dict(x.items())), None
    values = np.asanyarray(x)
    values = values.astype(float) if values.dtype == bool else values
    if values.ndim == 0:
        raise DataError("x: came a single number, needs [N, d]")
    if is_text(values) or values.dtype.kind not in "fiubO":
        raise DataError(f"x: came values that are not numbers ({values.dtype}); encode them first, e.g. one-hot")
    if values.ndim > 2:
        return Columns({"x": np.zeros(len(values))}), cast_images(values)
    wide = values[:, None] if values.ndim == 1 else values
    if names is not None and len(set(names)) != wide.shape[1]:
        raise DataError(f"columns: came {len(set(names))} different names for {wide.shape[1]} features, needs one each")
    _refuse_gaps("x", wide, names)
    return Columns({"x": wide} if names is None else {name: wide[:, i] for i, name in enumerate(names)}), None


def cast_images(values: np.ndarray) -> np.ndarray:
    """Features that are no columns, checked and in the type that learners compute in."""
    _refuse_gaps("x", values.reshape(len(values), -1), None)
    flat = values.reshape(len(values), -1).astype(float)
    return cast(flat, flat, "x", Columns({"x": flat}), "x").reshape(values.shape)


def _one_dimensional(values: Any, name: str, raw: Columns) -> np.ndarray:
    """Targets, labels or groups as an array; what numpy would change (tuples, 1 beside '1') stays as it is."""
    if hasattr(values, "columns") and len(values.columns) == 1:  # a DataFrame of one column
        values = values.iloc[:, 0]
    if isinstance(values, np.ndarray) or hasattr(values, "dtype"):
        array = as_array(values)
    else:
        listed = list(values)
        array = np.empty(len(listed), object)
        for i, value in enumerate(listed):
            array[i] = value
        kinds = {type(value) for value in listed}
        alike = len(kinds) == 1 and not kinds & {tuple, frozenset}
        if alike or all(issubclass(kind, int | float | np.number) for kind in kinds):
            array = np.asarray(listed)
    if array.dtype.kind == "f":
        _refuse_gaps(name, array[:, None] if array.ndim == 1 else array, None)
    return array


def _refuse_gaps(name: str, values: np.ndarray, columns: Sequence[str] | None) -> None:
    """A DataError that names the column and row of the first NaN, infinity or missing value."""
    if values.dtype.kind == "f" and not np.ma.isMaskedArray(values):
        bad = np.argwhere(~np.isfinite(values))
    else:
        bad = np.argwhere(np.stack([missing(column) for column in values.T], 1)) if values.size else np.empty((0, 2))
    if len(bad):
        row, at = bad[0][:2].tolist()
        column = at if columns is None else columns[at]
        raise DataError(
            f"{name}: came {values[row, at]} in column {column!r}, row {row} ({len(bad)} such values), needs finite "
            "numbers; fill them in or leave those rows out"
        )


def _known(groups: Sequence[Sequence[Any]], names: Sequence[Any]) -> list[list[Any]]:
    """A run's shares of the groups, which must all be there still; new ones belong to none."""
    there, listed = set(names), {name for part in groups for name in part}
    if lost := [name for part in groups for name in part if name not in there]:
        raise DataError(
            f"groups: the table no longer has group {lost[0]!r} ({len(lost)} such), which the run learned from or was "
            "to be judged by; use the table of training, or say tasks.split anew"
        )
    if new := [name for name in names if name not in listed]:
        warnings.warn(f"groups: {len(new)} are new since training ({new[0]!r}, ...) and are left out", stacklevel=3)
    return [list(part) for part in groups]


def _large_enough(part: np.ndarray, counts: np.ndarray, names: list, least: int, small: str) -> np.ndarray:
    lacking = part[counts[part] < least]
    if len(lacking) and small == "error":
        listed = ", ".join(f"{names[g]!r} ({counts[g]})" for g in lacking[:5])
        raise DataError(
            f"groups: {len(lacking)} have fewer rows than the {least} a task needs: {listed}"
            f"{' ...' if len(lacking) > 5 else ''}; lower shot or query, use ragged='pad', or drop them (small='drop')"
        )
    kept = part[counts[part] >= least]
    if not len(kept):
        raise DataError(f"groups: none of a split has the {least} rows that a task needs; lower shot or query")
    return kept
