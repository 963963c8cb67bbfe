"""Every bad input gets a clear error, every unusual one the right answer, and nothing else."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bad_inputs import CASES, judge

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_answered_clearly(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verdict, came = judge(case, tmp_path)
    assert verdict == ("clear" if case.right is None else "works"), f"{case.name}: {verdict}: {came}"


def test_there_are_many_and_each_has_its_own_name():
    assert len({case.name for case in CASES}) == len(CASES) >= 500
