"""Where data are stored: the user's data folder, downloads from the official source, and a cache of decoded arrays."""

import glob
import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from metaprior.core.extras import extra
from metaprior.core.files import partial_prefix, remove_partials
from metaprior.core.runtime import cache_folder
from metaprior.tasks.checks import DataError
from metaprior.tasks.limits import check_regular, open_arrays

Arrays = dict[str, np.ndarray]

DAMAGE = (OSError, EOFError, ValueError, KeyError, RuntimeError, zlib.error, zipfile.BadZipFile)


def data_folder(name: str) -> Path | None:
    """Returns the folder of a data set.

    Args:
        name: The name of a folder inside the folder that the environment variable METAPRIOR_DATA names.

    Returns:
        The folder; None if it does not exist.
    """
    root = os.environ.get("METAPRIOR_DATA")
    folder = Path(root, name) if root else None
    return folder if folder is not None and folder.is_dir() else None


@contextmanager
def reading(path: str | Path, fix: str = "Delete it and download or copy it again.") -> Iterator[None]:
    """Turns the errors that a damaged file raises into a DataError that names the file and the fix.

    Args:
        path: The file that is read inside the `with` block.
        fix: What the user can do, a sentence that ends the message.

    Raises:
        DataError: A file that is absent, not regular, or damaged.
    """
    if not Path(path).exists():
        raise DataError(f"{path}: no such file. Correct the path, or download or copy the file there.")
    check_regular(path)
    try:
        yield
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"{path} is corrupt or truncated ({type(error).__name__}: {error}). {fix}") from error


def read_npz(path: str | Path, names: tuple[str, ...]) -> list[np.ndarray]:
    """Reads arrays of an NPZ file.

    Args:
        path: The file.
        names: The names of the arrays.

    Returns:
        The arrays, in the order of `names`.

    Raises:
        DataError: A file that is absent, damaged, or lacks one of the arrays.
    """
    with reading(path), open_arrays(path) as file:
        missing = [name for name in names if name not in file.files]
        if missing:
            raise DataError(f"{path} must hold the arrays {', '.join(names)}, got {', '.join(file.files)}.")
        return [file[name] for name in names]


def download(url: str, sha256: str | None, dataset: str) -> Path:
    """Downloads a file of the official source into the cache, once, and checks it.

    A broken transfer leaves nothing behind, so that the next call starts from the beginning. A progress bar is shown.

    Args:
        url: The address of the file.
        sha256: Its checksum; None if it is not known.
        dataset: The name of the data set.

    Returns:
        The path of the file.

    Raises:
        DataError: No network, or a file that is not the official one.
        MissingExtra: Pooch, requests or tqdm is not installed.
    """
    with extra("data", f"Downloading {dataset}"):
        import pooch
        import requests
        import tqdm  # noqa: F401  pooch's progress bar
    folder = cache_folder() / "downloads" / dataset
    advice = (
        f"Check the network and run again. Or fetch {url} on another machine, put it into a folder {dataset}/ and set "
        "the environment variable METAPRIOR_DATA to the folder above it."
    )
    known = f"sha256:{sha256}" if sha256 else None
    try:
        fetched = pooch.retrieve(url, known, fname=url.rsplit("/", 1)[-1], path=folder, progressbar=True)
    except requests.exceptions.RequestException as error:
        raise DataError(f"{dataset}: cannot download {url} ({type(error).__name__}). {advice}") from error
    except ValueError as error:
        raise DataError(f"{dataset}: the file from {url} is not the official one ({error}). {advice}") from error
    except OSError as error:
        raise DataError(f"{dataset}: cannot store {url} in {folder} ({error}). Free space there.") from error
    return Path(fetched)


def stamp(*paths: str | Path) -> list[list[Any]]:
    """Returns what identifies the current state of local files.

    Args:
        *paths: The files.

    Returns:
        Path, size in bytes and modification time in ns of each.
    """
    stats = [(Path(path).resolve(), Path(path).stat()) for path in paths]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def cached(name: str, identity: Any, build: Callable[[], Arrays]) -> Mapping[str, np.ndarray]:
    """Returns the arrays that `build` makes; they are stored on disk and memory-mapped in later calls.

    The folder appears complete or not at all. Its checksums are verified at each load, and a damaged folder is rebuilt.

    Args:
        name: A readable prefix of the folder's name.
        identity: What the arrays depend on, as JSON. Another identity is another folder.
        build: Makes the arrays.

    Returns:
        The arrays by name. If the disk is full or read-only, they are not stored, and a warning says so.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{digest}"
    if folder.is_dir():
        try:
            return _load(folder)
        except DataError as error:
            warnings.warn(f"{error} The cached copy is rebuilt.", stacklevel=2)
            shutil.rmtree(folder, ignore_errors=True)
    arrays = build()
    try:
        _save(folder, arrays)
        return _load(folder)
    except OSError as error:
        warnings.warn(
            f"{folder}: cannot store the decoded data ({error}). Each start decodes them again.", stacklevel=2
        )
        return arrays


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _share(partial: Path, folder: Path, digests: Mapping[str, str]) -> None:
    """Replaces new arrays by links to equal arrays of other folders, as after the source file was moved or copied."""
    alike = glob.escape(folder.name.rpartition("-")[0])
    for name, digest in digests.items():
        size = (partial / f"{name}.npy").stat().st_size
        for twin in folder.parent.glob(f"{alike}-*/{name}.npy"):
            with suppress(OSError):  # without links, the file system stores both
                if twin.stat().st_size == size and _digest(twin) == digest:
                    os.link(twin, partial / "twin")
                    os.replace(partial / "twin", partial / f"{name}.npy")
                    break


def _save(folder: Path, arrays: Arrays) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(folder.parent)
    partial = Path(tempfile.mkdtemp(prefix=partial_prefix(), dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        digests = {name: _digest(partial / f"{name}.npy") for name in arrays}
        _share(partial, folder, digests)
        (partial / "SHA256.json").write_text(json.dumps(digests, indent=1))
        try:
            partial.rename(folder)
        except OSError:
            # Another process may have written the same arrays meanwhile. Other errors go to the caller.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(folder: Path) -> Mapping[str, np.ndarray]:
    with reading(folder, "It cannot be used."):
        digests = json.loads((folder / "SHA256.json").read_text())
        for name, digest in digests.items():
            if _digest(folder / f"{name}.npy") != digest:
                raise DataError(f"{folder / name}.npy has another checksum than when it was stored.")
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in digests}
