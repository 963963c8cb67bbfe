"""Regression on random functions of one variable: what the sinusoids, lines and mixed families share."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.types import Batch, Splits, Task
from metaprior.tasks.checks import Interval


class Family(Protocol):
    """A distribution over functions of one variable. It must be hashable, because it is a constant of compiled code."""

    def draw(self, key: PRNGKeyArray, n: int) -> Any:
        """Draws the parameters of n functions, a pytree with leaves [n, k]; k is usually 1."""
        ...

    def evaluate(self, parameters: Any, x: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """Evaluates each function at its own m points."""
        ...

    def noise(self, parameters: Any) -> Float[Array, "n 1"] | float:
        """Returns the standard deviation of the noise of each function's observations."""
        ...


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], interval: Interval) -> Array:
    """Draws from U(low, high), in the default float type."""
    return jax.random.uniform(key, shape, minval=interval[0], maxval=interval[1])


def observations(
    key: PRNGKeyArray, family: Family, parameters: Any, points: int, domain: Interval, noisy: bool
) -> Batch:
    """Draws observations y = f(x) of n functions at x uniform on an interval.

    Args:
        key: Random key.
        family: The family of the functions.
        parameters: Their parameters, with leaves [n, k].
        points: The number of points per function.
        domain: The interval of x.
        noisy: Whether y has the family's noise.

    Returns:
        x and y [n, points, 1].
    """
    key_x, key_noise = jax.random.split(key)
    scale = family.noise(parameters)
    n = jax.tree.leaves(parameters)[0].shape[0]
    x = uniform(key_x, (n, points), domain)
    y = family.evaluate(parameters, x)
    if noisy:
        y = y + scale * jax.random.normal(key_noise, (n, points))
    return Batch(x[..., None], y[..., None])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FunctionTasks:
    """Tasks y = f(x) + noise with f drawn from a family and x uniform on an interval; x and y are [n, 1].

    Attributes:
        family: The family of f.
        shot: Points of the support.
        query: Points of the query.
        support_domain: The interval of the support's x.
        domain: The interval of the query's x.
        noisy_query: Whether the query is noisy. The support always is.
        stream: A number that is folded into every key, so that the splits differ.
        given: Whether the inputs also contain the parameters of f, in the order of its pytree.
    """

    family: Family = field(metadata={"static": True})
    shot: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    support_domain: Interval = field(metadata={"static": True})
    domain: Interval = field(metadata={"static": True})
    noisy_query: bool = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})
    given: bool = field(default=False, metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks.

        Returns:
            Support x and y [n, shot, 1], query x and y [n, query, 1]; x has more columns if parameters are given.
        """
        key_family, key_support, key_query = jax.random.split(jax.random.fold_in(key, self.stream), 3)
        parameters = self.family.draw(key_family, n)
        task = Task(
            observations(key_support, self.family, parameters, self.shot, self.support_domain, True),
            observations(key_query, self.family, parameters, self.query, self.domain, self.noisy_query),
        )
        return Task(*(beside(batch, parameters) for batch in task)) if self.given else task


def beside(batch: Batch, parameters: Any) -> Batch:
    """Appends the parameters of each function to the inputs of its observations.

    Args:
        batch: Observations with x [n, points, 1].
        parameters: Parameters with leaves [n, k].
    """
    columns = [jnp.broadcast_to(p[:, None], (*batch.x.shape[:2], p.shape[-1])) for p in jax.tree.leaves(parameters)]
    return batch._replace(x=jnp.concatenate([batch.x, *columns], -1))


def function_splits(
    family: Family,
    shot: int,
    query: int,
    test_query: int,
    domain: Interval,
    support_domain: Interval | None,
    test_noise: bool,
    given: bool = False,
) -> Splits:
    """Makes the three splits of a family: the same distribution, with disjoint random keys.

    Args:
        family: The family of functions.
        shot: Points of the support.
        query: Points of the query in training.
        test_query: Points of the query in validation and test.
        domain: The interval of x.
        support_domain: The interval of the support's x; None for `domain`.
        test_noise: Whether the validation and test queries are noisy too.
        given: Whether the inputs also contain the parameters of the function.
    """
    sizes = [query] + 2 * [test_query]
    support_domain = domain if support_domain is None else support_domain
    sources = [
        FunctionTasks(family, shot, size, support_domain, domain, stream == 0 or test_noise, stream, given)
        for stream, size in enumerate(sizes)
    ]
    return Splits(*sources)
