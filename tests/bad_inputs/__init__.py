"""Bad inputs as data: what is given, and the verdict that it must get. `tests/test_bad_inputs.py` runs them all."""

from bad_inputs import files, options, python, recipes, tables
from bad_inputs.judging import Case, judge

CASES: list[Case] = [*options.cases(), *recipes.cases(), *tables.cases(), *files.cases(), *python.cases()]

__all__ = ["CASES", "Case", "judge"]
