"""What `evaluate` found, as JSON holds it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from metaprior.core.files import write_atomically
from metaprior.core.options import Count, accept, shown
from metaprior.evaluation.figures import Figure, digits_of, title_of

CORRELATION = "variance_error_correlation"  # undefined where all variances are one


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. `pooled` are figures without an interval, None where undefined, as the correlation of
    variance and error is where all variances are one; `curve` has a row an inner step.

    `target` names the column of a table that was predicted: errors, widths and NLL are in its own units. `groups` is
    the number of groups that the tasks come from, None where each task is a draw of its own. `notes` are sentences on
    what the figures cannot say.
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
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def save(self, path: Path | str) -> None:
        write_atomically(Path(path), self.to_json())

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """What `to_json` wrote.

        Raises:
            ValueError: other or damaged text, saying what is wrong with it.
        """
        table = accept(dict, json.loads(text), "a report")
        if lacking := [name for name in ("kind", "tasks", "figures", "pooled", "curve") if name not in table]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
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
            list(accept(tuple[str, ...], rows["notes"], "notes")),
        )

    def __str__(self) -> str:
        rows = [(title_of(name), str(figure)) for name, figure in self.figures.items()]
        rows += [(title_of(n), "-" if v is None else f"{v:{digits_of(v)}}") for n, v in self.pooled.items()]
        width = max(len(name) for name, _ in rows) if rows else 0
        lines = [self.heading(), *(f"{name:{width}}  {value}" for name, value in rows)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def heading(self, title: str = "") -> str:
        """The title of a table: by default the number of tasks; with the number of groups and the target's name."""
        title = (title or f"{self.tasks} tasks") + (f" of {self.groups} groups" if self.groups else "")
        return title + (f"; in units of {self.target}" if self.target else "")


def _numbers(table: Any, name: str, *, undefined: Sequence[str] = ()) -> dict[Any, Any]:
    """Numbers by name as JSON holds them; NaN and infinity are figures too, of tasks that diverged.

    undefined: those for which None may stand.
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
