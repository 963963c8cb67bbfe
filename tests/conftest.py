"""Shared by all tests: the compilation cache, so that compile time is paid once, and where the data lie."""

import inspect
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

from metaprior.learners import LEARNERS

TESTS = Path(__file__).parent

# Most programs here are one operation large, and compile in a twentieth of a second, thousands of times.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
# Examples drawn anew would be programs compiled anew; and one that compiles is slow once.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


# `make quick` leaves out what trains, the command line, other processes, and data: tests that use one of these names,
# by themselves, by a function of the tests, or by a fixture; and tests marked `slow`. Of a parametrised test it has the
# first case, and of tests of every learner it has four.
SLOW = {"main", "run_cli", "cli", "subprocess", "Popen", "data_dir", "scan", "fit", "run_chunk", "optimise"}
SLOW |= {"MetaRegressor", "MetaClassifier", "evaluate", "nuts"}
REPRESENTATIVES = {"maml", "protonet", "cnp", "bmaml"}


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the tests that `make quick` runs")
    parser.addoption("--learner", metavar="NAME", help="only what is asked of every learner, and of this one")


def pytest_ignore_collect(collection_path, config):
    """`make quick` does not import what it would not run."""
    if config.getoption("quick") and collection_path.name.startswith("test_"):
        return "\npytestmark = pytest.mark.slow\n" in collection_path.read_text() or None
    return None


def names_in(function, seen):
    """The names that a function uses, and those of the tests' functions that it calls."""
    found, codes = set(), [inspect.unwrap(function).__code__]
    for code in codes:
        found |= set(code.co_names) | set(code.co_freevars)
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    for name in found - seen:
        seen.add(name)
        called = inspect.unwrap(function).__globals__.get(name)
        if inspect.isfunction(inspect.unwrap(called)) and str(TESTS) in inspect.unwrap(called).__code__.co_filename:
            names_in(called, seen)
    return seen


def slow(item):
    fixtures = [f.func for name in item.fixturenames for f in item._fixtureinfo.name2fixturedefs.get(name, ())]
    fixtures = [f for f in fixtures if str(TESTS) in inspect.unwrap(f).__code__.co_filename]
    seen = set(item.fixturenames)
    for function in (item.function, *fixtures):
        names_in(function, seen)
    return bool(seen & SLOW) or any(item.iter_markers("slow")) or any(item.iter_markers("data"))


def learner_of(item):
    """The learner that a test is run for, by a parameter `name` or a bad input's name; None: no single one."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    words = [values.get("name"), *(case.name.split(" ")[0] for case in values.get("cases", ())[:1])]
    return next((word for word in words if word in LEARNERS), None)


def pytest_collection_modifyitems(config, items):
    """Contract tests of one learner run after one another, so that they share what they trace and compile."""
    contract = [item for item in items if item.path.name == "test_contract.py" and hasattr(item, "callspec")]
    ordered = iter(sorted(contract, key=lambda item: item.callspec.params["name"]))
    members = set(contract)
    items[:] = [next(ordered) if item in members else item for item in items]
    if name := config.getoption("learner"):
        if name not in LEARNERS:
            raise pytest.UsageError(f"no learner is called {name!r}: learners/registry.py has {', '.join(LEARNERS)}")
        keep(config, items, lambda item: learner_of(item) == name)
    if config.getoption("quick"):
        tried = set()

        def first_of_its_kind(item):
            name = learner_of(item)
            kind = (item.path, item.originalname, name)
            return name in {None, *REPRESENTATIVES} and not (kind in tried or tried.add(kind))

        keep(config, items, lambda item: not slow(item) and first_of_its_kind(item))


def keep(config, items, wanted):
    kept, left_out = [], []
    for item in items:
        (kept if wanted(item) else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


CLEARED_EVERY = 20
_done = 0


def pytest_runtest_teardown(item, nextitem):
    """Compiled programs of tests gone by are rarely of use again, and gigabytes by the hundred."""
    global _done
    _done += len(item.callspec.params.get("cases", "1")) if hasattr(item, "callspec") else 1
    same = nextitem is not None and learner_of(item) is not None and learner_of(item) == learner_of(nextitem)
    often = 100 if item.config.getoption("quick") else CLEARED_EVERY
    if _done >= often and not same:  # tests of one learner share its programs
        _done = 0
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
