"""Tasks of several families, which are drawn with equal probabilities: mixtures of other sources."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from metaprior.core.named import construct
from metaprior.core.options import OptionError, accept, checked
from metaprior.core.types import (
    FamilySource,
    Splits,
    Task,
    TaskSource,
    check_family,
    draw_task,
    families_of,
    group_count,
)


def drawn_families(source: FamilySource, key: PRNGKeyArray, n: int) -> tuple[PRNGKeyArray, Int[Array, " n"]]:
    """Draws the families of n tasks.

    Args:
        source: A source with families.
        key: Random key.
        n: The number of tasks.

    Returns:
        A key for each task, and the index of its family.
    """
    key_family, key_task = jax.random.split(key)
    return jax.random.split(key_task, n), jax.random.randint(key_family, (n,), 0, len(source.families))


def with_family(task: Task, family: Int[Array, ""], count: int) -> Task:
    """Appends the family of a task to its inputs, one-hot.

    Args:
        task: A task whose x are arrays of real numbers [n, ..., c].
        family: The index of the family.
        count: The number of families.

    Returns:
        The task with x [n, ..., c + count]. For images, these are constant channels.

    Raises:
        ValueError: Inputs of another form.
    """

    def beside(x: Any) -> Array:
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.inexact) or x.ndim < 2:
            raise ValueError(
                "oracle must be false for inputs that are not arrays of real numbers [n, ..., features], got "
                f"{jax.tree.map(lambda leaf: f'{leaf.dtype}{list(leaf.shape)}', x)}."
            )
        told = jax.nn.one_hot(family, count, dtype=x.dtype)
        return jnp.concatenate([x, jnp.broadcast_to(told, (*x.shape[:-1], count))], -1)

    return Task(*(batch._replace(x=beside(batch.x)) for batch in task))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MixtureTasks:
    """Tasks of several sources with equal probabilities. Each source is a family.

    Attributes:
        sources: The sources, whose tasks have equal shapes.
        families: Their names.
        oracle: Whether the inputs also hold the task's family.
    """

    sources: tuple[TaskSource, ...]
    families: tuple[str, ...] = field(metadata={"static": True})
    oracle: bool = field(default=False, metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks, each from a source that is drawn first. No other source is sampled for it."""
        return jax.lax.map(lambda drawn: self.of_family(*drawn), drawn_families(self, key, n))

    def of_family(self, key: PRNGKeyArray, family: Int[Array, ""]) -> Task:
        """Draws a task of one source."""
        check_family(family, self.families)
        task = jax.lax.switch(
            family, [lambda k, s=source: draw_task(s, k, jnp.zeros((), int)) for source in self.sources], key
        )
        return with_family(task, family, len(self.families)) if self.oracle else task


def mixture_of(families: Mapping[str, Splits], *, oracle: bool = False) -> Splits:
    """Mixes the tasks of several data sets with equal probabilities.

    `evaluate` reports the figures of each family beside the overall ones.

    Args:
        families: The splits of each family, by its name. All tasks of a split have equal shapes.
        oracle: Whether the inputs also hold the task's family, one-hot: as further features, or as further constant
            channels of images. A learner that knows the family shows how much there is to gain from it.

    Returns:
        The three mixtures.

    Raises:
        ValueError: Fewer than two families, tasks of different shapes, or a source with groups or families.

    Example:
        >>> import jax, metaprior as mp
        >>> families = {"wave": mp.tasks.sinusoid(test_query=10), "line": mp.tasks.linear(shot=10, test_query=10)}
        >>> mp.tasks.mixture_of(families).test.families
        ('wave', 'line')
    """
    names = tuple(families)
    if len(names) < 2:
        raise ValueError(f"families must be at least two, got {', '.join(names) or 'none'}.")
    mixed = []
    for part in Splits._fields:
        sources = [getattr(families[name], part) for name in names]
        for name, source in zip(names, sources, strict=True):
            if group_count(source) is not None or families_of(source):
                what = "groups" if group_count(source) is not None else "families"
                raise ValueError(f"families.{name} must have no {what}, got a source with {what}. Use it by itself.")
        shapes = [_form(source) for source in sources]
        for name, shape in zip(names, shapes, strict=True):
            if shape != shapes[0]:
                raise ValueError(
                    f"families.{name} must have tasks of the same shapes as {names[0]} in {part}, got "
                    f"{_shown(shape, shapes[0])}. Set its shot, query and test_query."
                )
        mixed.append(MixtureTasks(tuple(sources), names, oracle))
    splits = Splits(*mixed)
    if oracle:
        jax.eval_shape(lambda: splits.train.sample(jax.random.key(0), 1))  # raises if inputs cannot be extended
    return splits


@checked
def mixture(*, families: dict[str, Any], oracle: bool = False) -> Splits:
    """Mixes the tasks of several sources with equal probabilities; for recipes, see `mixture_of`.

    In a recipe:

        [tasks]
        name = "mixture"
        families.wave = {name = "sinusoid", shot = 5}
        families.line = {name = "linear", shot = 5}

    Args:
        families: For each family, the `name` of a task source and its options.
        oracle: Whether the inputs also hold the task's family, one-hot.

    Returns:
        The three mixtures.

    Raises:
        ValueError: As in `mixture_of`, or a source or an option that is unknown.
    """
    from metaprior.tasks import SOURCES  # which has this factory too

    made = {}
    for family, table in families.items():
        options = dict(accept(dict, table, f"families.{family}"))
        if "name" not in options:
            raise OptionError(f"families.{family}.name is missing: it is one of {', '.join(sorted(SOURCES))}.")
        made[family] = construct(f"families.{family}", options.pop("name"), SOURCES, **options)
    return mixture_of(made, oracle=oracle)


def _form(source: TaskSource) -> tuple[Any, list[str]]:
    """The structure of a source's tasks, and the name, type and shape of each of their arrays."""
    task: PyTree = jax.eval_shape(lambda: source.sample(jax.random.key(0), 1))
    leaves = jax.tree_util.tree_leaves_with_path(task)
    arrays = [f"{jax.tree_util.keystr(p).removeprefix('.')} {leaf.dtype}{list(leaf.shape[1:])}" for p, leaf in leaves]
    return jax.tree.structure(task), arrays


def _shown(form: tuple[Any, list[str]], other: tuple[Any, list[str]]) -> str:
    """The arrays in which two forms differ."""
    own, theirs = ([a for a in these[1] if a not in those[1]] for these, those in ((form, other), (other, form)))
    return f"{', '.join(own) or 'no such array'} instead of {', '.join(theirs) or 'nothing'}"
