"""The tutorial runs from top to bottom, and what it shows is so."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"


@pytest.mark.slow
def test_the_tutorial_runs():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [out["data"]["text/plain"] for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out]
    coverage = [float(found) for text in shown for found in re.findall(r"Figure\(mean=(0\.\d+)", text)[-1:]]
    assert len(coverage) == 2
    assert all(0.7 < c < 1 for c in coverage), shown
