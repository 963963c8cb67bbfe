"""Checks of options: type, range and choices are read from a factory's annotations.

    @checked
    def maml(model: Model, likelihood: Likelihood, *, steps: Whole = 1, rate: Finite = 0.01, ...) -> Learner:

`maml(model, likelihood, steps=2.5)` then raises a ValueError, "steps must be an integer of at least 0, got 2.5.". An
unknown option raises one too. A frozen dataclass calls `check_fields(self)` in `__post_init__`. Traced values inside
compiled functions pass without a check, because they have no value yet.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import lru_cache, wraps
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray

F = TypeVar("F", bound=Callable)
LARGEST_INT, LARGEST_FLOAT = 2**31 - 1, float(np.finfo(np.float32).max)
PLURAL = {"an integer": "integers", "a finite number": "finite numbers", "text": "texts"}


@dataclass(frozen=True)
class Range:
    """Marks a number, or an array of numbers, that must lie in a range.

    Attributes:
        least: Values must be >= this.
        most: Values must be <= this.
        above: Values must be > this.
        below: Values must be < this.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: Any) -> bool:
        """Returns whether the value is in the range."""
        v = np.asarray(value)
        return v.dtype.kind in "biuf" and bool(
            ((v >= self.least) & (v <= self.most)).all()
            and (self.above == -math.inf or (v > self.above).all())
            and (self.below == math.inf or (v < self.below).all())
        )

    def __str__(self) -> str:
        if self.least > -math.inf and self.most < math.inf:
            return f" from {self.least:g} to {self.most:g}"
        parts = {" of at least": self.least, " above": self.above, " of at most": self.most, " below": self.below}
        return " and".join(f"{word} {edge:g}" for word, edge in parts.items() if abs(edge) < math.inf)


@dataclass(frozen=True)
class Ordered:
    """Marks a pair (low, high) that must have least <= low <= high.

    Attributes:
        least: Lower bound of low.
    """

    least: float = -math.inf

    def holds(self, value: Any) -> bool:
        """Returns whether the pair is in order."""
        return self.least <= value[0] <= value[1]

    def __str__(self) -> str:
        return " (low, high) with " + (f"{self.least:g} <= " if self.least > -math.inf else "") + "low <= high"


@dataclass(frozen=True)
class NotEmpty:
    """Marks a sequence or a text that must not be empty."""

    def holds(self, value: Any) -> bool:
        """Returns whether the value is not empty."""
        return len(value) > 0

    def __str__(self) -> str:
        return ", at least one"


@dataclass(frozen=True)
class Optimizer:
    """Marks the name of an optimiser.

    Attributes:
        own: Names of this library's optimisers, which are allowed beside those of optax.
    """

    own: tuple[str, ...] = ()

    def holds(self, value: Any) -> bool:
        """Returns whether the value is the name of an optimiser. Anything but text passes."""
        if not isinstance(value, str) or value in self.own:
            return True
        try:
            return isinstance(getattr(optax, value)(0.1), optax.GradientTransformation) and not value.startswith("_")
        except Exception:  # no such name, or a function of optax that is not an optimiser
            return False

    def __str__(self) -> str:
        return ", the name of an optax optimiser, e.g. 'sgd' or 'adam'"


Whole = Annotated[int, Range(least=0)]
Count = Annotated[int, Range(least=1)]
Way = Annotated[int, Range(least=2)]
Seed = Annotated[int, Range(least=0)]
NonNegative = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Fraction = Annotated[float, Range(least=0, most=1)]
Scale = Annotated[float | Array, Range(above=0)]
Interval = Annotated[tuple[float, float], Ordered()]
InnerOptimizer = Annotated[str, Optimizer(("natural", "line_search"))]
OuterOptimizer = Annotated[str, Optimizer()]
Word = Annotated[str, NotEmpty()]


class OptionError(ValueError):
    """An option is unknown, missing, or of the wrong type or range."""


class _Mismatch(Exception):
    pass


def nearest(word: str, words: Sequence[str]) -> str:
    """Returns the text '; did you mean ...?' if some word is similar, else an empty text.

    Args:
        word: What was given.
        words: What is allowed.
    """
    close = get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def accept(annotation: Any, value: Any, name: str) -> Any:
    """Converts a value to its annotation: a list to a tuple, 3 to 3.0, 1e4 to 10000.

    Args:
        annotation: A type, with marks such as `Range` if it is `Annotated`.
        value: The value that was given.
        name: The option's name, with its path, for the message.

    Returns:
        The converted value.

    Raises:
        OptionError: The value does not fit the annotation.
    """
    try:
        return _fit(annotation, value)
    except _Mismatch:
        words = [word for word in _choices(annotation) if isinstance(word, str)]
        hint = nearest(value, words) if isinstance(value, str) else ""
        raise OptionError(f"{name} must be {describe(annotation)}, got {shown(value)}{hint or '.'}") from None


