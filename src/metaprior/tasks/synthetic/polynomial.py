"""Random polynomials of one variable (Finn & Levine 2018, Meta-learning and universality)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.options import Count, NonNegative, checked
from metaprior.core.types import Splits
from metaprior.tasks.checks import Interval
from metaprior.tasks.synthetic.functions import function_splits, uniform


@dataclass(frozen=True)
class Polynomials:
    """Polynomials y = c_0 x^d + ... + c_d.

    Attributes:
        degree: The degree d.
        coefficients: The interval of each coefficient, which is uniform.
        noise_sd: The standard deviation of the noise.
    """

    degree: int
    coefficients: Interval
    noise_sd: float

    def draw(self, key: PRNGKeyArray, n: int) -> Float[Array, "n c"]:
        """Draws the coefficients of n functions, that of the highest power first."""
        return uniform(key, (n, self.degree + 1), self.coefficients)

    def evaluate(self, parameters: Float[Array, "n c"], x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """Evaluates each function at its own m points."""
        return jnp.polyval(parameters.T[..., None], x)

    def noise(self, parameters: Float[Array, "n c"]) -> float:
        """Returns the standard deviation of the noise."""
        return self.noise_sd


@checked
def polynomial(
    *,
    shot: Count = 40,
    query: Count = 40,
    test_query: Count = 100,
    degree: Count = 3,
    coefficients: Interval = (-1.0, 1.0),
    noise: NonNegative = 0.0,
    test_noise: bool = True,
    domain: Interval = (-3.0, 3.0),
    support_domain: Interval | None = None,
    given: bool = False,
) -> Splits:
    """Makes tasks of polynomials y = c_0 x^d + ... + c_d, with x uniform on the domain; x and y are [n, 1].

    Args:
        shot: Points of the support.
        query: Points of the query in training.
        test_query: Points of the query in validation and test.
        degree: The degree d.
        coefficients: The interval (low, high) of each coefficient.
        noise: The standard deviation of the noise.
        test_noise: Whether the validation and test queries are noisy too. The support always is.
        domain: The interval of x.
        support_domain: The interval of the support's x, if another one.
        given: Whether the inputs also contain the coefficients, so that x is [n, d + 2]. A network that is trained on
            them without inner steps is the oracle of the paper.

    Returns:
        Three sources of the same distribution, with disjoint random keys.

    Raises:
        ValueError: A size below 1, an interval that is not (low, high), or a negative noise.

    References:
        Finn & Levine 2018 (the defaults: cubics, 40 points, coefficients in -1 to 1, x in -3 to 3).
    """
    family = Polynomials(degree, coefficients, noise)
    return function_splits(family, shot, query, test_query, domain, support_domain, test_noise, given)
