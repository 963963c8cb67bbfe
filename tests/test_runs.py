"""A run's folder survives: resuming, kills, damage, and other learners' checkpoints."""

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from metaprior.core.files import Locked, check_output, write_atomically
from metaprior.experiments.runs import OtherSettings, Run, RunExists, digest
from metaprior.tasks import array_tasks
from metaprior.training.checkpoint import CheckpointError, CheckpointMismatch, Checkpoints, check_fingerprint
from metaprior.training.loop import NonFiniteLoss, fit, init_state
from scenarios import TINY, same_bits, tiny_learner, tiny_splits

KILLS = 10  # benchmarks/reliability/kills.py has the campaign of a thousand


def train(folder, training=TINY, learner=None, resume=False):
    with Run.resume(folder) if resume else Run.create(folder, {"name": "tiny"}) as run:
        return fit(learner or tiny_learner(), tiny_splits(), training, run=run, resume=resume)


def test_a_resumed_run_has_the_same_bits_as_an_unstopped_one(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", replace(TINY, steps=8))
    resumed = train(tmp_path / "parts", resume=True)
    assert same_bits(whole.state, resumed.state)
    assert same_bits(whole.best, resumed.best)
    strip = [{k: v for k, v in row.items() if "second" not in k} for row in whole.history]
    assert [{k: v for k, v in row.items() if "second" not in k} for row in resumed.history] == strip
    assert [row["step"] for row in Run.open(tmp_path / "parts").metrics()] == [4, 8, 12]
    like = init_state(tiny_learner(), tiny_splits().train, TINY)
    assert same_bits(Run.open(tmp_path / "parts").params(like), whole.best)
    assert same_bits(Run.open(tmp_path / "parts").params(like, "last"), whole.params)
    assert list((tmp_path / "parts" / "tensorboard").iterdir())


def test_fast_chunks_share_a_checkpoint_and_a_stop_between_them_loses_no_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("metaprior.training.loop.SAVE_EVERY", 1e6)
    training, learner, folder = replace(TINY, chunk=2, validate_every=12), tiny_learner(), tmp_path / "run"

    def stop(row):
        if row["step"] == 8:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fit(learner, tiny_splits(), training, run=Run.create(folder, {}), report=stop)
    assert [row["step"] for row in _rows(folder)] == [2, 4, 6, 8]
    assert [p.name for p in (folder / "checkpoints" / "last").iterdir()] == ["2"]
    resumed = train(folder, training, resume=True)
    assert same_bits(resumed.state, fit(learner, tiny_splits(), training).state)
    assert [row["step"] for row in _rows(folder)] == [2, 4, 6, 8, 10, 12]
    assert sorted(int(p.name) for p in (folder / "checkpoints" / "last").iterdir()) == [4, 12]


def test_the_last_good_state_of_a_run_that_diverged_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("metaprior.training.loop.SAVE_EVERY", 1e6)
    training = replace(TINY, steps=400, chunk=2, validate_every=400, optimizer="sgd", rate=10.0)
    with pytest.raises(NonFiniteLoss) as caught:
        train(tmp_path / "run", training)
    like = init_state(tiny_learner(), tiny_splits().train, training)
    state, _, _, rows = Run.open(tmp_path / "run").restore(like)
    assert same_bits(state, caught.value.state)
    assert int(state.step) > training.chunk  # else its first checkpoint would do
    assert [row["step"] for row in rows] == list(range(2, int(state.step) + 1, 2))


VICTIM = """
import sys
from scenarios import TINY, tiny_learner, tiny_splits
from dataclasses import replace
from metaprior.experiments.runs import Run
from metaprior.training import fit
folder, fresh = sys.argv[1], sys.argv[2] == "fresh"
run = Run.create(folder, {"name": "tiny"}) if fresh else Run.resume(folder)
print("ready", flush=True)
fit(tiny_learner(), tiny_splits(), replace(TINY, steps=400), run=run, resume=not fresh)
"""


def test_ten_kills_lose_at_most_a_chunk_each_and_corrupt_nothing(tmp_path):
    folder, dice = tmp_path / "victim", random.Random(0)
    path = os.pathsep.join(filter(None, (os.path.dirname(__file__), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    training, like = replace(TINY, steps=400), init_state(tiny_learner(), tiny_splits().train, TINY)
    before, kills = 0, 0
    while kills < KILLS:
        mode = "go on" if (folder / "recipe.json").exists() else "fresh"
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(folder), mode], env=env, stdout=subprocess.PIPE, text=True
        )
        assert victim.stdout.readline() == "ready\n"
        rows_at_start = len(_rows(folder))
        # Half of the kills strike just as figures of a chunk appear, when its checkpoint is being written.
        deadline = time.monotonic() + 20
        while len(_rows(folder)) <= rows_at_start and time.monotonic() < deadline and victim.poll() is None:
            time.sleep(0.002)
        time.sleep(dice.choice([0.0, dice.uniform(0, 0.4)]))
        written = _rows(folder)[-1]["step"] if _rows(folder) else 0
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        kills += 1
        state, _, _, rows = Run.open(folder).restore(like)
        assert int(state.step) >= max(before, written - TINY.chunk)
        assert [row["step"] for row in rows] == list(range(TINY.chunk, int(state.step) + 1, TINY.chunk))
        before = int(state.step)
        if before >= training.steps - TINY.chunk:
            break
    assert kills == KILLS
    survived = train(folder, training, resume=True)
    assert same_bits(survived.state, fit(tiny_learner(), tiny_splits(), training).state)


def _rows(folder: Path) -> list[dict]:
    try:
        return Run(folder).metrics()
    except OSError:
        return []


def test_an_existing_folder_is_not_written_over(tmp_path):
    train(tmp_path / "run", replace(TINY, steps=4))
    with pytest.raises(RunExists, match="--resume"):
        Run.create(tmp_path / "run", {})
    with pytest.raises(ValueError, match=r"has no recipe\.json"):
        Run.open(tmp_path / "elsewhere")


def test_another_learners_checkpoint_is_refused_saying_what_differs(tmp_path):
    train(tmp_path / "run", replace(TINY, steps=4))
    with pytest.raises(CheckpointMismatch, match=r"\['head'\]\['w'\]: saved float32\[8,1\], needed float32\[9,1\]"):
        train(tmp_path / "run", learner=tiny_learner(9), resume=True)
    with pytest.raises(CheckpointMismatch, match="only saved:  a"):
        check_fingerprint({"a": "float32[]"}, {"b": "float32[]"}, tmp_path)


def _damage(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:7])


def test_a_damaged_checkpoint_falls_back_and_then_says_so(tmp_path):
    whole = train(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last"
    _damage(last / "12")
    with pytest.warns(UserWarning, match="checkpoint last/12 cannot be read"):
        again = train(tmp_path / "run", resume=True)  # from meta-step 8
    assert same_bits(whole.state, again.state)
    for step in last.iterdir():
        _damage(step)
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read.*damaged"):
        train(tmp_path / "run", resume=True)


def test_a_full_disk_is_said_and_earlier_checkpoints_stay(tmp_path, monkeypatch):
    train(tmp_path / "run", replace(TINY, steps=8))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints" / "last")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._writer(), "save", full)
    like = init_state(tiny_learner(), tiny_splits().train, TINY)
    with pytest.raises(CheckpointError, match=r"No space left.*free some disk space.*--resume"):
        checkpoints.save(12, like)
    assert Checkpoints(tmp_path / "run" / "checkpoints" / "last").restore(like).step == 8


def test_a_torn_line_of_figures_is_left_out(tmp_path):
    train(tmp_path / "run", replace(TINY, steps=8))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 12, "tr')
    assert [row["step"] for row in Run.open(tmp_path / "run").metrics()] == [4, 8]
    train(tmp_path / "run", resume=True)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [4, 8, 12]


def test_float64_states_do_not_pass_for_float32(tmp_path):
    train(tmp_path / "run", replace(TINY, steps=4))
    with jax.enable_x64(True), pytest.raises(CheckpointMismatch, match="float64"):
        train(tmp_path / "run", learner=tiny_learner(), resume=True)


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


def test_reading_a_run_changes_nothing_in_it(tmp_path):
    folder = tmp_path / "run"
    train(folder)
    _damage(folder / "checkpoints" / "best" / "8")
    # What the training process is writing at this moment.
    (folder / "checkpoints" / "last" / "16.orbax-checkpoint-tmp").mkdir()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')
    before, like = _snapshot(folder), init_state(tiny_learner(), tiny_splits().train, TINY)
    run = Run.open(folder)
    with pytest.warns(UserWarning, match="the best checkpoint"):
        run.params(like)
    run.restore(like)
    assert [row["step"] for row in run.metrics()] == [4, 8, 12]
    assert (run.recipe["name"], run.started["training"]["steps"]) == ("tiny", 12)
    for change in (lambda: run.begin(like, TINY, True), lambda: run.record({"step": 16}), lambda: run.save(like)):
        with pytest.raises(ValueError, match="open for reading"):
            change()
    assert _snapshot(folder) == before


def test_a_damaged_best_checkpoint_is_never_passed_over_in_silence(tmp_path):
    folder, like = tmp_path / "run", init_state(tiny_learner(), tiny_splits().train, TINY)
    whole = train(folder)
    best = folder / "checkpoints" / "best"
    assert sorted(p.name for p in best.iterdir()) == ["4", "8"]
    run = Run.open(folder)
    run.params(like)
    assert run.used[1:] == ("best", 8)
    _damage(best / "8")
    with pytest.warns(
        UserWarning, match=r"best checkpoint \(meta-step 8\) cannot be read .* one, of meta-step 4, is used"
    ):
        run.params(like)
    assert run.used[1:] == ("best", 4)
    _damage(best / "4")
    with pytest.warns(UserWarning, match=r"cannot be read .* The last one, of meta-step 12, is used"):
        assert same_bits(run.params(like), whole.params)
    assert run.used[1:] == ("last", 12)
    shutil.rmtree(best)
    with pytest.warns(UserWarning, match=r"best checkpoint is missing. The last one, of meta-step 12, is used"):
        run.params(like)


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    train(folder)
    code = (
        "import sys; from metaprior.experiments.runs import Run\n"
        "run = Run.resume(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(Locked, match=f"process {other.pid} on {socket.gethostname()}"):
        Run.resume(folder)
    Run.open(folder).metrics()  # may be read
    other.kill()
    other.wait()
    assert (folder / "lock").read_text().startswith(f"{other.pid} ")  # it could not tidy up, and blocks nobody
    with Run.resume(folder), pytest.raises(Locked, match="this process"):
        Run.resume(folder)
    Run.resume(folder).close()

    # A file system without locks: the text decides.
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("metaprior.core.files.fcntl.flock", none)
    (folder / "lock").write_text(f"{other.pid} {socket.gethostname()}")
    Run.resume(folder).close()
    for holder in (f"{os.getppid()} {socket.gethostname()}", "7 elsewhere"):
        (folder / "lock").write_text(holder)
        with pytest.raises(Locked, match=f"{holder.split()[0]} on .*delete"):
            Run.resume(folder)


def test_rows_of_two_trainings_at_once_are_read_once_and_cut_on_resume(tmp_path):
    folder = tmp_path / "run"
    train(folder, replace(TINY, steps=8))
    path = folder / "metrics.jsonl"
    lines = path.read_text()
    path.write_text(lines + lines + 'not JSON\n{"step": 12, "seconds": 1.0}\n')
    assert [row["step"] for row in Run.open(folder).metrics()] == [4, 8, 12]
    train(folder, resume=True)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [4, 8, 12]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"meta_batch": 8}, r"training.meta_batch: 4 -> 8"),
        ({"seed": 1, "rate": 0.5}, r"training.rate: 0.01 -> 0.5\n  training.seed: 0 -> 1"),
        ({"chunk": 2}, "training.chunk: 4 -> 2"),
        ({"steps": 4}, "training.steps must be at least 8, the current meta-step of .*, got 4"),
    ],
)
def test_other_settings_are_refused_on_resume(tmp_path, changed, said):
    train(tmp_path / "run", replace(TINY, steps=8))
    with pytest.raises(OtherSettings, match=said):
        train(tmp_path / "run", replace(TINY, **changed), resume=True)
    assert [row["step"] for row in Run.open(tmp_path / "run").metrics()] == [4, 8]
    with pytest.raises(RunExists, match="resume=True"), Run.resume(tmp_path / "run") as run:
        fit(tiny_learner(), tiny_splits(), TINY, run=run)


