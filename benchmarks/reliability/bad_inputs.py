"""How many bad inputs get which verdict: clear, works, or a fault (silent, obscure, hang, crash).

    python benchmarks/reliability/bad_inputs.py [--quick]

The cases are the tests' (`tests/bad_inputs/`). --quick runs every 1000th.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from bad_inputs import CASES, judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every 1000th case")
    chosen = CASES[:: 1000 if parser.parse_args().quick else 1]
    counts = Counter()
    for case in chosen:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            verdict, came = judge(case, Path(folder))
            os.chdir("/")
        counts[verdict] += 1
        if verdict not in ("clear", "works"):
            print(f"{verdict}: {case.name}: {came}")
    print(f"{len(chosen)} cases:", ", ".join(f"{verdict} {n}" for verdict, n in counts.most_common()))


if __name__ == "__main__":
    main()
