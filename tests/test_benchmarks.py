"""Every benchmark runs: `--quick`, whose figures mean little."""

import contextlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
PEERS = Path(os.environ.get("PEERS_VENV", FOLDER.parent / ".venv-peers")) / "bin" / "python"
TEXTS = {path.relative_to(FOLDER).as_posix(): path.read_text() for path in sorted(FOLDER.rglob("*.py"))}
# Those that take --quick, but for the one that runs the others; the rest are their workers.
SCRIPTS = [
    name
    for name, text in TEXTS.items()
    if re.search(r"= options\(|--quick", text) and '__name__ == "__main__"' in text and name != "run_all.py"
]

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def ended_well():
    try:
        yield
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"ended with {end.code}") from None


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_runs(script, monkeypatch, capsys, tmp_path, request):
    if re.search(r"from harness import .*\bPEERS\b", TEXTS[script]) and not PEERS.exists():
        pytest.skip("needs the peers: benchmarks/install_peers.sh")
    if "METAPRIOR_DATA" in TEXTS[script]:
        request.getfixturevalue("data_dir")
    path = FOLDER / script
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--quick"])
    monkeypatch.setattr(sys, "path", [str(path.parent), str(FOLDER), *sys.path])
    if "os.fork" in TEXTS[script]:  # not in a process whose JAX has threads
        done = subprocess.run([sys.executable, path, "--quick"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    with ended_well():
        runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    # A worker that failed, unless it is a peer that is not installed; a learner that could not be fitted.
    assert not re.search(r" -  (?!no peers)|Error:", printed), printed


def test_they_are_found():
    assert {"conv.py", "sinusoid.py", "reliability/kills.py", "reliability/pit.py"} <= set(SCRIPTS)
    assert not {"harness.py", "peers.py", "ours.py", "worker.py"} & set(SCRIPTS)
