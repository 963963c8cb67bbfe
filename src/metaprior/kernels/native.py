"""Kernels in C++ (`kernels.cc`) for processors, compiled on first use by the machine's own compiler and kept.

Where there is no C++ compiler, or METAPRIOR_NATIVE=0 says so, `build` gives None and the same maps go through XLA.

A library is executed, so it is loaded only from a folder that nobody else can write to, and only if its content has the
hash that was written beside it; otherwise it is compiled again.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from metaprior.core.runtime import owned, private_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-w", "-shared", "-fPIC")
SOURCE = Path(__file__).with_name("kernels.cc")
TARGETS = tuple(f"metaprior_{kernel}_{out}" for kernel in ("conv", "product") for out in "yxw")


def compiler() -> str | None:
    """The C++ compiler: that of CXX, or the usual names."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))), None)


def processor() -> str:
    """What `-march=native` goes by: a folder that machines share holds a library for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


def build(source: Path, folder: Path) -> Path | None:
    """The compiled library of `source` in `folder`; None without a compiler or where it fails, with a warning."""
    chosen = compiler()
    if chosen is None:
        return None
    command, name = _command(chosen, source), _name(chosen, source)
    try:
        with _alone(folder):
            if trusted(folder / name):
                return folder / name
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / name
                done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    return _keep(made, folder / name)
                said = done.stderr.strip().splitlines()
    except OSError as error:
        said = [str(error)]
    warnings.warn(f"{source.name} did not compile ({said[0] if said else chosen}); going on without it", stacklevel=2)
    return None


def _command(chosen: str, source: Path) -> list[str]:
    return [chosen, *FLAGS, "-I", jax.ffi.include_dir(), str(source)]


def _name(chosen: str, source: Path) -> str:
    parts = (source.read_text(), jax.__version__, platform.machine(), processor(), *_command(chosen, source)[:-1])
    return f"{source.stem}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"


def trusted(library: Path) -> bool:
    """Whether a library is a regular file of this user's, closed to others' writing, with the hash beside it."""
    try:
        found, beside = library.lstat(), _digest_file(library)
        safe = stat.S_ISREG(found.st_mode) and owned(found) and not found.st_mode & 0o022
        return safe and beside.read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _keep(made: Path, library: Path) -> Path:
    """Put a new library and its hash in place; both reach the disk before they get their names."""
    made.chmod(0o700)
    digest = _digest_file(made)
    digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
    for file in (made, digest):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    made.rename(library)
    digest.rename(_digest_file(library))
    return library


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time compiles in a folder; the others wait and use what it made."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def registered() -> bool:
    """Whether XLA knows the kernels; compiles and registers them on the first call."""
    if os.environ.get("METAPRIOR_NATIVE", "1") == "0":
        return False
    kept = private_folder("native")
    folder = kept or Path(tempfile.mkdtemp(prefix="metaprior-"))  # made with permissions 0700
    try:
        made = build(SOURCE, folder)
        if made is None:
            return False
        library = ctypes.cdll.LoadLibrary(str(made))
    except OSError as error:  # a folder from which nothing may be run
        warnings.warn(f"the kernels do not load ({error}); going on without them", stacklevel=2)
        return False
    finally:
        if kept is None:
            shutil.rmtree(folder, ignore_errors=True)  # what is loaded stays in memory
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return True


def kernels() -> str | None:
    """The name of the kernels in use, which tells their source, flags and processor apart; None without them."""
    chosen = compiler() if registered() else None
    return None if chosen is None else _name(chosen, SOURCE).removesuffix(".so")
