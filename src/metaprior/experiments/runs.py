"""A run is a folder: its recipe, its figures as JSON lines and TensorBoard events, its checkpoints and pictures.

    recipe.json   training.json   preparation.json (of a table)   state.json   lock
    metrics.jsonl   tensorboard/   checkpoints/{last,best}/STEP   report-*.json   plots/

One process trains a run, and holds its lock; any number may read it meanwhile. `Run.open` reads and changes nothing.
"""

import json
import shutil
import uuid
import warnings
from collections.abc import Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from metaprior.core.files import Lock, Locked, explained, remove_partials, sync, write_atomically
from metaprior.core.types import Splits
from metaprior.experiments.course import (
    OtherSettings,
    check_same_course,
    differences,
    digest,
    environment,
    recipe_digest,
    text_digest,
)
from metaprior.experiments.events import Events
from metaprior.tasks.tables.preparation import Preparation
from metaprior.training.checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    NotSaved,
    check_fingerprint,
    fingerprint,
    unreadable,
)
from metaprior.training.loop import Restored, Training, TrainState

Row = dict[str, float]
RESTORE = "put back the file that the training wrote, or train again"


class RunExists(ValueError):
    """A new run was to be written where one lies already."""


class Chosen(NamedTuple):
    """Parameters of a checkpoint: `which` is "best" or "last", `step` its meta-step."""

    params: PyTree
    which: str
    step: int


