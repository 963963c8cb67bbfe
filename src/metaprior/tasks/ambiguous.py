"""Lines, and the ambiguous mixture of sinusoids and lines of PLATIPUS (Finn, Xu & Levine 2018, sec. 6)."""

from dataclasses import dataclass
from math import pi
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from metaprior.tasks.checks import Interval, check_interval, check_scale
from metaprior.tasks.functions import function_splits, uniform
from metaprior.tasks.sinusoid import Sinusoids, Wave
from metaprior.types import Splits


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


class WaveOrLine(NamedTuple):
    """Both candidates of each of n functions, and which of them it is."""

    wave: Wave
    line: Line
    is_wave: Bool[Array, "n 1"]


@dataclass(frozen=True)
class WavesAndLines:
    """Each function is a sinusoid or a line with equal probability: few points do not say which."""

    waves: Sinusoids
    lines: Lines

    def draw(self, key: PRNGKeyArray, n: int) -> WaveOrLine:
        key_wave, key_line, key_which = jax.random.split(key, 3)
        which = jax.random.bernoulli(key_which, 0.5, (n, 1))
        return WaveOrLine(self.waves.draw(key_wave, n), self.lines.draw(key_line, n), which)

    def evaluate(self, parameters: WaveOrLine, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        wave = self.waves.evaluate(parameters.wave, x)
        return jnp.where(parameters.is_wave, wave, self.lines.evaluate(parameters.line, x))

    def noise(self, parameters: WaveOrLine) -> float:
        return self.lines.noise_sd


def linear(
    *,
    shot: int = 5,
    query: int = 10,
    test_query: int = 100,
    slope: Interval = (-3.0, 3.0),
    intercept: Interval = (-3.0, 3.0),
    noise: float = 0.3,
    test_noise: bool = True,
    domain: Interval = (-5.0, 5.0),
    support_domain: Interval | None = None,
) -> Splits:
    """Lines y = slope x + intercept + noise; x and y are [n, 1]. Options and errors as for `sinusoid`."""
    lines = Lines(
        check_interval("slope", slope), check_interval("intercept", intercept), check_scale("noise", noise)
    )
    return function_splits(lines, shot, query, test_query, domain, support_domain, test_noise)


def ambiguous(
    *,
    shot: int = 5,
    query: int = 50,
    test_query: int = 50,
    amplitude: Interval = (1.0, 5.0),
    phase: Interval = (0.0, pi),
    slope: Interval = (-3.0, 3.0),
    intercept: Interval = (-3.0, 3.0),
    noise: float = 0.3,
    test_noise: bool = True,
    domain: Interval = (-5.0, 5.0),
    support_domain: Interval | None = None,
) -> Splits:
    """Half sinusoids, half lines, with noise of sd 0.3: five points leave open which it is; x and y are [n, 1].

    Options and errors as for `sinusoid`.

    Source: Finn, Xu & Levine 2018 (PLATIPUS), one-dimensional regression; amplitudes start at 1.
    """
    noise = check_scale("noise", noise)
    family = WavesAndLines(
        Sinusoids(check_interval("amplitude", amplitude), check_interval("phase", phase), (1.0, 1.0), noise, 0.0),
        Lines(check_interval("slope", slope), check_interval("intercept", intercept), noise),
    )
    return function_splits(family, shot, query, test_query, domain, support_domain, test_noise)
