"""Components by name: a table of factories, and errors that say what was meant."""

from collections.abc import Callable, Mapping
from typing import Any

from metaprior.options import OptionError, accept_all, nearest, option_names, passes_options_to, shown


def lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """table[name], or a ValueError that lists the names and suggests the nearest."""
    if isinstance(name, str) and name in table:
        return table[name]
    known = sorted(table)
    raise OptionError(f"{kind} must be one of {', '.join(known)}, got {shown(name)}{nearest(str(name), known) or '.'}")


def construct(kind: str, name: str, table: Mapping[str, Callable], *args: Any, **options: Any) -> Any:
    """table[name](*args, **options), where a wrong option is a ValueError that names it with its path, kind.option."""
    factory = lookup(kind, name, table)
    args, options = accept_all(factory, args, options, f"{kind}.")
    return factory(*args, **options)


__all__ = ["construct", "lookup", "nearest", "option_names", "passes_options_to"]
