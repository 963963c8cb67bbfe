"""Kill trainings at random moments, resume them, and hold the end against a run that nobody killed.

    python benchmarks/reliability/kills.py [--quick] [--kills 1000] [--out FOLDER] [--seed 0]

Each learner trains on sinusoids through the command line, and saves a checkpoint every ten meta-steps. A training is
killed (SIGKILL mostly, also SIGTERM and SIGINT) at a random moment of its start, just after figures appeared, or while
a checkpoint is being written, and resumed, until it is done. Meanwhile a reader opens the run again and again, as
`evaluate` does. A kill is survived if

* the training that follows it starts, and stands no earlier than the last checkpoint that was seen whole,
* the reader never meets an error, a warning or a run that goes backwards,
* the parameters at the end, the last ones and those that validated best, equal the undisturbed run's to the bit,
* metrics.jsonl has the undisturbed run's rows, each once, and TensorBoard shows each once,
* no temporary file or folder is left.

Importing JAX takes longer than everything else, so trainings are forked from a process that has imported it and not
used it yet. They share nothing else. Prints a table; exit status 1 if anything did not survive. Linux and macOS only.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import orbax.checkpoint  # noqa: F401  imported before the fork
import tensorboardX.record_writer
import tensorboardX.summary  # noqa: F401
from tensorboardX.proto import event_pb2

from metaprior import cli
from metaprior.experiments.runs import Run

warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
LEARNERS = ("maml", "reptile", "meta_sgd", "imaml", "amortized_bml", "bmaml", "platipus", "meta_lstm", "llama", "anil")
EVERY = 10  # meta-steps a chunk
OPTIONS = [f"training.chunk={EVERY}", f"training.validate_every={EVERY}", "training.meta_batch=2",
           "training.validation_tasks=2", "network.hidden=[8]"]  # fmt: skip
MOMENTS = ("start", "figures", "checkpoint")


def fork(work: Callable[[], int], log: Path) -> int:
    """The id of a process that does the work, its output in `log`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = work()
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    """The exit status of a process, minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(learner: str, folder: Path, steps: int, resume: bool) -> int:
    how = ["--resume"] if resume else ["--set", *OPTIONS, f"training.steps={steps}"]
    try:
        cli.main(["train", "sinusoid", "--learner", learner, "--out", str(folder), *how])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def read(folder: Path) -> int:
    """Open the run again and again until it is told to stop; whatever is wrong ends it with status 1."""
    from metaprior.experiments.opened import load
    from metaprior.training.loop import init_state

    stop = False

    def ask(signum: int, frame: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, ask)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    like, stood, reads = None, 0, 0
    while not stop:
        time.sleep(0.4)
        if not (folder / "recipe.json").exists() or not Run(folder)._last.steps():
            continue
        if like is None:
            experiment = load(folder).experiment
            like = init_state(experiment.learner, experiment.splits.train, experiment.training)
        run = Run.open(folder)
        chosen = run.chosen(like, "last")
        assert chosen.step >= stood, f"the run went back from meta-step {stood} to {chosen.step}"
        stood, reads = chosen.step, reads + 1
        run.chosen(like)
        steps = [row["step"] for row in run.metrics()]
        assert steps == sorted(set(steps)), f"rows {steps}"
    print(f"{reads} reads")
    return 0


def tensorboard(folder: Path) -> list[tuple[int, str]]:
    """Step and name of each figure that TensorBoard shows: files in order, a restart hides what is beyond it."""
    shown: list[tuple[int, str]] = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at + 12 <= len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            if at + 16 + size > len(data):
                break  # cut short by a kill
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.HasField("session_log"):
                shown = [(step, name) for step, name in shown if step < event.step]
            shown += [(event.step, value.tag) for value in event.summary.value]
    return shown


def judge(whole: Path, killed: Path) -> int:
    """0 if both runs are the same to the bit; prints what is not."""
    import jax

    from metaprior.experiments.opened import load
    from metaprior.training.loop import init_state

    def leaves(tree: object) -> list[bytes]:
        return [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]

    experiment = load(whole).experiment
    like = init_state(experiment.learner, experiment.splits.train, experiment.training)
    faults = []
    one, other = Run.open(whole), Run.open(killed)
    for which in ("best", "last"):
        a, b = one.chosen(like, which), other.chosen(like, which)
        if a.step != b.step or leaves(a.params) != leaves(b.params):
            faults.append(f"{which}: parameters differ (meta-steps {a.step}, {b.step})")
    if leaves(one.restore(like).state) != leaves(other.restore(like).state):
        faults.append("state differs")
    rows = [
        [{k: v for k, v in row.items() if "second" not in k} for row in map(json.loads, lines)]
        for lines in ((run / "metrics.jsonl").read_text().splitlines() for run in (whole, killed))
    ]
    if rows[0] != rows[1]:
        faults.append(f"rows differ: {[r['step'] for r in rows[0]]}, {[r['step'] for r in rows[1]]}")
    shown = [Counter(tensorboard(run)) for run in (whole, killed)]
    if shown[0] != shown[1] or max(shown[1].values()) > 1:
        more, less = (list(d.items())[:3] for d in (shown[1] - shown[0], shown[0] - shown[1]))
        faults.append(f"TensorBoard differs: more {more}, less {less}")
    left = [p for p in killed.rglob("*") if p.name.startswith(".") or "tmp" in p.name or "damaged" in p.name]
    if left:
        faults.append(f"left behind: {left[:3]}")
    print("\n".join(faults))
    return 1 if faults else 0


def strike(pid: int, folder: Path, dice: random.Random) -> tuple[str, str, bool]:
    """Kill a training at a random moment; (signal, moment, whether it was still running)."""
    name = dice.choices(("SIGKILL", "SIGTERM", "SIGINT"), (8, 1, 1))[0]
    moment = dice.choices(MOMENTS, (2, 4, 4))[0]
    figures, deadline = folder / "metrics.jsonl", time.monotonic() + 60

    def size() -> int:
        try:
            return figures.stat().st_size
        except OSError:
            return 0

    def writing() -> bool:
        return any("tmp" in p.name for which in ("last", "best") for p in _listed(folder / "checkpoints" / which))

    def running() -> bool:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    if moment == "start":
        end = time.monotonic() + dice.uniform(0, 3)
        while running() and time.monotonic() < end:
            time.sleep(0.01)
    else:
        before = size()
        while running() and size() <= before and time.monotonic() < deadline:
            time.sleep(0.001)
        end = time.monotonic() + dice.uniform(0, 0.4)
        while running() and time.monotonic() < end:
            time.sleep(0.001)
        if moment == "checkpoint":
            while running() and not writing() and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(dice.uniform(0, 0.03))
    alive = running()
    os.kill(pid, getattr(signal, name))
    return name, moment, alive


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def whole_steps(folder: Path) -> int:
    return max((int(p.name) for p in _listed(folder / "checkpoints" / "last") if p.name.isdecimal()), default=0)


def campaign(learner: str, kills: int, steps: int, root: Path, dice: random.Random) -> tuple[Counter, list[str]]:
    """Kill trainings of one learner `kills` times; (kills by signal and moment, faults)."""
    counts, faults, whole, log = Counter(), [], root / f"{learner}-whole", root / f"{learner}.log"
    if wait(fork(lambda: train(learner, whole, steps, False), log)):
        return counts, [f"{learner}: the undisturbed training failed, see {log}"]
    number = 0
    while counts.total() < kills and not faults:
        folder, reading = root / f"{learner}-{number}", root / f"{learner}-{number}-reader.log"
        number += 1
        reader, stood = fork(lambda folder=folder: read(folder), reading), 0
        while True:
            resume = (folder / "recipe.json").exists()
            pid = fork(lambda folder=folder, resume=resume: train(learner, folder, steps, resume), log)
            if counts.total() >= kills:
                status = wait(pid)
            else:
                name, moment, alive = strike(pid, folder, dice)
                status = wait(pid)
                counts[name, moment] += alive
            ended = {0: "done", -9: "killed", -15: "killed", -2: "killed", 130: "saved", 143: "saved"}.get(status)
            stands = whole_steps(folder)
            if ended is None:
                faults.append(f"{learner}: a training ended with status {status}, see {log}")
            if stands < stood:
                faults.append(f"{learner}: went back from meta-step {stood} to {stands}")
            stood = stands
            if faults or ended == "done":
                break
        os.kill(reader, signal.SIGTERM)
        if wait(reader):
            faults.append(f"{learner}: the reader met an error, see {reading}")
        judged = root / f"{learner}-{number}-judged.log"
        if not faults and wait(fork(lambda folder=folder: judge(whole, folder), judged)):
            faults.append(f"{learner}: {judged.read_text().strip()[:500]}")
        if not faults:
            shutil.rmtree(folder)
        print(f"{learner}: {counts.total()} kills, {faults or 'survived'}", flush=True)
    return counts, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one learner, two kills")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--learners", nargs="+", default=LEARNERS)
    parser.add_argument("--steps", type=int, default=600, help="meta-steps a training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="keep logs, and the runs that did not survive, here")
    asked = parser.parse_args()
    learners, kills = (asked.learners[:1], 2) if asked.quick else (asked.learners, asked.kills)
    root = asked.out or Path(tempfile.mkdtemp())
    root.mkdir(parents=True, exist_ok=True)
    dice, total, faults = random.Random(asked.seed), Counter(), []
    for i, learner in enumerate(learners):
        share = kills * (i + 1) // len(learners) - kills * i // len(learners)
        counts, found = campaign(learner, share, 100 if asked.quick else asked.steps, root, dice)
        total, faults = total + counts, faults + found
    print(f"\n{'signal':<10}" + "".join(f"{moment:>12}" for moment in MOMENTS))
    for name in ("SIGKILL", "SIGTERM", "SIGINT"):
        print(f"{name:<10}" + "".join(f"{total[name, moment]:>12}" for moment in MOMENTS))
    print(f"{total.total()} kills of {len(learners)} learners, {len(faults)} faults")
    print("\n".join(faults))
    if asked.out is None and not faults:
        shutil.rmtree(root)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
