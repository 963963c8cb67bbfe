"""Components by name: a table of factories, and errors that say what was meant."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)


def nearest(word: str, words: list[str]) -> str:
    """'; did you mean ...?' where some word is near, else nothing."""
    close = get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """table[name], or a ValueError that lists the names and suggests the nearest."""
    if name in table:
        return table[name]
    known = sorted(table)
    raise ValueError(f"{kind}: came {name!r}, needs one of {', '.join(known)}{nearest(str(name), known)}")


def construct(kind: str, name: str, table: Mapping[str, Callable], *args: Any, **options: Any) -> Any:
    """table[name](*args, **options), where an unknown option is a ValueError that suggests the nearest."""
    factory = lookup(kind, name, table)
    known = option_names(factory)
    for option in options:
        if option not in known:
            raise ValueError(
                f"{kind} {name}: unknown option {option!r}, needs one of {', '.join(known)}{nearest(option, known)}"
            )
    return factory(*args, **options)


def option_names(factory: Callable) -> list[str]:
    """The options that a factory takes by keyword."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(factory).parameters.values() if p.kind in kinds]


def passes_options_to(target: Callable) -> Callable[[F], F]:
    """Show, in the signature of a factory that ends in **options, the keyword options of what it passes them to."""

    def show(factory: F) -> F:
        own = inspect.signature(factory)
        kept = {p.name: p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        for p in inspect.signature(target).parameters.values():
            if p.kind is inspect.Parameter.KEYWORD_ONLY:
                kept.setdefault(p.name, p)
        factory.__signature__ = own.replace(parameters=list(kept.values()))  # type: ignore[attr-defined]
        return factory

    return show
