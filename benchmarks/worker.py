"""One side of a comparison: a process that gets ready, then runs for as long as each line of its input says.

Standard library only, so that both environments can run it. Lines out are JSON; what others print goes to stderr.
"""

import json
import resource
import sys
import time
from collections.abc import Callable


def peak_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(build: Callable[[], Callable[[], int]]) -> None:
    """`build` returns a function that runs some meta-steps to their end and says how many."""
    out, sys.stdout = sys.stdout, sys.stderr

    def say(**figures: float) -> None:
        print(json.dumps(figures), file=out, flush=True)

    baseline, began = peak_mib(), time.perf_counter()
    run = build()
    run()
    say(ready_seconds=time.perf_counter() - began)
    for line in sys.stdin:
        limit, steps, began = float(line), 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - began < limit:
            steps += run()
        seconds = time.perf_counter() - began
        say(steps=steps, seconds=seconds, peak_mib=peak_mib() - baseline)
