"""What is imported when, and what happens where the library of an extra is missing."""

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

import metaprior as mp
from metaprior.cli import COMMANDS, commands
from metaprior.core.extras import MissingExtra, extra

TOP = Path(__file__).parents[1]
SOURCES = sorted((TOP / "src").rglob("*.py"))
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
IMPORTED_AS = {"scikit-learn": "sklearn", "pillow": "PIL", "orbax-checkpoint": "orbax"}


def names(requirements: list[str]) -> list[str]:
    """The distributions that requirements name, as they are spelled there, without versions and extras."""
    return [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]


BASE = set(names(PROJECT["dependencies"]))
EXTRAS = {
    name: {IMPORTED_AS.get(library, library) for library in names(PROJECT["optional-dependencies"][name])}
    for name in ("cli", "data", "sklearn", "plots", "lanczos", "truth")
}


def foreign(node: ast.AST, allowed: frozenset[str]) -> list[str]:
    """The libraries that are imported below a node and may not be."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return []
    if isinstance(node, ast.With) and ast.unparse(call := node.items[0].context_expr).startswith("extra("):
        allowed |= EXTRAS[ast.literal_eval(call.args[0])]
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    found = [top for module in modules if (top := module.partition(".")[0]) not in allowed]
    return found + [name for child in ast.iter_child_nodes(node) for name in foreign(child, allowed)]


def test_what_is_imported_is_a_base_dependency_or_stands_inside_its_extra():
    base = {"jax", "numpy", "scipy", "optax", "equinox", "jaxtyping"}
    assert base == BASE
    known = frozenset({*sys.stdlib_module_names, *base, "metaprior", "metaprior_command"})
    found = {}
    for path in SOURCES:
        # The command line's modules are imported after their package, which names the extra.
        own = EXTRAS["cli"] if path.parent.name == "cli" and path.name != "__init__.py" else frozenset()
        if names_ := foreign(ast.parse(path.read_text()), known | own):
            found[str(path)] = names_
    assert found == {}
    assert {"PIL", "sklearn"} <= {*foreign(ast.parse("import PIL\ndef f():\n    from sklearn.x import y"), known)}


def test_all_installs_every_extra_and_the_makefile_installs_all():
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert everything == f"metaprior[{','.join(EXTRAS)}]"
    assert "'.[all," in (TOP / "Makefile").read_text()


def loaded_by(*command: str) -> set[str]:
    """The modules that a Python process has loaded when it ends."""
    code = "import atexit, sys; atexit.register(lambda: print('LOADED', *sys.modules, file=sys.stderr)); "
    done = subprocess.run([sys.executable, "-c", code + command[0], *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rpartition("LOADED ")[2].split())


def test_import_loads_nothing_and_help_no_command():
    heavy = {"jax", "numpy", "scipy", "optax", "equinox", "sklearn", "matplotlib", "orbax", "PIL", "requests", "tyro"}
    assert loaded_by("import metaprior") & heavy == set()
    shown = loaded_by("from metaprior_command import main; main()", "--help")
    assert shown & heavy == {"tyro"}
    assert {m for m in shown if m.startswith("metaprior.cli.")} == {"metaprior.cli.screen"}
    listed = loaded_by("from metaprior_command import main; main()", "list")
    assert listed & heavy & {"sklearn", "matplotlib", "orbax", "PIL", "requests"} == set()


def test_every_public_name_at_once_loads_no_library_of_an_extra():
    loaded = loaded_by(
        "import metaprior as mp; [getattr(mp, n) for n in mp.__all__ if n not in ('MetaClassifier', 'MetaRegressor')]"
    )
    assert loaded & (set.union(*EXTRAS.values()) | {"equinox", "scipy.optimize", "scipy.special"}) == set()


def test_public_names_are_what_type_checkers_see():
    seen = {}
    for node in ast.walk(ast.parse((TOP / "src/metaprior/__init__.py").read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom):
                    seen |= {alias.name: line.module for alias in line.names}
    assert set(mp.__all__) <= set(seen)
    assert len(mp.__all__) <= 30
    assert {name for name in seen if name not in mp.__all__} <= set(dir(mp))
    for name, module in seen.items():
        there = getattr(import_module(module), name, None) or import_module(f"{module}.{name}")
        assert getattr(mp, name) is there, name
    assert set(mp.__all__) <= set(dir(mp))
    assert mp.__version__ == PROJECT["version"]
    assert mp.training.fit is mp.fit
    with pytest.raises(AttributeError, match="'metaprior' has no attribute 'fitt'"):
        _ = mp.fitt


def test_each_package_may_be_imported_first():
    """`import metaprior` sets no order any more."""
    packages = [path.parent.relative_to(TOP / "src") for path in SOURCES if path.name == "__init__.py"]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    for n in [n for n in sys.modules if n.startswith('metaprior')]: del sys.modules[n]\n"
        "    importlib.import_module(name)\n"
    )
    chosen = [".".join(package.parts) for package in packages]
    done = subprocess.run([sys.executable, "-c", code, *chosen], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"metaprior.learners", "metaprior.tasks", "metaprior.cli"} <= set(chosen)


def test_help_says_of_each_command_what_the_command_says():
    assert list(commands([])) == list(COMMANDS)
    for name, (_, text) in COMMANDS.items():
        own = commands([name])[name]
        assert inspect.getdoc(own).startswith(text), name
        assert "\n        " not in own.__doc__, f"{name}: a line break within an argument's text is kept in its help"
        others = [other for other in commands([name]).values() if other.__name__ == "command"]
        assert len(others) == len(COMMANDS) - 1
    assert all(one.__name__ != "command" for one in commands(["--tyro-print-completion", "bash"]).values())


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"^A plot needs the extra `plots` \(.*matplotlib.*metaprior\[plots\]'$"):
        mp.evaluation.plots.panels(1, 1)
    with pytest.raises(ModuleNotFoundError, match=r"metaprior\.nothing"), extra("plots", "A plot"):
        import_module("metaprior.nothing")  # our own fault, which no extra mends
    with pytest.raises(ZeroDivisionError), extra("plots", "A plot"):
        _ = 1 / 0


def bare() -> set[str]:
    """The modules that an environment with the base dependencies alone lacks, of those that are installed here."""
    present, waiting = set(), {"metaprior", *BASE}
    while waiting:
        present.add(name := re.sub(r"[-_.]+", "-", waiting.pop()).lower())
        needed = [r for r in (requires(name) or []) if "extra ==" not in r] if name != "metaprior" else []
        waiting |= {re.sub(r"[-_.]+", "-", n).lower() for n in names(needed)} - present
    return {
        module
        for module, homes in packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", home).lower() for home in homes} & present
    }


def test_base_dependencies_are_enough_to_fit_and_evaluate(tmp_path):
    code = f"""
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {bare()!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]