def shown(value: Any) -> str:
    """Returns a short text for a value in an error message.

    Args:
        value: The value.
    """
    if isinstance(value, (np.ndarray, jax.Array)) and np.ndim(value):
        return f"an array of shape {value.shape}"
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({type(value).__name__})"


def _fit(kind: Any, value: Any) -> Any:
    if isinstance(value, Tracer) or kind in (Any, inspect.Parameter.empty) or isinstance(kind, (str, TypeVar)):
        return value
    if kind == PRNGKeyArray:
        _ensure(isinstance(value, jax.Array) and _is_key(value))
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = _fit(args[0], value)
        _ensure(value is None or all(mark.holds(value) for mark in args[1:] if hasattr(mark, "holds")))
        return value
    if origin in (Union, UnionType):
        return _first(args, value)
    if origin is Literal:
        _ensure(any(type(value) is type(word) and value == word for word in args))
        return value
    if kind in (bool, int, float):
        return _number(kind, value)
    if kind in (None, NoneType):
        _ensure(value is None)
        return value
    if kind is Path:
        _ensure(isinstance(value, (str, Path)) and str(value) != "")
        return value
    if origin is tuple or (origin is not None and origin in (Sequence, list)):
        return _sequence(origin, args, value)
    if origin in (dict, Mapping):
        _ensure(isinstance(value, Mapping))
        return value
    if kind is Array:
        _ensure(isinstance(value, (np.ndarray, np.generic, jax.Array)) and bool(np.isfinite(np.asarray(value)).all()))
        return value
    if Callable in (kind, origin):
        _ensure(callable(value))
        return value
    if isinstance(kind, type) and not kind.__module__.startswith("jaxtyping"):
        try:
            right = isinstance(value, kind)
        except TypeError:  # a Protocol that is not runtime_checkable
            return value
        _ensure(right)
    return value


def _is_key(value: jax.Array) -> bool:
    """Returns whether an array is one key, from `jax.random.key` or the older `jax.random.PRNGKey`."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value.shape == ()
    return value.dtype == np.uint32 and value.shape in ((2,), (4,))


def _ensure(holds: Any) -> None:
    if not holds:
        raise _Mismatch


def _first(kinds: tuple, value: Any) -> Any:
    for kind in kinds:
        try:
            return _fit(kind, value)
        except _Mismatch:
            continue
    raise _Mismatch


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, (np.ndarray, jax.Array)) and np.ndim(value) == 0 and np.asarray(value).dtype.kind in "biuf":
        value = np.asarray(value)[()]
    if isinstance(value, (bool, np.bool_)) or kind is bool:
        _ensure(kind is bool and isinstance(value, (bool, np.bool_)))
        return bool(value)
    _ensure(isinstance(value, Real))
    if kind is int:
        _ensure(math.isfinite(value) and float(value).is_integer() and abs(value) <= LARGEST_INT)
        return int(value)
    _ensure(math.isfinite(value) and abs(value) <= LARGEST_FLOAT)
    return float(value)


def _sequence(origin: Any, args: tuple, value: Any) -> tuple:
    _ensure(isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes)) and np.ndim(args) == 1)
    items = tuple(value)
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        _ensure(len(items) == len(args))
        return tuple(_fit(kind, item) for kind, item in zip(args, items, strict=True))
    return tuple(_fit(args[0], item) for item in items)


def describe(kind: Any) -> str:
    """Returns an annotation in words, e.g. 'an integer of at least 0'.

    Args:
        kind: The annotation.
    """
    if kind == PRNGKeyArray:
        return "a key, e.g. jax.random.key(0)"
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(args[0]) + "".join(str(mark) for mark in args[1:] if hasattr(mark, "holds"))
    if origin in (Union, UnionType):
        parts = list(dict.fromkeys(describe(arm) for arm in args))
        return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        return f"{len(args)} {_several(describe(args[0]))}"
    if origin is not None and origin in (Sequence, list, tuple):
        return f"a list of {_several(describe(args[0]))}"
    if origin in (dict, Mapping):
        return "a table"
    words = {dict: "a table", bool: "true or false", int: "an integer", float: "a finite number", str: "text",
             Path: "a path", None: "None", NoneType: "None", Array: "an array"}  # fmt: skip
    if kind in words:
        return words[kind]
    return "a function" if "Callable" in str(kind) else f"a {getattr(kind, '__name__', kind)}"


def _several(text: str) -> str:
    for one, many in PLURAL.items():
        if text.startswith(one):
            return many + text.removeprefix(one)
    return f"entries, each {text}"


def _choices(kind: Any) -> list:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return list(args)
    return [w for arm in args for w in _choices(arm)] if origin in (Union, UnionType, Annotated) else []


@lru_cache(maxsize=1024)
def parameters_of(factory: Callable) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a factory's signature by name.

    Args:
        factory: The factory.
    """
    return inspect.signature(factory).parameters


