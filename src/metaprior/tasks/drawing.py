"""Drawing episodes: distinct places, rows of classes, and the task that they make."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from metaprior.core.types import Batch, Task


def distinct(key: PRNGKeyArray, population: Int[Array, ""] | int, k: int) -> Int[Array, " k"]:
    """k different numbers below `population` in random order; the population may be traced, k is static.

    Where the population is smaller than k, all of it comes first and -1 fills the rest. Cost O(k^2) whatever the
    population: Floyd's method (Bentley & Floyd 1987), then a shuffle of the k.
    """
    key_draw, key_order = jax.random.split(key)
    tops = population - k + jnp.arange(k)
    draws = jax.random.randint(key_draw, (k,), 0, tops + 1)

    def take(i: Array, chosen: Int[Array, " k"]) -> Int[Array, " k"]:
        taken = (chosen == draws[i]).any()
        return chosen.at[i].set(jnp.where(taken | (tops[i] < 0), tops[i], draws[i]))

    # Numbers below 0 stand for what is not there; they never meet a draw.
    chosen = jnp.maximum(jax.lax.fori_loop(0, k, take, jnp.full(k, -1, draws.dtype)), -1)
    order = jnp.where(chosen < 0, 2.0, jax.random.uniform(key_order, (k,)))
    return chosen[jnp.argsort(order)]


def draw_rows(
    key: PRNGKeyArray,
    starts: Int[Array, " classes"],
    counts: Int[Array, " classes"],
    way: int,
    size: int,
    turns: int = 1,
) -> tuple[Int[Array, "way size"], Int[Array, " way"]]:
    """`size` different rows of each of `way` different classes, and which classes, below turns * classes.

    Class i's rows are starts[i] .. starts[i] + counts[i]; i + classes, i + 2 classes, ... are the same rows.
    """
    key_class, key_row = jax.random.split(key)
    chosen = distinct(key_class, starts.shape[0] * turns, way)
    place = chosen % starts.shape[0]
    draw = jax.vmap(lambda k, count: distinct(k, count, size))
    return starts[place, None] + draw(jax.random.split(key_row, way), counts[place]), chosen


def as_task(x: Shaped[Array, "way m ..."], labels: Int[Array, " way"], shot: int) -> Task:
    """A task, class by class: the first `shot` examples of each class are the support, the others the query."""

    def batch(x: Array) -> Batch:
        return Batch(x.reshape(-1, *x.shape[2:]), jnp.repeat(labels, x.shape[1]))

    return Task(batch(x[:, :shot]), batch(x[:, shot:]))
