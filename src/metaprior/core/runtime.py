"""Settings of the process: the persistent compilation cache, float64, devices and threads. Importing sets nothing."""

import os
import stat
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable)


def cache_folder() -> Path:
    """Returns the folder for compiled programs and decoded data: METAPRIOR_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("METAPRIOR_CACHE"):
        return Path(chosen)
    usual = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA") or "~/AppData/Local"}
    found = usual.get(sys.platform) or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(found).expanduser() / "metaprior"


def private_folder(name: str) -> Path | None:
    """Creates a folder in the cache for code that will be executed: owned by this user, with permissions 0700.

    Other users may share the cache, so the folder's name ends in the user's id.

    Args:
        name: The first part of the folder's name.

    Returns:
        The folder, or None with a warning if it belongs to another user, is a link, or cannot be created.
    """
    folder = cache_folder() / (f"{name}-{os.getuid()}" if hasattr(os, "getuid") else name)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and owned(found):
            folder.chmod(0o700)
            return folder
        problem = "is not a folder of this user"
    except OSError as error:
        problem = f"cannot be used ({error.strerror or error})"
    warnings.warn(f"{folder} {problem}, so nothing is kept there; set METAPRIOR_CACHE to another folder", stacklevel=2)
    return None


def owned(found: os.stat_result) -> bool:
    """Returns whether a file belongs to this user. It is always true on systems without user ids.

    Args:
        found: The file's status.
    """
    return not hasattr(os, "getuid") or found.st_uid == os.getuid()


def configure(*, float64: bool = False, cache: bool = True, devices: int = 1, threads: int | None = None) -> None:
    """Sets options of JAX for this process. Call it before JAX is first used.

    Args:
        float64: Compute in float64.
        cache: Use the persistent compilation cache. JAX_COMPILATION_CACHE_DIR overrides its folder.
        devices: Number of devices into which a machine without an accelerator divides its cores.
        threads: Number of threads for computing. None uses all cores.

    Raises:
        ValueError: devices or threads is below 1.
    """
    for name, count in (("devices", devices), ("threads", threads)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    if threads is not None:
        os.environ["NPROC"] = str(threads)  # the size of XLA's thread pool, for which JAX has no option
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_x64", float64)
    if cache:
        # Compiled programs are machine code, so no other user may write to their folder.
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and (folder := private_folder("compiled")):
            jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def shared(maxsize: int = 8) -> Callable[[F], F]:
    """Decorates a function that makes compiled programs: the same arguments return the same program.

    If an argument cannot be hashed, a new program is made.

    Args:
        maxsize: Number of programs that are kept.
    """

    def decorate(make: F) -> F:
        kept = lru_cache(maxsize)(make)

        @wraps(make)
        def get(*args: Any) -> Any:
            try:
                hash(args)
            except TypeError:
                return make(*args)
            return kept(*args)

        return get  # type: ignore[return-value]

    return decorate
