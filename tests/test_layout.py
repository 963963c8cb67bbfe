"""The rooms of the package: which may use which, and modules by their former names."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path

import pytest

import metaprior as mp
from metaprior.moved import MOVED

PACKAGE = Path(mp.__file__).parent
ROOT = Path(__file__).parents[1]


def room(module: str) -> str:
    """The folder of a module, `learners.builders` apart from the learners; "" for the top."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[:2] == ["learners", "builders"] else parts[0] if len(parts) > 1 else ""


def arrows() -> dict[str, set[str]]:
    found = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("metaprior", *path.relative_to(PACKAGE).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("metaprior."):
                whole = f"{node.module}.x"  # of a package, whose names are its own
                if room(whole) != room(module):
                    found[room(module)].add(room(whole))
    return found


def test_no_room_uses_one_that_uses_it():
    uses = arrows()
    del uses[""]  # the public names, which come from everywhere

    def reached(start: str) -> set[str]:
        seen, waiting = set(), list(uses[start])
        while waiting:
            if (now := waiting.pop()) not in seen:
                seen.add(now)
                waiting += uses.get(now, ())
        return seen

    assert len(uses) >= 12
    for name in list(uses):
        assert name not in reached(name), f"{name} uses itself by way of another room"
    assert uses["core"] == set()
    assert uses["kernels"] == {"core"}
    assert uses["tasks"] == {"core"}


def test_nothing_but_the_front_door_lies_at_the_top():
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "__main__.py", "moved.py"]


@pytest.mark.parametrize("former", sorted(MOVED))
def test_a_module_is_found_by_its_former_name(former):
    sys.modules.pop(f"metaprior.{former}", None)
    with pytest.warns(DeprecationWarning, match=MOVED[former][0]):
        module = import_module(f"metaprior.{former}")
    for today in MOVED[former]:
        for name, value in vars(import_module(f"metaprior.{today}")).items():
            if getattr(value, "__module__", None) == f"metaprior.{today}":
                assert vars(module)[name] is value, name


def test_a_former_name_hides_no_function():
    """A module that is imported becomes an attribute of its package, in place of whatever has that name there."""
    for former in MOVED:
        package, _, name = f"metaprior.{former}".rpartition(".")
        there = vars(import_module(package)).get(name)
        assert not callable(there), former


def test_former_names_are_in_nobodys_way():
    code = (
        "import metaprior as mp\n"
        "from metaprior.types import Batch\n"
        "from metaprior.inference.gradient import Adaptation, descend, joined\n"
        "assert Batch is mp.Batch and mp.runs.Run.__module__ == 'metaprior.experiments.runs'\n"
        "try:\n    import metaprior.nothing\n"
        "except ModuleNotFoundError as error:\n    assert 'nothing' in str(error)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_every_module_and_public_name_has_its_place_in_the_api_pages():
    pages = {page.name: page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")}
    shown = re.findall(r"^::: metaprior\.(\S+)$", "\n".join(pages.values()), re.MULTILINE)
    modules = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("[!_]*.py")]
    public = {module for module in modules if not module.startswith("cli.")} - {"moved"}
    assert sorted(shown) == sorted(public)
    assert set(re.findall(r"api/(\S+\.md)", (ROOT / "mkdocs.yml").read_text())) == pages.keys()
    names, former = pages["index.md"].split("## The public names")[1].split("## Former module names")
    table = "".join(line for line in names.split("## ")[0].splitlines() if line.startswith("| "))
    assert set(re.findall(r"`(\w+)`", table)) == set(mp.__all__)
    assert len(mp.__all__) == 30
    rows = re.findall(r"^\| `(\S+)` \| (.*) \|$", former, re.MULTILINE)
    assert {old: tuple(re.findall(r"`(\S+)`", new)) for old, new in rows} == MOVED
