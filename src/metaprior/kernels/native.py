"""C++ kernels (`kernels.cc`) for CPUs, compiled on first use by the machine's compiler and cached.

Without a C++ compiler, or with METAPRIOR_NATIVE=0 in the environment, XLA computes the same functions.

A library is executed, so it is loaded only from a folder that no other user can write to, and only if its content has
the hash in the file beside it. Otherwise it is compiled again.
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
    """Returns the path of the C++ compiler: that of CXX, else c++, g++ or clang++. None if there is none."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))), None)


def processor() -> str:
    """Returns a text that identifies the CPU for `-march=native`. A shared folder has one library per kind of CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()


def build(source: Path, folder: Path) -> Path | None:
    """Compiles a source file, unless its library is in the folder already.

    Args:
        source: The C++ file.
        folder: The folder for the library.

    Returns:
        The library. None without a compiler, or, with a warning, if the compilation fails.
    """
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
    warnings.warn(f"{source.name} did not compile ({said[0] if said else chosen}); continuing without it", stacklevel=2)
    return None


def _command(chosen: str, source: Path) -> list[str]:
    return [chosen, *FLAGS, "-I", jax.ffi.include_dir(), str(source)]


def _name(chosen: str, source: Path) -> str:
    parts = (source.read_text(), jax.__version__, platform.machine(), processor(), *_command(chosen, source)[:-1])
    return f"{source.stem}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"


def trusted(library: Path) -> bool:
    """Returns whether a library may be loaded.

    It must be a regular file of this user that others cannot write to, with the hash in the file beside it.

    Args:
        library: The library.
    """
    try:
        found, beside = library.lstat(), _digest_file(library)
        safe = stat.S_ISREG(found.st_mode) and owned(found) and not found.st_mode & 0o022
        return safe and beside.read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _keep(made: Path, library: Path) -> Path:
    """Moves a new library and its hash to their names, after both have reached the disk."""
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
    """Lets one process at a time compile in a folder. The others wait and use its result."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def registered() -> bool:
    """Returns whether the kernels are available. The first call compiles them and registers them with XLA."""
    if os.environ.get("METAPRIOR_NATIVE", "1") == "0":
        return False
    kept = private_folder("native")
    folder = kept or Path(tempfile.mkdtemp(prefix="metaprior-"))  # made with permissions 0700
    try:
        made = build(SOURCE, folder)
        if made is None:
            return False
        library = ctypes.cdll.LoadLibrary(str(made))
    except OSError as error:  # e.g. a folder from which no code may be executed
        warnings.warn(f"the kernels do not load ({error}); continuing without them", stacklevel=2)
        return False
    finally:
        if kept is None:
            shutil.rmtree(folder, ignore_errors=True)  # the loaded library stays in memory
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return True


def kernels() -> str | None:
    """Returns the name of the kernels in use, which depends on source, flags and CPU. None without kernels."""
    chosen = compiler() if registered() else None
    return None if chosen is None else _name(chosen, SOURCE).removesuffix(".so")
