"""Tasks spread over devices: each device computes its own share, and they communicate once, at the end."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

OWN, SHARED = PartitionSpec("tasks"), PartitionSpec()


def task_mesh(tasks: int, at_once: int = 1) -> Mesh | None:
    """Returns a mesh of all devices, or None if there is one device or the tasks cannot be divided evenly.

    Args:
        tasks: Number of tasks.
        at_once: Number of tasks that a device holds in memory at the same time.
    """
    devices = jax.devices()
    return None if len(devices) == 1 or tasks % (at_once * len(devices)) else Mesh(np.array(devices), ("tasks",))


def everywhere(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Copies a pytree to every device. A restored checkpoint is on one device only.

    Args:
        tree: The pytree.
        mesh: The devices; None returns the tree as it is.
    """
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, SHARED))


def mean_over_tasks(f: Callable[[PyTree, PyTree], PyTree], mesh: Mesh | None) -> Callable[[PyTree, PyTree], PyTree]:
    """Extends a function that averages over tasks to the tasks of all devices.

    Args:
        f: Function (shared, tasks along the leading axis) -> means over these tasks.
        mesh: The devices; None returns f.

    Returns:
        The same function over the tasks of all devices.
    """
    if mesh is None:
        return f

    def mean(shared: PyTree, own: PyTree) -> PyTree:
        return jax.lax.pmean(f(shared, own), "tasks")

    return jax.shard_map(mean, mesh=mesh, in_specs=(SHARED, OWN), out_specs=SHARED, check_vma=False)


def map_over_tasks(f: Callable[[PyTree, PyTree], PyTree], mesh: Mesh | None) -> Callable[[PyTree, PyTree], PyTree]:
    """Runs a function on the tasks of all devices, each on its own share.

    Args:
        f: Function (shared, tasks along the leading axis) -> one result per task along the leading axis.
        mesh: The devices; None returns f.

    Returns:
        The same function over the tasks of all devices.
    """
    return f if mesh is None else jax.shard_map(f, mesh=mesh, in_specs=(SHARED, OWN), out_specs=OWN, check_vma=False)
