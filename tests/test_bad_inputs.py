"""Every bad input gets a clear error, every unusual one the right answer, and nothing else."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bad_inputs import CASES, PARTS, judge, learners, options

pytestmark = pytest.mark.slow


def grouped():
    """The cases by title: those of a learner, for example. They share compiled programs, or are quick."""
    found = {}
    for part in PARTS:
        for case in part.cases():
            words = {options: 2, learners: 1}.get(part)
            found.setdefault(" ".join(case.name.split(" ")[:words]), []).append(case)
    return found


GROUPS = grouped()


@pytest.mark.parametrize("cases", GROUPS.values(), ids=GROUPS)
def test_bad_inputs_are_answered_clearly(cases, tmp_path, monkeypatch):
    wrong = []
    for place, case in enumerate(cases):
        folder = tmp_path / str(place)
        folder.mkdir()
        monkeypatch.chdir(folder)
        verdict, came = judge(case, folder)
        if verdict != ("clear" if case.right is None else "works"):
            wrong.append(f"{case.name}: {verdict}: {came}")
    assert not wrong, "\n".join(wrong)


def test_there_are_many_and_each_has_its_own_name():
    assert len({case.name for case in CASES}) == len(CASES) >= 500
    assert sum(map(len, GROUPS.values())) == len(CASES)
