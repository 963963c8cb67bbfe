"""Limits on files of unknown origin: regular files only, and nothing that expands far beyond its size.

A few megabytes of an archive can expand to gigabytes, and the header of a picture can claim any size. Each limit is
checked before memory is allocated.
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

FILE_BYTES = 2**26  # limit of one encoded picture or text in an archive: 64 MiB
TOTAL_BYTES = 2**31  # an archive or a compressed file may always expand to this size: 2 GiB
EXPANSION = 20  # above TOTAL_BYTES, a file may expand to this many times its own size
PIXELS = 2**26  # limit of one picture: 67 megapixels


def check_regular(path: str | Path) -> None:
    """Checks that a path is a regular file or a folder, because reading from a pipe or a device may never end.

    Raises:
        DataError: Anything else.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(f"{path} must be a regular file or a folder, got a pipe, socket or device.")


def check_expansion(path: str | Path, total: int) -> None:
    """Checks that a file does not expand far beyond its own size.

    Args:
        path: The file.
        total: The number of bytes that it expands to.

    Raises:
        DataError: `total` is above TOTAL_BYTES and above EXPANSION times the file's size.
    """
    size = os.stat(path).st_size
    if total > max(TOTAL_BYTES, EXPANSION * size):
        raise DataError(
            f"{path} expands from {size / 2**20:.1f} MiB to {total / 2**30:.1f} GiB, more than {EXPANSION} times its "
            f"size. If that is intended, save it without compression."
        )


def check_pixels(place: str, size: tuple[int, int]) -> None:
    """Checks the size of a picture, as stated in its header, before it is decoded.

    Args:
        place: Where the picture is, for the error.
        size: (width, height) in pixels.

    Raises:
        DataError: More than PIXELS pixels.
    """
    if prod(size) > PIXELS:
        raise DataError(
            f"{place} has {size[0]} x {size[1]} pixels, more than the limit of {PIXELS / 1e6:.0f} million. Reduce it "
            "first."
        )


@contextmanager
def open_zip(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive, after checking that it does not expand beyond the limits.

    Raises:
        DataError: An archive that does.
    """
    with zipfile.ZipFile(path) as archive:
        check_expansion(path, sum(member.file_size for member in archive.infolist()))
        yield archive


def check_member(place: str, size: int) -> None:
    """Checks the size of one file in an archive.

    Args:
        place: Where the file is, for the error.
        size: Its expanded size in bytes.

    Raises:
        DataError: More than FILE_BYTES, which is larger than a picture or a text can be.
    """
    if size > FILE_BYTES:
        raise DataError(
            f"{place} has {size / 2**20:.0f} MiB, more than the limit of {FILE_BYTES // 2**20} MiB per file."
        )


@contextmanager
def open_arrays(path: str | Path) -> Iterator[Any]:
    """Opens an NPZ file as `np.load` does, after checking its size and the header of each array.

    Raises:
        DataError: A file that expands beyond the limits, or an array whose header claims more bytes than the file
            holds.
    """
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
        raise DataError(
            f"{place} claims {claimed} bytes, but the file holds {size}. It is damaged. Make or copy it again."
        )


def read_limited(file: IO[bytes], path: str | Path) -> bytes:
    """Reads a compressed file to its end, but not beyond the limit.

    Args:
        file: The open file, which expands as it is read.
        path: The compressed file, for its size and for the error.

    Raises:
        DataError: A file that expands beyond the limit.
    """
    limit = max(TOTAL_BYTES, EXPANSION * os.stat(path).st_size)
    data = file.read(limit + 1)
    check_expansion(path, len(data))
    return data
