"""What turns a raw table into what a learner sees, and predictions back: columns by name, levels, classes, scaling.

It is fitted on the training groups, belongs to the run (`preparation.json`), and is the one way in and out: training,
`adapt`, `evaluate` and pictures. All of it is float64; the cast to float32 comes after centring.
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

LABELS = ("label", "labels", "class", "target", "y")  # usual names of the column of targets
FAR = 100.0  # deviations from the training mean beyond which a value is warned of


@dataclass(frozen=True)
class Column:
    """A feature column: kind 'number', 'truth value' or 'category' (one feature a level), and the scaling of each.

    constant: which features had one value in training. What another value does is not known, and counts as nothing.
    """

    name: str
    kind: str
    levels: tuple[str, ...] = ()
    mean: Floats = (0.0,)
    deviation: Floats = (1.0,)
    constant: tuple[bool, ...] = (False,)

    def scaled(self, raw: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
        """The features as a learner sees them."""
        return np.where(self.constant, 0.0, (raw - self.mean) / self.deviation)

    def warn_of_strange(
        self, raw: Float[np.ndarray, "n k"], columns: Columns, argument: str = "features", stacklevel: int = 3
    ) -> None:
        """Warn of numbers far from what training had, and of any other value where it had one."""
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
            told = f"{argument}: column {self.features[at]!r} has {raw[row, at]:g} in {columns.place(row)}"
            told += f" ({rows} such rows)" if rows > 1 else ""
            warnings.warn(
                f"{told}, but the one value {mean[at]:g} in training; what it does is not known and counts as nothing."
                if strange is other
                else f"{told}, {apart[row, at]:.3g} deviations from what training had; check its units.",
                stacklevel=stacklevel,
            )

    def check(self) -> None:
        """A ValueError unless its parts fit together."""
        _check_kind(self.name, self.kind, ("number", "truth value", "category"))
        width = {"category": len(self.levels), "truth value": 1}.get(self.kind)
        _check_scaling(self.name, self.mean, self.deviation, width)
        if len(set(self.levels)) < len(self.levels) or not all(isinstance(level, str) for level in self.levels):
            raise ValueError(f"levels of {self.name!r} must be different texts, got {list(self.levels)}")

    @property
    def features(self) -> list[str]:
        """The name of each feature that the column makes."""
        if self.kind == "category":
            return [f"{self.name}={level}" for level in self.levels]
        return [self.name] if len(self.mean) == 1 else [f"{self.name}[{i}]" for i in range(len(self.mean))]

    def raw(self, columns: Columns, *, unknown: str = "error") -> Float[np.ndarray, "n k"]:
        """The column's features before scaling.

        unknown: whether a level that training never had is an 'error'; else it is none of the levels, which a warning
        says ('warn') or nothing ('pass').
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
            told = (
                f"features: column {self.name!r} has {cell!r} in {columns.place(int(strange[0]))}, a level that no "
                f"training group has ({len(strange)} such rows); known are {', '.join(known[:20])}"
                f"{nearest(cell, known)}"
            )
            if unknown == "error" or self.kind == "truth value":
                raise DataError(told)
            if unknown == "warn":
                warnings.warn(f"{told}; such rows count as none of these, so merge rare levels", stacklevel=2)
        return hot[:, 1:].astype(float) if self.kind == "truth value" else hot.astype(float)


