"""Encoding a raw table for a learner, and decoding predictions: columns by name, levels, classes and scaling.

A preparation is fitted on the training groups and stored with the run (`preparation.json`). Training, `adapt`,
`evaluate` and plots all encode and decode through it. Everything is float64; the cast to float32 comes after centring.
"""

import json
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from metaprior.core.named import nearest
from metaprior.core.types import Batch, Predictive, Splits, Task
from metaprior.core.units import Floats
from metaprior.tasks.checks import DataError
from metaprior.tasks.fixed import FixedTasks
from metaprior.tasks.tables.columns import TRUTH, Columns, as_ids, as_numbers, as_text, is_text, kind_of, refuse_missing
from metaprior.tasks.tables.scaling import CONSTANT, Scaling, cast, check_digits, moments

TARGETS = ("label", "labels", "class", "target", "y")  # usual names of the target column
FAR = 100.0  # standard deviations from the training mean; values beyond it raise a warning


@dataclass(frozen=True)
class Column:
    """A feature column.

    Attributes:
        name: The name of the column.
        kind: 'number', 'truth value', or 'category', which makes one feature per level.
        levels: The levels of a category.
        mean: What is subtracted from each feature.
        deviation: What each feature is divided by.
        constant: Which features had a single value in training. The effect of another value is unknown, so such a
            feature is always 0.
    """

    name: str
    kind: str
    levels: tuple[str, ...] = ()
    mean: Floats = (0.0,)
    deviation: Floats = (1.0,)
    constant: tuple[bool, ...] = (False,)

    def scaled(self, raw: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        """Returns the features as a learner sees them."""
        return np.where(self.constant, 0.0, (raw - self.mean) / self.deviation)

    def warn_of_strange(
        self, raw: Float[np.ndarray, "n k"], columns: Columns, argument: str = "features", stacklevel: int = 3
    ) -> None:
        """Warns of numbers far from the training range, and of new values of a feature that was constant in training.

        Args:
            raw: The features before scaling.
            columns: The table, for the place of a row.
            argument: The argument that holds the column, for the warning.
            stacklevel: As in `warnings.warn`.
        """
        if self.kind != "number":
            return
        mean, deviation, constant = np.asarray(self.mean), np.asarray(self.deviation), np.asarray(self.constant)
        apart = np.abs((raw - mean) / deviation)
        other = constant & (apart > 1e-9 * np.maximum(np.abs(mean), 1))
        scaled = (mean != 0) | (deviation != 1)
        for strange in (other, scaled & ~constant & (apart > FAR)):
            if not strange.any():
                continue
            row, at = np.argwhere(strange)[0].tolist()
            rows = int(strange.any(1).sum())
            message = f"{argument}: column {self.features[at]!r} has {raw[row, at]:g} in {columns.place(row)}"
            message += f" ({rows} such rows)" if rows > 1 else ""
            warnings.warn(
                f"{message}. In training it was always {mean[at]:g}; the effect of other values is unknown and ignored."
                if strange is other
                else f"{message}, {apart[row, at]:.3g} standard deviations from the training mean. Check its units.",
                stacklevel=stacklevel,
            )

    def check(self) -> None:
        """Checks that the fields are consistent.

        Raises:
            ValueError: Inconsistent fields.
        """
        _check_kind(self.name, self.kind, ("number", "truth value", "category"))
        width = {"category": len(self.levels), "truth value": 1}.get(self.kind)
        _check_scaling(self.name, self.mean, self.deviation, width)
        if len(set(self.levels)) < len(self.levels) or not all(isinstance(level, str) for level in self.levels):
            raise ValueError(f"levels of {self.name!r} must be different texts, got {list(self.levels)}")

    @property
    def features(self) -> list[str]:
        """The name of each feature of the column."""
        if self.kind == "category":
            return [f"{self.name}={level}" for level in self.levels]
        return [self.name] if len(self.mean) == 1 else [f"{self.name}[{i}]" for i in range(len(self.mean))]

    def raw(self, columns: Columns, *, unknown: str = "error") -> Float[np.ndarray, "n k"]:
        """Returns the features of the column before scaling.

        Args:
            columns: The table.
            unknown: What happens to a level that does not occur in training. It is an 'error', or the row has none of
                the levels, with a warning ('warn') or without ('pass').

        Raises:
            DataError: A column that is missing or does not fit its kind, a missing value, or an unknown level with
                'error'.
        """
        values = columns.find(self.name, "features")
        if self.kind == "number":
            return as_numbers(values, self.name, columns)
        refuse_missing(values, self.name, columns, "features")
        levels = np.asarray(TRUTH if self.kind == "truth value" else self.levels)
        cells = [cell.lower() if self.kind == "truth value" else cell for cell in as_text(values)]
        hot = np.asarray(cells)[:, None] == levels
        strange = np.flatnonzero(~hot.any(1))
        if len(strange):
            known, cell = levels.tolist(), cells[strange[0]]
            message = (
                f"features: column {self.name!r} has {cell!r} in {columns.place(int(strange[0]))}, a level that no "
                f"training group has ({len(strange)} such rows). Known levels are {', '.join(known[:20])}"
                f"{nearest(cell, known) or '.'}"
            )
            if unknown == "error" or self.kind == "truth value":
                raise DataError(message)
            if unknown == "warn":
                warnings.warn(f"{message} Such rows count as having none of these. Merge rare levels.", stacklevel=2)
        return hot[:, 1:].astype(float) if self.kind == "truth value" else hot.astype(float)


@dataclass(frozen=True)
class Target:
    """The target column.

    Attributes:
        name: The name of the column.
        kind: 'number' (scaled), 'count' (not scaled) or 'class' (encoded as positions in `classes`).
        classes: The classes.
        mean: What is subtracted from each target.
        deviation: What each target is divided by.
    """

    name: str
    kind: str
    classes: tuple[Any, ...] = ()
    mean: Floats = (0.0,)
    deviation: Floats = (1.0,)

    def check(self) -> None:
        """Checks that the fields are consistent.

        Raises:
            ValueError: Inconsistent fields.
        """
        _check_kind(self.name, self.kind, ("number", "count", "class"))
        _check_scaling(self.name, self.mean, self.deviation)
        if (self.kind == "class") != bool(self.classes) or len(set(self.classes)) < len(self.classes):
            needed = "different classes" if self.kind == "class" else "no classes"
            raise ValueError(f"{self.name!r} of kind {self.kind} must have {needed}, got {self.classes}")

    def codes(self, values: np.ndarray, name: str, columns: Columns, argument: str = "target") -> np.ndarray:
        """Encodes labels as the run did.

        Args:
            values: Labels [n].
            name: The name of their column.
            columns: The table, for the place of a row.
            argument: The argument that holds them, for errors.

        Returns:
            Codes int32 [n].

        Raises:
            DataError: A label that does not occur in training; the error names it and the nearest.
        """
        place: dict[Hashable, int] = {str(label): code for code, label in enumerate(self.classes)}
        place |= {label: code for code, label in enumerate(self.classes)}
        labels = as_ids(values, name, columns, argument)
        found = [place.get(label, place.get(str(label))) for label in labels]
        if None in found:
            row = found.index(None)
            known = [str(label) for label in self.classes]
            raise DataError(
                f"{argument} must be a class of training ({', '.join(known[:20])}), got {labels[row]!r} in "
                f"{columns.place(row)}{nearest(str(labels[row]), known) or '.'}"
            )
        return np.asarray(found, np.int32)

    def numbers(self, values: np.ndarray, name: str, columns: Columns, argument: str) -> Float[np.ndarray, "n d"]:
        """Returns the targets before scaling.

        Args:
            values: Targets [n] or [n, d].
            name: The name of their column.
            columns: The table, for the place of a row.
            argument: The argument that holds them, for errors.

        Raises:
            DataError: Values that are not numbers, or counts that are not whole numbers of at least 0.
        """
        numbers = as_numbers(values, name, columns, argument)
        if self.kind == "count" and ((numbers < 0) | (numbers != np.rint(numbers))).any():
            row, at = np.argwhere((numbers < 0) | (numbers != np.rint(numbers)))[0]
            raise DataError(
                f"{argument}: column {name!r} has {numbers[row, at]:g} in {columns.place(row)}. A count must be a "
                "whole number of at least 0."
            )
        return numbers


@dataclass(frozen=True)
class Preparation:
    """The preparation of one table.

    Attributes:
        columns: The feature columns, in the order in which a learner sees them.
        target: The target column.
        group: The name of the group column.
        groups: The names of the groups of training, validation and test; None if unknown.
    """

    columns: tuple[Column, ...]
    target: Target
    group: str = "group"
    groups: tuple[tuple[Hashable, ...], ...] | None = field(default=None, compare=False)

    @classmethod
    def fit(
        cls,
        columns: Columns,
        target: Target,
        goal: np.ndarray,
        rows: Bool[np.ndarray, " n"],
        *,
        standardise: bool,
        categories: Sequence[str] = (),
        **names: Any,
    ) -> "Preparation":
        """Fits levels and scaling on the training rows, and the kind of each column on all rows.

        Args:
            columns: The feature columns and no others.
            target: The name, kind and classes of the target.
            goal: The raw values of the target.
            rows: Which rows belong to training groups.
            standardise: Whether to scale features and real targets to mean 0 and standard deviation 1. Counts are never
                scaled.
            categories: Columns that are categories although they hold numbers, dates or many levels.
            **names: `group` and `groups`.

        Returns:
            The preparation.

        Raises:
            DataError: Columns that cannot be read, or numbers that float32 cannot distinguish.
        """
        if unknown := [name for name in categories if name not in columns]:
            columns.find(unknown[0], "categories")
        fitted = tuple(_fit_column(name, columns, rows, standardise, name in categories) for name in columns)
        if target.kind != "class":
            argument = "y" if columns.path is None else "target"
            raw = target.numbers(goal, target.name, columns, argument)
            mean, deviation = np.zeros(raw.shape[1]), np.ones(raw.shape[1])
            if standardise and target.kind == "number":
                mean, deviation = moments(raw[rows], target.name)
            check_digits(raw, mean, deviation, [target.name] * raw.shape[1], columns, argument)
            target = Target(target.name, target.kind, (), tuple(mean.tolist()), tuple(deviation.tolist()))
        return cls(fitted, target, **names)

    @cached_property
    def scaling(self) -> Scaling:
        """The scaling of all features and targets, as arrays."""
        mean, deviation = ([v for c in self.columns for v in getattr(c, part)] for part in ("mean", "deviation"))
        fixed = [one for c in self.columns for one in (c.constant * len(c.mean))[: len(c.mean)]]
        spread = np.where(fixed, np.inf, deviation)
        return Scaling(*map(np.asarray, (mean, spread, self.target.mean, self.target.deviation)))

    @property
    def features(self) -> list[str]:
        """The name of each feature that a learner sees."""
        return [name for column in self.columns for name in column.features]

    def encode(self, columns: Mapping[str, Any], *, strict: bool = True) -> Float[np.ndarray, "n d"]:
        """Encodes features as a learner sees them.

        Args:
            columns: Columns by name. Other columns than the features (group, target) are ignored.
            strict: Whether to refuse levels that do not occur in training, and to warn of numbers far outside the
                training range. Only the held-out groups of a run's own table are encoded with False.

        Returns:
            Features [n, d].

        Raises:
            DataError: An unknown or missing column or level (naming it and the nearest), or values that are not
                numbers.
        """
        columns = columns if isinstance(columns, Columns) else Columns(columns)
        blocks = []
        for column in self.columns:
            raw = column.raw(columns, unknown="error" if strict else "warn")
            if raw.shape[1] != len(column.mean):
                raise DataError(
                    f"features: column {column.name!r} must have width {len(column.mean)}, got {raw.shape[1]}."
                )
            if strict:
                column.warn_of_strange(raw, columns)
            blocks.append(cast(column.scaled(raw), raw, column.name, columns, "features"))
        if len({len(block) for block in blocks}) > 1:
            lengths = ", ".join(str(len(block)) for block in blocks)
            raise DataError(f"features must be columns of equal length, got {lengths} rows.")
        return np.concatenate(blocks, 1)

    def encode_target(
        self, values: Any, columns: Columns | None = None, name: str | None = None, *, strict: bool = False
    ) -> np.ndarray:
        """Encodes targets as a learner sees them.

        Args:
            values: Raw targets [n] or [n, d], or labels [n].
            columns: The table, for the place of a row.
            name: The name of their column. By default that of training.
            strict: Whether to warn of numbers far outside the training range.

        Returns:
            Numbers [n, d], or class codes [n].

        Raises:
            DataError: Values that are not numbers, or a class that does not occur in training, naming place and value.
        """
        values, name = np.asanyarray(values), self.target.name if name is None else name
        columns = Columns({name: values}) if columns is None else columns
        if self.target.kind == "class":
            return self.target.codes(values, name, columns)
        raw = self.target.numbers(values, name, columns, "target")
        if raw.shape[1] != len(self.target.mean):
            raise DataError(f"target: column {name!r} must have width {len(self.target.mean)}, got {raw.shape[1]}.")
        if strict and self.target.kind == "number":
            self._target_column(name).warn_of_strange(raw, columns, "target")
        return cast((raw - self.target.mean) / self.target.deviation, raw, name, columns, "target")

    def _target_column(self, name: str) -> Column:
        return Column(name, "number", (), self.target.mean, self.target.deviation)

    def warn_of_strange(self, x: Float[np.ndarray, "n d"], y: np.ndarray | None = None, stacklevel: int = 2) -> None:
        """Warns of raw features and numeric targets far outside the training range.

        Args:
            x: Raw features, as one array with the columns in the order of training.
            y: Raw targets; None to check features only.
            stacklevel: As in `warnings.warn`.
        """
        columns, first, deeper = Columns({"x": x}), 0, stacklevel + 1
        for column in self.columns:
            column.warn_of_strange(x[:, first : first + len(column.mean)], columns, "X", deeper)
            first += len(column.mean)
        if y is not None and self.target.kind == "number":
            self._target_column(self.target.name).warn_of_strange(y.reshape(len(x), -1), columns, "y", deeper)

    def examples(self, columns: Columns, *, labelled: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Encodes the examples of a user's file as a learner sees them.

        The target is the column that the run was trained on, or else one of the usual names.

        Args:
            columns: The columns of the file.
            labelled: Whether to return targets.

        Returns:
            Features [n, d], and targets if `labelled`, else None.

        Raises:
            DataError: An argument that `encode` or `encode_target` rejects, or no target column.
        """
        x = self.encode(columns)
        if not labelled:
            return x, None
        taken = {column.name for column in self.columns}
        usual = [name for name in (self.target.name, *TARGETS) if name in columns or f"{name}[0]" in columns]
        name = next((name for name in usual if name not in taken), self.target.name)
        if name != self.target.name and len(also := [one for one in usual if one not in taken]) > 1:
            listed = ", ".join(map(repr, also))
            raise DataError(f"target: columns {listed} could all be the target. Name one of them {self.target.name!r}.")
        return x, self.encode_target(columns.find(name, "target"), columns, name, strict=True)

    def blank(self, shot: int, query: int, *, padded: bool) -> Splits:
        """Makes tasks of the right shapes without the data of the table, for a run whose table is not available.

        Args:
            shot: Rows of the support.
            query: Rows of the query.
            padded: Whether support and query have weights.

        Returns:
            The same source of zeros three times.
        """

        def batch(rows: int) -> Batch:
            x = np.zeros((1, rows, len(self.features)), jax.dtypes.canonicalize_dtype(float))
            y = np.zeros((1, rows), np.int32) if self.target.classes else np.zeros_like(x, shape=(1, rows, self.width))
            return jax.tree.map(jnp.asarray, Batch(x, y, jnp.ones((1, rows)) if padded else None))

        source = FixedTasks(Task(batch(shot), batch(query)))
        return Splits(source, source, source)

    @property
    def width(self) -> int:
        """The number of targets."""
        return len(self.target.mean)

    @property
    def standardised(self) -> str | None:
        """The target's name if it is standardised, so that training metrics are not in its units; else None."""
        return self.target.name if set(self.target.deviation) - {1.0} else None

    def predictive(self, predictive: Predictive) -> Predictive:
        """Returns a learner's predictive in the units of the target. Those of classes and counts do not change."""
        return self.scaling.predictive(predictive) if self.target.kind == "number" else predictive

    def to_json(self) -> str:
        """Returns the preparation as JSON; floats keep all their bits."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Preparation":
        """Reads what `to_json` wrote.

        Args:
            text: JSON.

        Raises:
            DataError: Other or damaged text.
        """
        try:
            table = json.loads(text)
            columns = tuple(Column(**_tuples(column)) for column in table["columns"])
            groups = None if table["groups"] is None else tuple(map(tuple, table["groups"]))
            found = cls(columns, Target(**_tuples(table["target"])), table["group"], groups)
            for column in (*columns, found.target):
                column.check()
            if len(set(names := [*(column.name for column in columns), found.target.name])) < len(names):
                raise ValueError(f"a name occurs twice in {', '.join(names)}")
            return found
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"preparation is damaged ({type(error).__name__}: {error}).") from error


def _check_kind(name: Any, kind: Any, kinds: tuple[str, ...]) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a column's name must be text, got {name!r}")
    if kind not in kinds:
        raise ValueError(f"{name!r} must be of kind {' or '.join(kinds)}, got {kind!r}")


def _check_scaling(name: str, mean: Floats, deviation: Floats, width: int | None = None) -> None:
    if not len(mean) == len(deviation) == (len(mean) if width is None else width) > 0:
        raise ValueError(
            f"{name!r} must have {width or 'as many'} means and deviations, got {len(mean)} and {len(deviation)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and min(deviation) > 0):
        raise ValueError(f"{name!r} must have finite means and deviations above 0")


def _tuples(table: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


def _fit_column(name: str, columns: Columns, rows: np.ndarray, standardise: bool, category: bool) -> Column:
    kind = "category" if category else kind_of(name, columns)
    levels: tuple[str, ...] = ()
    if kind == "category":
        refuse_missing(columns[name], name, columns, "features")
        levels = tuple(sorted({cell for cell, kept in zip(as_text(columns[name]), rows, strict=True) if kept}))
    raw = Column(name, kind, levels).raw(columns, unknown="pass")
    mean, deviation = np.zeros(raw.shape[1]), np.ones(raw.shape[1])
    constant = np.zeros(raw.shape[1], bool)
    if standardise:
        mean, deviation = moments(raw[rows], name)
        constant = np.abs(raw[rows] - mean).max(0) <= CONSTANT * np.abs(mean)
    check_digits(raw, mean, deviation, Column(name, kind, levels, tuple(mean)).features, columns, "features")
    return Column(name, kind, levels, tuple(mean.tolist()), tuple(deviation.tolist()), tuple(constant.tolist()))


def target_of(
    goal: np.ndarray, name: str, columns: Columns, *, classification: bool | None, counts: bool, integers: str
) -> Target:
    """Returns the name, kind and classes of the target.

    Args:
        goal: The raw values of the target.
        name: Its name.
        columns: The table, for the place of a row.
        classification: Whether the target holds labels; None to decide by its type.
        counts: Whether it holds counts.
        integers: What whole numbers are if neither is given: 'number', or 'error'.

    Raises:
        DataError: With 'error', a target that could hold classes or numbers; or a missing value.
        ValueError: Both `classification` and `counts`.
    """
    if classification and counts:
        raise ValueError("classification and counts must not both be true, because a target holds classes or counts.")
    if classification is None and not counts:
        if integers == "error" and goal.dtype.kind in "iu" and goal.ndim == 1:
            raise DataError(
                f"{name} holds whole numbers ({goal.dtype}), which may be classes, counts or other numbers. Set "
                "classification=True, counts=True or classification=False."
            )
        named = Columns({name: goal}, columns.path, columns.lines)
        text = is_text(goal) or goal.dtype.kind == "b" or (goal.dtype == object and integers == "error")
        refuse_missing(goal, name, columns, "target")
        classification = text and (integers == "error" or kind_of(name, named, "target") != "number")
    if not classification:
        return Target(name, "count" if counts else "number")
    labels = list(dict.fromkeys(as_ids(goal, name, columns, "target")))
    try:
        labels = sorted(labels)
    except TypeError:
        labels = sorted(labels, key=lambda label: (type(label).__name__, str(label)))
    return Target(name, "class", tuple(labels))
