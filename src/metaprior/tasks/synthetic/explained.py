"""Tasks with two explanations that are both known exactly; the support fits either.

A fair coin decides which of the two is true. The exact predictive puts mass 1/2 on each, so it can be measured how well
a posterior covers both (see `studies`).
"""

from dataclasses import dataclass, field
from math import pi
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from metaprior.core.options import Count, NonNegative, Positive, checked
from metaprior.core.types import Batch, Splits, Task
from metaprior.tasks.checks import Interval, check_count, check_interval, check_scale
from metaprior.tasks.synthetic.functions import uniform


class Explained(NamedTuple):
    """n tasks, and their query targets under each explanation.

    Attributes:
        task: The tasks.
        targets: The query targets under each of e equally likely explanations of the support, without noise.
    """

    task: Task
    targets: Float[Array, "n e m 1"] | Int[Array, "n e m"]


@runtime_checkable
class ExplainedTasks(Protocol):
    """A task source that knows the explanations of its supports.

    Attributes:
        noise: The standard deviation of the query targets around the true explanation; 0 for classes.
    """

    noise: float

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks."""
        ...

    def explained(self, key: PRNGKeyArray, n: int) -> Explained:
        """Draws the tasks that `sample` draws from this key, with the query targets under each explanation."""
        ...

    def explanations(self, support: PyTree, x: PyTree) -> Array:
        """Returns the targets at inputs x [m, d] under each explanation of one task's support."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WaveOrLine:
    """The wave a sin x + b cos x and the line through the same two points, one of which is true.

    Attributes:
        amplitude: The interval of the wave's amplitude.
        gap: The interval of the distance between the two points.
        domain: The interval of all points.
        noise: The standard deviation of the query noise.
        query: Points of the query.
        stream: A number that is folded into every key, so that the splits differ.
    """

    amplitude: Interval = field(metadata={"static": True})
    gap: Interval = field(metadata={"static": True})
    domain: Interval = field(metadata={"static": True})
    noise: float = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks.

        Returns:
            Support x and y [n, 2, 1], query x and y [n, query, 1].
        """
        return self.explained(key, n).task

    def explained(self, key: PRNGKeyArray, n: int) -> Explained:
        """Draws the same tasks, with the noise-free query targets under the wave, then under the line."""
        keys = jax.random.split(jax.random.fold_in(key, self.stream), 7)
        amplitude, phase = uniform(keys[0], (n, 1), self.amplitude), uniform(keys[1], (n, 1), (0.0, 2 * pi))
        gap = uniform(keys[2], (n, 1), self.gap)
        low, high = self.domain
        first = low + uniform(keys[3], (n, 1), (0.0, 1.0)) * (high - low - gap)
        seen = jnp.concatenate([first, first + gap], -1)[..., None]
        support = Batch(seen, amplitude[..., None] * jnp.sin(seen - phase[..., None]))
        x = uniform(keys[4], (n, self.query, 1), self.domain)
        targets = jax.vmap(self.explanations)(support, x)
        true = jnp.take_along_axis(targets, _coin(keys[5], n)[:, None, None, None], 1)[:, 0]
        y = true + self.noise * jax.random.normal(keys[6], true.shape)
        return Explained(Task(support, Batch(x, y)), targets)

    def explanations(self, support: Batch, x: Float[Array, "m 1"]) -> Float[Array, "e m 1"]:
        """Returns the targets [e, m, 1] at inputs x under the wave, then under the line."""
        (x1, x2), (y1, y2) = support.x[:, 0], support.y[:, 0]
        # Cramer's rule for a sin x + b cos x at the two points.
        area = jnp.sin(x1 - x2)
        a = (y1 * jnp.cos(x2) - y2 * jnp.cos(x1)) / area
        b = (y2 * jnp.sin(x1) - y1 * jnp.sin(x2)) / area
        line = y1 + (y2 - y1) / (x2 - x1) * (x - x1)
        return jnp.stack([a * jnp.sin(x) + b * jnp.cos(x), line])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TwoCircles:
    """Points inside or outside a circle of known radius, given two points of its rim; two circles pass through these.

    Attributes:
        radius: The radius of all circles.
        apart: The interval of the distance between the two centres, in radii.
        query: Points of the query.
        stream: A number that is folded into every key, so that the splits differ.
        noise: 0, because targets are classes.
    """

    radius: float = field(metadata={"static": True})
    apart: Interval = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})
    noise: float = field(default=0.0, metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks.

        Returns:
            Support x [n, 2, 2] and y [n, 2], all 1 (inside); query x [n, query, 2] and y [n, query].
        """
        return self.explained(key, n).task

    def explained(self, key: PRNGKeyArray, n: int) -> Explained:
        """Draws the same tasks, with the query labels under either circle."""
        keys = jax.random.split(jax.random.fold_in(key, self.stream), 5)
        middle = uniform(keys[0], (n, 1, 2), (-self.radius, self.radius))
        angle, apart = uniform(keys[1], (n, 1), (0.0, pi)), uniform(keys[2], (n, 1), self.apart)
        along = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
        half = self.radius * jnp.sqrt(1 - apart**2 / 4)[..., None]
        support = Batch(middle + half * jnp.array([[-1.0], [1.0]]) * along, jnp.ones((n, 2), jnp.int32))
        # Queries lie in a square around both circles, so that their place does not reveal the true one.
        reach = 2 * self.radius
        x = middle + uniform(keys[3], (n, self.query, 2), (-reach, reach))
        targets = jax.vmap(self.explanations)(support, x)
        y = jnp.take_along_axis(targets, _coin(keys[4], n)[:, None, None], 1)[:, 0]
        return Explained(Task(support, Batch(x, y)), targets)

    def centres(self, support: Batch) -> Float[Array, "2 2"]:
        """Returns the centres of the two circles through the two support points."""
        middle, half = support.x.mean(0), (support.x[1] - support.x[0]) / 2
        square = (half**2).sum()
        across = jnp.stack([-half[1], half[0]]) * jnp.sqrt((self.radius**2 - square) / square)
        return jnp.stack([middle - across, middle + across])

    def explanations(self, support: Batch, x: Float[Array, "m 2"]) -> Int[Array, "e m"]:
        """Returns the labels [e, m] of inputs x under either circle."""
        distance = jnp.linalg.norm(x[None] - self.centres(support)[:, None], axis=-1)
        return (distance < self.radius).astype(jnp.int32)