class Run:
    """A run's folder. `create` and `resume` lock it for training, as a `training.Recorder`; `open` only reads."""

    def __init__(self, folder: Path, lock: Lock | None = None):
        self.folder = folder
        self._lock = lock
        self._made: list[Path] = []  # folders that `create` made
        self.used: Chosen | None = None
        self._events: Events | None = None
        self._last, self._best = (
            Checkpoints(folder / "checkpoints" / which, run=lambda: _started(folder).get("id"))
            for which in ("last", "best")
        )

    @classmethod
    def create(cls, folder: Path | str, recipe: dict[str, Any], asked: dict[str, Any] | None = None) -> "Run":
        """A new run in a folder that is empty or not there yet, locked for training.

        Args:
            folder: where.
            recipe: the resolved recipe, as plain tables.
            asked: the options by name that the user set over the recipe, to tell them from the recipe's own later.

        Raises:
            RunExists: the folder is there and not empty.
            ValueError: the folder cannot be made or written to.
            Locked: another process is making a run there at this moment.
        """
        folder = Path(folder)
        made = []
        try:
            # A start that was killed before it wrote the recipe, which is last, left no run.
            remove_partials(folder)
            there = folder.exists()
            if there and (not folder.is_dir() or {p.name for p in folder.iterdir()} - {"lock", "training.json"}):
                raise RunExists(
                    f"--out {folder}: exists already and is not empty; go on with it by --resume, or name another "
                    "folder"
                )
            for path in reversed([folder, *folder.parents]):
                if not path.exists():
                    path.mkdir(exist_ok=True)
                    made.append(path)
            run = cls(folder, Lock(folder / "lock", str(folder)))
            run._made = made
            started = {"id": uuid.uuid4().hex[:16], "recipe": recipe_digest(recipe), "asked": asked or {}}
            write_atomically(folder / "training.json", json.dumps(started, indent=2) + "\n")
            write_atomically(folder / "recipe.json", json.dumps(recipe, indent=2) + "\n")
        except OSError as error:
            _remove(folder, made)
            raise ValueError(f"--out {explained(error, folder)}") from error
        return run

    @classmethod
    def open(cls, folder: Path | str) -> "Run":
        """An existing run, to be read: nothing in it is changed, so it may be in training."""
        folder = Path(folder)
        if not (folder / "recipe.json").is_file():
            raise ValueError(f"run: {folder} holds no run (no recipe.json in it); give the folder that `train` wrote")
        return cls(folder)

    def warn_if_edited(self) -> None:
        """A warning where recipe.json is another than the run was trained by."""
        if self.edited:
            _warn(
                f"{self.folder / 'recipe.json'}: was edited since the run was started, and is read as it stands now, "
                "though the parameters were trained by what stood there before"
            )

    @classmethod
    def resume(cls, folder: Path | str) -> "Run":
        """An existing run, to be trained on: locked for this process.

        Raises:
            ValueError: there is no run, or its folder cannot be written to.
            Locked: another process trains it; the message names it.
        """
        run = cls.open(folder)
        if run.edited:
            where = run.folder / "recipe.json"
            raise OtherSettings(f"--resume: {where} was edited since the run was started; {RESTORE}")
        try:
            run._lock = Lock(run.folder / "lock", str(run.folder))
        except OSError as error:
            raise ValueError(f"--resume: {explained(error, folder)}") from error
        return run

    @property
    def edited(self) -> bool:
        """Whether recipe.json is another than the run was started with, but for the length of the training."""
        return self.started.get("recipe", own := recipe_digest(self.recipe)) != own

    def close(self) -> None:
        """End training: the lock is free for others. The end of the process does the same."""
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def discard(self) -> None:
        """Remove a new run of which nothing has been recorded, and the folders that `create` made for it."""
        if self._lock is None or self.metrics() or self._last.steps():
            return
        self.close()
        _remove(self.folder, self._made)

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe that the run was started with."""
        return _table(self.folder / "recipe.json")

    @property
    def started(self) -> dict[str, Any]:
        """How the run was started: `training` (its settings), `asked` (options over the recipe), `under` (see
        `environment`; one entry a start or resume), `id` (of the run, also in its checkpoints), `recipe` and
        `preparation` (hashes of what it was started with). Empty for runs of a version that kept none."""
        return _started(self.folder)

    @property
    def preparation(self) -> Preparation | None:
        """What turned the table of training into what the learner saw; None for tasks that are no tables."""
        path, kept = self.folder / "preparation.json", self.started.get("preparation")
        if not path.is_file():
            if kept is not None:
                raise ValueError(f"{path}: is missing; {RESTORE}")
            return None
        try:
            text = path.read_text(encoding="utf-8")
            found = Preparation.from_json(text)
        except OSError as error:
            raise ValueError(explained(error, path)) from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {RESTORE}") from error
        if kept is not None and kept != text_digest(text):
            raise ValueError(f"{path}: was edited since the run was trained on it; {RESTORE}")
        return found

    def keep(self, preparation: Preparation) -> None:
        """Keep the table's preparation for all that reads the run later."""
        write_atomically(self.folder / "preparation.json", preparation.to_json())

    def metrics(self) -> list[Row]:
        """The rows of metrics.jsonl by step, one a step (the latest written); what a kill cut short is left out."""
        path = self.folder / "metrics.jsonl"
        rows: dict[int, Row] = {}
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
            # A line that a kill or a full disk cut short.
            with suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError):
                row = json.loads(line)
                if all(isinstance(value, int | float) for value in row.values()):
                    rows[int(row["step"])] = row
        return [rows[step] for step in sorted(rows)]

    def begin(
        self, like: TrainState, training: Training, resume: bool = False, splits: Splits | None = None
    ) -> Restored:
        """Start or go on: where the run stands, with what a kill left behind cleaned up.

        Figures, events and checkpoints beyond the newest whole state are dropped, and damaged checkpoints are moved
        aside. `like` itself is the state if nothing was saved yet. Warns if anything differs that the last bits depend
        on: see `environment`, and the data of the tasks, where `splits` is given.

        Raises:
            RunExists: the run was trained before, and resume is false.
            OtherSettings: settings differ from those the run was started with.
            CheckpointMismatch, CheckpointError: checkpoints of other shapes, or none that can be read.
        """
        self._training()
        if not resume and (self.metrics() or self._last.steps()):
            raise RunExists(f"{self.folder}: has been trained already; go on with it by resume=True.")
        started, settings = self.started, training.table()
        check_same_course(self.folder, started.get("training", settings), settings)
        restored, step, damaged = self._restored(like)
        if training.steps < step:
            raise OtherSettings(
                f"training.steps must be at least {step}, where {self.folder} stands, got {training.steps}."
            )
        for checkpoints in (self._last, self._best):
            checkpoints.drop(step, damaged[checkpoints.folder.name])
        for which, found in damaged.items():
            for at, why in found.items():
                _warn(f"{self.folder}: the checkpoint {which}/{at} cannot be read ({why}); it was moved aside")
        remove_partials(self.folder)
        if (figures := self.folder / "metrics.jsonl").exists():
            write_atomically(figures, "".join(json.dumps(row) + "\n" for row in restored.history))
        self._events = Events(self.folder / "tensorboard", after=step)
        self._note(started, settings, step, environment() | ({"tasks": digest(splits)} if splits else {}))
        return restored

    def restore(self, like: TrainState) -> Restored:
        """Where the run stands, as `begin` would find it; changes nothing."""
        return self._restored(like)[0]

    def record(self, row: Row) -> None:
        """Keep a chunk's figures. Those of a state that a kill kept from being saved are dropped by `begin`."""
        self._training()
        try:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if self._events is None:
                self._events = Events(self.folder / "tensorboard")
            self._events.write(row)
        except OSError as error:
            raise NotSaved(
                f"could not write figures ({explained(error, self.folder).rstrip('.')}). Checkpoints are whole: go on "
                "with --resume once that is mended."
            ) from error

    def save(self, state: TrainState, best: bool = False) -> None:
        """Keep the state, once; best: its parameters are the best so far.

        The figures reach the disk before the checkpoint: a state that is there has all its rows.
        """
        self._training()
        step = int(state.step)
        try:
            if not (self.folder / "state.json").is_file():
                write_atomically(self.folder / "state.json", json.dumps(fingerprint(state), indent=2) + "\n")
            if (self.folder / "metrics.jsonl").is_file():
                sync(self.folder / "metrics.jsonl")
                sync(self.folder)
        except OSError as error:
            raise NotSaved(f"could not save meta-step {step} ({explained(error, self.folder)})") from error
        if best:
            self._best.save(step, state.params)
        self._last.save(step, state)

    def params(self, like: TrainState, which: str = "best") -> PyTree:
        """The parameters of `chosen`, which `used` tells of afterwards."""
        self.used = self.chosen(like, which)
        return self.used.params

    @property
    def newest(self) -> int | None:
        """The meta-step of the newest checkpoint of those that validated best, or else of all; None without any."""
        steps = self._best.steps() or self._last.steps()
        return steps[-1] if steps else None

    def chosen(self, like: TrainState, which: str = "best") -> Chosen:
        """The parameters that validated best, or the last ones; `like` has the state's shapes.

        Without a validated checkpoint the last one is taken. Where the wanted one is damaged or missing, a warning says
        which one is used in its place.
        """
        self._check(like)
        damaged: dict[int, str] = {}
        if which == "best":
            found = self._best.restore(like.params)
            damaged = found.damaged
            if found.step is not None:
                if damaged:
                    _warn(f"{self._lost(damaged)}; an earlier one, of meta-step {found.step}, is used in its place")
                return Chosen(found.tree, "best", found.step)
        last = self._last.restore(like)
        if last.step is None:
            if last.damaged:
                raise unreadable(self._last.folder, last.damaged)
            raise CheckpointError(f"{self.folder}: holds no checkpoint yet; go on with its training by --resume")
        if which == "best":
            validated = [row for row in self.metrics() if isfinite(row.get("validation/nll", float("nan")))]
            lost = self._lost(damaged) if damaged else f"{self.folder}: the checkpoint that validated best is missing"
            if damaged or any(row["step"] <= last.step for row in validated):
                _warn(f"{lost}; the last one, of meta-step {last.step}, is used in its place")
        elif last.damaged:
            _warn(f"{self._lost(last.damaged, 'last')}; an earlier one, of meta-step {last.step}, is used in its place")
        return Chosen(last.tree.params, "last", last.step)

    def _lost(self, damaged: dict[int, str], which: str = "best") -> str:
        step = max(damaged)
        name = "that validated best" if which == "best" else "saved last"
        return f"{self.folder}: the checkpoint {name} (meta-step {step}) cannot be read ({damaged[step]})"

    def _restored(self, like: TrainState) -> tuple[Restored, int, dict[str, dict[int, str]]]:
        self._check(like)
        last = self._last.restore(like)
        if last.step is None and last.damaged:
            raise unreadable(self._last.folder, last.damaged)
        step, state = (0, like) if last.step is None else (last.step, last.tree)
        rows = [row for row in self.metrics() if row["step"] <= step]
        best = self._best.restore(like.params, most=step)
        # What there is to beat is what is kept, not what was once measured of a checkpoint that is lost.
        lowest = next((row["validation/nll"] for row in rows if row["step"] == best.step), float("inf"))
        return Restored(state, best.tree, lowest, rows), step, {"last": last.damaged, "best": best.damaged}

    def _note(self, started: dict[str, Any], settings: dict[str, Any], step: int, now: dict[str, Any]) -> None:
        """Write down the settings and under what the run goes on; warn if that has changed."""
        under = started.get("under", [])
        common = under[-1].keys() & now.keys() if under else ()
        if changed := differences({k: under[-1][k] for k in common}, {k: now[k] for k in common}):
            _warn(
                f"{self.folder}: goes on under other conditions than before ({'; '.join(changed)}), so its last bits "
                "may differ from those of a run that never stopped"
            )
        if (path := self.folder / "preparation.json").is_file():
            started = {"preparation": text_digest(path.read_text(encoding="utf-8"))} | started
        started = started | {"training": settings, "under": [*under, {"from": step} | now]}
        write_atomically(self.folder / "training.json", json.dumps(started, indent=2) + "\n")
        recipe = self.recipe
        if recipe.get("training", {}).get("steps", settings["steps"]) != settings["steps"]:
            recipe["training"]["steps"] = settings["steps"]
            write_atomically(self.folder / "recipe.json", json.dumps(recipe, indent=2) + "\n")

    def _training(self) -> None:
        if self._lock is None:
            raise ValueError(f"{self.folder}: is opened for reading; use Run.resume(folder) to train it.")

    def _check(self, like: TrainState) -> None:
        if (self.folder / "state.json").is_file():
            check_fingerprint(_table(self.folder / "state.json"), fingerprint(like), self.folder)


def _started(folder: Path) -> dict[str, Any]:
    return _table(folder / "training.json") if (folder / "training.json").is_file() else {}


def _table(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(explained(error, path)) from error
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); the run folder is damaged") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(found).__name__}; the run folder is damaged")
    return found


def _remove(folder: Path, made: list[Path]) -> None:
    """Remove a new run's few files, and the folders that were made for it where they are empty."""
    for name in ("tensorboard", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("recipe.json", "preparation.json", "training.json", "state.json", "metrics.jsonl", "lock"):
        with suppress(OSError):
            (folder / name).unlink()
    for path in reversed(made):
        with suppress(OSError):
            path.rmdir()


def _warn(message: str) -> None:
    warnings.warn(f"{message}.", stacklevel=3)


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


__all__ = [
    "CheckpointError",
    "CheckpointMismatch",
    "Locked",
    "OtherSettings",
    "Run",
    "RunExists",
    "digest",
    "write_atomically",
]
