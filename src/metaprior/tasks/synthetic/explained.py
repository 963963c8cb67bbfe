"""Tasks with two explanations, both known exactly: the support fits either, and a fair coin said which is true.

The exact predictive is half of each, so how well a posterior covers the explanations can be measured (`studies`).
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
    """n tasks, and what the queries would be under each of e equally likely explanations of the support."""

    task: Task
    targets: Float[Array, "n e m 1"] | Int[Array, "n e m"]


@runtime_checkable
class ExplainedTasks(Protocol):
    """A task source that knows what explains its supports."""

    noise: float  # sd of the queries' targets about the true explanation's; 0 for classes

    def sample(self, key: PRNGKeyArray, n: int) -> Task: ...

    def explained(self, key: PRNGKeyArray, n: int) -> Explained: ...

    def explanations(self, support: PyTree, x: PyTree) -> Array:
        """Targets at any inputs x [m, d] under each explanation of one task's support."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WaveOrLine:
    """The wave a sin x + b cos x and the line through the same two points, of which one is true."""

    amplitude: Interval = field(metadata={"static": True})
    gap: Interval = field(metadata={"static": True})
    domain: Interval = field(metadata={"static": True})
    noise: float = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n tasks: support x, y [n, 2, 1] and query x, y [n, query, 1]."""
        return self.explained(key, n).task

    def explained(self, key: PRNGKeyArray, n: int) -> Explained:
        """The same tasks with each query's noise-free target under the wave, then under the line."""
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
        (x1, x2), (y1, y2) = support.x[:, 0], support.y[:, 0]
        # Cramer's rule on a sin x + b cos x at the two points.
        area = jnp.sin(x1 - x2)
        a = (y1 * jnp.cos(x2) - y2 * jnp.cos(x1)) / area
        b = (y2 * jnp.sin(x1) - y1 * jnp.sin(x2)) / area
        line = y1 + (y2 - y1) / (x2 - x1) * (x - x1)
        return jnp.stack([a * jnp.sin(x) + b * jnp.cos(x), line])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TwoCircles:
    """Inside or outside a circle of known radius, of which two points of the rim are known: two circles have them."""

    radius: float = field(metadata={"static": True})
    apart: Interval = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})
    noise: float = field(default=0.0, metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n tasks: support x [n, 2, 2], y [n, 2] all 1 (inside), and query x [n, query, 2], y [n, query]."""
        return self.explained(key, n).task

    def explained(self, key: PRNGKeyArray, n: int) -> Explained:
        """The same tasks with each query's label under either circle."""
        keys = jax.random.split(jax.random.fold_in(key, self.stream), 5)
        middle = uniform(keys[0], (n, 1, 2), (-self.radius, self.radius))
        angle, apart = uniform(keys[1], (n, 1), (0.0, pi)), uniform(keys[2], (n, 1), self.apart)
        along = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
        half = self.radius * jnp.sqrt(1 - apart**2 / 4)[..., None]
        support = Batch(middle + half * jnp.array([[-1.0], [1.0]]) * along, jnp.ones((n, 2), jnp.int32))
        # A square about both circles: where it lies says nothing about which of them is true.
        reach = 2 * self.radius
        x = middle + uniform(keys[3], (n, self.query, 2), (-reach, reach))
        targets = jax.vmap(self.explanations)(support, x)
        y = jnp.take_along_axis(targets, _coin(keys[4], n)[:, None, None], 1)[:, 0]
        return Explained(Task(support, Batch(x, y)), targets)

    def centres(self, support: Batch) -> Float[Array, "2 2"]:
        """Of the two circles through the two points."""
        middle, half = support.x.mean(0), (support.x[1] - support.x[0]) / 2
        square = (half**2).sum()
        across = jnp.stack([-half[1], half[0]]) * jnp.sqrt((self.radius**2 - square) / square)
        return jnp.stack([middle - across, middle + across])

    def explanations(self, support: Batch, x: Float[Array, "m 2"]) -> Int[Array, "e m"]:
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
    """A wave of frequency 1 or a line, through the same two points seen without noise; x and y are [n, 1].

    Two points fix both exactly, and a fair coin says which one the queries are of.

    Args:
        query: points of the query in training.
        test_query: points of the query in validation and test.
        amplitude: of the wave; its phase is uniform.
        gap: between the two points, inside (0, pi), where the wave through them is unique.
        domain: of all points.
        noise: sd of the queries' noise.

    Raises:
        ValueError: a size below 1, an interval that is not (low, high) or lies outside, a domain shorter than the gap.

    Source: the ambiguous regression of Finn, Xu & Levine 2018, made exact.
    """
    gap, domain = check_interval("gap", gap), check_interval("domain", domain)
    if not (gap[0] > 0 and gap[1] < pi):
        raise ValueError(f"gap: came {gap}, needs an interval inside (0, pi), where one wave passes through two points")
    if domain[1] - domain[0] <= gap[1]:
        raise ValueError(f"domain: came {domain}, needs to be longer than the gap {gap[1]:g} of the two points")
    amplitude, noise = check_interval("amplitude", amplitude, 0.0), check_scale("noise", noise)
    return Splits(*(
        WaveOrLine(amplitude, gap, domain, noise, size, stream) for stream, size in enumerate(_sizes(query, test_query))
    ))  # fmt: skip


@checked
def two_circles(
    *, query: Count = 50, test_query: Count = 100, radius: Positive = 1.0, apart: Interval = (1.0, 1.7)
) -> Splits:
    """Inside a circle in the plane or not, from two points of its rim and no others; x float [n, 2], y int [n].

    The radius is the same in all tasks, so two circles pass through the two points; a fair coin says which is meant.

    Args:
        query: points of the query in training.
        test_query: points of the query in validation and test.
        radius: of all circles.
        apart: distance of the two centres in radii, inside (0, 2).

    Raises:
        ValueError: a size below 1, a radius that is not positive, or centres not inside (0, 2) radii.

    Source: the ambiguous 2-D classification of Finn, Xu & Levine 2018 (circles from positive examples), made exact.
    """
    apart = check_interval("apart", apart)
    if not (apart[0] > 0 and apart[1] < 2):
        raise ValueError(f"apart: came {apart}, needs an interval inside (0, 2), where two circles meet in two points")
    if check_scale("radius", radius) == 0:
        raise ValueError(f"radius: came {radius}, needs a number above 0")
    return Splits(*(
        TwoCircles(float(radius), apart, size, stream) for stream, size in enumerate(_sizes(query, test_query))
    ))  # fmt: skip


def _sizes(query: int, test_query: int) -> list[int]:
    return [check_count("query", query), *2 * [check_count("test_query", test_query)]]
