"""Tasks spread over devices: each device runs through its own share, and they meet once, at the end."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

OWN, SHARED = PartitionSpec("tasks"), PartitionSpec()


def task_mesh(tasks: int, at_once: int = 1) -> Mesh | None:
    """All devices, if there are many and `tasks` tasks, `at_once` in memory, can be shared out among them evenly."""
    devices = jax.devices()
    return None if len(devices) == 1 or tasks % (at_once * len(devices)) else Mesh(np.array(devices), ("tasks",))


def everywhere(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The tree on every device: what a checkpoint brought back lies on one."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, SHARED))


def mean_over_tasks(f: Callable[[PyTree, PyTree], PyTree], mesh: Mesh | None) -> Callable[[PyTree, PyTree], PyTree]:
    """f: (what all tasks share, tasks along the leading axis) -> means over tasks, now over those of all devices."""
    if mesh is None:
        return f

    def mean(shared: PyTree, own: PyTree) -> PyTree:
        return jax.lax.pmean(f(shared, own), "tasks")

    return jax.shard_map(mean, mesh=mesh, in_specs=(SHARED, OWN), out_specs=SHARED, check_vma=False)


def map_over_tasks(f: Callable[[PyTree, PyTree], PyTree], mesh: Mesh | None) -> Callable[[PyTree, PyTree], PyTree]:
    """f: (what all tasks share, tasks along the leading axis) -> one result a task, along the leading axis."""
    return f if mesh is None else jax.shard_map(f, mesh=mesh, in_specs=(SHARED, OWN), out_specs=OWN, check_vma=False)
