"""Two environments, one machine, one run: workers take turns (A B C A B C ...), medians and ratios are reported."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = Path(os.environ.get("PEERS_VENV", HERE.parent / ".venv-peers")) / "bin" / "python"
THREADS = 2
SETTLE = 0.4  # seconds: OpenMP's threads go on spinning for 0.2 after their work, in the next contender's time


def options(description: str | None, **extra: dict) -> argparse.Namespace:
    """--json PATH and --quick, which every benchmark has, and its own flags."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a smoke run: figures mean little")
    for name, settings in extra.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args()


def environment(threads: int = THREADS) -> dict[str, str]:
    """The process's environment with so many threads for OpenMP, MKL and XLA."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(threads))
    return dict(os.environ) | limits | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}


class Worker:
    """A worker process, ready to run; `failed` says why it is not."""

    def __init__(self, script: str, *arguments: object, peer: bool, threads: int = THREADS):
        python = str(PEERS) if peer else sys.executable
        self.process, self.failed, self.rounds = None, None, []
        if peer and not PEERS.exists():
            self.failed = "no peers' environment: run benchmarks/install_peers.sh"
            return
        command = [python, str(HERE / script), *map(str, arguments)]
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe nobody reads would fill up and block)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        self.process = subprocess.Popen(command, text=True, env=environment(threads), **pipes)
        ready = self._listen()
        self.ready_seconds = ready["ready_seconds"] if ready else None

    def _listen(self) -> dict | None:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.said.seek(0)
        said = self.said.read().strip().splitlines()
        self.failed = said[-1][:300] if said else "ended without a word"
        return None

    def run(self, seconds: float) -> None:
        if self.failed is None:
            print(seconds, file=self.process.stdin, flush=True)
            if figures := self._listen():
                self.rounds.append(figures)

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()

    def report(self) -> dict:
        if self.failed is not None or not self.rounds:
            return {"failed": self.failed or "not run"}
        per_step = sorted(r["seconds"] / r["steps"] for r in self.rounds)
        return {
            "seconds_per_step": statistics.median(per_step),
            "steps_per_second": 1 / statistics.median(per_step),
            "fastest": per_step[0],
            "slowest": per_step[-1],
            "rounds": len(per_step),
            "ready_seconds": self.ready_seconds,
            "peak_mib": max(r["peak_mib"] for r in self.rounds),
        }


def peer_workers(names: list[str], problem: str, steps: int, threads: list[int]) -> dict[str, Callable]:
    """Each peer with each number of threads: two can be slower than one on tiny work, so its best counts."""

    def make(name: str, count: int) -> Callable[[], Worker]:
        return lambda: Worker("peers.py", name, problem, steps, count, peer=True, threads=count)

    return {f"{name} ({count} thr)": make(name, count) for name in names for count in threads}


def our_workers(problem: str, steps: int, at_once: int, threads: list[int]) -> dict[str, Callable]:
    """metaprior with each number of threads."""

    def make(count: int) -> Callable[[], Worker]:
        return lambda: Worker("ours.py", problem, steps, at_once, peer=False, threads=count)

    return {f"metaprior ({count} thr)": make(count) for count in threads}


def interleave(start: dict[str, Callable[[], Worker]], rounds: int, seconds: float) -> dict[str, dict]:
    """Start every worker, then let them take turns; figures of each by name."""
    workers = {}
    try:
        for name, make in start.items():
            print(f"  preparing {name}", file=sys.stderr)
            workers[name] = make()
        for _ in range(rounds):
            for worker in workers.values():
                time.sleep(SETTLE)
                worker.run(seconds)
    finally:
        for worker in workers.values():
            worker.close()
    return {name: worker.report() for name, worker in workers.items()}


def fastest(figures: dict[str, dict], names: list[str]) -> float | None:
    """Seconds a step of the fastest of those named that ran, each at its best number of threads."""
    rows = [row for name, row in figures.items() if name.rsplit(" (", 1)[0] in names]
    return min((row["seconds_per_step"] for row in rows if "seconds_per_step" in row), default=None)


def against(figures: dict[str, dict], ours: str, names: list[str]) -> float | None:
    """How many times faster ours is than the fastest of those named."""
    mine, theirs = fastest(figures, [ours]), fastest(figures, names)
    return theirs / mine if theirs and mine else None


def alone(script: str, *arguments: object) -> dict:
    """The figures that `script --one ARGUMENTS` prints, from a process of its own."""
    command = [sys.executable, str(HERE / script), "--one", *map(str, arguments)]
    said = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(said.splitlines()[-1])


def ratios(figures: dict[str, dict], groups: dict[str, list[str]]) -> dict[str, float | None]:
    """How many times faster metaprior is than the fastest of each group of peers; printed, too."""
    found = {name: against(figures, "metaprior", peers) for name, peers in groups.items()}
    for name, ratio in found.items():
        print(f"  times {name}: " + ("-" if ratio is None else f"{ratio:.2f}"))
    return found


def show(title: str, figures: dict[str, dict]) -> None:
    print(f"\n{title}")
    for name, row in figures.items():
        if "failed" in row:
            print(f"  {name:28s} -  {row['failed']}")
        else:
            ms, low, high = (1e3 * row[k] for k in ("seconds_per_step", "fastest", "slowest"))
            print(f"  {name:28s} {ms:9.3f} ms a step ({low:.3f} to {high:.3f}), {row['steps_per_second']:9.1f} steps/s,"
                  f" {row['peak_mib']:6.0f} MiB, ready in {row['ready_seconds']:.1f} s")  # fmt: skip


def write(path: Path | None, figures: dict) -> None:
    machine = {"cores": os.cpu_count(), "load": os.getloadavg(), "python": platform.python_version()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures | {"machine": machine}, indent=1) + "\n")