import importlib

import jax
import metaprior as mp
from metaprior.core.extras import MissingExtra

splits = mp.tasks.sinusoid(shot=3, query=3, test_query=3)
training = mp.Training(steps=2, meta_batch=2, chunk=2, validation_tasks=2)
learner = mp.make_learner("maml", mp.mlp(1, (4,)), mp.Gaussian())
fitted = mp.fit(learner, splits, training)
report = mp.evaluate(learner, fitted.best, splits.test, jax.random.key(0), tasks=2)
print(sorted(report.figures)[-1])

def named(purpose, function):
    try:
        function()
    except MissingExtra as error:
        print(error)
    else:
        print(purpose, "was not missed")

def lanczos():
    one = jax.numpy.ones((1, 1))
    mp.inference.curvature.lanczos(lambda phi, x: x @ phi, mp.Gaussian(), one, mp.Batch(one, one), 1.0)

named("estimators", lambda: mp.MetaRegressor)
named("lanczos", lanczos)
from metaprior.evaluation import plots
from metaprior.experiments import runs
from metaprior.tasks.images import decoding
named("pictures", lambda: plots.training_curve([{{"step": 1, "train/loss": 1.0, "validation/nll": 1.0}}]))
named("digits", lambda: mp.tasks.digits())
named("nuts", lambda: importlib.import_module("metaprior.referees.nuts"))
folder = runs.Run.create({str(tmp_path / "run")!r}, {{"learner": "maml"}})
named("run", lambda: mp.fit(learner, splits, training, run=folder))
folder.discard()
named("image", lambda: decoding.decode_picture(decoding.Picture("", "x.png", lambda: b""), None, 1))
named("download", lambda: mp.tasks.store.download("https://example.invalid/x.zip", None, "x"))

from metaprior_command import main
sys.argv[1:] = ["list"]
main()
"""
    cached = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | cached, capture_output=True, text=True)
    expected = [
        "width_95",
        r"A scikit-learn estimator needs the extra `sklearn` \(No module named 'sklearn'\): pip install .*",
        r"Lanczos curvature needs the extra `lanczos` \(No module named 'matfree'\): .*",
        r"A plot needs the extra `plots` \(No module named 'matplotlib'\): .*",
        r"The task source 'digits' needs the extra `sklearn` .*",
        r"NUTS needs the extra `truth` \(No module named 'numpyro'\): .*",
        r"A run's folder needs the extra `cli` \(No module named 'orbax'\): .*",
        r"Reading pictures needs the extra `data` \(No module named 'PIL'\): .*",
        r"Downloading x needs the extra `data` \(No module named 'pooch'\): .*",
    ]
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), done.stdout + done.stderr
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert done.returncode == 1
    assert re.fullmatch(r"error: The command line needs the extra `cli` \(No module named '\w+'\): .*\n", done.stderr)
    assert not (tmp_path / "run").exists()  # refused before anything was trained
