"""Lines, parabolas and mixtures of families, such as the sinusoids and lines of PLATIPUS (Finn, Xu & Levine 2018)."""

from dataclasses import dataclass
from math import pi
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metaprior.core.options import Count, NonNegative, checked
from metaprior.core.types import Splits
from metaprior.tasks.checks import Interval
from metaprior.tasks.synthetic.functions import Family, function_splits, uniform
from metaprior.tasks.synthetic.sinusoid import Sinusoids


class Line(NamedTuple):
    """The parameters of n lines."""

    slope: Float[Array, "n 1"]
    intercept: Float[Array, "n 1"]


@dataclass(frozen=True)
class Lines:
    """y = slope x + intercept, each uniform on its interval."""

    slope: Interval
    intercept: Interval
    noise_sd: float

    def draw(self, key: PRNGKeyArray, n: int) -> Line:
        key_slope, key_intercept = jax.random.split(key)
        return Line(uniform(key_slope, (n, 1), self.slope), uniform(key_intercept, (n, 1), self.intercept))

    def evaluate(self, parameters: Line, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        return parameters.slope * x + parameters.intercept

    def noise(self, parameters: Line) -> float:
        return self.noise_sd


class Parabola(NamedTuple):
    """The parameters of n parabolas."""

    curvature: Float[Array, "n 1"]
    vertex: Float[Array, "n 1"]
    height: Float[Array, "n 1"]


@dataclass(frozen=True)
class Parabolas:
    """y = curvature (x - vertex)^2 + height, each uniform on its interval."""

    curvature: Interval
    vertex: Interval
    height: Interval
    noise_sd: float

    def draw(self, key: PRNGKeyArray, n: int) -> Parabola:
        intervals = (self.curvature, self.vertex, self.height)
        keys = jax.random.split(key, 3)
        return Parabola(*(uniform(k, (n, 1), interval) for k, interval in zip(keys, intervals, strict=True)))

    def evaluate(self, parameters: Parabola, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        return parameters.curvature * (x - parameters.vertex) ** 2 + parameters.height

    def noise(self, parameters: Parabola) -> float:
        return self.noise_sd


class Choice(NamedTuple):
    """What each family would have drawn for each of n functions, and which family each function is of."""

    candidates: tuple[Any, ...]
    which: Int[Array, "n 1"]


@dataclass(frozen=True)
class OneOf:
    """Each function is of one of the families, with equal probability: few points do not say which."""

    families: tuple[Family, ...]

    def draw(self, key: PRNGKeyArray, n: int) -> Choice:
        *keys, key_which = jax.random.split(key, len(self.families) + 1)
        candidates = tuple(family.draw(k, n) for family, k in zip(self.families, keys, strict=True))
        return Choice(candidates, jax.random.randint(key_which, (n, 1), 0, len(self.families)))

    def evaluate(self, parameters: Choice, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        values = [f.evaluate(p, x) for f, p in zip(self.families, parameters.candidates, strict=True)]
        return jnp.select([parameters.which == i for i in range(len(values))], values)

    def noise(self, parameters: Choice) -> Float[Array, "n 1"]:
        sds = [jnp.asarray(f.noise(p)) for f, p in zip(self.families, parameters.candidates, strict=True)]
        return jnp.select([parameters.which == i for i in range(len(sds))], sds)


@checked
def linear(
    *,
    shot: Count = 5,
    query: Count = 10,
    test_query: Count = 100,
    slope: Interval = (-3.0, 3.0),
    intercept: Interval = (-3.0, 3.0),
    noise: NonNegative = 0.3,
    test_noise: bool = True,
    domain: Interval = (-5.0, 5.0),
    support_domain: Interval | None = None,
) -> Splits:
    """Lines y = slope x + intercept + noise; x and y are [n, 1]. Options and errors as for `sinusoid`."""
    lines = Lines(slope, intercept, noise)
    return function_splits(lines, shot, query, test_query, domain, support_domain, test_noise)


@checked
def ambiguous(
    *,
    shot: Count = 5,
    query: Count = 50,
    test_query: Count = 50,
    amplitude: Interval = (1.0, 5.0),
    phase: Interval = (0.0, pi),
    slope: Interval = (-3.0, 3.0),
    intercept: Interval = (-3.0, 3.0),
    noise: NonNegative = 0.3,
    test_noise: bool = True,
    domain: Interval = (-5.0, 5.0),
    support_domain: Interval | None = None,
) -> Splits:
    """Half sinusoids, half lines, with noise of sd 0.3: five points leave open which it is; x and y are [n, 1].

    Options and errors as for `sinusoid`.

    Source: Finn, Xu & Levine 2018 (PLATIPUS), one-dimensional regression; amplitudes start at 1.
    """
    waves = Sinusoids(amplitude, phase, (1.0, 1.0), noise, 0.0)
    lines = Lines(slope, intercept, noise)
    family = OneOf((waves, lines))
    return function_splits(family, shot, query, test_query, domain, support_domain, test_noise)


@checked
def three_families(
    *,
    shot: Count = 5,
    query: Count = 10,
    test_query: Count = 50,
    noise: NonNegative = 0.1,
    test_noise: bool = True,
    domain: Interval = (-5.0, 5.0),
    support_domain: Interval | None = None,
) -> Splits:
    """Sinusoids, lines and parabolas in equal parts: a family of tasks with three modes; x and y are [n, 1].

    Amplitudes 0.1-5 and phases 0-pi, slopes and intercepts -3..3, parabolas c (x - v)^2 + h with c in -0.15..0.15,
    v in -2..2 and h in -3..3. Options and errors as for `sinusoid`.
    """
    families = (
        Sinusoids((0.1, 5.0), (0.0, pi), (1.0, 1.0), noise, 0.0),
        Lines((-3.0, 3.0), (-3.0, 3.0), noise),
        Parabolas((-0.15, 0.15), (-2.0, 2.0), (-3.0, 3.0), noise),
    )
    return function_splits(OneOf(families), shot, query, test_query, domain, support_domain, test_noise)
