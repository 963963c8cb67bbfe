"""Trained runs whose files are cut, emptied, edited, swapped, copied or gone, and reports of other times."""

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from bad_inputs.adapting import QUERY, SUPPORT, answer, plain, same, text, trained
from bad_inputs.judging import Case, cli

Damage = Callable[[Path], Any]
ARRAYS = "checkpoints/best/10/default/d"


def copied(folder: Path, damage: Damage, target: str = "score") -> Path:
    """A copy of the trained run, damaged."""
    shutil.copytree(trained(target), folder / "run")
    damage(folder / "run")
    return folder / "run"


def adapted(damage: Damage, folder: Path) -> Any:
    return answer(copied(folder, damage), text(SUPPORT), text(QUERY), folder)


def done(command: tuple[str, ...], damage: Damage, folder: Path) -> str:
    """What a command says of the damaged run."""
    run = copied(folder, damage)
    return cli(command[0], *(run if word == "RUN" else word for word in command[1:]))


@cache
def earlier() -> Any:
    """The answer of the checkpoint before the best one."""
    with tempfile.TemporaryDirectory() as folder:
        return adapted(lambda run: shutil.rmtree(run / "checkpoints" / "best" / "10"), Path(folder))


def as_earlier(found: Any) -> bool:
    return same(found, earlier()) and not same(found, plain())


def each(run: Path, part: str, change: Callable[[Path], Any]) -> None:
    """Change all files of a part of the run."""
    files = [file for file in (run / part).rglob("*") if file.is_file()]
    for file in [run / part] if (run / part).is_file() else files:
        change(file)


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)


