"""Sinusoids: the regression family of MAML (Finn, Abbeel & Levine 2017, sec. 5.1) and its harder relative."""

from dataclasses import dataclass
from math import pi
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.options import Count, NonNegative, checked
from metaprior.core.types import Splits
from metaprior.tasks.checks import Interval
from metaprior.tasks.synthetic.functions import function_splits, uniform


class Wave(NamedTuple):
    """The parameters of n sinusoids."""

    amplitude: Float[Array, "n 1"]
    phase: Float[Array, "n 1"]
    frequency: Float[Array, "n 1"]


@dataclass(frozen=True)
class Sinusoids:
    """y = amplitude sin(frequency x - phase), each parameter uniform on its interval.

    The noise of a function has sd noise + relative_noise * amplitude.
    """

    amplitude: Interval
    phase: Interval
    frequency: Interval
    noise_sd: float
    relative_noise: float

    def draw(self, key: PRNGKeyArray, n: int) -> Wave:
        keys = jax.random.split(key, 3)
        intervals = (self.amplitude, self.phase, self.frequency)
        return Wave(*(uniform(k, (n, 1), interval) for k, interval in zip(keys, intervals, strict=True)))

    def evaluate(self, parameters: Wave, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        return parameters.amplitude * jnp.sin(parameters.frequency * x - parameters.phase)

    def noise(self, parameters: Wave) -> Float[Array, "n 1"]:
        return self.noise_sd + self.relative_noise * jnp.abs(parameters.amplitude)


@checked
def sinusoid(
    *,
    shot: Count = 10,
    query: Count = 10,
    test_query: Count = 100,
    amplitude: Interval = (0.1, 5.0),
    phase: Interval = (0.0, pi),
    frequency: Interval = (1.0, 1.0),
    noise: NonNegative = 0.0,
    relative_noise: NonNegative = 0.0,
    test_noise: bool = True,
    domain: Interval = (-5.0, 5.0),
    support_domain: Interval | None = None,
) -> Splits:
    """Sinusoids y = A sin(w x - b) with x uniform on the domain; x and y are [n, 1].

    Args:
        shot, query, test_query: points of the support, of the query in training, and in validation and test.
        amplitude, phase, frequency: intervals (low, high) of A, b (radians) and w.
        noise, relative_noise: the observations' noise has sd noise + relative_noise * A.
        test_noise: whether the validation and test queries are noisy too; the support always is.
        support_domain: draw the support's x from here instead, to see what is believed where nothing was seen.

    Raises:
        ValueError: a size below 1, an interval that is not (low, high), or a negative noise.

    Source: Finn, Abbeel & Levine 2017, sec. 5.1 (defaults: A in 0.1-5, b in 0-pi, x in -5..5, no noise).
    """
    family = Sinusoids(
        amplitude,
        phase,
        frequency,
        noise,
        relative_noise,
    )
    return function_splits(family, shot, query, test_query, domain, support_domain, test_noise)


@checked
def sinusoid_hard(
    *,
    shot: Count = 10,
    query: Count = 10,
    test_query: Count = 100,
    amplitude: Interval = (0.1, 5.0),
    phase: Interval = (0.0, 2 * pi),
    frequency: Interval = (0.5, 2.0),
    relative_noise: NonNegative = 0.01,
    test_noise: bool = False,
    domain: Interval = (-5.0, 5.0),
    support_domain: Interval | None = None,
) -> Splits:
    """Sinusoids of varying frequency with noise of sd 0.01 A; validation and test queries are noise-free.

    Options and errors as for `sinusoid`.

    Source: the challenging setting of gradient-EM Bayesian meta-learning (Zou & Lu 2020).
    """
    return sinusoid(
        shot=shot, query=query, test_query=test_query, amplitude=amplitude, phase=phase, frequency=frequency,
        relative_noise=relative_noise, test_noise=test_noise, domain=domain, support_domain=support_domain,
    )  # fmt: skip
