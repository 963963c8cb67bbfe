"""Kernels in C++ (`kernels.cc`) for processors: compiled once a machine, by its own compiler, and kept.

Where there is no C++ compiler, or METAPRIOR_NATIVE=0 says so, `build` gives None and the same maps go through XLA.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import jax

from metaprior.runtime import cache_folder

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-w", "-shared", "-fPIC")
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
    """The compiled library of `source` in `folder`, from there if it was compiled before; None without a compiler."""
    chosen = compiler()
    if chosen is None:
        return None
    command = [chosen, *FLAGS, "-I", jax.ffi.include_dir(), str(source)]
    parts = (source.read_text(), jax.__version__, platform.machine(), processor(), *command[:-1])
    name = f"{source.stem}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    if (folder / name).exists():
        return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return made.rename(folder / name)
            said = done.stderr.strip().splitlines()
    except OSError as error:
        said = [str(error)]
    warnings.warn(f"{source.name} did not compile ({said[0] if said else chosen}); going on without it", stacklevel=2)
    return None


@functools.cache
def registered() -> bool:
    """Whether XLA knows the kernels; compiles and registers them on the first call."""
    if os.environ.get("METAPRIOR_NATIVE", "1") == "0":
        return False
    made = build(Path(__file__).with_name("kernels.cc"), cache_folder() / "native")
    if made is None:
        return False
    try:
        library = ctypes.cdll.LoadLibrary(str(made))
    except OSError as error:  # a folder from which nothing may be run
        warnings.warn(f"{made} does not load ({error}); going on without it", stacklevel=2)
        return False
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return True