def zeroed(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def removed(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def edited(name: str, change: Callable[[Any], Any]) -> Damage:
    def edit(run: Path) -> None:
        table = json.loads((run / name).read_text())
        change(table)
        (run / name).write_text(json.dumps(table))

    return edit


def written(name: str, raw: bytes) -> Damage:
    return lambda run: (run / name).write_bytes(raw)


def swapped(run: Path, a: str, b: str) -> None:
    folder = run / "checkpoints"
    (folder / a).rename(folder / "aside")
    (folder / b).rename(folder / a)
    (folder / "aside").rename(folder / b)


def of_another_run(run: Path, part: str = "checkpoints") -> None:
    """Checkpoints of a run with the same shapes."""
    other = json.loads((run / "training.json").read_text())
    assert other["id"]
    started = other | {"id": "0" * 16}  # as if this run were another than the one that saved them
    (run / "training.json").write_text(json.dumps(started))


def no_arrays(run: Path) -> None:
    for which in ("best", "last"):
        for step in (5, 10):
            shutil.rmtree(run / "checkpoints" / which / str(step) / "default")


WAYS: dict[str, Callable[[Path], Any]] = {"emptied": emptied, "cut": cut, "flipped": flipped, "zeroed": zeroed}
# Of the best checkpoint: the one before it answers in its place, with a warning.
BEST: dict[str, Damage] = {
    f"{part.rsplit('/', 1)[-1]} {name}": partial(lambda part, change, run: each(run, part, change), part, change)
    for part in (ARRAYS, "checkpoints/best/10/default/manifest.ocdbt", "checkpoints/best/10/default/_METADATA",
                 "checkpoints/best/10/_CHECKPOINT_METADATA")
    for name, change in WAYS.items() if not (part.endswith("METADATA") and name == "flipped")
} | {
    "without arrays": lambda run: removed(run / ARRAYS),
    "without a manifest": lambda run: removed(run / "checkpoints/best/10/default/manifest.ocdbt"),
    "without metadata": lambda run: removed(run / "checkpoints/best/10/_CHECKPOINT_METADATA"),
    "an empty folder": lambda run: (removed(run / "checkpoints/best/10"), (run / "checkpoints/best/10").mkdir()),
    "gone": lambda run: removed(run / "checkpoints/best/10"),
}  # fmt: skip
# The right answer all the same.
HARMLESS: dict[str, Damage] = {
    "no last": lambda run: removed(run / "checkpoints" / "last"),
    "no best": lambda run: removed(run / "checkpoints" / "best"),
    "an older one gone": lambda run: removed(run / "checkpoints" / "best" / "5"),
    "another folder beside": lambda run: (run / "checkpoints" / "best" / "old").mkdir(),
    "a file beside": written("checkpoints/best/notes.txt", b"x"),
    "no metrics": lambda run: removed(run / "metrics.jsonl"),
    "metrics cut": lambda run: cut(run / "metrics.jsonl"),
    "metrics of bytes": written("metrics.jsonl", b"\xff\0\n[1]\n3\n{}\n"),
    "no tensorboard": lambda run: removed(run / "tensorboard"),
    "no state.json": lambda run: removed(run / "state.json"),
    "no lock": lambda run: removed(run / "lock"),
    "a lock of bytes": written("lock", b"\xff\0"),
    "no training.json": lambda run: removed(run / "training.json"),
    "renamed": lambda run: run.rename(run.with_name("aside")) and shutil.copytree(run.with_name("aside"), run),
    "no table": edited("recipe.json", lambda t: t["tasks"].update(path="/nowhere/t.csv")),
}
BROKEN: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no checkpoints": (lambda run: removed(run / "checkpoints"), ("run", "no checkpoint")),
    "no arrays at all": (no_arrays, ("no checkpoint can be read", "train again")),
    "checkpoints of another run": (of_another_run, ("saved by another run",)),
    "steps swapped": (lambda run: [swapped(run, f"{w}/5", f"{w}/10") for w in ("best", "last")],
                      ("copy of meta-step",)),
    "best and last swapped": (lambda run: swapped(run, "best", "last"), ("no checkpoint can be read",)),
    "preparation.json empty": (written("preparation.json", b""), ("preparation.json", "damaged")),
    "preparation.json cut": (lambda run: cut(run / "preparation.json"), ("preparation.json", "damaged")),
    "preparation.json {}": (written("preparation.json", b"{}"), ("preparation.json", "damaged")),
    "preparation.json a list": (written("preparation.json", b"[]"), ("preparation.json", "damaged")),
    "preparation.json gone": (lambda run: removed(run / "preparation.json"), ("preparation.json", "missing")),
    "preparation.json with a column renamed": (
        edited("preparation.json", lambda t: t["columns"][0].update(name="h")), ("preparation.json", "edited")),
    "preparation.json without a column": (
        edited("preparation.json", lambda t: t["columns"].pop()), ("preparation.json", "edited")),
    "preparation.json with columns in another order": (
        edited("preparation.json", lambda t: t["columns"].reverse()), ("preparation.json", "edited")),
    "preparation.json with other levels": (
        edited("preparation.json", lambda t: t["columns"][1].update(levels=["green", "blue", "red"])),
        ("preparation.json", "edited")),
    "preparation.json with fewer levels": (
        edited("preparation.json", lambda t: t["columns"][1].update(levels=["blue"])), ("preparation.json", "damaged")),
    "preparation.json with another mean": (
        edited("preparation.json", lambda t: t["target"].update(mean=[0.0])), ("preparation.json", "edited")),
    "preparation.json with a deviation of 0": (
        edited("preparation.json", lambda t: t["target"].update(deviation=[0.0])), ("preparation.json", "above 0")),
    "preparation.json with nan": (
        edited("preparation.json", lambda t: t["target"].update(mean=[float("nan")])), ("preparation.json", "finite")),
    "preparation.json of a word": (
        edited("preparation.json", lambda t: t["target"].update(mean=["x"])), ("preparation.json", "damaged")),
    "state.json empty": (written("state.json", b""), ("state.json", "damaged")),
    "state.json a list": (written("state.json", b"[]"), ("state.json", "damaged")),
    "state.json of other shapes": (
        edited("state.json", lambda t: t.update(dict.fromkeys(t, "float32[3]"))), ("saved float32[3]",)),
    "training.json empty": (written("training.json", b""), ("training.json", "damaged")),
    "training.json cut": (lambda run: cut(run / "training.json"), ("training.json", "damaged")),
    "recipe.json gone": (lambda run: removed(run / "recipe.json"), ("recipe.json",)),
    "recipe.json cut": (lambda run: cut(run / "recipe.json"), ("recipe.json", "damaged")),
    "recipe.json of another learner": (edited("recipe.json", lambda t: t.update(learner="meta_sgd")), ("differences",)),
    "recipe.json of no learner": (edited("recipe.json", lambda t: t.update(learner="mamll")), ("learner", "mamll")),
    "recipe.json of another width": (
        edited("recipe.json", lambda t: t["network"].update(hidden=[5])), ("differences", "float32[5]")),
    "recipe.json of another likelihood": (
        edited("recipe.json", lambda t: t["likelihood"].update(name="categorical")), ("likelihood",)),
    "recipe.json of a wrong type": (
        edited("recipe.json", lambda t: t["learners"]["maml"].update(steps="two")), ("learner.steps", "'two'")),
    "recipe.json with a list for a table": (edited("recipe.json", lambda t: t.update(tasks=[])), ("recipe.tasks",)),
    "a file in place of the run": (lambda run: (removed(run), run.write_text("x")), ("run",)),
}  # fmt: skip
OTHERS: tuple[tuple[str, ...], ...] = (("evaluate", "RUN"), ("plot", "RUN"))


def judged(report: bytes | None, folder: Path) -> Any:
    """adapt --calibrated and compare on a report."""
    run = copied(folder, lambda run: None)
    if report is not None:
        (run / "report-own-calibrated.json").write_bytes(report)
    for name, rows in (("s.csv", SUPPORT), ("q.csv", QUERY)):
        (folder / name).write_bytes(text(rows))
    return cli("adapt", run, "--support", folder / "s.csv", "--query", folder / "q.csv", "--calibrated")


def compared(report: bytes, folder: Path) -> Any:
    run = copied(folder, written("report-own.json", report))
    return cli("compare", run, "--out", folder / "out")


REPORT = {"kind": "regression", "tasks": 2, "figures": {"mse": {"mean": 1.0, "interval": 0.5},
          "nll": {"mean": 1.0, "interval": None}}, "pooled": {"rmse": 1.0}, "curve": [], "target": "score"}  # fmt: skip
REPORTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "empty": (b"", ()),
    "{}": (b"{}", ("has no kind",)),
    "a list": (b"[1]", ("a table",)),
    "cut": (json.dumps(REPORT).encode()[:60], ()),
    "of bytes": (b"\xff\xfe\0", ()),
    "without figures": ({"figures": None}, ("figures",)),
    "with a word for a figure": ({"figures": {"mse": {"mean": "1", "interval": 0.5}}}, ("figures.mse.mean", "'1'")),
    "without an interval": ({"figures": {"mse": {"mean": 1.0}}}, ("figures.mse",)),
    "with a list of figures": ({"figures": [1.0]}, ("figures",)),
    "of another kind": ({"kind": "clustering"}, ("kind", "clustering")),
    "of no tasks": ({"tasks": 0}, ("tasks", "0")),
    "of a word of tasks": ({"tasks": "two"}, ("tasks", "'two'")),
    "with a word in its pooled": ({"pooled": {"rmse": "x"}}, ("pooled.rmse", "'x'")),
    "with a number for its curve": ({"curve": 3}, ("curve", "3")),
    "with a target of a number": ({"target": 3}, ("target", "3")),
    "with settings of a list": ({"settings": [1]}, ("settings",)),
}


