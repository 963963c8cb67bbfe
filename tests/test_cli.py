"""The command line, run as a user would."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw

from metaprior.cli import main, one_set
from metaprior.experiments.recipe import load_recipe, recipe_names, with_overrides
from scenarios import run_cli

SMALL = ["training.chunk=20", "training.meta_batch=4", "training.validate_every=20", "training.validation_tasks=8"]


@pytest.fixture(scope="module")
def sinusoid_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sinusoid"
    with pytest.raises(SystemExit) as exit_:
        main(["train", "sinusoid", "--steps", "60", "--out", str(folder), "--set", *SMALL])
    assert exit_.value.code == 0
    return folder


def test_options_set_in_several_places_all_count(tmp_path):
    folder = tmp_path / "run"
    apart = ("--set", "training.chunk=5", "training.meta_batch=3", "--steps", 5, "--set=tasks.shot=7")
    run_cli("train", "sinusoid", "--out", folder, "--set", *SMALL, *apart, "--set", "learner.steps=2")
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["training"]["chunk"], recipe["training"]["meta_batch"], recipe["training"]["steps"]) == (5, 3, 5)
    assert (recipe["tasks"]["shot"], recipe["learners"]["maml"]["steps"]) == (7, 2)
    assert set(SMALL) <= set(one_set(["train", "--set", *SMALL, "sinusoid"]))
    assert one_set(["list"]) == ["list"]


def test_train_evaluate_plot(sinusoid_run, capsys):
    assert {"recipe.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= {p.name for p in sinusoid_run.iterdir()}
    assert json.loads((sinusoid_run / "recipe.json").read_text())["training"]["steps"] == 60
    run_cli("evaluate", sinusoid_run, "--tasks", 10, "--no-memorisation", "--steps", 3)
    out = capsys.readouterr().out
    assert "MSE" in out
    assert "after each inner step" in out
    run_cli(
        "evaluate", sinusoid_run, "--tasks", 10, "--no-memorisation", "--steps", 3, "--set", "evaluation.course=false"
    )
    assert "after each inner step" not in (shorter := capsys.readouterr().out)
    mse = next(line for line in out.splitlines() if "MSE" in line)
    assert mse.split()[3] in shorter
    run_cli("evaluate", sinusoid_run, "--tasks", 10, "--no-memorisation", "--posterior", "implicit", "--calibrated")
    assert "temperature" in capsys.readouterr().out
    report = json.loads((sinusoid_run / "report-implicit-calibrated.json").read_text())
    assert report["tasks"] == 10
    assert report["settings"]["fitted"]["temperature"] > 0
    run_cli("plot", sinusoid_run)
    pictures = {p.name for p in (sinusoid_run / "plots").iterdir()}
    assert {"training.png", "tasks.png", "report-own-steps=3-pit.png", "report-own-steps=3-adaptation.png"} <= pictures


def test_other_tasks_have_a_report_of_their_own_and_no_published_figure(sinusoid_run, capsys):
    recipe = json.loads((sinusoid_run / "recipe.json").read_text())
    published = {"maml": [{"mse": 0.5, "source": "A paper"}]}
    (sinusoid_run / "recipe.json").write_text(json.dumps(recipe | {"published": published}))
    run_cli("evaluate", sinusoid_run, "--tasks", 10, "--no-memorisation")
    assert "published: MSE 0.5000 (A paper)" in capsys.readouterr().out
    before = (sinusoid_run / "report-own.json").read_text()
    run_cli("evaluate", sinusoid_run, "--tasks", 10, "--no-memorisation", "--set", "tasks.shot=3")
    assert "published" not in capsys.readouterr().out
    assert (sinusoid_run / "report-own.json").read_text() == before
    shots = json.loads((sinusoid_run / "report-own-tasks.shot=3.json").read_text())
    assert shots["settings"]["set"] == ["tasks.shot=3"]
    assert shots["figures"]["mse"] != json.loads(before)["figures"]["mse"]


def test_reports_stand_beside_each_other(sinusoid_run, tmp_path, capsys):
    other, out = tmp_path / "other", tmp_path / "compared"
    run_cli("train", "sinusoid", "--learner", "fomaml", "--steps", 20, "--out", other, "--set", *SMALL)
    run_cli("evaluate", sinusoid_run, "--tasks", 10, "--no-memorisation")
    with pytest.raises(SystemExit):
        main(["compare", str(sinusoid_run), str(other), "--out", str(out)])
    assert "has no report-own.json (its reports: none)" in capsys.readouterr().err.replace("\n", " ")
    run_cli("evaluate", other, "--tasks", 10, "--no-memorisation")
    capsys.readouterr()
    run_cli("compare", sinusoid_run, other, "--out", out)
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("fomaml"))
    found = json.loads((out / "compared.json").read_text())
    assert list(found) == ["maml", "fomaml"]
    assert row[1:5:2] == ["20", "10"]
    assert row[4] == f"{found['fomaml']['figures']['mse']['mean']:.3f}"
    assert (found["maml"]["meta_steps"], (out / "compared.png").exists()) == (60, True)
    assert not any("note" in line for line in lines)


def test_noise_is_fitted_around_a_learners_own_posterior(tmp_path):
    folder = tmp_path / "run"
    run_cli("train", "sinusoid", "--learner", "platipus", "--steps", 20, "--out", folder, "--set", *SMALL)
    run_cli("evaluate", folder, "--tasks", 10, "--no-memorisation")
    run_cli("evaluate", folder, "--tasks", 10, "--no-memorisation", "--calibrated")
    own, fitted = (json.loads((folder / f"report-own{kind}.json").read_text()) for kind in ("", "-calibrated"))
    assert fitted["settings"]["fitted"].keys() == {"noise"}
    # The posterior's draws stay: their mean misses by as much as before, and their spread still tells inputs apart.
    assert fitted["figures"]["mse"] == pytest.approx(own["figures"]["mse"], rel=1e-5)
    assert fitted["figures"]["nll"]["mean"] < own["figures"]["nll"]["mean"]
    assert fitted["pooled"]["variance_error_correlation"] != 0


def test_learned_gates_are_drawn(tmp_path):
    folder = tmp_path / "run"
    run_cli("train", "sinusoid", "--learner", "meta_lstm", "--steps", 20, "--out", folder, "--set", *SMALL)
    run_cli("plot", folder)
    assert {"training.png", "tasks.png", "gates.png"} <= {p.name for p in (folder / "plots").iterdir()}


def test_adapt_from_csv(sinusoid_run, tmp_path, capsys):
    x = np.linspace(-4, 4, 6)
    (tmp_path / "support.csv").write_text("x,y\n" + "".join(f"{a},{np.sin(a)}\n" for a in x))
    (tmp_path / "query.csv").write_text("x\n0.5\n1.5\n")
    out = tmp_path / "predictions.csv"
    files = ("--support", tmp_path / "support.csv", "--query", tmp_path / "query.csv", "--out", out)
    run_cli("adapt", sinusoid_run, *files, "--posterior", "implicit")
    assert "6 support examples" in capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 2
    assert float(rows[0]["5 %"]) < float(rows[0]["mean"]) < float(rows[0]["95 %"])


def test_adapt_says_when_the_support_is_too_much_for_the_inner_steps(sinusoid_run, tmp_path, capsys):
    (tmp_path / "support.csv").write_text("x,y\n1e15,1\n-1e15,2\n")
    (tmp_path / "query.csv").write_text("x\n0.5\n")
    run_cli("adapt", sinusoid_run, "--support", tmp_path / "support.csv", "--query", tmp_path / "query.csv", code=2)
    assert "maml diverged on these 2 examples" in capsys.readouterr().err.replace("\n", " ")


def test_resume_goes_on_and_an_existing_run_is_kept(sinusoid_run, tmp_path, capsys):
    folder = tmp_path / "run"
    run_cli("train", "sinusoid", "--steps", 20, "--out", folder, "--set", *SMALL)
    run_cli("train", "sinusoid", "--out", folder, code=2)
    assert "--resume" in capsys.readouterr().err
    run_cli("train", "sinusoid", "--out", folder, "--resume", "--steps", 60)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [20, 40, 60]
    whole = [json.loads(line) for line in (sinusoid_run / "metrics.jsonl").read_text().splitlines()]
    assert [r["train/loss"] for r in rows] == [r["train/loss"] for r in whole]


def test_cores_divided_into_devices_train_go_on_and_judge(tmp_path):
    folder = tmp_path / "run"
    for args in (
        ["train", "sinusoid", "--steps", "20", "--out", str(folder), "--set", *SMALL],
        ["train", "sinusoid", "--steps", "40", "--out", str(folder), "--resume"],
        ["evaluate", str(folder), "--tasks", "10", "--no-memorisation"],
    ):
        command = [sys.executable, "-m", "metaprior", *args, "--devices", "2"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [20, 40]
    run_cli("evaluate", folder, "--tasks", 10, "--no-memorisation", "--devices", 0, code=2)


def test_ctrl_c_saves_and_exits(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "metaprior", "train", "sinusoid", "--out", str(folder), "--set", *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    deadline = time.monotonic() + 90
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130, out
    assert "--resume" in out
    assert list((folder / "checkpoints" / "last").iterdir())


def test_list_names_everything(capsys):
    run_cli("list")
    out = capsys.readouterr().out
    for name in ("maml", "llama", "omniglot-5way-1shot", "sleepstudy", "conv4", "implicit"):
        assert name in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "omniglot-5way-1shott"], "did you mean 'omniglot-5way-1shot'"),
        (["train", "sinusoid", "--learner", "mamll"], "did you mean 'maml'"),
        (["train", "sinusoid", "--set", "training.stepz=3"], "did you mean 'steps'"),
        (["train", "sinusoid", "--set", "tasks.shots=3"], "did you mean 'shot'"),
        (["train", "sinusoid", "--set", "learner.rat=3"], "did you mean 'rate'"),
        (["train", "sinusoid", "--set", "trainin.steps=3"], "did you mean 'training'"),
        (["train", "sinusoid", "--set", "steps"], "TABLE.OPTION=VALUE"),
        (["train", "nowhere.toml"], "no such file"),
        (["evaluate", "nowhere"], "has no recipe.json"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_cli(*args, code=2)
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_a_diverging_run_says_what_to_do(tmp_path, capsys):
    run_cli("train", "sinusoid", "--steps", 40, "--out", tmp_path / "run", "--set", *SMALL, "learner.rate=1e12",
        "training.clip_norm=1e30", code=1)  # fmt: skip
    err = capsys.readouterr().err.replace("\n", " ")
    assert "non-finite" in err
    assert "lower inner rate" in err


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_well_formed(name):
    from metaprior.core.named import option_names
    from metaprior.experiments.recipe import evaluation_of, training_of
    from metaprior.learners import LEARNERS

    recipe = load_recipe(name)
    assert recipe.description
    evaluation_of(recipe)
    for learner, options in recipe.learners.items():
        assert set(options) <= set(option_names(LEARNERS[learner])), learner
        training_of(with_overrides(recipe, learner))


@pytest.mark.data
def test_omniglot_from_training_to_new_characters(data_dir, tmp_path, capsys):
    folder = tmp_path / "omniglot"
    small = [*SMALL, "network.filters=8", "training.chunk=10", "tasks.test_query=3"]
    run_cli("train", "omniglot-5way-1shot", "--steps", 10, "--out", folder, "--set", *small)
    run_cli("evaluate", folder, "--tasks", 4, "--no-memorisation")
    assert "ECE" in capsys.readouterr().out
    run_cli("evaluate", folder, "--tasks", 2, "--no-memorisation", "--posterior", "laplace", "--draws", 2)
    # A user's own drawings: dark ink on white paper, one folder a class.
    shapes = {
        "cross": [(0, 0, 60, 60), (60, 0, 0, 60)],
        "line": [(30, 0, 30, 60)],
        "ell": [(5, 0, 5, 55), (5, 55, 55, 55)],
    }
    for name, lines in shapes.items():
        for kind, shift in (("support", 10), ("query", 14)):
            picture = Image.new("L", (84, 84), 255)
            for line in lines:
                ImageDraw.Draw(picture).line([c + shift for c in line], fill=0, width=4)
            target = tmp_path / kind / name / "1.png" if kind == "support" else tmp_path / kind / f"{name}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
    out = tmp_path / "answers.csv"
    run_cli("adapt", folder, "--support", tmp_path / "support", "--query", tmp_path / "query", "--out", out)
    rows = list(csv.DictReader(out.open()))
    assert {row["prediction"] for row in rows} <= set(shapes)
    for row in rows:
        assert sum(float(row[f"p({c})"]) for c in shapes) == pytest.approx(1, abs=1e-3)
    again = ("adapt", folder, "--support", tmp_path / "support", "--query", tmp_path / "query", "--calibrated")
    run_cli(*again, code=2)
    assert "metaprior evaluate" in capsys.readouterr().err
    run_cli("evaluate", folder, "--tasks", 4, "--no-memorisation", "--calibrated")
    assert "softmax_temperature" in capsys.readouterr().out
    run_cli(*again, "--out", out)
    scaled = list(csv.DictReader(out.open()))
    assert [row["prediction"] for row in scaled] == [row["prediction"] for row in rows]
    assert scaled != rows
