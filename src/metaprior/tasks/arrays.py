"""Tasks from arrays: features, targets and a group for every row; a group (subject, school, assay) is a task."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metaprior.tasks.checks import DataError, check_count
from metaprior.tasks.labels import encode_labels
from metaprior.tasks.pool import distinct
from metaprior.tasks.splitting import rows_of, split_groups
from metaprior.types import Batch, Predictive, Splits, Task
from metaprior.units import in_units

RAGGED = ("pad", "resample", "exact")


class Scaling(NamedTuple):
    """How raw features and targets were standardised, in float64: (raw - mean) / deviation, by the training groups.

    Centre with it before anything is cast to float32: 1.7e9 + 1 and 1.7e9 are one float32 number.
    """

    x_mean: Float[np.ndarray, " d"]
    x_deviation: Float[np.ndarray, " d"]
    y_mean: Float[np.ndarray, " c"]
    y_deviation: Float[np.ndarray, " c"]

    def features(self, raw: Any) -> Float[np.ndarray, "... d"]:
        """Raw features as a learner sees them, in float64."""
        return (np.asarray(raw, float) - self.x_mean) / self.x_deviation

    def standardised(self, y: Any) -> Float[np.ndarray, "... c"]:
        """Raw targets as a learner sees them, in float64."""
        return (np.asarray(y, float) - self.y_mean) / self.y_deviation

    def targets(self, y: Any) -> Float[np.ndarray, "... c"]:
        """Standardised targets or predicted means in original units, in float64."""
        return np.asarray(y, float) * self.y_deviation + self.y_mean

    def variances(self, variance: Any) -> Float[np.ndarray, "... c"]:
        """Predicted variances in original units."""
        return np.asarray(variance, float) * self.y_deviation**2

    def predictive(self, predictive: Predictive) -> Predictive:
        """A predictive of standardised targets as one in original units."""
        return in_units(predictive, self.y_mean, self.y_deviation)


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
    scaling: Scaling | None
    shot: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    ragged: str = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n tasks: x [n, shot, ...], y [n, shot, c] or labels [n, shot], weight [n, shot] where padded; query alike.

        Groups are different ones while they last, so n = the number of groups visits each once.
        """
        key_group, key_rows = jax.random.split(key)
        total = self.starts.shape[0]
        rounds = jax.vmap(lambda k: distinct(k, total, min(total, n)))(jax.random.split(key_group, -(-n // total)))
        return jax.vmap(self._task)(jax.random.split(key_rows, n), rounds.reshape(-1)[:n])

    def _task(self, key: PRNGKeyArray, group: Int[Array, ""]) -> Task:
        count = self.counts[group]
        rows = distinct(key, count, self.shot + self.query)
        seen = jnp.minimum(self.shot, count - 1)
        shown = jnp.minimum(self.query, count - seen)
        return Task(self._batch(group, rows, 0, seen, self.shot), self._batch(group, rows, seen, shown, self.query))

    def _batch(self, group: Array, rows: Array, first: Array | int, present: Array, size: int) -> Batch:
        place = jnp.arange(size)
        # What lacks repeats rows that are there: padding must be finite numbers too.
        index = self.starts[group] + rows[first + place % present]
        weight = (place < present).astype(self.x.dtype) if self.ragged == "pad" else None
        return Batch(self.x[index], self.y[index], weight)


def check_finite(name: str, values: np.ndarray, columns: Sequence[str] | None = None) -> np.ndarray:
    """The array, or a DataError that names the column and row of the first NaN or infinity."""
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, *rest = bad[0].tolist()
        column = columns[rest[0]] if columns is not None and rest else rest[0] if rest else None
        where = f"row {row}" if column is None else f"column {column!r}, row {row}"
        raise DataError(
            f"{name}: came {values[tuple(bad[0])]} in {where} ({len(bad)} such values), needs finite numbers; fill "
            "them in or leave those rows out"
        )
    return values


def array_tasks(
    x: Any,
    y: Any,
    groups: Any,
    *,
    shot: int = 5,
    query: int = 5,
    test_query: int | None = None,
    split: Any = (0.7, 0.15, 0.15),
    seed: int = 0,
    ragged: str = "pad",
    small: str = "error",
    standardise: bool = False,
    classification: bool | None = None,
    columns: Sequence[str] | None = None,
) -> Splits:
    """Tasks from rows with a group column.

    Args:
        x: features [N, d] (or [N], or any [N, ...] without standardising). y: targets [N] or [N, c], or labels [N].
        groups: [N], any hashable values; the rows of a group need not be adjacent.
        shot, query, test_query: rows of the support, of the query in training, and in validation and test (as `query`).
        split: three fractions of the groups, or lists of groups; `seed` shares out at random.
        ragged: groups of fewer than shot + query rows are padded with weight 0 ('pad'), filled with their own rows
            again ('resample') or count as too small ('exact').
        small: groups too small for a task (below 2 rows, or shot + query with 'exact') are an 'error' or 'drop'ped.
        standardise: features and real targets to mean 0, deviation 1 over the training groups; see `.scaling`.
        classification: whether y holds labels; by default if it is text or truth values. Labels become 0..k-1, sorted.
        columns: names of the features, for errors.

    Raises:
        DataError: lengths that differ, NaN (naming column and row), groups too small, a split that does not fit.
    """
    if ragged not in RAGGED:
        raise ValueError(f"ragged: came {ragged!r}, needs one of {', '.join(RAGGED)}")
    if small not in ("error", "drop"):
        raise ValueError(f"small: came {small!r}, needs 'error' or 'drop'")
    shot, query = check_count("shot", shot), check_count("query", query)
    test_query = query if test_query is None else check_count("test_query", test_query)
    features = _features(x, columns)
    targets = _targets(y, classification)
    ids, names = encode_labels(groups)
    if not len(features) == len(targets) == len(ids):
        raise DataError(f"x, y, groups: came {len(features)}, {len(targets)}, {len(ids)} rows, needs as many of each")
    order = np.argsort(ids, kind="stable")
    features, targets, counts = features[order], targets[order], np.bincount(ids)
    parts = split_groups(names, split, seed, "group")
    sizes = (query, test_query, test_query)
    kept = [
        _large_enough(part, counts, names, shot + size if ragged == "exact" else 2, small)
        for part, size in zip(parts, sizes, strict=True)
    ]
    starts = np.cumsum(counts) - counts
    scaling = None
    if standardise:
        features, targets, scaling = _standardised(features, targets, rows_of(kept[0], counts))
    x_all, y_all = jnp.asarray(features, float), jnp.asarray(targets, float if targets.ndim > 1 else jnp.int32)
    return Splits(*(
        ArrayTasks(x_all, y_all, jnp.asarray(part, jnp.int32), jnp.asarray(starts[part], jnp.int32),
                   jnp.asarray(counts[part], jnp.int32), scaling, shot, size, ragged)
        for part, size in zip(kept, sizes, strict=True)
    ))  # fmt: skip


def _features(x: Any, columns: Sequence[str] | None) -> np.ndarray:
    try:
        features = np.asarray(x, float)
    except (TypeError, ValueError) as error:
        raise DataError(f"x: came values that are not numbers ({error}); encode them first, e.g. one-hot") from None
    if features.ndim == 0:
        raise DataError("x: came a single number, needs [N, d]")
    return check_finite("x", features[:, None] if features.ndim == 1 else features, columns)


def _targets(y: Any, classification: bool | None) -> np.ndarray:
    values = np.asarray(y)
    if classification or (classification is None and values.dtype.kind in "USOb"):
        return encode_labels(values)[0]
    try:
        targets = values.astype(float)
    except (TypeError, ValueError) as error:
        raise DataError(f"y: came values that are not numbers ({error}); set classification=True for labels") from None
    return check_finite("y", targets[:, None] if targets.ndim == 1 else targets)


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


def _standardised(x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, Scaling]:
    if x.ndim != 2:
        raise DataError(f"standardise: came features {x.shape}, needs [N, d]")

    def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        deviation = values[rows].std(0)
        # A constant column carries nothing; it is centred and left in its own units.
        return values[rows].mean(0), np.where(deviation > 0, deviation, 1.0)

    x_mean, x_deviation = moments(x)
    y_mean, y_deviation = moments(y) if y.ndim > 1 else (np.zeros(1), np.ones(1))
    scaling = Scaling(x_mean, x_deviation, y_mean, y_deviation)
    return (x - x_mean) / x_deviation, (y - y_mean) / y_deviation if y.ndim > 1 else y, scaling
