"""Registries of components by name, including those of other packages, with errors that suggest similar names."""

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from metaprior.core.options import OptionError, accept_all, nearest, option_names, passes_options_to, shown


def summary(factory: Callable[..., Any]) -> str:
    """Returns the first line of a factory's docstring.

    Args:
        factory: The factory.
    """
    return (inspect.getdoc(getattr(factory, "func", factory)) or "").split("\n")[0]


class Registry(dict[str, Callable[..., Any]]):
    """A dictionary of factories by name.

    Other packages add factories by `register`, or by an entry point in the registry's group. Entry points are loaded
    when a name is not found, or by `discovered`.

    Attributes:
        kind: What the factories make: "learner", "network" or "tasks".
        group: The entry points' group, e.g. "metaprior.learners".
        arguments: The names of a factory's positional arguments.
    """

    def __init__(self, kind: str, factories: Mapping[str, Callable[..., Any]], arguments: tuple[str, ...] = ()):
        """Makes a registry.

        Args:
            kind: What the factories make: "learner", "network" or "tasks".
            factories: The library's own factories, by name.
            arguments: The names of a factory's positional arguments.
        """
        super().__init__(factories)
        self.kind, self.group, self.arguments = kind, f"metaprior.{kind.removesuffix('s')}s", arguments
        self._searched = False

    def register(self, name: str, factory: Callable[..., Any]) -> None:
        """Adds a factory.

        Args:
            name: Its name in recipes and on the command line.
            factory: The factory. Its first parameters must be `arguments`.

        Raises:
            ValueError: Another factory has this name, or the factory has other positional arguments.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be text, got {shown(name)}.")
        if not callable(factory):
            raise ValueError(f"{self.kind} {name} must be a function that makes one, got {shown(factory)}.")
        if self.get(name, factory) is not factory:
            raise ValueError(f"name must be new, got {name!r}, which is another {self.kind}. Choose another name.")
        given = list(inspect.signature(factory).parameters)[: len(self.arguments)]
        if tuple(given) != self.arguments:
            needed = ", ".join(self.arguments)
            raise ValueError(f"{self.kind} {name}: must take ({needed}, *, ...), got ({', '.join(given)}, ...).")
        self[name] = factory

    def discovered(self) -> "Registry":
        """Loads the entry points of installed packages, and returns this registry.

        Raises:
            ValueError: An entry point does not load, or does not fit the registry.
        """
        if not self._searched:
            self._searched = True
            for point in entry_points(group=self.group):
                try:
                    self.register(point.name, point.load())
                except Exception as error:
                    message = f"{self.kind} {point.name} cannot be loaded from {point.value}: {error}"
                    raise ValueError(message) from error
        return self


def lookup(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """Looks up a factory.

    Args:
        kind: What the name is called in the message, e.g. "learner".
        name: The name.
        table: The factories by name.

    Returns:
        table[name].

    Raises:
        OptionError: There is no such name. The message lists the names and suggests a similar one.
    """
    if isinstance(name, str) and name not in table and isinstance(table, Registry):
        table.discovered()
    if isinstance(name, str) and name in table:
        return table[name]
    known = sorted(table)
    raise OptionError(f"{kind} must be one of {', '.join(known)}, got {shown(name)}{nearest(str(name), known) or '.'}")


def construct(kind: str, name: str, table: Mapping[str, Callable], *args: Any, **options: Any) -> Any:
    """Calls table[name](*args, **options) after checking the options.

    Args:
        kind: What the name is called in messages, e.g. "learner".
        name: The name.
        table: The factories by name.
        args: Positional arguments of the factory.
        options: Keyword arguments of the factory.

    Raises:
        OptionError: The name is unknown, or an option is wrong. The message names it with its path, kind.option.
    """
    factory = lookup(kind, name, table)
    args, options = accept_all(factory, args, options, f"{kind}.")
    return factory(*args, **options)


__all__ = ["Registry", "construct", "lookup", "nearest", "option_names", "passes_options_to"]
