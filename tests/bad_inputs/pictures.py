"""Pictures of every mode, folders and archives as people have them, and NPZ files of another form."""

import io
import os
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bad_inputs.judging import Case
from metaprior.tasks import images, read_examples

GREY = np.zeros((8, 8), np.uint8)
GREY[1:6, 2:5] = 204
INK = np.zeros((8, 8, 4), np.uint8)  # black ink on nothing, as drawing programs save it
INK[1:6, 2:5, 3] = 255
TURNED = Image.Exif()
TURNED[0x112] = 3  # upside down


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


GOOD, OTHER = encoded(Image.fromarray(GREY)), encoded(Image.fromarray(255 - GREY))
NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)))


def looks(expected: np.ndarray, tolerance: float = 0.0) -> Callable[[Any], bool]:
    """Whether the first example is this picture, bytes [8, 8]."""
    return lambda found: bool(np.abs(found.x[0, ..., 0] * 255 - expected).max() <= tolerance + 1e-3)


# name: (the file's name, its bytes, what it looks like)
MODES: dict[str, tuple[str, bytes, np.ndarray, float]] = {
    "grey": ("a.png", GOOD, GREY, 0),
    "upper-case suffix": ("a.PNG", GOOD, GREY, 0),
    "16 bit png": ("a.png", encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY, 0),
    "16 bit tiff": ("a.tif", encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), GREY, 0),
    "palette": ("a.png", encoded(Image.fromarray(GREY).convert("P")), GREY, 0),
    "palette with a transparent colour": ("a.png", encoded(Image.fromarray(GREY).convert("P"), transparency=0),
                                          np.where(GREY == 0, 255, GREY), 0),
    "colour": ("a.png", encoded(Image.fromarray(GREY).convert("RGB")), GREY, 1),
    "ink on nothing": ("a.png", encoded(Image.fromarray(INK)), 255 - INK[..., 3], 0),
    "grey with transparency": ("a.png", encoded(Image.fromarray(INK).convert("LA")), 255 - INK[..., 3], 0),
    "one bit": ("a.png", encoded(Image.fromarray(GREY > 100)), np.where(GREY > 100, 255, 0), 0),
    "cmyk": ("a.tif", encoded(Image.fromarray(GREY).convert("CMYK"), "TIFF"), GREY, 2),
    "gif": ("a.gif", encoded(Image.fromarray(GREY), "GIF"), GREY, 0),
    "bmp named png": ("a.png", encoded(Image.fromarray(GREY), "BMP"), GREY, 0),
    "upside down by its tag": ("a.png", encoded(Image.fromarray(GREY), exif=TURNED), GREY[::-1, ::-1], 0),
    "twice the size": ("a.png", encoded(Image.fromarray(GREY).resize((16, 16), 0)), GREY, 60),
}  # fmt: skip
# name: (the file's name, its bytes, the error's words)
BROKEN: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "32 bit integers": ("a.tif", encoded(Image.fromarray(GREY.astype(np.int32) * 257), "TIFF"), ("a.tif", "mode I")),
    "floats": ("a.tif", encoded(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"), ("a.tif", "mode F")),
    "lab": ("a.tif", encoded(Image.fromarray(GREY).convert("RGB").convert("LAB"), "TIFF"), ("a.tif", "mode LAB")),
    "empty": ("a.png", b"", ("a.png", "truncated")),
    "cut": ("a.png", GOOD[:50], ("a.png", "truncated")),
    "cut in its data": ("a.png", NOISE[: len(NOISE) // 2], ("a.png", "truncated")),
    "text": ("a.png", b"hello, I am text", ("a.png",)),
    "a page of the web": ("a.jpg", b"<!DOCTYPE html><html>404</html>", ("a.jpg",)),
    "svg": ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", ("a.png",)),
    "pdf": ("a.png", b"%PDF-1.7\n", ("a.png",)),
    "another kind of file": ("a.docx", b"PK\3\4", ("a.docx",)),
    "no suffix": ("a", GOOD, ("/a",)),
}  # fmt: skip


def one(name: str, data: bytes, folder: Path) -> Any:
    (folder / name).write_bytes(data)
    return read_examples(folder / name, labelled=False, size=8, channels=1)


def in_classes(folder: Path, classes: tuple[str, ...] = ("a", "b"), number: int = 2) -> Path:
    for name in classes:
        (folder / "p" / name).mkdir(parents=True)
        for i in range(number):
            (folder / "p" / name / f"{i}.png").write_bytes(GOOD)
    return folder / "p"


def read(path: Path, *, labelled: bool = True) -> Any:
    return read_examples(path, labelled=labelled, size=8, channels=1)


def linked_class(folder: Path) -> Any:
    path = in_classes(folder)
    (folder / "c").mkdir()
    (folder / "c" / "0.png").write_bytes(OTHER)
    os.symlink(folder / "c", path / "c")
    return read(path)


def circle(folder: Path) -> Any:
    path = in_classes(folder)
    os.symlink(path, path / "a" / "again")
    return read(path)


def broken_link(folder: Path) -> Any:
    path = in_classes(folder)
    os.symlink(folder / "nowhere.png", path / "a" / "x.png")
    return read(path)


def with_others(folder: Path) -> Any:
    path = in_classes(folder)
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "._0.png"):
        (path / "a" / name).write_bytes(b"x")
    (path / "empty").mkdir()
    (path / "__MACOSX").mkdir()
    (path / "__MACOSX" / "0.png").write_bytes(b"x")
    return read(path)


def beside_classes(read_them: Callable[[Path], Any], folder: Path) -> Any:
    path = in_classes(folder, tuple("abcdefghij"), 3)
    (path / "0.png").write_bytes(GOOD)
    return read_them(path)


def as_tasks(path: Path) -> Any:
    return images(path=path, way=2, shot=1, query=1, test_query=1, size=8, channels=1, split=(0.4, 0.3, 0.3))


def zipped(members: list[tuple[str, bytes]], folder: Path) -> Any:
    with warnings.catch_warnings(), zipfile.ZipFile(folder / "a.zip", "w") as file:
        warnings.simplefilter("ignore")  # of names that stand twice
        for name, data in members:
            file.writestr(name, data)
    return read(folder / "a.zip")


def encrypted(folder: Path) -> Any:
    with zipfile.ZipFile(folder / "a.zip", "w") as file:
        file.writestr("a/0.png", GOOD)
    raw = bytearray((folder / "a.zip").read_bytes())
    raw[6] |= 1
    raw[raw.index(b"PK\1\2") + 8] |= 1
    (folder / "a.zip").write_bytes(raw)
    return read(folder / "a.zip")


def nested(folder: Path) -> Any:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("a/0.png", GOOD)
    return zipped([("inner.zip", inner.getvalue())], folder)


FOUR, CODES = np.stack([GREY] * 4), np.arange(4)
NPZ: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one-hot labels": ({"images": FOUR, "labels": np.eye(4, dtype=int)}, ("a.npz", "labels", "(4, 4)")),
    "a single label": ({"images": FOUR, "labels": np.asarray(3)}, ("a.npz", "labels", "()")),
    "nan labels": ({"images": FOUR, "labels": np.asarray([0, np.nan, 1, 2])}, ("a.npz", "labels", "at 1")),
    "empty labels": ({"images": FOUR, "labels": np.asarray(["a", "", "b", "a"])}, ("a.npz", "labels", "at 1")),
    "two channels": ({"images": np.zeros((4, 8, 8, 2), np.uint8)}, ("a.npz", "(4, 8, 8, 2)")),
    "five channels": ({"images": np.zeros((4, 8, 8, 5), np.uint8)}, ("a.npz", "(4, 8, 8, 5)")),
    "channels first": ({"images": np.zeros((4, 3, 8, 8), np.uint8)}, ("a.npz", "(4, 3, 8, 8)")),
    "no height": ({"images": np.zeros((4, 0, 8), np.uint8)}, ("a.npz", "(4, 0, 8)")),
    "no image": ({"images": FOUR[:0], "labels": CODES[:0]}, ("a.npz", "no picture")),
    "one image alone": ({"images": GREY}, ("a.npz", "(8, 8)")),
    "object images": ({"images": np.asarray([None, GREY], object)}, ("a.npz",)),
    "wnids short": ({"images": FOUR, "labels": CODES, "wnids": np.asarray(["a", "b"])}, ("a.npz", "wnids")),
    "offsets beyond the end": ({"jpeg": np.frombuffer(GOOD, np.uint8), "offsets": np.asarray([0, 10**6])},
                               ("a.npz", "offsets")),
    "offsets that fall": ({"jpeg": np.frombuffer(GOOD, np.uint8), "offsets": np.asarray([9, 3])}, ("a.npz", "offsets")),
    "offsets of floats": ({"jpeg": np.frombuffer(GOOD, np.uint8), "offsets": np.asarray([0.0, 9.5])},
                          ("a.npz", "offsets")),
    "x of no rows": ({"x": np.zeros((0, 3)), "y": np.zeros(0)}, ("'x'", "no rows")),
    "x a number": ({"x": np.asarray(3.0)}, ("'x'", "a single value")),
    "x of objects": ({"x": np.asarray([None, 1.0], object)}, ("a.npz",)),
    "x of words": ({"x": np.asarray(["a", "b"])}, ("a.npz", "must hold numbers")),
    "x complex": ({"x": np.asarray([1j, 2j])}, ("a.npz", "complex")),
    "x nan": ({"x": np.asarray([[1.0, np.nan]])}, ("a.npz", "row 0")),
    "x inf": ({"x": np.asarray([[1.0, np.inf]])}, ("a.npz", "row 0")),
    "x too large": ({"x": np.asarray([[1e39]])}, ("'x'", "1e+39")),
    "y of another length": ({"x": np.ones((4, 2)), "y": np.ones(2)}, ("a.npz", "(2,)", "4")),
    "nothing": ({}, ("features",)),
}  # fmt: skip


def arrays(given: dict[str, Any], folder: Path) -> Any:
    np.savez(folder / "a.npz", **given)
    return read_examples(folder / "a.npz", labelled=False, size=8, channels=1)


def labels_are(*names: str) -> Callable[[Any], bool]:
    return lambda found: found.labels == list(names)


def cases() -> list[Case]:
    found = [
        Case(f"picture {name}", partial(one, file, data), right=looks(expected, tolerance))
        for name, (file, data, expected, tolerance) in MODES.items()
    ]
    found += [Case(f"picture of {name}", partial(one, file, data), says) for name, (file, data, says) in BROKEN.items()]
    found += [Case(f"npz with {name}", partial(arrays, given), says) for name, (given, says) in NPZ.items()]
    twice = [("a/0.png", GOOD), ("a/0.png", OTHER), ("b/0.png", GOOD)]
    names = ("ü 漢", "a b'c\"", "[/b]$x$")
    return [
        *found,
        Case("npz of float labels", partial(arrays, {"images": FOUR, "labels": CODES * 1.0}),
             right=labels_are("0.0", "1.0", "2.0", "3.0")),
        Case("folders of unicode names", lambda f: read(in_classes(f, names, 1)), right=labels_are(*sorted(names))),
        Case("folders: a class is a link", linked_class, right=labels_are("a", "a", "b", "b", "c")),
        Case("folders: a link in a circle", circle, right=labels_are("a", "a", "b", "b")),
        Case("folders: a link to nothing", broken_link, ("x.png",)),
        Case("folders: other files beside", with_others, right=labels_are("a", "a", "b", "b")),
        Case("folders: a picture beside the classes", partial(beside_classes, read), ("without labels",)),
        Case("tasks: a picture beside the classes", partial(beside_classes, as_tasks), ("1 pictures without a class",)),
        Case("support is flat", lambda f: read(in_classes(f) / "a"), ("without labels",)),
        Case("query is flat", lambda f: read(in_classes(f) / "a", labelled=False), right=lambda e: len(e.x) == 2),
        Case("folders: nothing in them", lambda f: read(in_classes(f, number=0)), ("no picture",)),
        Case("zip with a name twice", partial(zipped, twice), ("a.zip", "a/0.png", "2 times")),
        Case("zip that leads out", partial(zipped, [("../a/0.png", GOOD)]), ("a.zip", "../a/0.png")),
        Case("zip from the root", partial(zipped, [("/a/0.png", GOOD), ("b/0.png", GOOD)]), ("a.zip", "/a/0.png")),
        Case("zip in a zip", nested, ("a.zip", "no picture")),
        Case("zip with a password", encrypted, ("a.zip", "encrypted")),
        Case("zip of two classes", partial(zipped, [("p/a/0.png", GOOD), ("p/b/0.png", OTHER)]),
             right=labels_are("a", "b")),
        Case("zip of one flat class", partial(zipped, [("0.png", GOOD)]), ("without labels",)),
    ]  # fmt: skip
