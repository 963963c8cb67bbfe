"""Bad inputs as data: what is given, and the verdict that it must get. `tests/test_bad_inputs.py` runs them all."""

from bad_inputs import adapting, damage, files, learners, options, pictures, python, recipes, tables
from bad_inputs.judging import Case, judge

PARTS = (options, recipes, tables, files, pictures, python, adapting, damage, learners)
CASES: list[Case] = [case for part in PARTS for case in part.cases()]

__all__ = ["CASES", "Case", "judge"]
