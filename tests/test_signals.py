"""Ctrl-C, SIGTERM and SIGHUP: in training, anywhere else, and a second time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from metaprior.core.signals import Ended, breaking_in, interruptible

COMMAND = [sys.executable, "-c", "from metaprior_command import main; main()"]
SMALL = ["training.chunk=5", "training.meta_batch=2", "training.validate_every=5", "training.validation_tasks=2"]


def started(*command: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    out = process.communicate(timeout=90)[0]
    return process.returncode, out


def until(there, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not there() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert there()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_scheduler_or_a_closed_terminal_saves_the_run(tmp_path, name):
    folder, signum = tmp_path / "run", getattr(signal, name)
    process = started("train", "sinusoid", "--out", folder, "--set", *SMALL)
    until((folder / "metrics.jsonl").exists)
    process.send_signal(signum)
    status, out = ended(process)
    assert status == 128 + signum, out
    assert "a second signal ends at once" in out
    assert "saved; continue with --resume" in out
    assert "Traceback" not in out


@pytest.mark.parametrize("seconds", [0.1, 0.6, 1.2])
def test_ctrl_c_during_imports_ends_with_one_line(seconds):
    # The interpreter's own start is not ours: signals count from when it runs the command.
    code = "import os; os.write(1, b'.'); from metaprior_command import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.read(1)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    # 0 if it was done by then, and the signal's own where it met a process on its way out.
    assert process.returncode in (130, 0, -signal.SIGINT), said
    assert said == ("stopped\n" if process.returncode == 130 else "")


def test_ctrl_c_while_the_first_chunk_compiles_or_runs(tmp_path):
    folder = tmp_path / "runs" / "new"
    process = started("train", "sinusoid", "--out", folder, "--set", *SMALL, "training.chunk=100000")
    until((folder / "recipe.json").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    if process.poll() is None:  # the chunk had begun, and would be finished first
        process.send_signal(signal.SIGINT)
    status, out = ended(process)
    assert status in (130, -signal.SIGINT), out  # the latter where the second one met a process on its way out
    assert "Traceback" not in out


def test_a_signal_breaks_in_and_is_named():
    with pytest.raises(Ended) as caught, breaking_in():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_first_signal_is_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as asked:
        assert asked() == 0
        os.kill(os.getpid(), signal.SIGHUP)
        assert asked() == signal.SIGHUP
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_ends_a_process_that_python_cannot_interrupt():
    # A wait that starts again whatever handlers do, like a compilation in C++.
    code = (
        "import sys; from metaprior.core.signals import interruptible; import hashlib\n"
        "with interruptible():\n"
        "    print('busy', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_a_signal_that_a_destructor_would_swallow_is_raised_again():
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def work():
        Dying()
        time.sleep(5)

    with pytest.raises(Ended), breaking_in():
        work()
