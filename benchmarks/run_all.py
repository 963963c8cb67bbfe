"""Every benchmark, one after another, never two at once; figures as JSON in --out."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = ("gradient_parity", "sinusoid", "kernels", "conv4", "protonet", "l2l", "bayes", "memory", "compile_time")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="a smoke run: figures mean little")
    chosen = parser.parse_args()
    failed = []
    for name in SCRIPTS:
        began = time.perf_counter()
        script, figures = Path(__file__).parent / f"{name}.py", chosen.out / f"{name}.json"
        command = [sys.executable, str(script), "--json", str(figures)]
        print(f"== {name}", flush=True)
        if subprocess.run(command + ["--quick"] * chosen.quick).returncode:
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - began:.0f} s", flush=True)
    if failed:
        print("failed:", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
