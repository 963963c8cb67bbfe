"""Checkpoints by orbax: atomic, the last two and the best one, refused where they do not fit."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written."""


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


class Checkpoints:
    """A folder of checkpoints, one subfolder a step; orbax writes each beside and renames it into place."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self.folder = folder
        self._keeper = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, tree: PyTree) -> None:
        """Write a checkpoint; earlier ones stay whole if this fails."""
        if step in self._keeper.all_steps():
            return  # a kill came after it: training is deterministic, so these are the same bits
        try:
            self._keeper.save(step, args=ocp.args.StandardSave(tree), force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.folder}: could not save meta-step {step} ({_first_line(error)}); earlier checkpoints are "
                "whole. Free some disk space and go on with --resume"
            ) from error

    def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
        """The newest checkpoint that can be read, as (step, tree); None where there is none at all."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        problems = []
        for step in sorted(self._keeper.all_steps(), reverse=True):
            try:
                return step, self._keeper.restore(step, args=ocp.args.StandardRestore(shapes))
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                problems.append(f"meta-step {step}: {_first_line(error)}")
                self._forget(step)
        if problems:
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be read ({'; '.join(problems)}). The folder is damaged: delete the "
                "run and train again, or put a backup in its place"
            )
        return None

    def _forget(self, step: int) -> None:
        """Move a damaged checkpoint aside, so that the step can be saved again."""
        damaged = self.folder / str(step)
        aside = self.folder.with_name(f"{self.folder.name}-damaged-{step}")
        if damaged.is_dir() and not aside.exists():
            damaged.rename(aside)
        self._keeper.reload()


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
