"""Tasks from arrays of features, targets and groups. A group (subject, school, assay) is a task."""

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
    """Tasks that are groups of rows.

    A draw picks a group and divides its rows at random into support and query, which never share a row. A group of
    fewer than shot + query rows ('pad', 'resample') gives up to `shot` rows to the support, but leaves at least one for
    the query. Missing rows are padding of weight 0 ('pad') or repeated rows ('resample').

    Attributes:
        x: Features of all rows, sorted by group.
        y: Targets [total, c] or labels [total].
        groups: The numbers of the groups of this source.
        starts: The first row of each group. The rows of group i are starts[i] .. starts[i] + counts[i] - 1.
        counts: The number of rows of each group.
        preparation: How the table was encoded; None for features that are not columns, such as images.
        shot: Rows of the support.
        query: Rows of the query.
        ragged: What happens to small groups: 'pad', 'resample' or 'exact'; see `array_tasks`.
        shots: 'fixed' or 'uniform'; see `array_tasks`.
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
        """How features and targets were standardised; None for features that are not columns, such as images."""
        return None if self.preparation is None else self.preparation.scaling

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks.

        The groups of the tasks differ until all were drawn, so n = the number of groups visits each group once.

        Returns:
            Support x [n, shot, ...], y [n, shot, c] or labels [n, shot], and weight [n, shot] if padded; the query
                likewise.
        """
        key_group, key_rows = jax.random.split(key)
        total = self.starts.shape[0]
        rounds = jax.vmap(lambda k: distinct(k, total, min(total, n)))(jax.random.split(key_group, -(-n // total)))
        return jax.vmap(self.of_group)(jax.random.split(key_rows, n), rounds.reshape(-1)[:n])

    @property
    def group_count(self) -> int:
        """The number of groups."""
        return self.starts.shape[0]

    def of_group(self, key: PRNGKeyArray, group: Int[Array, ""]) -> Task:
        """Draws a task of the group with this number, with a new random division of its rows."""
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
        # Missing rows repeat existing ones, because padding must be finite too.
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
    """Makes tasks from rows, each of which belongs to a group.

    Args:
        x: Features [N, d] or [N]; any [N, ...] if not standardised; or a mapping of columns by name. In a mapping, a
            text column is a category, with one feature per level.
        y: Targets [N] or [N, c], or labels [N].
        groups: The group of each row, [N], any hashable values. The rows of a group need not be adjacent.
        shot: Rows of the support.
        query: Rows of the query in training.
        test_query: Rows of the query in validation and test. By default `query`.
        split: Three fractions of the groups, or three lists of groups.
        seed: The seed of the random assignment of groups to splits.
        ragged: What happens to groups of fewer than shot + query rows. They are padded with weight 0 ('pad'), filled
            with their own rows again ('resample'), or count as too small ('exact').
        small: What happens to groups that are too small for a task (fewer than 2 rows, or fewer than shot + query with
            'exact'). They raise an error ('error') or are left out ('drop').
        shots: A task shows `shot` rows ('fixed'), or any number from 0 to `shot` with equal probability ('uniform').
            With 'uniform' a learner also learns to predict from few rows; it needs ragged='pad'.
        standardise: Whether to scale features and real targets to mean 0 and standard deviation 1 over the training
            groups; see `.scaling`. Counts are never standardised, but only the option `counts` marks them. Without it,
            a Poisson likelihood would receive standardised numbers.
        classification: Whether y holds labels. By default it does if it is text or truth values. Whole numbers need an
            explicit value, because they could be labels or numbers. Labels become 0..k-1, in sorted order.
        counts: Whether y holds counts, for a Poisson likelihood.
        columns: The names of the features.
        categories: The names of columns that are categories although they hold numbers. pandas Categoricals always are.
        names: The names of the target and of the group, for errors and reports.
        preparation: The preparation of an earlier run, whose levels, classes, scaling and assignment of groups are
            used. By default one is fitted here.

    Returns:
        Tasks of the training, validation and test groups.

    Raises:
        DataError: Different lengths, NaN (naming column and row), groups that are too small, a split that does not fit,
            or numbers that float32 cannot distinguish.
        ValueError: Options that contradict each other, or target and group of the same name.
    """
    for name, values in (("x", x), ("y", y), ("groups", groups)):
        if values is None:
            raise DataError(f"{name} must be an array with one entry per row, got None.")
    if shots == "uniform" and ragged != "pad":
        raise ValueError(f"shots must be 'fixed' where ragged is not 'pad', got {shots!r} with {ragged!r}.")
    if len(set(names)) < 2:
        raise ValueError(f"names must be two different names, of the target and of the group, got {names}.")
    if preparation is not None:
        _check_same_table(preparation, names)
    test_query = query if test_query is None else test_query
    named = x.items() if isinstance(x, Mapping) or hasattr(x, "columns") else ()
    categories = (*categories, *(str(name) for name, values in named if is_categorical(values)))
    raw, images = (x, None) if isinstance(x, Columns) else _as_columns(x, columns)
    goal, ids = _one_dimensional(y, names[0], raw), _one_dimensional(groups, names[1], raw)
    if not raw.rows == len(goal) == len(ids):
        raise DataError(f"x, y and groups must have equal lengths, got {raw.rows}, {len(goal)} and {len(ids)} rows.")
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
        raise DataError(f"standardise must be False for features that are not [N, d], got features {images.shape}.")
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
        raise ValueError(f"preparation must be the Preparation of a run, got {preparation!r}.")
    if names[0] != preparation.target.name:
        raise DataError(
            f"target must be {preparation.target.name!r}, which the run learned to predict, got {names[0]!r}."
        )


def _as_columns(x: Any, names: Sequence[str] | None) -> tuple[Columns, np.ndarray | None]:
    """Returns features by name; features that are not columns, such as images, are returned beside them as an array."""
    if isinstance(x, Mapping) or hasattr(x, "columns"):  # a DataFrame
        names_of = [str(name) for name in getattr(x, "columns", x)]
        if len(set(names_of)) < len(names_of):
            twice = next(name for name in names_of if names_of.count(name) > 1)
            raise DataError(f"x: {names_of.count(twice)} columns are named {twice!r}. Give each a different name.")
        return Columns(dict(x.items())), None
    values = np.asanyarray(x)
    values = values.astype(float) if values.dtype == bool else values
    if values.ndim == 0:
        raise DataError("x must be an array [N, d], got a single number.")
    if is_text(values) or values.dtype.kind not in "fiubO":
        raise DataError(f"x must hold numbers, got {values.dtype} values. Encode them first, e.g. one-hot.")
    if values.ndim > 2:
        return Columns({"x": np.zeros(len(values))}), cast_images(values)
    wide = values[:, None] if values.ndim == 1 else values
    if names is not None and len(set(names)) != wide.shape[1]:
        raise DataError(
            f"columns must be one different name per feature, got {len(set(names))} for {wide.shape[1]} features."
        )
    _refuse_gaps("x", wide, names)
    return Columns({"x": wide} if names is None else {name: wide[:, i] for i, name in enumerate(names)}), None


def cast_images(values: np.ndarray) -> np.ndarray:
    """Checks features that are not columns and converts them to the type that learners use.

    Args:
        values: Features [n, ...].

    Raises:
        DataError: NaN, infinity, or a value that is too large for that type.
    """
    _refuse_gaps("x", values.reshape(len(values), -1), None)
    flat = values.reshape(len(values), -1).astype(float)
    return cast(flat, flat, "x", Columns({"x": flat}), "x").reshape(values.shape)


def _one_dimensional(values: Any, name: str, raw: Columns) -> np.ndarray:
    """Returns targets, labels or groups as an array; what numpy would change (tuples, 1 beside '1') stays an object."""
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
    """Raises a DataError that names the column and row of the first NaN, infinity or missing value."""
    if values.dtype.kind == "f" and not np.ma.isMaskedArray(values):
        bad = np.argwhere(~np.isfinite(values))
    else:
        bad = np.argwhere(np.stack([missing(column) for column in values.T], 1)) if values.size else np.empty((0, 2))
    if len(bad):
        row, at = bad[0][:2].tolist()
        column = at if columns is None else columns[at]
        raise DataError(
            f"{name} must be finite numbers, got {values[row, at]} in column {column!r}, row {row} ({len(bad)} such "
            "values). Fill them in or leave those rows out."
        )


def _known(groups: Sequence[Sequence[Any]], names: Sequence[Any]) -> list[list[Any]]:
    """Returns a run's assignment of groups. All of them must still exist; new groups belong to no split."""
    there, listed = set(names), {name for part in groups for name in part}
    if lost := [name for part in groups for name in part if name not in there]:
        raise DataError(
            f"groups: the table no longer has group {lost[0]!r} ({len(lost)} such), which is in a split of the run. "
            "Use the table of training, or set tasks.split again."
        )
    if new := [name for name in names if name not in listed]:
        warnings.warn(f"groups: {len(new)} are new since training ({new[0]!r}, ...) and are left out.", stacklevel=3)
    return [list(part) for part in groups]


def _large_enough(part: np.ndarray, counts: np.ndarray, names: list, least: int, small: str) -> np.ndarray:
    lacking = part[counts[part] < least]
    if len(lacking) and small == "error":
        listed = ", ".join(f"{names[g]!r} ({counts[g]})" for g in lacking[:5])
        raise DataError(
            f"groups: {len(lacking)} have fewer rows than the {least} that a task needs: {listed}"
            f"{' ...' if len(lacking) > 5 else ''}. Lower shot or query, use ragged='pad', or drop them (small='drop')."
        )
    kept = part[counts[part] >= least]
    if not len(kept):
        raise DataError(f"groups: none of a split has the {least} rows that a task needs. Lower shot or query.")
    return kept
