"""Options that check themselves: type, range and choices are read from a factory's annotations.

    @checked
    def maml(model: Model, likelihood: Likelihood, *, steps: Whole = 1, rate: Finite = 0.01, ...) -> Learner:

`maml(model, likelihood, steps=2.5)` is then a ValueError, "steps must be an integer of at least 0, got 2.5.", and so is
an unknown option. A frozen dataclass calls `check_fields(self)` in `__post_init__`. Values that a compiled function is
traced with pass: they have no value yet.
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
    """Marks a number (or an array of them) that must be >= least, > above, <= most, < below."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: Any) -> bool:
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
    """Marks a pair (low, high) that must have least <= low <= high."""

    least: float = -math.inf

    def holds(self, value: Any) -> bool:
        return self.least <= value[0] <= value[1]

    def __str__(self) -> str:
        return " (low, high) with " + (f"{self.least:g} <= " if self.least > -math.inf else "") + "low <= high"


@dataclass(frozen=True)
class NotEmpty:
    """Marks a sequence or a text that must hold something."""

    def holds(self, value: Any) -> bool:
        return len(value) > 0

    def __str__(self) -> str:
        return ", at least one"


@dataclass(frozen=True)
class Optimizer:
    """Marks the name of an optax optimiser, or of one of this library's own."""

    own: tuple[str, ...] = ()

    def holds(self, value: Any) -> bool:
        if not isinstance(value, str) or value in self.own:
            return True
        try:
            return isinstance(getattr(optax, value)(0.1), optax.GradientTransformation) and not value.startswith("_")
        except Exception:  # no such name, or a function of optax that is no optimiser
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
    """An option that is unknown, missing, or not of the type or range that it must have."""


class _Mismatch(Exception):
    pass


def nearest(word: str, words: Sequence[str]) -> str:
    """'; did you mean ...?' where some word is near, else nothing."""
    close = get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def accept(annotation: Any, value: Any, name: str) -> Any:
    """The value as the annotation wants it (a list as a tuple, 3 as 3.0, 1e4 as 10000), or an OptionError.

    Args:
        annotation: a type, with marks such as `Range` if it is `Annotated`.
        value: what came.
        name: the option's name, with its path, for the message.
    """
    try:
        return _fit(annotation, value)
    except _Mismatch:
        words = [word for word in _choices(annotation) if isinstance(word, str)]
        hint = nearest(value, words) if isinstance(value, str) else ""
        raise OptionError(f"{name} must be {describe(annotation)}, got {shown(value)}{hint or '.'}") from None


def shown(value: Any) -> str:
    """A value as a message shows it: short."""
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
        except TypeError:  # a Protocol that is not for run time
            return value
        _ensure(right)
    return value


def _is_key(value: jax.Array) -> bool:
    """One key, of `jax.random.key` or of the older `jax.random.PRNGKey`."""
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
    """What an annotation asks for, in words: 'an integer of at least 0'."""
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
    return inspect.signature(factory).parameters


def option_names(factory: Callable) -> list[str]:
    """The options that a factory takes by keyword."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters_of(factory).values() if p.kind in kinds]


def accept_options(factory: Callable, options: Mapping[str, Any], path: str = "", *, taken: int = 0) -> dict[str, Any]:
    """The options of a call, each as its annotation wants it; taken: so many parameters are given by position.

    Raises:
        OptionError: an unknown option, one that is missing, one of the wrong type or out of range.
    """
    parameters = parameters_of(factory)
    known, title = option_names(factory), getattr(factory, "__name__", getattr(factory, "func", factory))
    title = getattr(title, "__name__", title)
    offered = known[taken:]
    opened = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in known and not opened:
            has = f"it has {', '.join(offered)}" if offered else "it has none"
            raise OptionError(f"{path}{option} is not an option of {title}; {has}{nearest(option, offered)}")
    for name in offered:
        if parameters[name].default is inspect.Parameter.empty and name not in options:
            raise OptionError(f"{path}{name} is missing: {title} cannot do without it.")
    return {n: accept(parameters[n].annotation, v, path + n) if n in known else v for n, v in options.items()}


def accept_all(
    factory: Callable, args: Sequence[Any], options: Mapping[str, Any], path: str = ""
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and options of a call, as `accept_options`."""
    parameters = parameters_of(factory)
    named = accept_options(factory, options, path, taken=len(args))
    places = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = [accept(p.annotation, v, path + p.name) for p, v in zip(places, args, strict=False)]
    return (*given, *args[len(given) :]), named


def checked(factory: F) -> F:
    """A factory whose arguments are checked against its annotations at each call."""

    @wraps(factory)
    def call(*args: Any, **options: Any) -> Any:
        args, options = accept_all(call, args, options)
        return factory(*args, **options)

    return call  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def check_fields(settings: Any, path: str = "") -> None:
    """Check each field of a frozen dataclass against its annotation, and set it as that wants it."""
    for field in fields(settings):
        value = accept(_hints(type(settings))[field.name], getattr(settings, field.name), path + field.name)
        object.__setattr__(settings, field.name, value)


def passes_options_to(target: Callable, *, without: Sequence[str] = (), **defaults: Any) -> Callable[[F], F]:
    """Gives a factory that ends in **options the keyword options of the function that it passes them to.

    They stand in the factory's signature, so that recipes, checks and help know them. Its calls are checked, as by
    `checked`.

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
