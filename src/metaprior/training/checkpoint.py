"""Checkpoints by orbax: atomic, the last two and the best two, refused where they do not fit."""

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
    """The state of a training cannot be written; what was saved before is whole."""


class CheckpointMismatch(ValueError):
    """A checkpoint is of another learner, or of other shapes."""


def fingerprint(tree: PyTree) -> dict[str, str]:
    """Path of each leaf -> its type and shape, e.g. {"['head']['w']": "float32[40,1]"}."""

    def describe(leaf: Any) -> str:
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    return {jax.tree_util.keystr(path): describe(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_fingerprint(saved: dict[str, str], needed: dict[str, str], where: Path) -> None:
    """Raise CheckpointMismatch that says what differs, if anything does."""
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
            f"{where}: this checkpoint was made by another learner, network or precision; what differs:\n"
            + "\n".join(shown)
        )


def digest_of(tree: PyTree) -> str:
    """A hash of all leaves, with their paths, types and shapes."""
    found = hashlib.sha256(json.dumps(fingerprint(tree)).encode())
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:32]


class Checkpoints:
    """A folder of checkpoints, one subfolder a step; orbax writes each beside and renames it into place.

    Each keeps its step, a hash of its arrays, whose bits nothing else guards, and the id of its run; one that is not
    what they say counts as damaged. Reading changes nothing in the folder, so it is safe beside a process that saves.
    Only one process may save.
    """

    def __init__(self, folder: Path, keep: int = 2, run: Callable[[], str | None] = lambda: None):
        self.folder, self.keep, self._run = folder, keep, run
        self._keeper: CheckpointManager | None = None

    def steps(self) -> list[int]:
        """The steps that there are, in order."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def restore(self, like: PyTree, most: int | None = None) -> "Restored":
        """The newest checkpoint that can be read, of those up to step `most`."""
        found = self._newest(like, most)
        for _ in range(RETRIES):
            if not found.damaged:
                break
            # The process that saves deletes old checkpoints: one that vanishes under a reader is not damaged.
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
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                damaged[step] = _first_line(error)
        return Restored(None, None, damaged)

    def _check(self, step: int, tree: PyTree) -> None:
        """A CheckpointError where the arrays are not those that were saved at this step by this run."""
        noted = json.loads((self.folder / str(step) / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] or {}
        if noted.get("step", step) != step:
            raise CheckpointError(f"it is a copy of meta-step {noted['step']}")
        if (own := self._run()) is not None and noted.get("run", own) != own:
            raise CheckpointError("it was saved by another run")
        if "sha256" in noted and noted["sha256"] != digest_of(tree):
            raise CheckpointError("its arrays are not those that were saved")

    def save(self, step: int, tree: PyTree) -> None:
        """Write a checkpoint; earlier ones stay whole if this fails."""
        with extra("cli", "A run's folder"):
            from orbax.checkpoint.args import StandardSave
        try:
            keeper = self._writer()
            if step in keeper.all_steps():
                return  # a kill came after it: training is deterministic, so these are the same bits
            needed = 2**16 + 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
            if shutil.disk_usage(self.folder).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with _quiet():
                noted = {"step": step, "sha256": digest_of(tree)} | ({"run": run} if (run := self._run()) else {})
                keeper.save(step, args=StandardSave(tree), force=True, custom_metadata=noted)
            sync(self.folder)
        except (OSError, ValueError, RuntimeError) as error:
            for _ in range(RETRIES):  # what is still being written comes back once or twice
                for partial in (partials := list(self.folder.glob("*tmp*"))):
                    shutil.rmtree(partial, ignore_errors=True)
                if not partials:
                    break
                time.sleep(0.1)
            why = explained(error) if isinstance(error, OSError) else _cause(error)
            raise NotSaved(
                f"{self.folder}: could not save meta-step {step} ({why.rstrip('.')}). Earlier checkpoints are whole: "
                "free some disk space, or mend the folder, and go on with --resume."
            ) from error

    def drop(self, after: int, damaged: Iterable[int] = ()) -> None:
        """Delete the checkpoints beyond a step and move damaged ones aside, so that these steps can be saved again."""
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
    """A checkpoint's step and tree (None if none can be read), and by step why newer ones cannot be read."""

    step: int | None
    tree: PyTree
    damaged: dict[int, str]


def unreadable(folder: Path, damaged: dict[int, str]) -> CheckpointError:
    """The error of a folder of which no checkpoint can be read."""
    problems = "; ".join(f"meta-step {step}: {why}" for step, why in damaged.items())
    return CheckpointError(
        f"{folder}: no checkpoint can be read ({problems}). The folder is damaged: delete the run and train again, or "
        "put a backup in its place."
    )


def _retrieved(record: logging.LogRecord) -> bool:
    """Not about an error of a second write, when the first one's is ours to say."""
    return "exception was never retrieved" not in record.getMessage()


@contextmanager
def _quiet() -> Iterator[None]:
    """What goes wrong is said by our own error: orbax logs tracebacks of its threads besides."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except BaseException:
        hook = sys.unraisablehook
        # Its other writes end later, and find their event loop gone.
        sys.unraisablehook = lambda what: None if "Event loop is closed" in str(what.exc_value) else hook(what)
        logging.getLogger("asyncio").addFilter(_retrieved)
        raise
    finally:
        log.setLevel(before)


def _cause(error: BaseException) -> str:
    """What the system said, out of tensorstore's long messages, which end in '... No space left on device [...]'."""
    text = " ".join(str(error).split())
    return text.rpartition(" [os_error")[0].rpartition(": ")[2] or _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
