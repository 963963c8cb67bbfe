"""Six families of functions of two variables: the heterogeneous regression tasks of ARML (Yao et al. 2020)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import pi
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metaprior.core.options import Count, NonNegative, checked, nearest
from metaprior.core.types import Batch, Splits, Task, check_family
from metaprior.tasks.checks import Interval
from metaprior.tasks.mixture import drawn_families, with_family
from metaprior.tasks.synthetic.functions import uniform


class Formula(NamedTuple):
    """A family of functions y = f(x1, x2; a, b, c, d).

    Attributes:
        value: Function (x1, x2, a, b, c, d) -> y.
        intervals: The intervals of a, b, ..., which are uniform.
        inputs: 1 if f is a function of x1 alone, and x2 is then 1 instead of random.
    """

    value: Callable[..., Array]
    intervals: tuple[Interval, ...]
    inputs: int = 1


FAMILIES = {
    "sinusoid": Formula(lambda x, _, a, b, c, d: a * jnp.sin(b * x + c), ((0.1, 5.0), (0.8, 1.2), (0.0, 2 * pi))),
    "line": Formula(lambda x, _, a, b, c, d: a * x + b, ((-3.0, 3.0), (-3.0, 3.0))),
    "quadratic": Formula(lambda x, _, a, b, c, d: a * x**2 + b * x + c, ((-0.2, 0.2), (-2.0, 2.0), (-3.0, 3.0))),
    "cubic": Formula(
        lambda x, _, a, b, c, d: a * x**3 + b * x**2 + c * x + d,
        ((-0.1, 0.1), (-0.2, 0.2), (-2.0, 2.0), (-3.0, 3.0)),
    ),
    "quadratic_surface": Formula(lambda x, z, a, b, c, d: a * x**2 + b * z**2, ((-1.0, 1.0), (-1.0, 1.0)), 2),
    "ripple": Formula(lambda x, z, a, b, c, d: jnp.sin(-a * (x**2 + z**2)) + b, ((-0.2, 0.2), (-3.0, 3.0)), 2),
}
NAMES = tuple(FAMILIES)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Surfaces:
    """Tasks y = f(x) + noise with f from one of several families; x is [n, 2] and y [n, 1].

    Attributes:
        families: The names of the families.
        shot: Points of the support.
        query: Points of the query.
        domain: The interval of x1 and x2.
        noise: The standard deviation of the noise.
        noisy_query: Whether the query is noisy. The support always is.
        oracle: Whether x also holds the family, one-hot among all six.
        stream: A number that is folded into every key, so that the splits differ.
    """

    families: tuple[str, ...] = field(metadata={"static": True})
    shot: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    domain: Interval = field(metadata={"static": True})
    noise: float = field(metadata={"static": True})
    noisy_query: bool = field(metadata={"static": True})
    oracle: bool = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks, each from a family that is drawn first.

        Returns:
            Support x [n, shot, 2] and y [n, shot, 1], query x [n, query, 2] and y [n, query, 1].
        """
        return jax.vmap(self.of_family)(*drawn_families(self, key, n))

    def of_family(self, key: PRNGKeyArray, family: Int[Array, ""]) -> Task:
        """Draws a task of one family."""
        check_family(family, self.families)
        # Its index among all six.
        family = jnp.asarray([NAMES.index(name) for name in self.families])[family]
        key_f, key_support, key_query = jax.random.split(jax.random.fold_in(key, self.stream), 3)
        ends = [[*formula.intervals, *[(0.0, 0.0)] * (4 - len(formula.intervals))] for formula in FAMILIES.values()]
        low, high = jnp.moveaxis(jnp.asarray(ends)[family], -1, 0)
        parameters = low + (high - low) * jax.random.uniform(key_f, (4,))
        flat = jnp.asarray([formula.inputs == 1 for formula in FAMILIES.values()])[family]

        def observe(key: PRNGKeyArray, points: int, noisy: bool) -> Batch:
            key_x, key_noise = jax.random.split(key)
            x = uniform(key_x, (points, 2), self.domain)
            x = x.at[:, 1].set(jnp.where(flat, 1.0, x[:, 1]))
            y = values(x, parameters, family)
            if noisy:
                y = y + self.noise * jax.random.normal(key_noise, (points,))
            return Batch(x, y[:, None])

        task = Task(observe(key_support, self.shot, True), observe(key_query, self.query, self.noisy_query))
        return with_family(task, family, len(NAMES)) if self.oracle else task


def values(x: Float[Array, "n 2"], parameters: Float[Array, " 4"], family: Int[Array, ""]) -> Float[Array, " n"]:
    """Computes a function's values.

    Args:
        x: The inputs.
        parameters: Its a, b, c, d, of which its family may use fewer.
        family: The index of its family among all six.
    """
    every = jnp.stack([formula.value(x[:, 0], x[:, 1], *parameters) for formula in FAMILIES.values()])
    return every[family]


@checked
def families_2d(
    *,
    shot: Count = 10,
    query: Count = 10,
    test_query: Count = 100,
    families: tuple[str, ...] = NAMES,
    oracle: bool = False,
    noise: NonNegative = 0.3,
    test_noise: bool = True,
    domain: Interval = (-5.0, 5.0),
) -> Splits:
    """Makes regression tasks of six families: sinusoids, lines, parabolas, cubics, and two kinds of surfaces.

    With x1 and x2 uniform, and x2 = 1 in the first four families:

        sinusoid            a sin(b x1 + c)          a in 0.1 to 5, b in 0.8 to 1.2, c in 0 to 2 pi
        line                a x1 + b                 a and b in -3 to 3
        quadratic           a x1^2 + b x1 + c        a in -0.2 to 0.2, b in -2 to 2, c in -3 to 3
        cubic               a x1^3 + b x1^2 + c x1 + d   a in -0.1 to 0.1, b in -0.2 to 0.2, c in -2 to 2, d in -3 to 3
        quadratic_surface   a x1^2 + b x2^2          a and b in -1 to 1
        ripple              sin(-a (x1^2 + x2^2)) + b    a in -0.2 to 0.2, b in -3 to 3

    Noise of standard deviation 0.3 is added to y, so no prediction has an expected MSE below 0.09. `evaluate` reports
    the figures of each family.

    Args:
        shot: Points of the support.
        query: Points of the query in training.
        test_query: Points of the query in validation and test.
        families: The names of the families to draw from, with equal probabilities.
        oracle: Whether x also holds the task's family, as six further inputs, one-hot. A learner that knows the family
            shows how much there is to gain from it.
        noise: The standard deviation of the observations' noise.
        test_noise: Whether the validation and test queries are noisy too. The support always is.
        domain: The interval of x1 and x2.

    Returns:
        Three sources of the same distribution, with disjoint random keys.

    Raises:
        ValueError: No family, an unknown one or one twice; a size below 1, an interval that is not (low, high), or a
            negative noise.

    References:
        Yao et al. 2020, "Automated relational meta-learning", 2D regression.
    """
    for name in families:
        if name not in FAMILIES:
            raise ValueError(
                f"families must be names among {', '.join(NAMES)}, got {name!r}{nearest(name, list(NAMES)) or '.'}"
            )
    if not families or len(set(families)) < len(families):
        raise ValueError(f"families must be at least one name, and none twice, got {families!r}.")
    sources = [
        Surfaces(families, shot, size, domain, noise, stream == 0 or test_noise, oracle, stream)
        for stream, size in enumerate((query, test_query, test_query))
    ]
    return Splits(*sources)
