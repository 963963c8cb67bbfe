"""The terminal, to which text is printed without markup, so that brackets in names are kept."""

from typing import Any

from rich.console import Console


def screen(**options: Any) -> Console:
    """Returns a console without markup, since users' names of runs, columns and classes may contain '[/b]'.

    Args:
        **options: Further options of rich's `Console`.
    """
    return Console(markup=False, highlight=False, **options)
