"""Drawing episodes: distinct indices, classes and their labels, rows of classes, and the task made of them."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from metaprior.core.types import Batch, Task

# What the label of a class is: its place in the task, its number, or a slot 0..way-1 that is the same in every task.
Labels = Literal["task", "class", "slot"]


def distinct(key: PRNGKeyArray, population: Int[Array, ""] | int, k: int) -> Int[Array, " k"]:
    """Draws k different integers from 0 to population - 1, in random order.

    The method is Floyd's, followed by a shuffle of the k integers. Its cost is O(k^2) for any population.

    Args:
        key: Random key.
        population: The number of integers to draw from. It may be traced.
        k: How many integers to draw. It must be static.

    Returns:
        The integers [k]. If the population is smaller than k, all of it comes first and -1 fills the rest.

    References:
        Bentley & Floyd 1987, "A sample of brilliance".
    """
    key_draw, key_order = jax.random.split(key)
    tops = population - k + jnp.arange(k)
    draws = jax.random.randint(key_draw, (k,), 0, tops + 1)

    def take(i: Array, chosen: Int[Array, " k"]) -> Int[Array, " k"]:
        taken = (chosen == draws[i]).any()
        return chosen.at[i].set(jnp.where(taken | (tops[i] < 0), tops[i], draws[i]))

    # Negative numbers stand for missing items. They never equal a draw.
    chosen = jnp.maximum(jax.lax.fori_loop(0, k, take, jnp.full(k, -1, draws.dtype)), -1)
    order = jnp.where(chosen < 0, 2.0, jax.random.uniform(key_order, (k,)))
    return chosen[jnp.argsort(order)]


def slots(classes: int, way: int) -> list[Int[np.ndarray, " members"]]:
    """Assigns classes to label slots, at random but always in the same way.

    Args:
        classes: The number of classes, at least `way`.
        way: The number of slots.

    Returns:
        The classes of each slot. The sizes of two slots differ by at most 1.
    """
    order = np.random.default_rng(0).permutation(classes)
    return [order[slot::way] for slot in range(way)]


def draw_classes(
    key: PRNGKeyArray, classes: int, way: int, labels: Labels = "task"
) -> tuple[Int[Array, " way"], Int[Array, " way"]]:
    """Draws `way` different classes and gives them labels.

    Args:
        key: Random key.
        classes: The number of classes to draw from.
        way: The number of classes to draw.
        labels: "task": the label of a class is its place in the task, which is random. "class": it is the number of the
            class. "slot": each class has one of the labels 0..way-1 in all tasks, and a task has one class of each
            label. Labels are then a function of the example, so tasks are not mutually exclusive (Yin et al. 2020).

    Returns:
        The classes, and their labels.
    """
    if labels == "slot":
        members = slots(classes, way)
        most = max(map(len, members))
        table = jnp.asarray(np.stack([np.resize(slot, most) for slot in members]), jnp.int32)
        draw = jax.random.randint(key, (way,), 0, jnp.asarray([len(slot) for slot in members]))
        return table[jnp.arange(way), draw], jnp.arange(way, dtype=jnp.int32)
    chosen = distinct(key, classes, way)
    return chosen, (chosen if labels == "class" else jnp.arange(way)).astype(jnp.int32)


def draw_rows(
    key: PRNGKeyArray,
    starts: Int[Array, " classes"],
    counts: Int[Array, " classes"],
    way: int,
    size: int,
    labels: Labels = "task",
    turns: int = 1,
    among: Int[Array, ""] | None = None,
) -> tuple[Int[Array, "way size"], Int[Array, " way"], Int[Array, " way"]]:
    """Draws `way` different classes, and `size` different rows of each.

    Args:
        key: Random key.
        starts: The first row of each class, [classes].
        counts: The number of rows of each class, [classes]. The rows of class i are starts[i] .. starts[i] + counts[i]
            - 1.
        way: The number of classes to draw.
        size: The number of rows to draw per class.
        labels: What the label of a class is, see `draw_classes`.
        turns: How many classes each set of rows stands for: i, i + classes, i + 2 classes, ... have the same rows.
        among: The number of classes to draw from, if it is not all of them. It may be traced. A label is then the place
            of the class in the task.

    Returns:
        The rows [way, size], the drawn classes [way], which are below turns * classes, and their labels [way].
    """
    key_class, key_row = jax.random.split(key)
    if among is None:
        chosen, label = draw_classes(key_class, starts.shape[0] * turns, way, labels)
    else:
        chosen, label = distinct(key_class, among, way), jnp.arange(way, dtype=jnp.int32)
    place = chosen % starts.shape[0]
    draw = jax.vmap(lambda k, count: distinct(k, count, size))
    return starts[place, None] + draw(jax.random.split(key_row, way), counts[place]), chosen, label


def as_task(x: Shaped[Array, "way m ..."], labels: Int[Array, " way"], shot: int) -> Task:
    """Makes a task from examples that are sorted by class.

    Args:
        x: Examples, [way, m, ...].
        labels: The label of each class, [way].
        shot: The first `shot` examples of each class are the support, the others the query.

    Returns:
        The task; support and query are sorted by class.
    """

    def batch(x: Array) -> Batch:
        return Batch(x.reshape(-1, *x.shape[2:]), jnp.repeat(labels, x.shape[1]))

    return Task(batch(x[:, :shot]), batch(x[:, shot:]))
