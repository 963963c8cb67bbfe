"""A run is a folder: its recipe, its figures as JSON lines and TensorBoard events, its checkpoints and pictures.

    recipe.json   preparation.json (of a table)
    metrics.jsonl   tensorboard/   checkpoints/{last,best}/STEP   report-*.json   plots/
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from metaprior.checkpoint import CheckpointError, CheckpointMismatch, Checkpoints, check_fingerprint, fingerprint
from metaprior.tasks.preparation import Preparation
from metaprior.training import TrainState


class RunExists(ValueError):
    """A new run was to be written where one lies already."""


class Run:
    """A run's folder; `record` and `restore` make it a `training.Recorder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._writer: Any = None
        self._last: Checkpoints | None = None
        self._best: Checkpoints | None = None

    @classmethod
    def create(cls, folder: Path | str, recipe: dict[str, Any]) -> "Run":
        """A new run in a folder that is empty or not there yet."""
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunExists(
                f"--out {folder}: exists already and is not empty; go on with it by --resume, or name another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "recipe.json", json.dumps(recipe, indent=2) + "\n")
        return cls(folder)

    @classmethod
    def open(cls, folder: Path | str) -> "Run":
        """An existing run."""
        folder = Path(folder)
        if not (folder / "recipe.json").is_file():
            raise ValueError(f"run: {folder} holds no run (no recipe.json in it); give the folder that `train` wrote")
        return cls(folder)

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe that the run was started with."""
        path = self.folder / "recipe.json"
        try:
            return json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: is not JSON ({error}); the run folder is damaged") from error

    @property
    def preparation(self) -> Preparation | None:
        """What turned the table of training into what the learner saw; None for tasks that are no tables."""
        path = self.folder / "preparation.json"
        return Preparation.from_json(path.read_text()) if path.is_file() else None

    def keep(self, preparation: Preparation) -> None:
        """Keep the table's preparation for all that reads the run later."""
        write_atomically(self.folder / "preparation.json", preparation.to_json())

    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl; a last line that a kill cut short is left out."""
        path = self.folder / "metrics.jsonl"
        rows = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def record(self, row: dict[str, float]) -> None:
        """Keep a chunk's figures. Those of a state that a kill kept from being saved are dropped by `restore`."""
        try:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._tensorboard(row)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: could not write figures ({error}); checkpoints are whole. Free some disk space and go "
                "on with --resume"
            ) from error

    def save(self, state: TrainState, best: bool = False) -> None:
        """Keep the state, once; best: its parameters are the best so far."""
        step = int(state.step)
        if not (self.folder / "state.json").is_file():
            write_atomically(self.folder / "state.json", json.dumps(fingerprint(state), indent=2) + "\n")
        if best:
            self._checkpoints("best").save(step, state.params)
        self._checkpoints("last").save(step, state)

    def restore(self, like: TrainState) -> tuple[TrainState, PyTree | None, list[dict[str, float]]]:
        """Where the run stands: state, best parameters and figures; `like` itself if nothing was saved yet."""
        self._check(like)
        found = self._checkpoints("last").restore(like)
        step, state = found if found is not None else (0, like)
        rows = [row for row in self.metrics() if row["step"] <= step]
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        best = self._checkpoints("best").restore(like.params)
        return state, None if best is None or best[0] > step else best[1], rows

    def params(self, like: TrainState, which: str = "best") -> PyTree:
        """The parameters that validated best (or the last, if none were validated); `like` has the state's shapes."""
        self._check(like)
        if which == "best" and (found := self._checkpoints("best").restore(like.params)) is not None:
            return found[1]
        found = self._checkpoints("last").restore(like)
        if found is None:
            raise CheckpointError(f"{self.folder}: holds no checkpoint yet; go on with its training by --resume")
        return found[1].params

    def _check(self, like: TrainState) -> None:
        path = self.folder / "state.json"
        if path.is_file():
            check_fingerprint(json.loads(path.read_text()), fingerprint(like), self.folder)

    def _checkpoints(self, which: str) -> Checkpoints:
        name = f"_{which}"
        if getattr(self, name) is None:
            folder = self.folder / "checkpoints" / which
            folder.mkdir(parents=True, exist_ok=True)
            setattr(self, name, Checkpoints(folder, keep=2 if which == "last" else 1))
        return getattr(self, name)

    def _tensorboard(self, row: dict[str, float]) -> None:
        if self._writer is None:
            from tensorboardX import SummaryWriter  # slow to import, and only training writes events

            self._writer = SummaryWriter(str(self.folder / "tensorboard"))
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))
        self._writer.flush()


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader sees the old text or the new one, never half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


__all__ = ["CheckpointError", "CheckpointMismatch", "Run", "RunExists", "write_atomically"]


def told_apart(runs: Sequence[Run]) -> dict[str, Run]:
    """Each run by its learner's name, or by its folder's where two have one learner."""
    if not runs:
        raise ValueError("runs: came none, needs the folder of at least one run")
    learners = [run.recipe["learner"] for run in runs]
    names: dict[str, Run] = {}
    for run, learner in zip(runs, learners, strict=True):
        name = learner if learners.count(learner) == 1 else run.folder.name
        names[name if name not in names else str(run.folder)] = run
    return names