def option_names(factory: Callable) -> list[str]:
    """Returns the names of the parameters that a factory takes by keyword.

    Args:
        factory: The factory.
    """
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters_of(factory).values() if p.kind in kinds]


def accept_options(factory: Callable, options: Mapping[str, Any], path: str = "", *, taken: int = 0) -> dict[str, Any]:
    """Checks the options of a call, and converts each to its annotation.

    Args:
        factory: The factory that is called.
        options: Its keyword arguments.
        path: Prefix of the options' names in messages, e.g. "learner.".
        taken: Number of parameters that are given by position.

    Returns:
        The converted options.

    Raises:
        OptionError: An option is unknown, missing, of the wrong type or out of range.
    """
    parameters = parameters_of(factory)
    known, title = option_names(factory), getattr(factory, "__name__", getattr(factory, "func", factory))
    title = getattr(title, "__name__", title)
    offered = known[taken:]
    opened = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in known and not opened:
            has = f"it has {', '.join(offered)}" if offered else "it has none"
            raise OptionError(f"{path}{option} is not an option of {title}; {has}{nearest(option, offered) or '.'}")
    for name in offered:
        if parameters[name].default is inspect.Parameter.empty and name not in options:
            raise OptionError(f"{path}{name} is missing: {title} requires it.")
    return {n: accept(parameters[n].annotation, v, path + n) if n in known else v for n, v in options.items()}


def accept_all(
    factory: Callable, args: Sequence[Any], options: Mapping[str, Any], path: str = ""
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Checks the arguments and options of a call, and converts each to its annotation.

    Args:
        factory: The factory that is called.
        args: Its positional arguments.
        options: Its keyword arguments.
        path: Prefix of the options' names in messages, e.g. "learner.".

    Returns:
        The converted arguments and options.

    Raises:
        OptionError: An argument is unknown, missing, of the wrong type or out of range.
    """
    parameters = parameters_of(factory)
    named = accept_options(factory, options, path, taken=len(args))
    places = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = [accept(p.annotation, v, path + p.name) for p, v in zip(places, args, strict=False)]
    return (*given, *args[len(given) :]), named


def checked(factory: F) -> F:
    """Decorates a factory: each call checks its arguments against the annotations.

    Args:
        factory: The factory.
    """

    @wraps(factory)
    def call(*args: Any, **options: Any) -> Any:
        args, options = accept_all(call, args, options)
        return factory(*args, **options)

    return call  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def check_fields(settings: Any, path: str = "") -> None:
    """Checks each field of a frozen dataclass against its annotation, and converts it in place.

    Args:
        settings: The dataclass.
        path: Prefix of the fields' names in messages.

    Raises:
        OptionError: A field is of the wrong type or out of range.
    """
    for field in fields(settings):
        value = accept(_hints(type(settings))[field.name], getattr(settings, field.name), path + field.name)
        object.__setattr__(settings, field.name, value)


def passes_options_to(target: Callable, *, without: Sequence[str] = (), **defaults: Any) -> Callable[[F], F]:
    """Decorates a factory that passes its **options on: it gets the keyword options of their target.

    The options become part of the factory's signature, so that recipes, checks and help know them. Calls are checked,
    as with `checked`.

    Args:
        target: The function or dataclass that takes the options.
        without: Options of the target that the factory does not take.
        defaults: The factory's own defaults for options of the target.
    """

    def show(factory: F) -> F:
        own = inspect.signature(factory)
        kept = {p.name: p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        passed = [p for p in parameters_of(target).values() if p.kind is p.KEYWORD_ONLY and p.name not in without]
        for p in passed:
            kept.setdefault(p.name, p.replace(default=defaults.get(p.name, p.default)))
        if unknown := sorted({*defaults, *without} - parameters_of(target).keys()):
            raise TypeError(f"{target.__name__} has no option {unknown[0]}.")

        @wraps(factory)
        def filled(*args: Any, **options: Any) -> Any:
            return factory(*args, **(defaults | options))

        filled.__signature__ = own.replace(parameters=list(kept.values()))  # type: ignore[attr-defined]
        return checked(filled)  # type: ignore[return-value]

    return show
