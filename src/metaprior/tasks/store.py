"""Where data live: the user's data folder, downloads from the official source, and the cache of decoded arrays."""

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
    """The folder of a data set inside the one METAPRIOR_DATA names, where it exists."""
    root = os.environ.get("METAPRIOR_DATA")
    folder = Path(root, name) if root else None
    return folder if folder is not None and folder.is_dir() else None


@contextmanager
def reading(path: str | Path, fix: str = "delete it and download or copy it again") -> Iterator[None]:
    """Turns what a damaged file raises into a DataError that names the file and the fix."""
    if not Path(path).exists():
        raise DataError(f"{path}: no such file; correct the path, or download or copy the file there")
    check_regular(path)
    try:
        yield
    except DataError:
        raise
    except DAMAGE as error:
        raise DataError(f"{path}: corrupt or truncated ({type(error).__name__}: {error}); {fix}") from error


def read_npz(path: str | Path, names: tuple[str, ...]) -> list[np.ndarray]:
    """The named arrays of an NPZ file.

    Raises:
        DataError: the file is absent, damaged, or lacks one of the arrays.
    """
    with reading(path), open_arrays(path) as file:
        missing = [name for name in names if name not in file.files]
        if missing:
            raise DataError(f"{path}: came arrays {', '.join(file.files)}, needs {', '.join(names)}")
        return [file[name] for name in names]


def download(url: str, sha256: str | None, dataset: str) -> Path:
    """A file of the official source, fetched once into the cache and checked.

    A broken transfer leaves nothing behind and starts cleanly again; progress is shown.

    Raises:
        DataError: no network, or a file that is not the official one.
        MissingExtra: pooch, requests or tqdm is not installed.
    """
    with extra("data", f"Downloading {dataset}"):
        import pooch
        import requests
        import tqdm  # noqa: F401  pooch's progress bar
    folder = cache_folder() / "downloads" / dataset
    advice = (
        f"check the network and run again, or fetch {url} on another machine, put it into a folder {dataset}/ and let "
        "the environment variable METAPRIOR_DATA name the folder above"
    )
    known = f"sha256:{sha256}" if sha256 else None
    try:
        fetched = pooch.retrieve(url, known, fname=url.rsplit("/", 1)[-1], path=folder, progressbar=True)
    except requests.exceptions.RequestException as error:
        raise DataError(f"{dataset}: cannot download {url} ({type(error).__name__}); {advice}") from error
    except ValueError as error:
        raise DataError(f"{dataset}: what came from {url} is not the official file ({error}); {advice}") from error
    except OSError as error:
        raise DataError(f"{dataset}: cannot store {url} in {folder} ({error}); free space there") from error
    return Path(fetched)


def stamp(*paths: str | Path) -> list[list[Any]]:
    """What identifies the present state of local files: path, size, time of change."""
    stats = [(Path(path).resolve(), Path(path).stat()) for path in paths]
    return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def cached(name: str, identity: Any, build: Callable[[], Arrays]) -> Mapping[str, np.ndarray]:
    """The arrays that `build` makes, kept on disk and memory-mapped from then on.

    Args:
        name: a readable start of the folder's name.
        identity: what the arrays depend on (JSON); another identity is another folder.

    The folder appears whole or not at all, and its checksums are verified at each load; a damaged one is rebuilt. Where
    the disk is full or read-only the arrays are returned all the same, with a warning.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{name}-{digest}"
    if folder.is_dir():
        try:
            return _load(folder)
        except DataError as error:
            warnings.warn(f"{error}: the cached copy is made anew", stacklevel=2)
            shutil.rmtree(folder, ignore_errors=True)
    arrays = build()
    try:
        _save(folder, arrays)
        return _load(folder)
    except OSError as error:
        warnings.warn(f"{folder}: cannot keep the decoded data ({error}); it is decoded at each start", stacklevel=2)
        return arrays


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _share(partial: Path, folder: Path, digests: Mapping[str, str]) -> None:
    """Links in place of arrays that stand beside it already: the same data, of files since moved or copied anew."""
    alike = glob.escape(folder.name.rpartition("-")[0])
    for name, digest in digests.items():
        size = (partial / f"{name}.npy").stat().st_size
        for twin in folder.parent.glob(f"{alike}-*/{name}.npy"):
            with suppress(OSError):  # a file system without links keeps both
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
            # Another process may have put the same arrays there meanwhile; anything else is the caller's to tell.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(folder: Path) -> Mapping[str, np.ndarray]:
    with reading(folder, "it will be made anew"):
        digests = json.loads((folder / "SHA256.json").read_text())
        for name, digest in digests.items():
            if _digest(folder / f"{name}.npy") != digest:
                raise DataError(f"{folder / name}.npy: its checksum differs")
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in digests}
