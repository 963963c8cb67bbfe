"""Semi-supervised tasks: of some of the support's examples the label is not known (Garcia & Bruna 2018, sec. 5.2)."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from metaprior.core.options import Fraction, checked
from metaprior.core.types import Batch, Splits, Task, TaskSource, check_source, draw_task, group_count

UNKNOWN = -1  # the label of an example whose label is not known
KINDS = ("shown", "askable", "left_out")


def ask_for(label: Int[Array, " n"]) -> Int[Array, " n"]:
    """A label that is hidden but may be asked for: -2 - label, below 0 as every unknown one. Its own inverse."""
    return UNKNOWN - 1 - label


def known(key: PRNGKeyArray, y: Int[Array, " n"], weight: Float[Array, " n"], share: float) -> Bool[Array, " n"]:
    """Which examples keep their labels: of each class round(share * its number), at least one; and all padding."""
    there = weight > 0
    same = (y[:, None] == y[None]) & there[None]
    draw = jax.random.uniform(key, y.shape)
    place = (same & (draw[None] < draw[:, None])).sum(1)
    return (place < jnp.maximum(jnp.round(share * same.sum(1)), 1)) | ~there


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HiddenLabels:
    """Another source's tasks of classes, with `labelled` the share of the support, class by class, that has a label."""

    source: TaskSource
    labelled: float = field(metadata={"static": True})
    unlabelled: str = field(default="shown", metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n tasks whose supports say which labels are known; others are -1, or -2 - label where it may be asked for."""
        key_task, key_hide = jax.random.split(key)
        task = self.source.sample(key_task, n)
        return Task(jax.vmap(self._hide)(jax.random.split(key_hide, n), task.support), task.query)

    @property
    def group_count(self) -> int | None:
        """How many groups the source's tasks come from, if any."""
        return group_count(self.source)

    def of_group(self, key: PRNGKeyArray, group: Int[Array, ""]) -> Task:
        """A task of the source's group with this number."""
        key_task, key_hide = jax.random.split(key)
        task = draw_task(self.source, key_task, group)
        return Task(self._hide(key_hide, task.support), task.query)

    def _hide(self, key: PRNGKeyArray, support: Batch) -> Batch:
        if jnp.issubdtype(support.y.dtype, jnp.inexact) or support.y.ndim != 1:
            raise ValueError(
                f"y must be labels of classes, one an example, to be hidden, got {support.y.dtype} values of shape "
                f"{tuple(support.y.shape)}. Real targets cannot be hidden: give those rows weight 0."
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
    """The splits with `labelled` the share of each class's support examples that has a label, at least one a class.

    unlabelled: the others are "shown" with label -1, "askable" (hidden as -2 - label, which `gnn` with `ask` may learn
    of one), or "left_out" by weight 0, which is what they are to be compared with.

    Raises:
        ValueError: a share that is not above 0 and at most 1, or another word.
    """
    if not 0 < labelled <= 1:
        raise ValueError(f"labelled: came {labelled}, needs a share above 0 and at most 1 of each class's support")
    if unlabelled not in KINDS:
        raise ValueError(f"unlabelled: came {unlabelled!r}, needs one of {', '.join(map(repr, KINDS))}")
    for source in splits:
        check_source(source)
    hidden = Splits(*(HiddenLabels(source, float(labelled), unlabelled) for source in splits))
    jax.eval_shape(lambda: hidden.train.sample(jax.random.key(0), 1))  # raises what cannot be hidden
    return hidden
