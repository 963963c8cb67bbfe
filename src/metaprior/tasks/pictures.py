"""Finding pictures in folders, archives and NPZ files, and decoding them to bytes of one size."""

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from metaprior.tasks.checks import DataError
from metaprior.tasks.limits import check_expansion, check_member, check_pixels, check_regular, open_arrays, open_zip
from metaprior.tasks.store import DAMAGE, reading

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DAMAGED_PICTURE = (*DAMAGE, Image.DecompressionBombError, SyntaxError)


class Picture(NamedTuple):
    """One picture: its class ('' where it lies in no folder), where it lies, and how to read it."""

    group: str
    place: str
    read: Callable[[], bytes | np.ndarray]


def find_pictures(path: str | Path) -> list[Picture]:
    """The pictures of a folder of class folders, a zip or tar archive of one, an NPZ file, or one picture file.

    The class is the folder a picture lies in, relative to what all have in common. An NPZ file has `images` (uint8
    [n, h, w] or [n, h, w, c]) or `jpeg` and `offsets` (encoded files end to end), with `labels` [n]. A folder may hold
    `train.npz`, `val.npz` and `test.npz` in place of class folders.

    Raises:
        DataError: nothing there, no picture in it, or a damaged archive.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        parts = [(part, path / f"{part}.npz") for part in ("train", "val", "test")]
        if all(file.is_file() for _, file in parts):
            return [picture for part, file in parts for picture in _from_npz(file, f"{part}/")]
        files = [file for file in sorted(path.rglob("*")) if _is_picture(file.relative_to(path).as_posix())]
        files = [file for file in files if not file.is_dir()]
        found = [(file.relative_to(path).as_posix(), str(file), partial(_read_file, file)) for file in files]
    else:
        with reading(path):
            if path.suffix == ".npz":
                return _from_npz(path, "")
            if path.suffix.lower() in SUFFIXES:
                return [Picture("", str(path), partial(_read_file, path))]
            found = list(_from_archive(path))
    if not found:
        raise DataError(f"{path}: came no picture ({', '.join(sorted(SUFFIXES))}), needs folders of pictures by class")
    return _grouped(found)


def _read_file(path: Path) -> bytes:
    check_regular(path)
    return path.read_bytes()


def _is_picture(name: str) -> bool:
    parts = PurePosixPath(name)
    return parts.suffix.lower() in SUFFIXES and not parts.name.startswith(".") and "__MACOSX" not in parts.parts


def _grouped(found: Iterable[tuple[str, str, Callable[[], bytes]]]) -> list[Picture]:
    rows = [(PurePosixPath(name).parent.parts, place, read) for name, place, read in found]
    groups = {group for group, _, _ in rows}
    shared = len(PurePosixPath(os.path.commonpath(["/".join(group) for group in groups])).parts)
    # One class alone keeps its own name.
    cut = shared if len(groups) > 1 else max(shared - 1, 0)
    return [Picture("/".join(group[cut:]), place, read) for group, place, read in rows]


def _from_archive(path: Path) -> Iterable[tuple[str, str, Callable[[], bytes]]]:
    if zipfile.is_zipfile(path):
        with open_zip(path) as checked:
            members = sorted((m.filename, m.file_size) for m in checked.infolist() if _is_picture(m.filename))
        archive = zipfile.ZipFile(path)  # left open: its pictures are read later
        for name, size in members:
            check_member(f"{path}: {name}", size)
            yield name, f"{path}: {name}", partial(archive.read, name)
    elif tarfile.is_tarfile(path):
        # A compressed tar can only be read in its own order, so the encoded files are taken into memory at once.
        with tarfile.open(path) as archive:
            total = 0
            for member in archive:
                check_expansion(path, total := total + member.size)
                if member.isfile() and _is_picture(member.name):
                    check_member(f"{path}: {member.name}", member.size)
                    data = archive.extractfile(member).read()  # type: ignore[union-attr]
                    yield member.name, f"{path}: {member.name}", partial(bytes, data)
    else:
        raise DataError(
            f"{path}: came neither a zip or tar archive, nor an NPZ file, nor a picture; if it is one, it is corrupt "
            "or truncated: delete it and download it again"
        )


def _from_npz(path: Path, prefix: str) -> list[Picture]:
    with reading(path), open_arrays(path) as file:
        arrays = {name: file[name] for name in file.files if name in ("images", "jpeg", "offsets", "labels", "wnids")}
    labels = arrays.get("labels")
    if "jpeg" in arrays and "offsets" in arrays:
        data, edges = arrays["jpeg"], arrays["offsets"]
        reads = [partial(_slice, data, a, b) for a, b in pairwise(edges)]
    elif "images" in arrays:
        images = arrays["images"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise DataError(f"{path}: images came {images.dtype} {images.shape}, needs uint8 [n, h, w] or [n, h, w, c]")
        reads = [partial(images.__getitem__, i) for i in range(len(images))]
    else:
        raise DataError(f"{path}: came arrays {', '.join(arrays) or 'of other names'}, needs images (or jpeg, offsets)")
    if labels is not None and len(labels) != len(reads):
        raise DataError(f"{path}: labels came {len(labels)} for {len(reads)} pictures, needs one a picture")
    names = [""] * len(reads) if labels is None else _class_names(labels, arrays.get("wnids"))
    rows = enumerate(zip(names, reads, strict=True))
    return [Picture(prefix + name, f"{path}[{i}]", read) for i, (name, read) in rows]


def _class_names(labels: np.ndarray, wnids: np.ndarray | None) -> list[str]:
    if wnids is not None:
        return [str(name) for name in wnids[labels]]
    if labels.dtype.kind in "iu":
        width = len(str(int(labels.max())))
        return [f"{label:0{width}d}" for label in labels]
    return [str(label) for label in labels]


def _slice(data: np.ndarray, start: int, stop: int) -> bytes:
    return data[start:stop].tobytes()


def decode_picture(picture: Picture, size: tuple[int, int] | None, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """One picture as bytes; another size is reached by antialiased bicubic resizing (the aspect is not kept)."""
    try:
        data = picture.read()
        opened = _as_image(data) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data))
        with opened as image:
            check_pixels(picture.place, image.size)
            image = image.convert(MODES[channels])
            if size is not None and image.size != (size[1], size[0]):
                image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            array = np.asarray(image)
    except DataError:
        raise
    except DAMAGED_PICTURE as error:
        raise DataError(
            f"{picture.place}: cannot be decoded as a picture ({type(error).__name__}: {error}); it is corrupt or "
            "truncated: delete it or download it again"
        ) from error
    return array.reshape(*array.shape[:2], channels)


def _as_image(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)


def decode_pictures(
    pictures: Sequence[Picture], size: tuple[int, int], channels: int
) -> UInt8[np.ndarray, "n h w c"]:
    """All pictures, in their order; decoded by as many threads as there are cores, with a progress bar."""
    check_channels(channels)
    out = np.empty((len(pictures), *size, channels), np.uint8)
    step = 256

    def fill(start: int) -> int:
        for i in range(start, min(start + step, len(pictures))):
            out[i] = decode_picture(pictures[i], size, channels)
        return start

    quiet = True if len(pictures) < 2000 else None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        starts = range(0, len(pictures), step)
        for _ in tqdm(threads.map(fill, starts), "decoding", len(starts), disable=quiet, leave=False):
            pass
    return out


def check_channels(channels: int) -> None:
    if channels not in MODES:
        raise ValueError(f"channels: came {channels!r}, needs 1 (grey), 3 (colour) or 4 (with transparency)")


def fingerprint(path: str | Path) -> Any:
    """What identifies the present state of a file or of all pictures of a folder."""
    path = Path(path).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return [str(path.resolve()), len(files), digest.hexdigest()]
