"""Shared by all tests: the compilation cache, so that compile time is paid once, and where the data lie."""

import os
from importlib.metadata import version
from pathlib import Path

# Tests compile far more than they run, so the compiler's dearest passes do not pay here; without any, loops crawl.
# XLA's older emitters compile in two thirds of the time, where they are known: a flag that is not stops the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
# By the environment, as processes that tests start inherit it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "metaprior-tests"))

import jax
import pytest
from hypothesis import settings

# Most programs here are one operation large, and compile in a twentieth of a second, thousands of times.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
# Examples drawn anew would be programs compiled anew; and one that compiles is slow once.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Contract tests of one learner run after one another, so that they share what they trace and compile."""
    contract = [item for item in items if item.path.name == "test_contract.py" and hasattr(item, "callspec")]
    ordered = iter(sorted(contract, key=lambda item: item.callspec.params["name"]))
    items[:] = [next(ordered) if item in contract else item for item in items]


CLEARED_EVERY = 20
_done = 0


def pytest_runtest_teardown(item, nextitem):
    """Compiled programs of tests gone by are rarely of use again, and gigabytes by the hundred."""
    global _done
    _done += 1
    if _done % CLEARED_EVERY == 0:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Decoded data are cached in a folder of the test's own."""
    monkeypatch.setenv("METAPRIOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder that METAPRIOR_DATA names; tests that need it are skipped where it is absent."""
    folder = os.environ.get("METAPRIOR_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("METAPRIOR_DATA names no folder: the tests on real data sets are skipped")
    return Path(folder)
