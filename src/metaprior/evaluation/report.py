"""The report of an evaluation, which is saved as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from metaprior.core.files import write_atomically
from metaprior.core.options import Count, accept, shown
from metaprior.evaluation.figures import Figure, digits_of, title_of

Transductive = Literal["by the learner", "by batch statistics", "no"]
CORRELATION = "variance_error_correlation"  # undefined if all variances are equal


NEAR = 0.01  # nats per query; a smaller effect of the support counts as none
SUPPORTS = {
    "right": "the right support",
    "other": "another task's support",
    "shuffled": "its targets permuted",
    "empty": "no support",
}


@dataclass(frozen=True)
class Memorisation:
    """How much the answers depend on the support (see `evaluation.memorisation` for the estimators).

    Attributes:
        tasks: The number of tasks.
        others: The number of other tasks whose supports answered each query.
        figures: For each support, "right", "other" (of another task), "shuffled" (the right one with its targets
            permuted) and "empty", the accuracy or mse and the nll of the queries. A learner that cannot take an empty
            support has no "empty".
        rise: For each support but the right one, its nll minus that of the right one, with the interval of the
            difference.
        information: The estimate of I(y; D | x) in nats per query, which is too high on average.
        information_least: The estimate that is too low on average.
        notes: Sentences about what the figures do not show.
    """

    tasks: int
    others: int
    figures: dict[str, dict[str, Figure]]
    rise: dict[str, Figure]
    information: Figure
    information_least: Figure
    notes: list[str] = field(default_factory=list)

    @property
    def warning(self) -> str | None:
        """The warning that the run ignores its support, or None if there is evidence that it uses it.

        It is given if the 95 % intervals of both the rise of the nll with another task's support and the lower estimate
        of the information reach down to 0.01 nats per query or less.
        """
        rise, least = self.rise["other"], self.information_least
        low, high = rise.mean - (rise.interval or 0), rise.mean + (rise.interval or 0)
        if not (low <= NEAR and least.mean - (least.interval or 0) <= NEAR):
            return None
        if low >= -NEAR and high <= NEAR:
            return (
                f"the learner ignores its support: with another task's support the NLL changes by {rise} nats per query"
            )
        return (
            "there is no evidence that the learner uses its support: with another task's support the NLL changes by "
            f"{rise} nats per query. Evaluate more tasks, or see docs/learners.md on memorisation"
        )

    @classmethod
    def from_table(cls, table: Any) -> "Memorisation":
        """Reads a diagnosis from a report's table.

        Args:
            table: What `dataclasses.asdict` returned, from JSON.

        Raises:
            ValueError: It is damaged.
        """
        name = "memorisation"
        part = accept(dict, table, name)
        if lacking := [f for f in ("tasks", "others", "figures", "rise") if f not in part]:
            raise ValueError(f"{name} has no {', '.join(lacking)}")
        both = _figures({n: part.get(n) for n in ("information", "information_least")}, name)
        return cls(
            accept(Count, part["tasks"], f"{name}.tasks"),
            accept(Count, part["others"], f"{name}.others"),
            {n: _figures(row, f"{name}.{n}") for n, row in accept(dict, part["figures"], f"{name}.figures").items()},
            _figures(part["rise"], f"{name}.rise"),
            both["information"],
            both["information_least"],
            list(accept(tuple[str, ...], part.get("notes", []), f"{name}.notes")),
        )

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Returns the titles and the rows of its table, one row per support."""
        names = list(self.figures["right"])
        rows = [
            [SUPPORTS[support], *(str(row[name]) for name in names), str(self.rise.get(support, ""))]
            for support, row in self.figures.items()
        ]
        return ["queries answered with", *map(title_of, names), "rise of the NLL"], rows

    def summary(self) -> list[str]:
        """Returns the lines below its table: the information, the notes and the warning."""
        told = f"I(y; D | x), nats per query: {self.information}, biased up; {self.information_least}, biased down"
        lines = [told, *(f"note: {note}" for note in self.notes)]
        return lines if self.warning is None else [*lines, f"warning: {self.warning}"]

    def heading(self) -> str:
        """Returns the title of its table."""
        return f"how much the answers depend on the support ({self.tasks} tasks, {self.others} other supports each)"

    def __str__(self) -> str:
        titles, rows = self.rows()
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        lines = ["  ".join(f"{v:{w}}" for v, w in zip(row, widths, strict=True)).rstrip() for row in (titles, *rows)]
        return "\n".join([self.heading(), *lines, *self.summary()])


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
        memorisation: How much the answers depend on the support, or None if that was not estimated.
        transductive: Whether predictions depend on the other queries of their task: "by the learner", "by batch
            statistics" or "no". None if it was not checked.
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
    memorisation: Memorisation | None = None
    transductive: Transductive | None = None

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
            None if table.get("memorisation") is None else Memorisation.from_table(table["memorisation"]),
            accept(Transductive | None, table.get("transductive"), "transductive"),
        )

    def __str__(self) -> str:
        rows = [(title_of(name), str(figure)) for name, figure in self.figures.items()]
        rows += [(title_of(n), "-" if v is None else f"{v:{digits_of(v)}}") for n, v in self.pooled.items()]
        rows += [(title_of(name), str(figure)) for name, figure in self.of_families().items()]
        width = max(len(name) for name, _ in rows) if rows else 0
        lines = [self.heading(), *(f"{name:{width}}  {value}" for name, value in rows)]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines if self.memorisation is None else [*lines, "", str(self.memorisation)])

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
