"""Whether a run that goes on is the one that began: its settings, its data, and what the last bits depend on."""

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
    """A run was to go on with other settings than those it was started with."""


def environment() -> dict[str, Any]:
    """What the last bits of a training depend on besides its settings."""
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
    """A hash of the data that training and validation tasks are drawn from, where sources are pytrees of arrays."""
    # Of what is no array, as the size of a support, its text counts, but no address in memory.
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
    """A hash of a recipe's tables, but for the number of meta-steps, which a resume may change."""
    training = recipe.get("training")
    if isinstance(training, dict):
        recipe = recipe | {"training": {k: v for k, v in training.items() if k != "steps"}}
    return text_digest(json.dumps(recipe, sort_keys=True))


def text_digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """'name: old -> new' of each entry that differs, tables inside tables by dotted names."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif json.dumps(a, default=str) != json.dumps(b, default=str):
            found.append(f"{prefix}{name}: {a!r} -> {b!r}")
    return found


def check_same_course(folder: Path, old: dict[str, Any], new: dict[str, Any], prefix: str = "training.") -> None:
    """Raise OtherSettings, saying what differs, unless only the number of meta-steps does and the rate ignores it."""
    changed = differences(old, new, prefix)
    table = new if prefix else new.get("training", {})
    if table.get("schedule", "constant") == "constant":
        changed = [line for line in changed if not line.startswith("training.steps: ")]
    if changed:
        length = any(line.startswith("training.steps: ") for line in changed)
        why = (
            f"The rate's {table['schedule']} schedule depends on training.steps, so another length is another course."
            if length
            else "Only training.steps may change."
        )
        raise OtherSettings(
            f"--resume: {folder} goes on with the settings that it was started with, but these differ (old -> new):\n  "
            + "\n  ".join(changed)
            + f"\n{why} Leave them out, or train anew in another folder."
        )
