"""Limits on files of unknown origin: regular files only, and nothing that expands to far more than its size.

A few megabytes of an archive can expand to gigabytes, and a picture's header can claim any size. A limit is checked
before memory is taken.
"""

import os
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from metaprior.tasks.checks import DataError

FILE_BYTES = 2**26  # of one encoded picture or text in an archive: 64 MiB
TOTAL_BYTES = 2**31  # of what an archive or a packed file may expand to without question: 2 GiB
EXPANSION = 20  # beyond TOTAL_BYTES, how many times its own size a file may expand
PIXELS = 2**26  # of one picture: 67 megapixels


def check_regular(path: str | Path) -> None:
    """Raise a DataError for anything but a file or folder: reading from a pipe or a device may never end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(f"{path} must be a regular file or a folder, got a pipe, socket or device.")


def check_expansion(path: str | Path, total: int) -> None:
    """Raise a DataError where a file expands to far more than its own size."""
    size = os.stat(path).st_size
    if total > max(TOTAL_BYTES, EXPANSION * size):
        raise DataError(
            f"{path} expands from {size / 2**20:.1f} MiB to {total / 2**30:.1f} GiB, more than {EXPANSION} times its "
            f"size. If that is right, save it without compression."
        )


def check_pixels(place: str, size: tuple[int, int]) -> None:
    """Raise a DataError for a picture of more than PIXELS, as its header says, before it is decoded."""
    if prod(size) > PIXELS:
        raise DataError(
            f"{place} has {size[0]} x {size[1]} pixels, more than the limit of {PIXELS / 1e6:.0f} million; reduce it "
            "first."
        )


@contextmanager
def open_zip(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive that does not expand beyond the limits."""
    with zipfile.ZipFile(path) as archive:
        check_expansion(path, sum(member.file_size for member in archive.infolist()))
        yield archive


def check_member(place: str, size: int) -> None:
    """Raise a DataError for a member of an archive that is larger than a picture or a text can be."""
    if size > FILE_BYTES:
        raise DataError(f"{place} has {size / 2**20:.0f} MiB, more than the limit of {FILE_BYTES // 2**20} MiB a file.")


@contextmanager
def open_arrays(path: str | Path) -> Iterator[Any]:
    """An NPZ file, as `np.load` gives it; each array has the size of its member, and all are within the limits."""
    check_regular(path)
    with zipfile.ZipFile(path) as archive:
        check_expansion(path, sum(member.file_size for member in archive.infolist()))
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    _check_header(f"{path}: {member.filename}", file, member.file_size)
    with np.load(path, allow_pickle=False) as file:
        yield file


def _check_header(place: str, file: IO[bytes], size: int) -> None:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if not dtype.hasobject and prod(shape) * dtype.itemsize > size:
        claimed = prod(shape) * dtype.itemsize
        raise DataError(f"{place} claims {claimed} bytes, but the file holds {size}; it is damaged.")


def read_limited(file: IO[bytes], path: str | Path) -> bytes:
    """All of a packed file that is being expanded, up to the limit."""
    limit = max(TOTAL_BYTES, EXPANSION * os.stat(path).st_size)
    data = file.read(limit + 1)
    check_expansion(path, len(data))
    return data
