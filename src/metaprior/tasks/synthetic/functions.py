"""Regression on random functions of one variable: the frame that the sinusoid, line and mixed families share."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.types import Batch, Splits, Task
from metaprior.tasks.checks import Interval


class Family(Protocol):
    """A distribution over functions of one variable; hashable, as it is a constant of compiled code."""

    def draw(self, key: PRNGKeyArray, n: int) -> Any:
        """The parameters of n functions: a pytree with leaves [n, 1]."""
        ...

    def evaluate(self, parameters: Any, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """Each function at its own m points."""
        ...

    def noise(self, parameters: Any) -> Float[Array, "n 1"] | float:
        """Standard deviation of the noise of each function's observations."""
        ...


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], interval: Interval) -> Array:
    """Draws from U(low, high), in the default float type."""
    return jax.random.uniform(key, shape, minval=interval[0], maxval=interval[1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FunctionTasks:
    """Tasks y = f(x) + noise with f drawn from a family and x uniform on an interval; x and y are [n, 1].

    `stream` keeps the splits apart: it is folded into every key.
    """

    family: Family = field(metadata={"static": True})
    shot: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    support_domain: Interval = field(metadata={"static": True})
    domain: Interval = field(metadata={"static": True})
    noisy_query: bool = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n tasks: support x, y [n, shot, 1] and query x, y [n, query, 1]."""
        key_family, key_support, key_query = jax.random.split(jax.random.fold_in(key, self.stream), 3)
        parameters = self.family.draw(key_family, n)
        scale = self.family.noise(parameters)

        def observe(key: PRNGKeyArray, points: int, domain: Interval, noisy: bool) -> Batch:
            key_x, key_noise = jax.random.split(key)
            x = uniform(key_x, (n, points), domain)
            y = self.family.evaluate(parameters, x)
            if noisy:
                y = y + scale * jax.random.normal(key_noise, (n, points))
            return Batch(x[..., None], y[..., None])

        return Task(
            observe(key_support, self.shot, self.support_domain, True),
            observe(key_query, self.query, self.domain, self.noisy_query),
        )


def function_splits(
    family: Family,
    shot: int,
    query: int,
    test_query: int,
    domain: Interval,
    support_domain: Interval | None,
    test_noise: bool,
) -> Splits:
    """The three splits of a family: the same distribution, disjoint streams of keys."""
    sizes = [query] + 2 * [test_query]
    support_domain = domain if support_domain is None else support_domain
    sources = [
        FunctionTasks(family, shot, size, support_domain, domain, stream == 0 or test_noise, stream)
        for stream, size in enumerate(sizes)
    ]
    return Splits(*sources)
