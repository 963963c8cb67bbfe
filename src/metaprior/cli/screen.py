"""The terminal: everything is printed as it stands, whatever brackets a name has."""

from typing import Any

from rich.console import Console


def screen(**options: Any) -> Console:
    """A console without markup: names of runs, columns and classes are the users', and may hold '[/b]'."""
    return Console(markup=False, highlight=False, **options)
