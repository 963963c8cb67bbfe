#!/usr/bin/env bash
# The libraries we are measured against, in an environment of their own: metaprior never depends on them.
# torch goes first and alone, so that no other package's requirement picks another build of it.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV="${PEERS_VENV:-.venv-peers}"
PYTHON="${PYTHON:-python3}"

test -x "$VENV/bin/python" || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip "$@"; }
pip install --quiet --upgrade pip setuptools wheel
pip install --quiet "torch==2.13.0"
# torch is named again: laplace-torch would else bring the newest build of it.
pip install --quiet "torch==2.13.0" numpy higher torchopt laplace-torch
# laplace-torch asks for torchvision and works without; the one that comes is built for another torch and breaks imports.
pip uninstall --quiet --yes torchvision
# learn2learn's source build needs Cython and an old setuptools, and fails on Python 3.11: say so and go on.
if ! pip install --quiet learn2learn >"$VENV/learn2learn.log" 2>&1; then
  echo "learn2learn: does not build here; its last words (whole log: $VENV/learn2learn.log):"
  grep -m 1 -E "fatal error|Error:" "$VENV/learn2learn.log" || tail -n 3 "$VENV/learn2learn.log"
fi
"$VENV/bin/python" - <<'PY'
import importlib
for name in ("torch", "higher", "torchopt", "laplace", "learn2learn"):
    try:
        module = importlib.import_module(name)
        print(f"{name}: {getattr(module, '__version__', 'installed')}")
    except ImportError as error:
        print(f"{name}: absent ({error})")
PY
