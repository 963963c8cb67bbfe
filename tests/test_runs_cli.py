"""Runs by the command line: what is refused, what is left behind, and what is said."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metaprior.cli import main
from metaprior.experiments.runs import Run
from scenarios import run_cli

SMALL = ["training.chunk=20", "training.meta_batch=4", "training.validate_every=20", "training.validation_tasks=8"]


def refused(capsys, *command) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, command)))
    said = capsys.readouterr().err
    assert end.value.code in (1, 2), said
    assert "Traceback" not in said
    return " ".join(said.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sinusoid"
    run_cli("train", "sinusoid", "--steps", 40, "--out", folder, "--set", *SMALL)
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "training.rate=0.1", "tasks.shot=3"], "tasks.shot: 10 -> 3 training.rate: 0.001 -> 0.1"),
        (["--seed", "3"], "training.seed: 0 -> 3"),
        (["--learner", "fomaml"], "learner: 'maml' -> 'fomaml'"),
        (["--set", "evaluation.tasks=7"], "evaluation.tasks: 600 -> 7"),
        (["--steps", "20"], "training.steps must be at least 40"),
    ],
)
def test_resume_refuses_all_but_the_length(run, capsys, options, said):
    before = (run / "recipe.json").read_text(), (run / "metrics.jsonl").read_text()
    assert said in refused(capsys, "train", "sinusoid", "--resume", "--out", run, *options)
    assert ((run / "recipe.json").read_text(), (run / "metrics.jsonl").read_text()) == before


def test_resume_refuses_another_recipe(run, capsys):
    assert "name: 'sinusoid' -> 'sleepstudy'" in refused(capsys, "train", "sleepstudy", "--resume", "--out", run)


def test_what_is_said_again_is_no_change_and_a_new_length_is_kept(tmp_path):
    folder = tmp_path / "run"
    run_cli("train", "sinusoid", "--steps", 20, "--out", folder, "--set", *SMALL)
    run_cli("train", "sinusoid", "--steps", 40, "--out", folder, "--seed", 0, "--resume", "--set", *SMALL)
    run_cli("train", "sinusoid", "--out", folder, "--resume")
    assert Run.open(folder).recipe["training"]["steps"] == 40
    assert [row["step"] for row in Run.open(folder).metrics()] == [20, 40]


def test_a_recipe_file_that_was_edited_is_refused(tmp_path, capsys):
    recipe, folder = tmp_path / "mine.toml", tmp_path / "run"
    text = (
        '[tasks]\nname = "sinusoid"\n[network]\nname = "mlp"\n[likelihood]\nname = "gaussian"\n'
        "[training]\nmeta_batch = 4\nchunk = 20\nvalidate_every = 20\nvalidation_tasks = 8\n"
    )
    recipe.write_text(text)
    run_cli("train", recipe, "--steps", 20, "--out", folder, "--set", "training.rate=0.01")
    run_cli("train", recipe, "--steps", 40, "--out", folder, "--resume")
    run_cli("train", recipe, "--out", folder, "--resume")
    recipe.write_text(text.replace("meta_batch = 4", "meta_batch = 8"))
    assert "training.meta_batch: 4 -> 8" in refused(capsys, "train", recipe, "--out", folder, "--resume")


def test_a_refused_start_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, "train", "sinusoid", "--set", "training.optimizer=nope")
    refused(capsys, "train", "sinusoid", "--set", "training.schedule=nope")
    refused(capsys, "train", "sinusoid", "--out", "a/b/c", "--set", "training.optimizer=nope")
    assert list(tmp_path.iterdir()) == []


def test_a_recipes_name_cannot_lead_out_of_runs(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for i, name in enumerate(("../../x", str(tmp_path / "abs"), "..")):
        recipe = tmp_path / f"{i}.toml"
        recipe.write_text(
            f'name = "{name}"\n[tasks]\nname = "sinusoid"\n[network]\nname = "mlp"\n[likelihood]\nname = "gaussian"\n'
        )
        run_cli("train", recipe, "--steps", 20, "--set", *SMALL)
    assert {p.name for p in tmp_path.iterdir()} == {"work", "0.toml", "1.toml", "2.toml"}
    assert len(list((tmp_path / "work" / "runs").iterdir())) == 3


def test_figures_are_shown_though_they_cannot_be_written(run, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("metaprior.core.files.sync", full)
    before = sorted(p.name for p in run.iterdir())
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(run), "--tasks", "10", "--no-memorisation"])
    out, said = capsys.readouterr()
    assert end.value.code == 1
    assert "MSE" in out
    assert "report-own.json: No space left on device; free some disk space." in said.replace("\n", "")
    assert sorted(p.name for p in run.iterdir()) == before


def test_a_report_names_the_checkpoint_that_was_judged(tmp_path, capsys):
    folder = tmp_path / "run"
    run_cli("train", "sinusoid", "--steps", 40, "--out", folder, "--set", *SMALL)
    run_cli("evaluate", folder, "--tasks", 10, "--no-memorisation")
    report = folder / "report-own.json"
    judged = json.loads(report.read_text())["settings"]["checkpoint"]
    assert (judged["which"], judged["step"]) == ("best", 40)
    for file in (folder / "checkpoints" / "best").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    capsys.readouterr()
    run_cli("evaluate", folder, "--tasks", 10, "--no-memorisation")
    said = capsys.readouterr().err
    assert said.startswith("warning: ")
    assert "the best checkpoint (meta-step 40) cannot be read" in said
    assert "The last one, of meta-step 40, is used instead" in said
    judged = json.loads(report.read_text())["settings"]["checkpoint"]
    assert (judged["which"], judged["step"]) == ("last", 40)
    assert sorted(p.name for p in (folder / "checkpoints" / "best").iterdir()) == ["20", "40"]


def test_a_disk_that_fills_while_a_checkpoint_is_written_is_one_sentence(tmp_path):
    resource = pytest.importorskip("resource")
    assert resource
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "from metaprior.cli import main; main(sys.argv[1:])"
    )
    command = ["train", "sinusoid", "--steps", "40", "--out", str(tmp_path / "run"), "--set", *SMALL]
    own = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # what is written there would be cut off, too
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "could not save meta-step 20 (File too large)" in done.stderr
    assert not [p for p in Path(tmp_path).rglob("*") if "tmp" in p.name or p.name.startswith(".")]
