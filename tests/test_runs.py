"""A run's folder survives: resuming, kills, damage, and other learners' checkpoints."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from metaprior.checkpoint import CheckpointError, CheckpointMismatch, Checkpoints, check_fingerprint
from metaprior.runs import Run, RunExists
from metaprior.training import NonFiniteLoss, fit, init_state
from scenarios import TINY, same_bits, tiny_learner, tiny_splits

KILLS = 20


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
    monkeypatch.setattr("metaprior.training.SAVE_EVERY", 1e6)
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
    monkeypatch.setattr("metaprior.training.SAVE_EVERY", 1e6)
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
from metaprior.runs import Run
from metaprior.training import fit
folder, fresh = sys.argv[1], sys.argv[2] == "fresh"
run = Run.create(folder, {"name": "tiny"}) if fresh else Run.resume(folder)
print("ready", flush=True)
fit(tiny_learner(), tiny_splits(), replace(TINY, steps=400), run=run, resume=not fresh)
"""


def test_twenty_kills_lose_at_most_a_chunk_each_and_corrupt_nothing(tmp_path):
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
    with pytest.raises(ValueError, match="holds no run"):
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