def cases() -> list[Case]:
    found = [Case(f"best checkpoint {name}", partial(adapted, change), right=as_earlier)
             for name, change in BEST.items()]  # fmt: skip
    found += [Case(f"run with {name}", partial(adapted, change), right=lambda rows: same(rows, plain()))
              for name, change in HARMLESS.items()]  # fmt: skip
    for name, (change, says) in BROKEN.items():
        found.append(Case(f"trained run with {name}: adapt", partial(adapted, change), says))
        for command in OTHERS:
            found.append(Case(f"trained run with {name}: {command[0]}", partial(done, command, change), says))
    for name, (part, says) in REPORTS.items():
        raw = part if isinstance(part, bytes) else json.dumps(REPORT | part).encode()
        found.append(
            Case(f"report {name}: adapt", partial(judged, raw), ("report-own-calibrated.json", "again", *says))
        )
        found.append(Case(f"report {name}: compare", partial(compared, raw), ("report-own.json", "again", *says)))
    found += [
        Case("no calibrated report: adapt", partial(judged, None),
             ("report-own-calibrated.json", "--calibrated` first")),
        Case("report without settings: adapt", partial(judged, json.dumps(REPORT).encode()),
             ("settings have no", "again")),
        Case("report of two figures: compare", partial(compared, json.dumps(REPORT).encode()),
             right=lambda said: "1.000" in said),
    ]  # fmt: skip
    return found
