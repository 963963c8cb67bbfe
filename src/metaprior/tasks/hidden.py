"""Semi-supervised tasks: the labels of some support examples are hidden (Garcia & Bruna 2018, sec. 5.2)."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from metaprior.core.options import Fraction, checked
from metaprior.core.types import (
    Batch,
    Splits,
    Task,
    TaskSource,
    check_family,
    check_source,
    draw_task,
    families_of,
    group_count,
)

UNKNOWN = -1  # the value of a hidden label
KINDS = ("shown", "askable", "left_out")


def ask_for(label: Int[Array, " n"]) -> Int[Array, " n"]:
    """Encodes a hidden label that a learner may request.

    Args:
        label: Labels of at least 0, or codes made by this function.

    Returns:
        -2 - label, which is below 0, like every hidden label. The function is its own inverse.
    """
    return UNKNOWN - 1 - label


def known(key: PRNGKeyArray, y: Int[Array, " n"], weight: Float[Array, " n"], share: float) -> Bool[Array, " n"]:
    """Draws which examples keep their labels.

    Args:
        key: Random key.
        y: Labels.
        weight: Weights; 0 marks padding.
        share: The fraction of labels to keep in each class.

    Returns:
        True for the examples whose label is known: in each class round(share * its number of examples), but at least
            one; and for all padding.
    """
    there = weight > 0
    same = (y[:, None] == y[None]) & there[None]
    draw = jax.random.uniform(key, y.shape)
    place = (same & (draw[None] < draw[:, None])).sum(1)
    return (place < jnp.maximum(jnp.round(share * same.sum(1)), 1)) | ~there


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HiddenLabels:
    """Classification tasks of another source with some support labels hidden.

    Attributes:
        source: The source of the tasks.
        labelled: The fraction of each class's support examples that keep their label.
        unlabelled: How the other examples appear: "shown", "askable" or "left_out"; see `hide_labels`.
    """

    source: TaskSource
    labelled: float = field(metadata={"static": True})
    unlabelled: str = field(default="shown", metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks of the source and hides labels of their supports.

        Returns:
            Tasks whose support has `known`. A hidden label is -1, or -2 - label if it may be requested ("askable").

        Raises:
            ValueError: Tasks whose targets are not labels.
        """
        key_task, key_hide = jax.random.split(key)
        task = self.source.sample(key_task, n)
        return Task(jax.vmap(self._hide)(jax.random.split(key_hide, n), task.support), task.query)

    @property
    def group_count(self) -> int | None:
        """The number of groups of the source's tasks; None if it has no groups."""
        return group_count(self.source)

    def of_group(self, key: PRNGKeyArray, group: Int[Array, ""]) -> Task:
        """Draws a task of the source's group with this number and hides labels of its support."""
        key_task, key_hide = jax.random.split(key)
        task = draw_task(self.source, key_task, group)
        return Task(self._hide(key_hide, task.support), task.query)

    @property
    def families(self) -> tuple[str, ...]:
        """The families of the source's tasks, empty if it has none."""
        return families_of(self.source)

    def of_family(self, key: PRNGKeyArray, family: Int[Array, ""]) -> Task:
        """Draws a task of one of the source's families and hides labels of its support."""
        check_family(family, self.families)
        return self.of_group(key, family)

    def _hide(self, key: PRNGKeyArray, support: Batch) -> Batch:
        if jnp.issubdtype(support.y.dtype, jnp.inexact) or support.y.ndim != 1:
            raise ValueError(
                f"y must hold one class label per example, got {support.y.dtype} values of shape "
                f"{tuple(support.y.shape)}. Real targets cannot be hidden. Give those rows weight 0 instead."
            )
        y = support.y.astype(int)
        weight = jnp.ones(y.shape) if support.weight is None else support.weight
        keep = known(key, y, weight, self.labelled)
        if self.unlabelled == "left_out":
            return support._replace(weight=weight * keep)
        hidden = ask_for(y) if self.unlabelled == "askable" else UNKNOWN
        return support._replace(y=jnp.where(keep, y, hidden), known=keep)


@checked
def hide_labels(splits: Splits, labelled: Fraction, unlabelled: str = "shown") -> Splits:
    """Hides labels in the supports of all three splits; at least one label per class stays known.

    Args:
        splits: Classification tasks.
        labelled: The fraction of each class's support examples that keep their label, above 0 and at most 1.
        unlabelled: How the other examples appear: "shown" with label -1; "askable" with label -2 - label, of which
            `gnn` with the option `ask` may request one; or "left_out" with weight 0, which is the baseline for the
            other two.

    Returns:
        The splits with hidden labels.

    Raises:
        ValueError: A fraction or a word outside these ranges, or tasks whose targets are not labels.
    """
    if not 0 < labelled <= 1:
        raise ValueError(f"labelled must be a fraction above 0 and at most 1 of each class's support, got {labelled}.")
    if unlabelled not in KINDS:
        raise ValueError(f"unlabelled must be one of {', '.join(map(repr, KINDS))}, got {unlabelled!r}.")
    for source in splits:
        check_source(source)
    hidden = Splits(*(HiddenLabels(source, float(labelled), unlabelled) for source in splits))
    jax.eval_shape(lambda: hidden.train.sample(jax.random.key(0), 1))  # raises if the targets are not labels
    return hidden
