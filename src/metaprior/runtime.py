"""Settings of the process: the persistent compilation cache and float64. Nothing happens at import."""

import os
from pathlib import Path

import jax
import platformdirs


def cache_folder() -> Path:
    """Where compiled programs and decoded data are kept: METAPRIOR_CACHE, or the user's cache folder."""
    return Path(os.environ.get("METAPRIOR_CACHE") or platformdirs.user_cache_dir("metaprior"))


def configure(*, float64: bool = False, cache: bool = True, devices: int = 1, threads: int | None = None) -> None:
    """Turn on the persistent compilation cache (JAX_COMPILATION_CACHE_DIR wins) and, on request, float64.

    devices: into how many a machine without an accelerator divides its cores, threads: how many it computes with (all
    cores if None); both before jax is first used.
    """
    for name, count in (("devices", devices), ("threads", threads)):
        if count is not None and count < 1:
            raise ValueError(f"{name}: came {count}, needs at least 1")
    if threads is not None:
        os.environ["NPROC"] = str(threads)  # what XLA sizes its pool by; JAX has no option for it
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_x64", float64)
    if cache:
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
