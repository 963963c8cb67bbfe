"""A source of given tasks: a published benchmark's episodes, or tasks made elsewhere."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from metaprior.core.types import Task
from metaprior.tasks.drawing import distinct


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FixedTasks:
    """Stacked tasks as they are; `sample` of all of them keeps their order, of fewer draws different ones."""

    tasks: Task

    @property
    def total(self) -> int:
        """How many tasks there are."""
        return jax.tree.leaves(self.tasks)[0].shape[0]

    @property
    def group_count(self) -> int:
        """Each task is a group of its own: shown twice, it is no new evidence."""
        return self.total

    def of_group(self, key: PRNGKeyArray, group: Int[Array, ""]) -> Task:
        """The task with this number."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[group], self.tasks)

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n different tasks.

        Raises:
            ValueError: n above `total`: a repeated task would count as new evidence.
        """
        if n > self.total:
            raise ValueError(f"n: came {n}, but there are {self.total} fixed tasks; ask for at most {self.total}")
        if n == self.total:
            return self.tasks
        rows = distinct(key, self.total, n)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], self.tasks)