@dataclass(frozen=True)
class Target:
    """The target: kind 'number' (scaled), 'count' (as it is) or 'class' (codes in the order of `classes`)."""

    name: str
    kind: str
    classes: tuple[Any, ...] = ()
    mean: Floats = (0.0,)
    deviation: Floats = (1.0,)

    def check(self) -> None:
        """A ValueError unless its parts fit together."""
        _check_kind(self.name, self.kind, ("number", "count", "class"))
        _check_scaling(self.name, self.mean, self.deviation)
        if (self.kind == "class") != bool(self.classes) or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"{self.name!r} of kind {self.kind} came with classes {self.classes}")

    def codes(self, values: np.ndarray, name: str, columns: Columns, argument: str = "target") -> np.ndarray:
        """The run's code of each label.

        Raises:
            DataError: a label that the run never saw, naming it and the nearest.
        """
        place: dict[Hashable, int] = {str(label): code for code, label in enumerate(self.classes)}
        place |= {label: code for code, label in enumerate(self.classes)}
        labels = as_ids(values, name, columns, argument)
        found = [place.get(label, place.get(str(label))) for label in labels]
        if None in found:
            row = found.index(None)
            known = [str(label) for label in self.classes]
            raise DataError(
                f"{argument}: came class {labels[row]!r} in {columns.place(row)}, needs one of those of training: "
                f"{', '.join(known[:20])}{nearest(str(labels[row]), known)}"
            )
        return np.asarray(found, np.int32)

    def numbers(self, values: np.ndarray, name: str, columns: Columns, argument: str) -> Float[np.ndarray, "n d"]:
        """Targets before scaling."""
        numbers = as_numbers(values, name, columns, argument)
        if self.kind == "count" and ((numbers < 0) | (numbers != np.rint(numbers))).any():
            row, at = np.argwhere((numbers < 0) | (numbers != np.rint(numbers)))[0]
            raise DataError(
                f"{argument}: column {name!r} has {numbers[row, at]:g} in {columns.place(row)}; a count is a whole "
                "number, 0 or more."
            )
        return numbers


