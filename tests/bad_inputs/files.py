"""NPZ files, pictures, archives and run folders that are damaged or of another form."""

import io
import json
import os
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bad_inputs.judging import Case, cli
from metaprior.tasks import images, read_examples


def picture(size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, 128).save(file, "PNG")
    return file.getvalue()


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "d.npz", **arrays)
    return folder / "d.npz"


GOOD_X, GOOD_Y = np.zeros((40, 8, 8), np.uint8), np.repeat(np.arange(10), 4)
NPZ: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no images": ({"other": GOOD_X}, ("d.npz", "images")),
    "float images": ({"images": GOOD_X.astype(float), "labels": GOOD_Y}, ("d.npz", "float64")),
    "flat images": ({"images": GOOD_X.reshape(40, 64), "labels": GOOD_Y}, ("d.npz", "(40, 64)")),
    "no labels": ({"images": GOOD_X}, ("d.npz", "label")),
    "few labels": ({"images": GOOD_X, "labels": GOOD_Y[:9]}, ("d.npz", "9")),
    "object labels": ({"images": GOOD_X, "labels": np.asarray([None] * 40, object)}, ("d.npz",)),
    "no picture": ({"images": GOOD_X[:0], "labels": GOOD_Y[:0]}, ("d.npz",)),
    "two classes": ({"images": GOOD_X, "labels": GOOD_Y % 2}, ("class",)),
}


def in_folders(folder: Path, data: bytes, name: str = "1.png") -> Path:
    for c in range(10):
        (folder / "p" / f"c{c}").mkdir(parents=True)
        for i in range(3):
            (folder / "p" / f"c{c}" / f"{i}.png").write_bytes(picture())
    (folder / "p" / "c0" / name).write_bytes(data)
    return folder / "p"


def source(path: Any) -> Any:
    return images(path=path, way=2, shot=1, query=1, test_query=1, size=8, channels=1, split=(0.4, 0.3, 0.3))


def zipped(folder: Path, members: dict[str, bytes], cut: int | None = None) -> Path:
    path = folder / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    if cut is not None:
        path.write_bytes(path.read_bytes()[:cut])
    return path


def tarred(folder: Path, kind: bytes, target: str) -> Path:
    with tarfile.open(folder / "a.tar", "w") as file:
        member = tarfile.TarInfo("c0/1.png")
        member.type, member.linkname = kind, target
        file.addfile(member)
    return folder / "a.tar"


def damaged_run(change: Any, command: tuple[str, ...], folder: Path) -> Any:
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    recipe = {"name": "sinusoid", "learner": "maml", "tasks": {"name": "sinusoid"}, "network": {"name": "mlp"},
              "likelihood": {"name": "gaussian"}}  # fmt: skip
    (run / "recipe.json").write_text(json.dumps(recipe))
    change(run)
    return cli(command[0], run, *command[1:])


def three(splits: Any) -> bool:
    return len(splits) == 3


def with_fifo(folder: Path) -> Any:
    path = in_folders(folder, picture())
    os.mkfifo(path / "c0" / "x.png")
    return source(path)


def remove(run: Path) -> None:
    (run / "recipe.json").unlink()


def recipe_text(text: str) -> Any:
    return lambda run: (run / "recipe.json").write_text(text)


def cases() -> list[Case]:
    found = [
        Case(f"npz {name}", partial(lambda arrays, f: source(npz(f, **arrays)), arrays), says)
        for name, (arrays, says) in NPZ.items()
    ]
    whole = {"images": GOOD_X, "labels": GOOD_Y}
    found.append(Case("npz good", lambda f: source(npz(f, **whole)), right=lambda s: len(s) == 3))

    def cut(share: float, f: Path) -> Any:
        path = npz(f, **whole)
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * share)])
        return source(path)

    found += [Case(f"npz cut at {share}", partial(cut, share), ("d.npz",)) for share in (0, 0.1, 0.5, 0.9, 0.99)]
    broken = {"empty": b"", "text": b"hello", "cut": picture()[:30], "zeros": b"\0" * 100}
    found += [
        Case(f"picture {name}", partial(lambda raw, f: source(in_folders(f, raw)), raw), ("1.png",))
        for name, raw in broken.items()
    ]
    found += [
        Case("pictures", lambda f: source(in_folders(f, picture())), right=three),
        Case("pictures of another size", lambda f: source(in_folders(f, picture((20, 5)))), right=three),
        Case("pictures: a fifo", with_fifo, ("x.png",)),
        Case("pictures: an empty folder", lambda f: source(f), ("picture",)),
        Case("pictures: nowhere", lambda f: source(f / "nowhere"), ("nowhere",)),
        Case("pictures: a number", lambda f: source(3), ("path", "3")),
        Case("pictures: None", lambda f: source(None), ("path", "None")),
        Case("zip cut", lambda f: source(zipped(f, {"c0/1.png": picture()}, 40)), ("a.zip",)),
        Case("zip of text", lambda f: source(zipped(f, {"c0/1.txt": b"x"})), ("a.zip", "picture")),
        Case("zip of nothing", lambda f: source(zipped(f, {})), ("a.zip",)),
        Case("zip of broken pictures", lambda f: source(zipped(f, {"c0/1.png": b"x", "c1/1.png": b"y"})), ("1.png",)),
        Case("tar with a link", lambda f: source(tarred(f, tarfile.SYMTYPE, "/etc/passwd")), ("a.tar",)),
        Case("tar with a fifo", lambda f: source(tarred(f, tarfile.FIFOTYPE, "")), ("a.tar",)),
    ]  # fmt: skip
    for name, text in {"empty": "", "text": "hello", "of another kind": '{"a": 1}'}.items():

        def examples(text: str, f: Path) -> Any:
            (f / "e.csv").write_text(text)
            return read_examples(f / "e.csv", target="y")

        found.append(Case(f"examples {name}", partial(examples, text), ("e.csv",)))
    damage = {
        "no recipe": remove,
        "empty recipe": recipe_text(""),
        "recipe is no json": recipe_text("{"),
        "recipe is a list": recipe_text("[1]"),
        "recipe of another version": recipe_text('{"name": "x", "no_such_table": {}}'),
        "recipe of a wrong type": recipe_text('{"name": "x", "training": 3}'),
        "no checkpoint": lambda run: None,
        "checkpoints is a file": lambda run: ((run / "checkpoints").rmdir(), (run / "checkpoints").write_text("x")),
        "binary metrics": lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\0"),
    }
    for name, change in damage.items():
        for command in (("evaluate",), ("plot",), ("adapt", "--support", "s.csv", "--query", "q.csv")):
            found.append(Case(f"run with {name}: {command[0]}", partial(damaged_run, change, command), ("run",)))
    return found
