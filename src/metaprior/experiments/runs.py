"""Run folders: each holds a run's recipe, metrics (JSON lines and TensorBoard events), checkpoints, reports and plots.

    recipe.json   training.json   preparation.json (for a table)   state.json   lock
    metrics.jsonl   tensorboard/   checkpoints/{last,best}/STEP   report-*.json   plots/

One process trains a run and holds its lock. Any number of processes may read it at the same time. `Run.open` only reads
and changes nothing.
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
RESTORE = "Restore the file that the training wrote, or train again."


class RunExists(ValueError):
    """A new run cannot be written where there is one already."""


class Chosen(NamedTuple):
    """The parameters of a checkpoint.

    Attributes:
        params: The parameters.
        which: "best" or "last".
        step: The checkpoint's meta-step.
    """

    params: PyTree
    which: str
    step: int


class Run:
    """A run's folder.

    `create` and `resume` lock it for training, and the run is then a `training.Recorder`. `open` only reads.

    Args:
        folder: The folder.
        lock: The lock on the folder, or None if it is only read.

    Attributes:
        folder: The folder.
        used: The checkpoint that `params` returned last, or None.
    """

    def __init__(self, folder: Path, lock: Lock | None = None):
        self.folder = folder
        self._lock = lock
        self._made: list[Path] = []  # the folders that `create` made
        self.used: Chosen | None = None
        self._events: Events | None = None
        self._last, self._best = (
            Checkpoints(folder / "checkpoints" / which, run=lambda: _started(folder).get("id"))
            for which in ("last", "best")
        )

    @classmethod
    def create(cls, folder: Path | str, recipe: dict[str, Any], asked: dict[str, Any] | None = None) -> "Run":
        """Creates a run and locks it for training.

        Args:
            folder: An empty folder, or one that does not exist yet.
            recipe: The resolved recipe, as plain tables.
            asked: The options by name that the user set in addition to the recipe. They are stored separately, so that
                they can be distinguished from the recipe's options later.

        Raises:
            RunExists: The folder is not empty.
            ValueError: The folder cannot be made or written to.
            Locked: Another process is creating a run there.
        """
        folder = Path(folder)
        made = []
        try:
            # The recipe is written last. A start that was killed before that left no run.
            remove_partials(folder)
            there = folder.exists()
            if there and (not folder.is_dir() or {p.name for p in folder.iterdir()} - {"lock", "training.json"}):
                raise RunExists(
                    f"--out must be an empty or a new folder, got {folder}, which is not empty. Continue its run with "
                    "--resume, or give another folder."
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
        """Opens an existing run for reading. Nothing in it is changed, so it may be in training.

        Args:
            folder: The run's folder.

        Raises:
            ValueError: There is no run in the folder.
        """
        folder = Path(folder)
        if not (folder / "recipe.json").is_file():
            raise ValueError(
                f"run must be the folder of a run, got {folder}, which has no recipe.json. Give the folder that "
                "`metaprior train` wrote."
            )
        return cls(folder)

    def warn_if_edited(self) -> None:
        """Warns if recipe.json was edited after the run was started."""
        if self.edited:
            _warn(
                f"{self.folder / 'recipe.json'} was edited after the run was started. The edited recipe is used, but "
                "the parameters were trained with the original one"
            )

    @classmethod
    def resume(cls, folder: Path | str) -> "Run":
        """Opens an existing run for further training and locks it for this process.

        Args:
            folder: The run's folder.

        Raises:
            ValueError: There is no run in the folder, or the folder cannot be written to.
            OtherSettings: Recipe.json was edited after the run was started.
            Locked: Another process is training the run. The message names it.
        """
        run = cls.open(folder)
        if run.edited:
            where = run.folder / "recipe.json"
            raise OtherSettings(f"--resume: {where} was edited after the run was started. {RESTORE}")
        try:
            run._lock = Lock(run.folder / "lock", str(run.folder))
        except OSError as error:
            raise ValueError(f"--resume: {explained(error, folder)}") from error
        return run

    @property
    def edited(self) -> bool:
        """Whether recipe.json was edited after the run was started, other than its number of meta-steps."""
        return self.started.get("recipe", own := recipe_digest(self.recipe)) != own

    def close(self) -> None:
        """Ends training and releases the lock. The end of the process does the same."""
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
        """Removes a new run without any metrics or checkpoints, and the folders that `create` made for it."""
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
        """How the run was started, or an empty table for runs of versions that did not store it.

        `training` holds the settings, `asked` the options that the user set in addition to the recipe, `under` the
        environment (see `environment`) of each start and resume, `id` the run's id, which its checkpoints hold too, and
        `recipe` and `preparation` the hashes of the original files.
        """
        return _started(self.folder)

    @property
    def preparation(self) -> Preparation | None:
        """How the training table was converted to the learner's inputs and targets, or None if there is no table."""
        path, kept = self.folder / "preparation.json", self.started.get("preparation")
        if not path.is_file():
            if kept is not None:
                raise ValueError(f"{path} is missing. {RESTORE}")
            return None
        try:
            text = path.read_text(encoding="utf-8")
            found = Preparation.from_json(text)
        except OSError as error:
            raise ValueError(explained(error, path)) from error
        except ValueError as error:
            raise ValueError(f"{path}: {str(error).rstrip('.')}. {RESTORE}") from error
        if kept is not None and kept != text_digest(text):
            raise ValueError(f"{path} was edited after the run was trained with it. {RESTORE}")
        return found

    def keep(self, preparation: Preparation) -> None:
        """Saves the preparation of a table in the run's folder, for evaluation and predictions.

        Args:
            preparation: The preparation.
        """
        write_atomically(self.folder / "preparation.json", preparation.to_json())

    def keep_start(self, record: dict[str, Any]) -> None:
        """Saves from which other run's network this run starts, and checks on resuming that it is the same.

        Args:
            record: The record that `start.begun` returns; empty if training starts from drawn parameters.

        Raises:
            OtherSettings: The other run holds another network now.
        """
        started = self.started
        if "start" not in started and record:
            write_atomically(self.folder / "training.json", json.dumps(started | {"start": record}, indent=2) + "\n")
        elif started.get("start", {}).get("network") != record.get("network"):
            raise OtherSettings(
                f"--resume: {self.folder} was started from the network of {started['start']['run']}, which holds "
                "another one now. Restore that run, or train again in another folder."
            )

    def metrics(self) -> list[Row]:
        """Returns the rows of metrics.jsonl in the order of meta-steps.

        If a meta-step has several rows, the last written one counts. Incomplete lines are left out.
        """
        path = self.folder / "metrics.jsonl"
        rows: dict[int, Row] = {}
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
            # A line is incomplete if the process was killed or the disk was full.
            with suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError):
                row = json.loads(line)
                if all(isinstance(value, int | float) for value in row.values()):
                    rows[int(row["step"])] = row
        return [rows[step] for step in sorted(rows)]

    def begin(
        self, like: TrainState, training: Training, resume: bool = False, splits: Splits | None = None
    ) -> Restored:
        """Starts or resumes training, and cleans up after a killed process.

        Metrics, events and checkpoints after the newest intact state are removed, and damaged checkpoints are moved
        aside. A warning says if anything changed that the exact bits of training depend on: see `environment`, and the
        data of the tasks.

        Args:
            like: A state with the structure, types and shapes of the run's. It is the state to start from if nothing
                was saved yet.
            training: The settings.
            resume: Whether the run may have been trained before.
            splits: The task sources, to check their data.

        Returns:
            The state to continue from.

        Raises:
            RunExists: The run was trained before, and `resume` is false.
            OtherSettings: The settings differ from those that the run was started with.
            CheckpointMismatch: The checkpoints have other shapes.
            CheckpointError: No checkpoint can be read.
        """
        self._training()
        if not resume and (self.metrics() or self._last.steps()):
            raise RunExists(f"{self.folder} has been trained already. Continue with resume=True.")
        started, settings = self.started, training.table()
        check_same_course(self.folder, started.get("training", settings), settings)
        restored, step, damaged = self._restored(like)
        if training.steps < step:
            raise OtherSettings(
                f"training.steps must be at least {step}, the current meta-step of {self.folder}, got {training.steps}."
            )
        for checkpoints in (self._last, self._best):
            checkpoints.drop(step, damaged[checkpoints.folder.name])
        for which, found in damaged.items():
            for at, why in found.items():
                _warn(f"{self.folder}: the checkpoint {which}/{at} cannot be read ({why}). It was moved aside")
        remove_partials(self.folder)
        if (figures := self.folder / "metrics.jsonl").exists():
            write_atomically(figures, "".join(json.dumps(row) + "\n" for row in restored.history))
        self._events = Events(self.folder / "tensorboard", after=step)
        self._note(started, settings, step, environment() | ({"tasks": digest(splits)} if splits else {}))
        return restored

    def restore(self, like: TrainState) -> Restored:
        """Returns the state that `begin` would continue from, without changing anything.

        Args:
            like: A state with the structure, types and shapes of the run's.
        """
        return self._restored(like)[0]

    def record(self, row: Row) -> None:
        """Saves the metrics of a chunk. If the process is killed before the state is saved, `begin` removes them.

        Args:
            row: The metrics by name, with the meta-step as "step".

        Raises:
            NotSaved: They cannot be written.
        """
        self._training()
        try:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if self._events is None:
                self._events = Events(self.folder / "tensorboard")
            self._events.write(row)
        except OSError as error:
            raise NotSaved(
                f"could not write metrics ({explained(error, self.folder).rstrip('.')}). Checkpoints are intact. Fix "
                "the problem, then continue with --resume."
            ) from error

    def save(self, state: TrainState, best: bool = False) -> None:
        """Saves a checkpoint of the state.

        The metrics are written to the disk before the checkpoint, so a saved state always has all its metrics.

        Args:
            state: The state.
            best: Whether its parameters have the lowest validation nll so far.

        Raises:
            NotSaved: It cannot be written.
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
        """Returns the parameters of `chosen`, and stores in `used` which ones they are.

        Args:
            like: A state with the structure, types and shapes of the run's.
            which: "best" or "last".
        """
        self.used = self.chosen(like, which)
        return self.used.params

    @property
    def newest(self) -> int | None:
        """The meta-step of the newest best checkpoint or, failing that, of the newest one. None without any."""
        steps = self._best.steps() or self._last.steps()
        return steps[-1] if steps else None

    def chosen(self, like: TrainState, which: str = "best") -> Chosen:
        """Returns the parameters with the lowest validation nll, or the last ones.

        Without a validated checkpoint, the last one is used. If the requested checkpoint is damaged or missing, a
        warning says which one is used instead.

        Args:
            like: A state with the structure, types and shapes of the run's.
            which: "best" or "last".

        Raises:
            CheckpointMismatch: The checkpoints have other shapes.
            CheckpointError: There is no checkpoint, or none can be read.
        """
        self._check(like)
        damaged: dict[int, str] = {}
        if which == "best":
            found = self._best.restore(like.params)
            damaged = found.damaged
            if found.step is not None:
                if damaged:
                    _warn(f"{self._lost(damaged)}. An earlier one, of meta-step {found.step}, is used instead")
                return Chosen(found.tree, "best", found.step)
        last = self._last.restore(like)
        if last.step is None:
            if last.damaged:
                raise unreadable(self._last.folder, last.damaged)
            raise CheckpointError(f"{self.folder} has no checkpoint yet. Continue its training with --resume.")
        if which == "best":
            validated = [row for row in self.metrics() if isfinite(row.get("validation/nll", float("nan")))]
            lost = self._lost(damaged) if damaged else f"{self.folder}: the best checkpoint is missing"
            if damaged or any(row["step"] <= last.step for row in validated):
                _warn(f"{lost}. The last one, of meta-step {last.step}, is used instead")
        elif last.damaged:
            _warn(f"{self._lost(last.damaged, 'last')}. An earlier one, of meta-step {last.step}, is used instead")
        return Chosen(last.tree.params, "last", last.step)

    def _lost(self, damaged: dict[int, str], which: str = "best") -> str:
        step = max(damaged)
        name = "best" if which == "best" else "last"
        return f"{self.folder}: the {name} checkpoint (meta-step {step}) cannot be read ({damaged[step]})"

    def _restored(self, like: TrainState) -> tuple[Restored, int, dict[str, dict[int, str]]]:
        self._check(like)
        last = self._last.restore(like)
        if last.step is None and last.damaged:
            raise unreadable(self._last.folder, last.damaged)
        step, state = (0, like) if last.step is None else (last.step, last.tree)
        rows = [row for row in self.metrics() if row["step"] <= step]
        best = self._best.restore(like.params, most=step)
        # The nll to improve on is that of the best checkpoint that still exists, not that of a lost one.
        lowest = next((row["validation/nll"] for row in rows if row["step"] == best.step), float("inf"))
        return Restored(state, best.tree, lowest, rows), step, {"last": last.damaged, "best": best.damaged}

    def _note(self, started: dict[str, Any], settings: dict[str, Any], step: int, now: dict[str, Any]) -> None:
        """Stores the settings and the environment of a start or resume, and warns if the environment has changed."""
        under = started.get("under", [])
        common = under[-1].keys() & now.keys() if under else ()
        if changed := differences({k: under[-1][k] for k in common}, {k: now[k] for k in common}):
            _warn(
                f"{self.folder}: the environment has changed ({'; '.join(changed)}), so the results may differ in the "
                "last digits from those of an uninterrupted run"
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
            raise ValueError(f"{self.folder} is open for reading only. Use Run.resume(folder) to train it.")

    def _check(self, like: TrainState) -> None:
        if (self.folder / "state.json").is_file():
            check_fingerprint(_table(self.folder / "state.json"), fingerprint(like), self.folder)


def _started(folder: Path) -> dict[str, Any]:
    return _table(folder / "training.json") if (folder / "training.json").is_file() else {}


def _table(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file of a run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(explained(error, path)) from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}). The run folder is damaged.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}. The run folder is damaged.")
    return found


def _remove(folder: Path, made: list[Path]) -> None:
    """Removes the files of a new run, and the folders that were made for it if they are empty."""
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
    """Returns runs by distinct names.

    Args:
        runs: The runs.

    Returns:
        Each run by the name of its learner, or of its folder if several runs have the same learner.

    Raises:
        ValueError: There are no runs.
    """
    if not runs:
        raise ValueError("runs must be the folders of at least one run, got none.")
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
