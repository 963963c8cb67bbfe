"""Checks whether a resumed run has the settings, the data and the environment that it was started with."""

import hashlib
import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaprior.core.types import Splits
from metaprior.kernels.native import kernels


class OtherSettings(ValueError):
    """A run cannot be resumed with other settings than those it was started with."""


def environment() -> dict[str, Any]:
    """Returns what the exact bits of training depend on besides the settings, such as versions and devices."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = jax.devices()
    return {
        "metaprior": version("metaprior"),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "threads": int(os.environ.get("NPROC") or cores or 1),
        "kernels": kernels() if devices[0].platform == "cpu" else None,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def digest(splits: Splits) -> str:
    """Returns a hash of the data that training and validation tasks are drawn from.

    Args:
        splits: Task sources that are pytrees of arrays.

    Returns:
        16 hexadecimal digits of the SHA-256.
    """
    # Static parts, such as the size of a support, count by their text, without addresses in memory.
    structure = re.sub(r" at 0x[0-9a-f]+", "", str(jax.tree.structure((splits.train, splits.validation))))
    found = hashlib.sha256(structure.encode())
    for leaf in jax.tree.leaves((splits.train, splits.validation)):
        key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if key else leaf)
        if array.dtype != object:
            found.update(f"{array.dtype}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
    return found.hexdigest()[:16]


def recipe_digest(recipe: dict[str, Any]) -> str:
    """Returns a hash of a recipe's tables, without the number of meta-steps, which may change on resuming.

    Args:
        recipe: The recipe as plain tables.
    """
    training = recipe.get("training")
    if isinstance(training, dict):
        recipe = recipe | {"training": {k: v for k, v in training.items() if k != "steps"}}
    return text_digest(json.dumps(recipe, sort_keys=True))


def text_digest(text: str) -> str:
    """Returns a short hash of a text: 16 hexadecimal digits of the SHA-256.

    Args:
        text: The text.
    """
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lists the entries in which two tables differ, as 'name: old -> new'.

    Args:
        old: The first table.
        new: The second table.
        prefix: Is put before each name. Entries of nested tables have dotted names.
    """
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif json.dumps(a, default=str) != json.dumps(b, default=str):
            found.append(f"{prefix}{name}: {a!r} -> {b!r}")
    return found


def check_same_course(folder: Path, old: dict[str, Any], new: dict[str, Any], prefix: str = "training.") -> None:
    """Checks that a run is resumed with its settings.

    Only the number of meta-steps may change, and only if the learning rate's schedule does not depend on it.

    Args:
        folder: The run's folder, for the error message.
        old: The settings that the run was started with.
        new: The settings to resume with.
        prefix: The dotted name of the tables; "" if they are whole recipes.

    Raises:
        OtherSettings: Other settings differ. The message lists them.
    """
    changed = differences(old, new, prefix)
    table = new if prefix else new.get("training", {})
    if table.get("schedule", "constant") == "constant":
        changed = [line for line in changed if not line.startswith("training.steps: ")]
    if changed:
        length = any(line.startswith("training.steps: ") for line in changed)
        why = (
            f"The learning rate's {table['schedule']} schedule depends on training.steps, so it cannot change."
            if length
            else "Only training.steps may change."
        )
        raise OtherSettings(
            f"--resume: {folder} must be resumed with the settings that it was started with, but these differ (old -> "
            "new):\n  " + "\n  ".join(changed) + f"\n{why} Leave these options out, or train again in another folder."
        )
