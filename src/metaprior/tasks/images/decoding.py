"""Finding pictures in folders, archives and NPZ files, and decoding them to bytes of one size."""

import hashlib
import io
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from metaprior.core.extras import extra
from metaprior.tasks.checks import DataError
from metaprior.tasks.limits import check_expansion, check_member, check_pixels, check_regular, open_arrays, open_zip
from metaprior.tasks.store import DAMAGE, reading
from metaprior.tasks.tables.columns import missing

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Picture(NamedTuple):
    """One picture.

    Attributes:
        group: Its class; '' if it lies in no folder.
        place: Where it is, for errors.
        read: Reads it: encoded bytes, or an array of pixels.
    """

    group: str
    place: str
    read: Callable[[], bytes | np.ndarray]


def find_pictures(path: str | Path) -> list[Picture]:
    """Finds the pictures of a folder, an archive, an NPZ file, or a single picture file.

    The class of a picture is the path of its folder, without the part that all pictures share.

    Args:
        path: A folder of class folders, or a zip or tar archive of one. Or an NPZ file with `images` (uint8 [n, h, w]
            or [n, h, w, c]) or with `jpeg` and `offsets` (encoded files end to end), and with `labels` [n]. Or a folder
            of `train.npz`, `val.npz` and `test.npz`. Or one picture.

    Returns:
        The pictures, not yet read.

    Raises:
        DataError: Nothing there, no pictures in it, or a damaged archive.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        parts = [(part, path / f"{part}.npz") for part in ("train", "val", "test")]
        if all(file.is_file() for _, file in parts):
            return [picture for part, file in parts for picture in _from_npz(file, f"{part}/")]
        files = [file for file in sorted(_files(path)) if _is_picture(file.relative_to(path).as_posix())]
        found = [(file.relative_to(path).as_posix(), str(file), partial(_read_file, file)) for file in files]
    else:
        with reading(path):
            if path.suffix == ".npz":
                return _from_npz(path, "")
            if path.suffix.lower() in SUFFIXES:
                return [Picture("", str(path), partial(_read_file, path))]
            found = list(_from_archive(path))
        _check_names(path, [name for name, _, _ in found])
    if not found:
        raise DataError(
            f"{path} must be a folder of pictures by class, got no pictures ({', '.join(sorted(SUFFIXES))})."
        )
    return _grouped(found)


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterable[Path]:
    """Yields all files below a folder; links to folders are followed, but not in circles."""
    real = folder.resolve()
    if real not in above:
        for path in folder.iterdir():
            if path.is_dir():
                yield from _files(path, (*above, real))
            else:
                yield path


def _check_names(path: Path, names: list[str]) -> None:
    """Checks that the names in an archive differ and stay inside the folder that it would be unpacked to."""
    for name, times in Counter(names).items():
        parts = PurePosixPath(name)
        if times > 1:
            raise DataError(f"{path} holds {name} {times} times. Unpack it and pack it again.")
        if parts.is_absolute() or ".." in parts.parts:
            raise DataError(
                f"{path} holds {name}, a path that leads out of the archive. Pack it again without that file."
            )


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
    # A single class keeps its name.
    cut = shared if len(groups) > 1 else max(shared - 1, 0)
    return [Picture("/".join(group[cut:]), place, read) for group, place, read in rows]


def _from_archive(path: Path) -> Iterable[tuple[str, str, Callable[[], bytes]]]:
    if zipfile.is_zipfile(path):
        with open_zip(path) as checked:
            members = [m for m in checked.infolist() if _is_picture(m.filename) and not m.is_dir()]
        archive = zipfile.ZipFile(path)  # stays open, because its pictures are read later
        for member in sorted(members, key=lambda member: member.filename):
            place = f"{path}: {member.filename}"
            if member.flag_bits & 1:
                raise DataError(f"{place} is encrypted. Unpack the archive with its password first.")
            check_member(place, member.file_size)
            yield member.filename, place, partial(archive.read, member)
    elif tarfile.is_tarfile(path):
        # A compressed tar can only be read from start to end, so all encoded files are read into memory.
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
            f"{path} must be a folder, a zip or tar archive, an NPZ file or a picture. If it is one, it is corrupt or "
            "truncated. Delete it and download it again."
        )


def _from_npz(path: Path, prefix: str) -> list[Picture]:
    with reading(path), open_arrays(path) as file:
        arrays = {name: file[name] for name in file.files if name in ("images", "jpeg", "offsets", "labels", "wnids")}
    labels = arrays.get("labels")
    if "jpeg" in arrays and "offsets" in arrays:
        data, edges = arrays["jpeg"], arrays["offsets"]
        if data.dtype != np.uint8 or data.ndim != 1 or not _are_edges(edges, len(data)):
            raise DataError(
                f"{path} is damaged: offsets must be increasing positions in jpeg, and jpeg must be uint8 [bytes]."
            )
        reads = [partial(_slice, data, a, b) for a, b in pairwise(edges)]
    elif "images" in arrays:
        images = arrays["images"]
        whole = images.dtype == np.uint8 and images.ndim in (3, 4) and 0 not in images.shape[1:]
        if not whole or images.shape[3:] not in ((), (1,), (3,), (4,)):
            needed = "uint8 [n, h, w] or [n, h, w, c] with c = 1, 3 or 4"
            raise DataError(f"{path}: images must be {needed}, got {images.dtype} {images.shape}.")
        reads = [partial(images.__getitem__, i) for i in range(len(images))]
    else:
        raise DataError(
            f"{path} must hold the array images (or jpeg and offsets), got {', '.join(arrays) or 'other arrays'}."
        )
    if not reads:
        raise DataError(f"{path} must hold at least one picture, got no pictures.")
    if labels is not None and labels.shape != (len(reads),):
        raise DataError(f"{path}: labels must be one per picture, got shape {labels.shape} for {len(reads)} pictures.")
    names = [""] * len(reads) if labels is None else _class_names(path, labels, arrays.get("wnids"))
    rows = enumerate(zip(names, reads, strict=True))
    return [Picture(prefix + name, f"{path}[{i}]", read) for i, (name, read) in rows]


def _are_edges(edges: np.ndarray, size: int) -> bool:
    whole = edges.dtype.kind in "iu" and edges.ndim == 1 and len(edges) > 0
    return whole and edges[0] >= 0 and edges[-1] <= size and bool((np.diff(edges.astype(np.int64)) > 0).all())


def _class_names(path: Path, labels: np.ndarray, wnids: np.ndarray | None) -> list[str]:
    lost = labels == "" if labels.dtype.kind in "US" else missing(labels)
    if lost.any():
        raise DataError(
            f"{path}: labels must not be missing, got none at {int(np.flatnonzero(lost)[0])} ({lost.sum()} such "
            "pictures)."
        )
    if wnids is not None:
        if labels.dtype.kind not in "iu" or wnids.ndim != 1 or labels.min() < 0 or labels.max() >= len(wnids):
            raise DataError(f"{path}: labels must be positions in wnids, which has {len(wnids)} names.")
        return [str(name) for name in wnids[labels]]
    if labels.dtype.kind in "iu":
        width = len(str(int(labels.max())))
        return [f"{label:0{width}d}" for label in labels]
    return [str(label) for label in labels]


def _slice(data: np.ndarray, start: int, stop: int) -> bytes:
    return data[start:stop].tobytes()


def decode_picture(picture: Picture, size: tuple[int, int] | None, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """Decodes one picture.

    Args:
        picture: The picture.
        size: (height, width) in pixels; None keeps the size. Pictures of another size are resized by antialiased
            bicubic interpolation, which does not preserve the aspect ratio.
        channels: 1 (grey), 3 (colour) or 4 (with transparency).

    Returns:
        uint8 [h, w, channels].

    Raises:
        DataError: A picture that is damaged, too large, or of an unsupported mode.
        MissingExtra: Pillow is not installed.
    """
    with extra("data", "Reading pictures"):
        from PIL import Image, ImageOps
    try:
        data = picture.read()
        opened = _as_image(data) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data))
        with opened as image:
            check_pixels(picture.place, image.size)
            image = _plain(ImageOps.exif_transpose(image), channels, picture.place)
            if size is not None and image.size != (size[1], size[0]):
                image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            array = np.asarray(image)
    except DataError:
        raise
    except (*DAMAGE, Image.DecompressionBombError, SyntaxError) as error:
        raise DataError(
            f"{picture.place} cannot be decoded as a picture ({type(error).__name__}: {error}). It is corrupt or "
            "truncated. Delete it or download it again."
        ) from error
    return array.reshape(*array.shape[:2], channels)


def _plain(image: "Image", channels: int, place: str) -> "Image":
    """Converts a picture to this many channels of 8 bits; transparent parts become white."""
    with extra("data", "Reading pictures"):
        from PIL.Image import alpha_composite, fromarray, new
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.uint32)  # convert() would clip 16 bits at 255
        image = fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode not in ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "La", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise DataError(
            f"{place} has pixels of mode {image.mode}, whose white value is unknown. Save it as an 8-bit PNG."
        )
    if channels < 4 and ("A" in image.mode or "a" in image.mode or "transparency" in image.info):
        seen = image.convert("RGBA")  # ink on a transparent background is often black on transparent black
        image = alpha_composite(new("RGBA", seen.size, "white"), seen)
    return image.convert(MODES[channels])


def _as_image(array: np.ndarray) -> "Image":
    with extra("data", "Reading pictures"):
        from PIL.Image import fromarray
    return fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)


def decode_pictures(pictures: Sequence[Picture], size: tuple[int, int], channels: int) -> UInt8[np.ndarray, "n h w c"]:
    """Decodes pictures with up to 8 threads and a progress bar.

    Args:
        pictures: The pictures.
        size: (height, width) in pixels.
        channels: 1, 3 or 4.

    Returns:
        uint8 [n, h, w, channels], in the order of `pictures`.

    Raises:
        DataError: A picture that cannot be decoded.
        MissingExtra: Pillow or tqdm is not installed.
    """
    check_channels(channels)
    out = np.empty((len(pictures), *size, channels), np.uint8)
    step = 256

    def fill(start: int) -> int:
        for i in range(start, min(start + step, len(pictures))):
            out[i] = decode_picture(pictures[i], size, channels)
        return start

    with extra("data", "Reading pictures"):
        from tqdm import tqdm
    quiet = True if len(pictures) < 2000 else None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        starts = range(0, len(pictures), step)
        for _ in tqdm(threads.map(fill, starts), "decoding", len(starts), disable=quiet, leave=False):
            pass
    return out


def check_channels(channels: int) -> None:
    """Checks a number of channels.

    Raises:
        ValueError: Anything but 1, 3 and 4.
    """
    if channels not in MODES:
        raise ValueError(f"channels must be 1 (grey), 3 (colour) or 4 (with transparency), got {channels!r}.")


def fingerprint(path: str | Path) -> Any:
    """Returns what identifies the current state of a file, or of all files in a folder.

    Args:
        path: The file or folder.

    Returns:
        The absolute path, the number of files, and a digest of their names, sizes and modification times.
    """
    path = Path(path).expanduser()
    files = [path] if path.is_file() else sorted(file for file in _files(path) if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return [str(path.resolve()), len(files), digest.hexdigest()]
