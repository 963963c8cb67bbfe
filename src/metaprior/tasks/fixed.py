"""A source of given tasks, such as the episodes of a published benchmark or tasks made elsewhere."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from metaprior.core.types import Task
from metaprior.tasks.drawing import distinct


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FixedTasks:
    """A source of given tasks.

    Attributes:
        tasks: The tasks, stacked along a leading axis.
    """

    tasks: Task

    @property
    def total(self) -> int:
        """The number of tasks."""
        return jax.tree.leaves(self.tasks)[0].shape[0]

    @property
    def group_count(self) -> int:
        """The number of groups. Each task is its own group, because a repeated task is no new evidence."""
        return self.total

    def of_group(self, key: PRNGKeyArray, group: Int[Array, ""]) -> Task:
        """Returns the task with this number."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[group], self.tasks)

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n different tasks; with n equal to `total`, returns all of them in their order.

        Args:
            key: Random key.
            n: The number of tasks.

        Raises:
            ValueError: N above `total`, because a repeated task would count as new evidence.
        """
        if n > self.total:
            raise ValueError(f"n must be at most {self.total}, the number of fixed tasks, got {n}.")
        if n == self.total:
            return self.tasks
        rows = distinct(key, self.total, n)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], self.tasks)
