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
    """Lines y = slope x + intercept.

    Attributes:
        slope: The interval of the slope, which is uniform.
        intercept: The interval of the intercept, which is uniform.
        noise_sd: The standard deviation of the noise.
    """

    slope: Interval
    intercept: Interval
    noise_sd: float

    def draw(self, key: PRNGKeyArray, n: int) -> Line:
        """Draws the parameters of n functions."""
        key_slope, key_intercept = jax.random.split(key)
        return Line(uniform(key_slope, (n, 1), self.slope), uniform(key_intercept, (n, 1), self.intercept))

    def evaluate(self, parameters: Line, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """Evaluates each function at its own m points."""
        return parameters.slope * x + parameters.intercept

    def noise(self, parameters: Line) -> float:
        """Returns the standard deviation of the noise of each function's observations."""
        return self.noise_sd


class Parabola(NamedTuple):
    """The parameters of n parabolas."""

    curvature: Float[Array, "n 1"]
    vertex: Float[Array, "n 1"]
    height: Float[Array, "n 1"]


@dataclass(frozen=True)
class Parabolas:
    """Parabolas y = curvature (x - vertex)^2 + height.

    Attributes:
        curvature: The interval of the curvature, which is uniform.
        vertex: The interval of the vertex, which is uniform.
        height: The interval of the height, which is uniform.
        noise_sd: The standard deviation of the noise.
    """

    curvature: Interval
    vertex: Interval
    height: Interval
    noise_sd: float

    def draw(self, key: PRNGKeyArray, n: int) -> Parabola:
        """Draws the parameters of n functions."""
        intervals = (self.curvature, self.vertex, self.height)
        keys = jax.random.split(key, 3)
        return Parabola(*(uniform(k, (n, 1), interval) for k, interval in zip(keys, intervals, strict=True)))

    def evaluate(self, parameters: Parabola, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """Evaluates each function at its own m points."""
        return parameters.curvature * (x - parameters.vertex) ** 2 + parameters.height

    def noise(self, parameters: Parabola) -> float:
        """Returns the standard deviation of the noise of each function's observations."""
        return self.noise_sd


class Choice(NamedTuple):
    """n functions, each from one of several families.

    Attributes:
        candidates: The parameters that each family drew, for all n functions.
        which: The family of each function.
    """

    candidates: tuple[Any, ...]
    which: Int[Array, "n 1"]


@dataclass(frozen=True)
class OneOf:
    """A mixture of families with equal probabilities; a few points often do not determine the family.

    Attributes:
        families: The families.
    """

    families: tuple[Family, ...]

    def draw(self, key: PRNGKeyArray, n: int) -> Choice:
        """Draws the parameters of n functions."""
        *keys, key_which = jax.random.split(key, len(self.families) + 1)
        candidates = tuple(family.draw(k, n) for family, k in zip(self.families, keys, strict=True))
        return Choice(candidates, jax.random.randint(key_which, (n, 1), 0, len(self.families)))

    def evaluate(self, parameters: Choice, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """Evaluates each function at its own m points."""
        values = [f.evaluate(p, x) for f, p in zip(self.families, parameters.candidates, strict=True)]
        return jnp.select([parameters.which == i for i in range(len(values))], values)

    def noise(self, parameters: Choice) -> Float[Array, "n 1"]:
        """Returns the standard deviation of the noise of each function's observations."""
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
    """Makes tasks of lines y = slope x + intercept + noise; x and y are [n, 1].

    Args:
        shot: Points of the support.
        query: Points of the query in training.
        test_query: Points of the query in validation and test.
        slope: The interval (low, high) of the slope.
        intercept: The interval of the intercept.
        noise: The standard deviation of the observations' noise.
        test_noise: Whether the validation and test queries are noisy too. The support always is.
        domain: The interval of x.
        support_domain: The interval of the support's x, if another one. It shows what is predicted where nothing was
            observed.

    Returns:
        Three sources of the same distribution, with disjoint random keys.

    Raises:
        ValueError: A size below 1, an interval that is not (low, high), or a negative noise.
    """
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
    """Makes tasks of sinusoids and lines in equal parts; x and y are [n, 1].

    With noise of standard deviation 0.3, five points often do not determine which of the two a function is.

    Args:
        shot: Points of the support.
        query: Points of the query in training.
        test_query: Points of the query in validation and test.
        amplitude: The interval (low, high) of the sinusoids' amplitude.
        phase: The interval of the sinusoids' phase, in radians.
        slope: The interval of the lines' slope.
        intercept: The interval of the lines' intercept.
        noise: The standard deviation of the observations' noise.
        test_noise: Whether the validation and test queries are noisy too. The support always is.
        domain: The interval of x.
        support_domain: The interval of the support's x, if another one. It shows what is predicted where nothing was
            observed.

    Returns:
        Three sources of the same distribution, with disjoint random keys.

    Raises:
        ValueError: A size below 1, an interval that is not (low, high), or a negative noise.

    References:
        Finn, Xu & Levine 2018 (PLATIPUS), one-dimensional regression. Here amplitudes start at 1.
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
    """Makes tasks of sinusoids, lines and parabolas in equal parts, a prior with three modes; x and y are [n, 1].

    Amplitudes are 0.1 to 5 and phases 0 to pi, slopes and intercepts -3 to 3. Parabolas are c (x - v)^2 + h with c in
    -0.15 to 0.15, v in -2 to 2 and h in -3 to 3.

    Args:
        shot: Points of the support.
        query: Points of the query in training.
        test_query: Points of the query in validation and test.
        noise: The standard deviation of the observations' noise.
        test_noise: Whether the validation and test queries are noisy too. The support always is.
        domain: The interval of x.
        support_domain: The interval of the support's x, if another one. It shows what is predicted where nothing was
            observed.

    Returns:
        Three sources of the same distribution, with disjoint random keys.

    Raises:
        ValueError: A size below 1, an interval that is not (low, high), or a negative noise.
    """
    families = (
        Sinusoids((0.1, 5.0), (0.0, pi), (1.0, 1.0), noise, 0.0),
        Lines((-3.0, 3.0), (-3.0, 3.0), noise),
        Parabolas((-0.15, 0.15), (-2.0, 2.0), (-3.0, 3.0), noise),
    )
    return function_splits(OneOf(families), shot, query, test_query, domain, support_domain, test_noise)