@dataclass(frozen=True)
class Preparation:
    """The preparation of one table.

    Attributes:
        columns: the feature columns, in the order in which a learner sees them.
        target: the target column.
        group: name of the group column.
        groups: names of the groups of training, validation and test, or None.
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
        """Levels and scaling from the training rows; kinds from all rows.

        Args:
            columns: the feature columns and no others.
            target: its name, kind and classes.
            goal: the target's raw values.
            rows: which are of training groups.
            standardise: features and real targets to mean 0, deviation 1; counts stay as they are.
            categories: columns that are categories although they hold numbers, dates or many levels.
            names: `group` and `groups`.
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
        """The scaling of all features and targets as arrays."""
        mean, deviation = ([v for c in self.columns for v in getattr(c, part)] for part in ("mean", "deviation"))
        fixed = [one for c in self.columns for one in (c.constant * len(c.mean))[: len(c.mean)]]
        spread = np.where(fixed, np.inf, deviation)
        return Scaling(*map(np.asarray, (mean, spread, self.target.mean, self.target.deviation)))

    @property
    def features(self) -> list[str]:
        """The name of each feature that a learner sees."""
        return [name for column in self.columns for name in column.features]

    def encode(self, columns: Mapping[str, Any], *, strict: bool = True) -> Float[np.ndarray, "n d"]:
        """Features as a learner sees them, from columns by name; others (group, target) are passed over.

        strict: refuse levels that training never had, and warn of numbers far outside what it had. Only the groups held
        out of a run's own table are encoded otherwise.

        Raises:
            DataError: an unknown or missing column or level, naming it and the nearest; values that are no numbers.
        """
        columns = columns if isinstance(columns, Columns) else Columns(columns)
        blocks = []
        for column in self.columns:
            raw = column.raw(columns, unknown="error" if strict else "warn")
            if raw.shape[1] != len(column.mean):
                raise DataError(f"features: column {column.name!r} came {raw.shape[1]} wide, needs {len(column.mean)}")
            if strict:
                column.warn_of_strange(raw, columns)
            blocks.append(cast(column.scaled(raw), raw, column.name, columns, "features"))
        if len({len(block) for block in blocks}) > 1:
            raise DataError(f"features: columns of {', '.join(str(len(block)) for block in blocks)} rows; need as many")
        return np.concatenate(blocks, 1)

    def encode_target(
        self, values: Any, columns: Columns | None = None, name: str | None = None, *, strict: bool = False
    ) -> np.ndarray:
        """Targets as a learner sees them: numbers [n, d], or class codes [n].

        strict: warn of numbers far from what training had.

        Raises:
            DataError: values that are no numbers, or a class that training never saw; names place and value.
        """
        values, name = np.asanyarray(values), self.target.name if name is None else name
        columns = Columns({name: values}) if columns is None else columns
        if self.target.kind == "class":
            return self.target.codes(values, name, columns)
        raw = self.target.numbers(values, name, columns, "target")
        if raw.shape[1] != len(self.target.mean):
            raise DataError(f"target: column {name!r} came {raw.shape[1]} wide, needs {len(self.target.mean)}")
        if strict and self.target.kind == "number":
            self._target_column(name).warn_of_strange(raw, columns, "target")
        return cast((raw - self.target.mean) / self.target.deviation, raw, name, columns, "target")

    def _target_column(self, name: str) -> Column:
        return Column(name, "number", (), self.target.mean, self.target.deviation)

    def warn_of_strange(self, x: Float[np.ndarray, "n d"], y: np.ndarray | None = None, stacklevel: int = 2) -> None:
        """Warn of raw features side by side, and of raw targets that are numbers, far from what training had."""
        columns, first, deeper = Columns({"x": x}), 0, stacklevel + 1
        for column in self.columns:
            column.warn_of_strange(x[:, first : first + len(column.mean)], columns, "X", deeper)
            first += len(column.mean)
        if y is not None and self.target.kind == "number":
            self._target_column(self.target.name).warn_of_strange(y.reshape(len(x), -1), columns, "y", deeper)

    def examples(self, columns: Columns, *, labelled: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Features and, if `labelled`, targets of a user's file as a learner sees them.

        The target is the column that the run was trained on, or else one of the usual names.

        Raises:
            DataError: see `encode` and `encode_target`; no column of targets.
        """
        x = self.encode(columns)
        if not labelled:
            return x, None
        taken = {column.name for column in self.columns}
        usual = [name for name in (self.target.name, *LABELS) if name in columns or f"{name}[0]" in columns]
        name = next((name for name in usual if name not in taken), self.target.name)
        if name != self.target.name and len(also := [one for one in usual if one not in taken]) > 1:
            listed = ", ".join(map(repr, also))
            raise DataError(f"target: columns {listed} could each be it; name one of them {self.target.name!r}")
        return x, self.encode_target(columns.find(name, "target"), columns, name, strict=True)

    def blank(self, shot: int, query: int, *, padded: bool) -> Splits:
        """Tasks of the shapes that a learner sees, without the table's data: for a run whose table is elsewhere."""

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
        """The target's name if learners see it standardised, so that figures of training are not in its units."""
        return self.target.name if set(self.target.deviation) - {1.0} else None

    def predictive(self, predictive: Predictive) -> Predictive:
        """A learner's predictive in the units of the target; classes and counts are in them already."""
        return self.scaling.predictive(predictive) if self.target.kind == "number" else predictive

    def to_json(self) -> str:
        """All of it as JSON; floats to the last bit."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Preparation":
        """What `to_json` wrote.

        Raises:
            DataError: other or damaged text.
        """
        try:
            table = json.loads(text)
            columns = tuple(Column(**_tuples(column)) for column in table["columns"])
            groups = None if table["groups"] is None else tuple(map(tuple, table["groups"]))
            found = cls(columns, Target(**_tuples(table["target"])), table["group"], groups)
            for column in (*columns, found.target):
                column.check()
            if len(set(names := [*(column.name for column in columns), found.target.name])) < len(names):
                raise ValueError(f"a name stands twice in {', '.join(names)}")
            return found
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"preparation: damaged ({type(error).__name__}: {error})") from error


def _check_kind(name: Any, kind: Any, kinds: tuple[str, ...]) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a column's name must be text, got {name!r}")
    if kind not in kinds:
        raise ValueError(f"{name!r} must be of kind {' or '.join(kinds)}, got {kind!r}")


def _check_scaling(name: str, mean: Floats, deviation: Floats, width: int | None = None) -> None:
    if not len(mean) == len(deviation) == (len(mean) if width is None else width) > 0:
        raise ValueError(f"{name!r} has {len(mean)} means and {len(deviation)} deviations, needs {width or 'as many'}")
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
    """The target's name, kind and classes.

    integers: what whole numbers are where it is not said: 'number', or 'error'.

    Raises:
        DataError: a target that could be classes or numbers, where 'error' is asked for.
    """
    if classification and counts:
        raise ValueError("classification, counts: both came true; a target is classes or counts.")
    if classification is None and not counts:
        if integers == "error" and goal.dtype.kind in "iu" and goal.ndim == 1:
            raise DataError(
                f"{name}: came whole numbers ({goal.dtype}), which may be classes, counts or other numbers; say "
                "classification=True, counts=True or classification=False"
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
