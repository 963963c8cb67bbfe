"""What the commands of `metaprior study` print and write."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from metaprior.cli.screen import screen
from metaprior.core.files import write_atomically
from metaprior.evaluation.figures import Figure
from metaprior.evaluation.plots import save


def cell(value: Any) -> str:
    """Formats a cell of a table: a figure's mean with three decimals and its interval.

    Args:
        value: A figure, or something else to be shown as it is.
    """
    return f"{value:.3f}" if isinstance(value, Figure) else str(value)


def keep(out: Path, name: str, found: dict[str, Any], plot: Any | None, *tables: Table) -> int:
    """Prints the tables of a study, and writes its figures and its picture.

    Args:
        out: The folder.
        name: The name of both files.
        found: The figures.
        plot: The picture, if there is one.
        tables: The tables.
    """
    console = screen()
    for table in tables:
        console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{name}.json", json.dumps(_by_name(found), indent=2, default=_plain) + "\n")
    if plot is not None:
        save(plot, out / f"{name}.png")
    also = f" and {out / name}.png" if plot is not None else ""
    console.print(f"written: {out / name}.json{also}", soft_wrap=True)
    return 0


def _by_name(value: Any) -> Any:
    """Returns tables with the fields of named tuples by name."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    return {name: _by_name(part) for name, part in value.items()} if isinstance(value, dict) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Figure):
        return {"mean": value.mean, "interval": value.interval}
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