def _coin(key: PRNGKeyArray, n: int) -> Int[Array, " n"]:
    return jax.random.randint(key, (n,), 0, 2)


@checked
def wave_or_line(
    *,
    query: Count = 20,
    test_query: Count = 50,
    amplitude: Interval = (0.5, 1.5),
    gap: Interval = (1.0, 2.5),
    domain: Interval = (-3.0, 3.0),
    noise: NonNegative = 0.2,
) -> Splits:
    """Makes tasks of a wave of frequency 1 or a line through the same two noise-free points; x and y are [n, 1].

    The two points determine both functions exactly. A fair coin decides which of the two the queries come from.

    Args:
        query: Points of the query in training.
        test_query: Points of the query in validation and test.
        amplitude: The interval (low, high) of the wave's amplitude. Its phase is uniform.
        gap: The interval of the distance between the two points, inside (0, pi), where the wave through them is unique.
        domain: The interval of all points.
        noise: The standard deviation of the query noise.

    Returns:
        Three sources of the same distribution, with disjoint random keys.

    Raises:
        ValueError: A size below 1, an interval that is not (low, high) or lies outside its range, or a domain that is
            shorter than the gap.

    References:
        Finn, Xu & Levine 2018, the ambiguous regression. Here both explanations are known exactly.
    """
    gap, domain = check_interval("gap", gap), check_interval("domain", domain)
    if not (gap[0] > 0 and gap[1] < pi):
        raise ValueError(
            f"gap must be an interval inside (0, pi), where the wave through two points is unique, got {gap}."
        )
    if domain[1] - domain[0] <= gap[1]:
        raise ValueError(f"domain must be longer than the gap {gap[1]:g} of the two points, got {domain}.")
    amplitude, noise = check_interval("amplitude", amplitude, 0.0), check_scale("noise", noise)
    return Splits(*(
        WaveOrLine(amplitude, gap, domain, noise, size, stream) for stream, size in enumerate(_sizes(query, test_query))
    ))  # fmt: skip


@checked
def two_circles(
    *, query: Count = 50, test_query: Count = 100, radius: Positive = 1.0, apart: Interval = (1.0, 1.7)
) -> Splits:
    """Classifies points as inside or outside a circle, given two points of its rim; x float [n, 2], y int [n].

    The support has no other points. The radius is the same in all tasks, so two circles pass through the two points. A
    fair coin decides which of the two is true.

    Args:
        query: Points of the query in training.
        test_query: Points of the query in validation and test.
        radius: The radius of all circles.
        apart: The interval (low, high) of the distance between the two centres in radii, inside (0, 2).

    Returns:
        Three sources of the same distribution, with disjoint random keys.

    Raises:
        ValueError: A size below 1, a radius that is not positive, or a distance outside (0, 2) radii.

    References:
        Finn, Xu & Levine 2018, the ambiguous 2-D classification (circles from positive examples). Here both
            explanations are known exactly.
    """
    apart = check_interval("apart", apart)
    if not (apart[0] > 0 and apart[1] < 2):
        raise ValueError(f"apart must be an interval inside (0, 2), where two circles meet in two points, got {apart}.")
    if check_scale("radius", radius) == 0:
        raise ValueError(f"radius must be above 0, got {radius}.")
    return Splits(*(
        TwoCircles(float(radius), apart, size, stream) for stream, size in enumerate(_sizes(query, test_query))
    ))  # fmt: skip


def _sizes(query: int, test_query: int) -> list[int]:
    return [check_count("query", query), *2 * [check_count("test_query", test_query)]]
