"""Components by name: tables of factories, those of other packages too, and errors that say what was meant."""

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from metaprior.core.options import OptionError, accept_all, nearest, option_names, passes_options_to, shown


class Registry(dict[str, Callable[..., Any]]):
    """Factories by name. What other packages bring joins them by `register`, or by an entry point of the group.

    Entry points are loaded when a name is not known, or all names are asked for by `discovered`.
    """

    def __init__(self, kind: str, factories: Mapping[str, Callable[..., Any]], arguments: tuple[str, ...] = ()):
        """kind: "learner", "network" or "tasks"; arguments: what a factory takes by position."""
        super().__init__(factories)
        self.kind, self.group, self.arguments = kind, f"metaprior.{kind.removesuffix('s')}s", arguments
        self._searched = False

    def register(self, name: str, factory: Callable[..., Any]) -> None:
        """Add a factory.

        Raises:
            ValueError: a name that is taken by another factory, or one that takes other arguments than it should.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be text, got {shown(name)}.")
        if not callable(factory):
            raise ValueError(f"{self.kind} {name}: needs a function that makes one, got {shown(factory)}.")
        if self.get(name, factory) is not factory:
            raise ValueError(f"name: there is a {self.kind} {name!r} already; take another name.")
        given = list(inspect.signature(factory).parameters)[: len(self.arguments)]
        if tuple(given) != self.arguments:
            needed = ", ".join(self.arguments)
            raise ValueError(f"{self.kind} {name}: must take ({needed}, *, ...), got ({', '.join(given)}, ...).")
        self[name] = factory

    def discovered(self) -> "Registry":
        """This registry with the entry points of installed packages."""
        if not self._searched:
            self._searched = True
            for point in entry_points(group=self.group):
                try:
                    self.register(point.name, point.load())
                except Exception as error:
                    raise ValueError(f"{self.kind} {point.name}: cannot be had from {point.value}: {error}") from error
        return self


def lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """table[name], or a ValueError that lists the names and suggests the nearest."""
    if isinstance(name, str) and name not in table and isinstance(table, Registry):
        table.discovered()
    if isinstance(name, str) and name in table:
        return table[name]
    known = sorted(table)
    raise OptionError(f"{kind} must be one of {', '.join(known)}, got {shown(name)}{nearest(str(name), known) or '.'}")


def construct(kind: str, name: str, table: Mapping[str, Callable], *args: Any, **options: Any) -> Any:
    """table[name](*args, **options), where a wrong option is a ValueError that names it with its path, kind.option."""
    factory = lookup(kind, name, table)
    args, options = accept_all(factory, args, options, f"{kind}.")
    return factory(*args, **options)


__all__ = ["Registry", "construct", "lookup", "nearest", "option_names", "passes_options_to"]
