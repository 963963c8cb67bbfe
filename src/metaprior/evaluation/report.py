"""The report of an evaluation, which is saved as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from metaprior.core.files import write_atomically
from metaprior.core.options import Count, accept, shown
from metaprior.evaluation.figures import Figure, digits_of, title_of

CORRELATION = "variance_error_correlation"  # undefined if all variances are equal


@dataclass(frozen=True)
class Report:
    """The report of an evaluation.

    Attributes:
        kind: "classification" or "regression".
        tasks: The number of tasks.
        figures: Means over tasks with 95 % intervals, by name.
        pooled: Figures over all query examples, without an interval. None marks an undefined one, such as the
            correlation of variance and error if all variances are equal.
        curve: The figures after 0, 1, ..., k inner steps; empty for a learner without inner steps.
        reliability: Of a classification, for each bin of the confidence: its edges `low` and `high`, the `count` of
            predictions, their mean `confidence` and their `accuracy`.
        pit: Of a regression, the density of the probability integral transform in equal bins of [0, 1].
        target: The name of the predicted column of a table. Errors, widths and NLL are in its units.
        groups: The number of groups that the tasks come from, or None if tasks are independent draws.
        families: The figures of each family of tasks by its name; empty if there is a single family.
        notes: Sentences about what the figures do not show.
    """

    kind: str
    tasks: int
    figures: dict[str, Figure]
    pooled: dict[str, float | None]
    curve: list[dict[str, Figure]] = field(default_factory=list)
    reliability: list[dict[str, float]] = field(default_factory=list)
    pit: list[float] = field(default_factory=list)
    target: str | None = None
    groups: int | None = None
    families: dict[str, dict[str, Figure]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Returns the report as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def save(self, path: Path | str) -> None:
        """Writes the report to a JSON file, atomically.

        Args:
            path: The file.
        """
        write_atomically(Path(path), self.to_json())

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Reads a report from the text that `to_json` returns.

        Args:
            text: The JSON text.

        Raises:
            ValueError: The text is damaged or not a report. The message says what is wrong.
        """
        table = accept(dict, json.loads(text), "a report")
        if lacking := [name for name in ("kind", "tasks", "figures", "pooled", "curve") if name not in table]:
            raise ValueError(f"the report has no {', '.join(lacking)}")
        kind = accept(Literal["classification", "regression"], table["kind"], "kind")
        rows = {name: accept(list, table.get(name, []), name) for name in ("curve", "reliability", "pit", "notes")}
        return cls(
            kind,
            accept(Count, table["tasks"], "tasks"),
            _figures(table["figures"], "figures"),
            _numbers(table["pooled"], "pooled", undefined=(CORRELATION,)),
            [_figures(row, "curve") for row in rows["curve"]],
            [_numbers(row, "reliability") for row in rows["reliability"]],
            list(_numbers(dict(enumerate(rows["pit"])), "pit").values()),
            accept(str | None, table.get("target"), "target"),
            accept(Count | None, table.get("groups"), "groups"),
            {
                family: _figures(row, f"families.{family}")
                for family, row in accept(dict, table.get("families", {}), "families").items()
            },
            list(accept(tuple[str, ...], rows["notes"], "notes")),
        )

    def __str__(self) -> str:
        rows = [(title_of(name), str(figure)) for name, figure in self.figures.items()]
        rows += [(title_of(n), "-" if v is None else f"{v:{digits_of(v)}}") for n, v in self.pooled.items()]
        rows += [(title_of(name), str(figure)) for name, figure in self.of_families().items()]
        width = max(len(name) for name, _ in rows) if rows else 0
        lines = [self.heading(), *(f"{name:{width}}  {value}" for name, value in rows)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def of_families(self) -> dict[str, Figure]:
        """Returns the main figure (accuracy or mse) of each family, by names such as 'accuracy of blur'."""
        main = next(iter(self.figures), "")
        return {f"{main} of {family}": row[main] for family, row in self.families.items() if main in row}

    def heading(self, title: str = "") -> str:
        """Returns the title of the report's table, with the number of groups and the name of the target.

        Args:
            title: Its beginning. The default is the number of tasks.
        """
        title = (title or f"{self.tasks} tasks") + (f" of {self.groups} groups" if self.groups else "")
        return title + (f"; in units of {self.target}" if self.target else "")


def _numbers(table: Any, name: str, *, undefined: Sequence[str] = ()) -> dict[Any, Any]:
    """Checks numbers by name that were read from JSON. NaN and infinity are allowed, since tasks can diverge.

    Args:
        table: The numbers.
        name: What they are, for the error message.
        undefined: The names of numbers that may be None.
    """
    for key, value in accept(dict, table, name).items():
        if key in undefined and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}.{key} must be a number, got {shown(value)}.")
    return table


def _figures(table: Any, name: str) -> dict[str, Figure]:
    found = {}
    for key, value in accept(dict, table, name).items():
        part = dict(accept(dict, value, f"{name}.{key}"))
        known = part.get("interval", 0.0) is not None
        part = _numbers(part if known else part | {"interval": 0.0}, f"{name}.{key}")
        if part.keys() != {"mean", "interval"}:
            raise ValueError(f"{name}.{key} must have a mean and an interval, got {', '.join(part) or 'neither'}.")
        found[key] = Figure(part["mean"], part["interval"] if known else None)
    return found
