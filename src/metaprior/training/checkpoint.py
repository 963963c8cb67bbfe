"""Checkpoints, written by orbax.

Each checkpoint is written atomically. A run keeps the last two and the best two. A checkpoint that does not fit the
learner is refused.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from metaprior.core.extras import extra
from metaprior.core.files import explained, sync

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

RETRIES = 5


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written."""


class NotSaved(CheckpointError):
    """The state of a run cannot be written. Earlier checkpoints are intact."""


class CheckpointMismatch(ValueError):
    """A checkpoint belongs to another learner, or its arrays have other shapes."""


def fingerprint(tree: PyTree) -> dict[str, str]:
    """Returns the type and shape of each leaf by its path, e.g. `{"['head']['w']": "float32[40,1]"}`.

    Args:
        tree: A pytree of arrays.
    """

    def describe(leaf: Any) -> str:
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    return {jax.tree_util.keystr(path): describe(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_fingerprint(saved: dict[str, str], needed: dict[str, str], where: Path) -> None:
    """Checks that a checkpoint has the leaves, types and shapes that are needed.

    Args:
        saved: The checkpoint's fingerprint.
        needed: The fingerprint of the tree to restore.
        where: The folder, for the error message.

    Raises:
        CheckpointMismatch: They differ. The message lists up to 12 differences.
    """
    lines = [f"  only saved:  {path} {saved[path]}" for path in saved if path not in needed]
    lines += [f"  only needed: {path} {needed[path]}" for path in needed if path not in saved]
    lines += [
        f"  {path}: saved {saved[path]}, needed {needed[path]}"
        for path in saved
        if path in needed and saved[path] != needed[path]
    ]
    if lines:
        shown = lines[:12] + ([f"  ... and {len(lines) - 12} more"] if len(lines) > 12 else [])
        raise CheckpointMismatch(
            f"{where}: this checkpoint was made by another learner, network or precision. The differences are:\n"
            + "\n".join(shown)
        )


def digest_of(tree: PyTree) -> str:
    """Returns a hash of all leaves, including their paths, types and shapes.

    Args:
        tree: A pytree of arrays.

    Returns:
        32 hexadecimal digits of the SHA-256.
    """
    found = hashlib.sha256(json.dumps(fingerprint(tree)).encode())
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:32]


class Checkpoints:
    """A folder of checkpoints, with one subfolder per saved meta-step.

    orbax writes each checkpoint under a temporary name and then renames it. Each one stores its meta-step, a hash of
    its arrays (nothing else detects a changed bit) and the id of its run. A checkpoint that does not match these counts
    as damaged. Reading never changes the folder, so it is safe while another process saves. Only one process may save.

    Args:
        folder: The folder of the checkpoints. It need not exist.
        keep: How many of the newest checkpoints to keep.
        run: Returns the id of the run, or None if it has none.

    Attributes:
        folder: The folder of the checkpoints.
        keep: How many of the newest checkpoints are kept.
    """

    def __init__(self, folder: Path, keep: int = 2, run: Callable[[], str | None] = lambda: None):
        self.folder, self.keep, self._run = folder, keep, run
        self._keeper: CheckpointManager | None = None

    def steps(self) -> list[int]:
        """Returns the saved meta-steps, in ascending order."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def restore(self, like: PyTree, most: int | None = None) -> "Restored":
        """Restores the newest readable checkpoint.

        Args:
            like: A pytree with the structure, types and shapes of the saved one.
            most: The latest meta-step to consider. None considers all.

        Returns:
            The checkpoint, and why newer ones could not be read.
        """
        found = self._newest(like, most)
        for _ in range(RETRIES):
            if not found.damaged:
                break
            # The saving process deletes old checkpoints. One that disappears during a read is not damaged.
            time.sleep(0.1)
            before, found = found, self._newest(like, most)
            if found.damaged.keys() == before.damaged.keys():
                break
        return found

    def _newest(self, like: PyTree, most: int | None) -> "Restored":
        with extra("cli", "A run's folder"):
            from orbax.checkpoint import StandardCheckpointer
            from orbax.checkpoint.utils import to_shape_dtype_struct
        shapes, damaged = jax.tree.map(to_shape_dtype_struct, like), {}
        for step in reversed(self.steps()):
            if most is not None and step > most:
                continue
            try:
                with StandardCheckpointer() as reader:
                    path = self.folder.absolute() / str(step) / "default"
                    tree = reader.restore(path, shapes)
                self._check(step, tree)
                return Restored(step, tree, damaged)
            except Exception as error:  # orbax and tensorstore raise many types of error for a damaged file
                damaged[step] = _first_line(error)
        return Restored(None, None, damaged)

    def _check(self, step: int, tree: PyTree) -> None:
        """Raises CheckpointError if these are not the arrays that this run saved at this meta-step."""
        noted = json.loads((self.folder / str(step) / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] or {}
        if noted.get("step", step) != step:
            raise CheckpointError(f"it is a copy of meta-step {noted['step']}")
        if (own := self._run()) is not None and noted.get("run", own) != own:
            raise CheckpointError("it was saved by another run")
        if "sha256" in noted and noted["sha256"] != digest_of(tree):
            raise CheckpointError("its arrays differ from those that were saved")

    def save(self, step: int, tree: PyTree) -> None:
        """Writes a checkpoint. Earlier ones stay intact if this fails.

        Args:
            step: The meta-step of the state.
            tree: The state, a pytree of arrays.

        Raises:
            NotSaved: It cannot be written, for example because the disk is full.
        """
        with extra("cli", "A run's folder"):
            from orbax.checkpoint.args import StandardSave
        try:
            keeper = self._writer()
            if step in keeper.all_steps():
                return  # saved before the process was killed; training is deterministic, so the bits are the same
            needed = 2**16 + 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
            if shutil.disk_usage(self.folder).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with _quiet():
                noted = {"step": step, "sha256": digest_of(tree)} | ({"run": run} if (run := self._run()) else {})
                keeper.save(step, args=StandardSave(tree), force=True, custom_metadata=noted)
            sync(self.folder)
        except (OSError, ValueError, RuntimeError) as error:
            for _ in range(RETRIES):  # writes that are still in progress create their files again, once or twice
                for partial in (partials := list(self.folder.glob("*tmp*"))):
                    shutil.rmtree(partial, ignore_errors=True)
                if not partials:
                    break
                time.sleep(0.1)
            why = explained(error) if isinstance(error, OSError) else _cause(error)
            raise NotSaved(
                f"{self.folder}: could not save meta-step {step} ({why.rstrip('.')}). Earlier checkpoints are intact. "
                "Free some disk space or repair the folder, then continue with --resume."
            ) from error

    def drop(self, after: int, damaged: Iterable[int] = ()) -> None:
        """Removes checkpoints after a meta-step and damaged ones, so that these meta-steps can be saved again.

        Args:
            after: Checkpoints of later meta-steps are deleted.
            damaged: Meta-steps whose checkpoints are damaged. They are renamed, not deleted.
        """
        for step in damaged:
            aside = self.folder.with_name(f"{self.folder.name}-damaged-{step}-{time.time_ns()}")
            (self.folder / str(step)).rename(aside)
        for step in self.steps():
            if step > after:
                shutil.rmtree(self.folder / str(step))
        if self._keeper is not None:
            self._keeper.reload()

    def _writer(self) -> "CheckpointManager":
        if self._keeper is None:
            with extra("cli", "A run's folder"):
                from orbax.checkpoint import CheckpointManager, CheckpointManagerOptions
            self.folder.mkdir(parents=True, exist_ok=True)
            options = CheckpointManagerOptions(
                max_to_keep=self.keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
            )
            self._keeper = CheckpointManager(self.folder.absolute(), options=options)
        return self._keeper


class Restored(NamedTuple):
    """A restored checkpoint.

    Attributes:
        step: Its meta-step, or None if no checkpoint can be read.
        tree: Its pytree, or None if no checkpoint can be read.
        damaged: For each meta-step that was tried and could not be read, the reason.
    """

    step: int | None
    tree: PyTree
    damaged: dict[int, str]


def unreadable(folder: Path, damaged: dict[int, str]) -> CheckpointError:
    """Returns the error for a folder in which no checkpoint can be read.

    Args:
        folder: The folder.
        damaged: The reason for each meta-step.
    """
    problems = "; ".join(f"meta-step {step}: {why}" for step, why in damaged.items())
    return CheckpointError(
        f"{folder}: no checkpoint can be read ({problems}). The folder is damaged. Restore it from a backup, or delete "
        "the run and train again."
    )


def _retrieved(record: logging.LogRecord) -> bool:
    """Whether a log record is not about the error of a second write, since the first one's is reported by us."""
    return "exception was never retrieved" not in record.getMessage()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what orbax and tensorstore print from their threads, since our own error reports the failure.

    The first write that fails closes the event loop. The others end at any time after that, even before the exception
    arrives here, so the hooks are set before the writes begin. They stay in place after a failure.
    """
    log, loop_log, hook = logging.getLogger("absl"), logging.getLogger("asyncio"), sys.unraisablehook
    before = log.level
    log.setLevel(logging.CRITICAL)
    loop_log.addFilter(_retrieved)
    sys.unraisablehook = lambda what: None if "Event loop is closed" in str(what.exc_value) else hook(what)
    try:
        yield
        loop_log.removeFilter(_retrieved)
        sys.unraisablehook = hook
    finally:
        log.setLevel(before)


def _cause(error: BaseException) -> str:
    """The system's own message, from tensorstore's long ones, which end in '... No space left on device [...]'."""
    text = " ".join(str(error).split())
    return text.rpartition(" [os_error")[0].rpartition(": ")[2] or _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