def test_another_length_is_another_course_where_the_rate_depends_on_it(tmp_path):
    cosine = replace(TINY, steps=8, schedule="cosine")
    train(tmp_path / "run", cosine)
    with pytest.raises(
        OtherSettings, match=r"steps: 8 -> 12\nThe learning rate's cosine schedule depends on training.steps"
    ):
        train(tmp_path / "run", replace(cosine, steps=12), resume=True)


def test_a_longer_training_keeps_to_the_chunks_of_one_that_never_stopped(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", replace(TINY, steps=6))
    assert same_bits(train(tmp_path / "parts", resume=True).state, whole.state)
    assert [row["step"] for row in Run.open(tmp_path / "parts").metrics()] == [4, 6, 8, 12]


def test_other_threads_are_warned_of(tmp_path, monkeypatch):
    train(tmp_path / "run", replace(TINY, steps=8))
    monkeypatch.setenv("NPROC", "77")
    with pytest.warns(UserWarning, match=r"environment has changed \(threads: \d+ -> 77\)"):
        train(tmp_path / "run", resume=True)
    assert [entry["from"] for entry in Run.open(tmp_path / "run").started["under"]] == [0, 8]


def test_other_data_are_warned_of(tmp_path):
    x, groups = np.linspace(0, 1, 60)[:, None], np.repeat(np.arange(12), 5)
    one, same, other = (array_tasks(x, f(x[:, 0]), groups, shot=2, query=2) for f in (np.sin, np.sin, np.cos))
    assert digest(one) == digest(same) != digest(other)
    assert digest(one) != digest(array_tasks(x, np.sin(x[:, 0]), groups, shot=3, query=2))
    with Run.create(tmp_path / "run", {}) as run:
        fit(tiny_learner(), one, replace(TINY, steps=8), run=run)
    with (
        pytest.warns(UserWarning, match=r"environment has changed \(tasks: '\w+' -> '\w+'\)"),
        Run.resume(tmp_path / "run") as run,
    ):
        fit(tiny_learner(), other, TINY, run=run, resume=True)


def _shown(folder: Path) -> list[tuple[int, str]]:
    """What TensorBoard shows: files by name, a restart hides what lies beyond it."""
    shown = []
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.HasField("session_log"):
                shown = [(step, tag) for step, tag in shown if step < event.step]
            shown += [(event.step, value.tag) for value in event.summary.value]
    return shown


def test_tensorboard_shows_each_figure_once_whatever_the_clock_does(tmp_path, monkeypatch):
    clock = iter(range(10**9, 0, -3600))  # an hour back at each look
    real = time.time
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    try:
        train(tmp_path / "run", replace(TINY, steps=8))
        for _ in range(2):  # in the same second, as far as names of files go
            run = Run.resume(tmp_path / "run")
            run.begin(init_state(tiny_learner(), tiny_splits().train, TINY), replace(TINY, steps=8), True)
            run.record({"step": 12, "train/loss": 1.0})  # killed before its state was saved
            run.close()
        train(tmp_path / "run", resume=True)
    finally:
        monkeypatch.setattr("time.time", real)
    shown = _shown(tmp_path / "run" / "tensorboard")
    assert len(shown) == len(set(shown))
    assert sorted({step for step, _ in shown}) == [4, 8, 12]
    assert (12, "validation/nll") in shown
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 4


def test_figures_that_cannot_be_written_end_training_with_a_sentence(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    train(folder, replace(TINY, steps=8))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("metaprior.experiments.events.Events.write", full)
    with pytest.raises(CheckpointError, match=r"No space left on device; free some disk space.*--resume"):
        train(folder, resume=True)
    monkeypatch.undo()
    assert same_bits(train(folder, resume=True).state, train(tmp_path / "whole").state)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / ("n" * 250 + ".json")
    write_atomically(path, "old")

    def full(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    monkeypatch.undo()
    code = (
        "import os, signal, sys; from pathlib import Path; from metaprior.core.files import beside\n"
        "with beside(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); print(partial, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert Path(killed.stdout.strip()).exists()
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("file/below", "a file stands where a folder is needed"),
        ("file", "a file stands where a folder is needed"),
        ("n" * 300, "File name too long; choose a shorter path"),
    ],
)
def test_a_folder_that_cannot_be_made_is_said_before_any_work(tmp_path, path, said):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=said):
        check_output(tmp_path / path, "--out")
    check_output(tmp_path / "new" / "deep", "--out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="--out"):
        Run.create(tmp_path / path, {})


def test_a_start_that_was_killed_is_started_again(tmp_path):
    Run.create(tmp_path / "run", {}, {"training.rate": 1.0}).close()
    assert Run.resume(tmp_path / "run").started["asked"] == {"training.rate": 1.0}
    (tmp_path / "run" / "recipe.json").unlink()  # it is written last
    Run.create(tmp_path / "run", {}).close()


def test_a_new_run_of_which_nothing_was_recorded_leaves_no_folder(tmp_path):
    Run.create(tmp_path / "runs" / "new", {}).discard()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    Run.create(tmp_path / "mine", {}).discard()
    assert [p.name for p in tmp_path.rglob("*")] == ["mine"]
    train(tmp_path / "run", replace(TINY, steps=4))
    with Run.resume(tmp_path / "run") as run:
        run.discard()
        assert run.metrics()
