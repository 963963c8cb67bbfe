"""Sinusoids: the regression family of MAML (Finn, Abbeel & Levine 2017, sec. 5.1), and a harder variant."""

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
    """Sinusoids y = amplitude sin(frequency x - phase).

    Attributes:
        amplitude: The interval of the amplitude, which is uniform.
        phase: The interval of the phase in radians, which is uniform.
        frequency: The interval of the frequency, which is uniform.
        noise_sd: The constant part of the noise's standard deviation, noise_sd + relative_noise * amplitude.
        relative_noise: The part that is proportional to the amplitude.
    """

    amplitude: Interval
    phase: Interval
    frequency: Interval
    noise_sd: float
    relative_noise: float

    def draw(self, key: PRNGKeyArray, n: int) -> Wave:
        """Draws the parameters of n functions."""
        keys = jax.random.split(key, 3)
        intervals = (self.amplitude, self.phase, self.frequency)
        return Wave(*(uniform(k, (n, 1), interval) for k, interval in zip(keys, intervals, strict=True)))

    def evaluate(self, parameters: Wave, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """Evaluates each function at its own m points."""
        return parameters.amplitude * jnp.sin(parameters.frequency * x - parameters.phase)

    def noise(self, parameters: Wave) -> Float[Array, "n 1"]:
        """Returns the standard deviation of the noise of each function's observations."""
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
    """Makes tasks of sinusoids y = A sin(w x - b), with x uniform on the domain; x and y are [n, 1].

    Args:
        shot: Points of the support.
        query: Points of the query in training.
        test_query: Points of the query in validation and test.
        amplitude: The interval (low, high) of A.
        phase: The interval of b, in radians.
        frequency: The interval of w.
        noise: The constant part of the noise's standard deviation, noise + relative_noise * A.
        relative_noise: The part that is proportional to A.
        test_noise: Whether the validation and test queries are noisy too. The support always is.
        domain: The interval of x.
        support_domain: The interval of the support's x, if another one. It shows what is predicted where nothing was
            observed.

    Returns:
        Three sources of the same distribution, with disjoint random keys.

    Raises:
        ValueError: A size below 1, an interval that is not (low, high), or a negative noise.

    References:
        Finn, Abbeel & Levine 2017, sec. 5.1 (the defaults: A in 0.1 to 5, b in 0 to pi, x in -5 to 5, no noise).
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
    """Makes tasks of sinusoids of varying frequency with noise of standard deviation 0.01 A; x and y are [n, 1].

    By default, the validation and test queries are free of noise.

    Args:
        shot: As in `sinusoid`.
        query: As in `sinusoid`.
        test_query: As in `sinusoid`.
        amplitude: As in `sinusoid`.
        phase: As in `sinusoid`.
        frequency: As in `sinusoid`.
        relative_noise: As in `sinusoid`.
        test_noise: As in `sinusoid`.
        domain: As in `sinusoid`.
        support_domain: As in `sinusoid`.

    Returns:
        Three sources of the same distribution, with disjoint random keys.

    Raises:
        ValueError: As in `sinusoid`.

    References:
        Zou & Lu 2020, gradient-EM Bayesian meta-learning, the challenging setting.
    """
    return sinusoid(
        shot=shot, query=query, test_query=test_query, amplitude=amplitude, phase=phase, frequency=frequency,
        relative_noise=relative_noise, test_noise=test_noise, domain=domain, support_domain=support_domain,
    )  # fmt: skip
