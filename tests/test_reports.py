"""Reports are read again for what they are of: the parameters, the steps and the scalars that were judged."""

import json
import shutil

import numpy as np
import pytest

from metaprior.evaluation.figures import Figure
from metaprior.evaluation.report import Report
from metaprior.experiments.runs import Run
from metaprior.training.checkpoint import Checkpoints
from scenarios import run_cli

SMALL = ["training.chunk=5", "training.meta_batch=2", "training.validate_every=5", "training.validation_tasks=2",
         "network.hidden=[4]", "learner.steps=2"]  # fmt: skip
CALIBRATED = ("--posterior", "implicit", "--calibrated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of ten meta-steps with its calibrated report, and files to adapt to."""
    folder = tmp_path_factory.mktemp("reports")
    run_cli("train", "sinusoid", "--steps", 10, "--out", folder / "run", "--set", *SMALL)
    run_cli("evaluate", folder / "run", "--tasks", 4, "--no-memorisation", *CALIBRATED)
    (folder / "s.csv").write_text("x,y\n0.1,0.3\n0.5,0.1\n1.0,-0.2\n")
    (folder / "q.csv").write_text("x\n0.2\n1.0\n")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """A copy of the run, in the current folder."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def adapt(*more, code=0):
    run_cli("adapt", "run", "--support", "s.csv", "--query", "q.csv", *more, code=code)


def test_scalars_fitted_at_an_earlier_meta_step_are_refused_and_compare_names_both(run, capsys):
    adapt(*CALIBRATED)
    assert "90 % interval: 5 % to 95 %" in capsys.readouterr().out
    run_cli("train", "sinusoid", "--steps", 15, "--out", "run", "--resume")
    capsys.readouterr()
    now = Run.open(run).newest
    adapt(*CALIBRATED, code=2)
    said = capsys.readouterr().err
    assert f"fitted at meta-step 10, but the run's parameters have changed since (meta-step {now})" in said
    assert "`metaprior evaluate run --posterior implicit --calibrated` again" in said
    run_cli("compare", "run", "--report", "implicit-calibrated")
    out, said = capsys.readouterr()
    assert f"evaluated meta-step 10, but the run is now at meta-step {now}" in said
    assert next(line.split() for line in out.splitlines() if line.startswith("maml"))[1] == "10"
    assert json.loads((run.parent / "compared" / "compared.json").read_text())["maml"]["meta_steps"] == 10


def test_scalars_hold_for_their_own_steps_and_draws(run, capsys):
    adapt(*CALIBRATED, "--steps", 3, code=2)
    assert "`metaprior evaluate run --posterior implicit --calibrated --steps 3` first" in capsys.readouterr().err
    adapt(*CALIBRATED, "--draws", 3, code=2)
    assert "--draws must be 0 with --calibrated" in capsys.readouterr().err
    run_cli("evaluate", "run", "--tasks", 4, "--no-memorisation", *CALIBRATED, "--steps", 3)
    adapt(*CALIBRATED, "--steps", 3)
    # The predictive is the one that was judged: that of the report's steps, draws and scalars.
    path = run / "report-implicit-calibrated.json"
    shutil.copy(run / "report-implicit-calibrated-steps=3.json", path)
    capsys.readouterr()
    adapt(*CALIBRATED, code=2)
    said = "fitted with 3 inner steps, but the run's recipe now has the learner's default number of inner steps"
    assert said in capsys.readouterr().err


def edit(path, change):
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


DAMAGE = {
    "settings.fitted.noise must be a finite number above 0, got nan":
        lambda t: t["settings"]["fitted"].update(noise=float("nan")),
    "settings.fitted.noise must be a finite number above 0, got 'x'":
        lambda t: t["settings"]["fitted"].update(noise="x"),
    "settings.fitted.noise must be a finite number above 0, got -1": lambda t: t["settings"]["fitted"].update(noise=-1),
    "its settings have no fitted": lambda t: t["settings"].pop("fitted"),
    "contains fitted temperature, but this run needs noise": lambda t: t["settings"]["fitted"].pop("noise"),
    "settings.fitted.nois is not one of": lambda t: t["settings"]["fitted"].update(nois=1.0),
    "posterior: 'laplace' -> 'implicit'": lambda t: t["settings"].update(posterior="laplace"),
    "settings.draws must be": lambda t: t["settings"].update(draws="two"),
    "settings must be a table": lambda t: t.update(settings=[1]),
}  # fmt: skip
BROKEN = {
    "the report has no figures": lambda t: t.pop("figures"),
    "figures must be a table": lambda t: t.update(figures=[1]),
    "figures.mse.mean must be a number, got '1'": lambda t: t["figures"]["mse"].update(mean="1"),
    "figures.mse must have a mean and an interval": lambda t: t["figures"]["mse"].pop("mean"),
    "pooled.rmse must be a number, got None": lambda t: t["pooled"].update(rmse=None),
    "curve.nll must be a table": lambda t: t["curve"].append({"nll": 3}),
    "pit.0 must be a number": lambda t: t.update(pit=["x"]),
    "kind must be one of": lambda t: t.update(kind="other"),
    "tasks must be an integer of at least 1, got 0": lambda t: t.update(tasks=0),
}


@pytest.mark.parametrize("says", [*DAMAGE, *BROKEN])
def test_a_damaged_report_is_named_with_what_to_do(run, capsys, says):
    path = run / "report-implicit-calibrated.json"
    edit(path, (DAMAGE | BROKEN)[says])
    adapt(*CALIBRATED, code=2)
    found = [capsys.readouterr().err]
    if says in BROKEN:
        run_cli("compare", "run", "--report", "implicit-calibrated", code=2)
        found.append(capsys.readouterr().err)
    for said in found:
        assert "report-implicit-calibrated.json" in said
        assert says in said
        assert "`metaprior evaluate run --posterior implicit --calibrated` again" in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b'{"kind": "regr', b"\xff\xfe\0"])
def test_what_is_no_report_is_named(run, capsys, raw):
    (run / "report-implicit-calibrated.json").write_bytes(raw)
    for command in (lambda: adapt(*CALIBRATED, code=2), lambda: run_cli("compare", "run", "--report",
                                                                        "implicit-calibrated", code=2)):  # fmt: skip
        command()
        said = capsys.readouterr().err
        assert "report-implicit-calibrated.json is damaged (" in said
        assert "Run `metaprior evaluate run --posterior implicit --calibrated` again" in said


def test_compare_says_which_report_there_is(run, capsys):
    run_cli("compare", "run", code=2)
    said = capsys.readouterr().err
    assert "has no report-own.json (its reports: implicit-calibrated). Give --report implicit-calibrated" in said
    assert "`metaprior evaluate run` first" in said


def test_a_figure_that_one_run_lacks_is_left_open(run, folder, capsys, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "other")
    edit(tmp_path / "other" / "report-implicit-calibrated.json", lambda t: t["figures"].pop("coverage_90"))
    run_cli("compare", "run", "other", "--report", "implicit-calibrated")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("run", "other"))]
    assert rows[1][-1] == "-"
    assert len(rows[0]) == len(rows[1]) + 2


def test_figures_that_diverged_are_read_as_they_were_written():
    report = Report("regression", 2, {"mse": Figure(float("inf"), None)}, {"rmse": float("inf")})
    assert Report.from_json(report.to_json()) == report


@pytest.mark.slow
def test_a_checkpoint_of_which_a_bit_flipped_is_passed_over(tmp_path):
    tree = {"w": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
    saved = Checkpoints(tmp_path / "c")
    saved.save(1, tree)
    saved.save(2, tree)
    large = max((p for p in (tmp_path / "c" / "2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(large.read_bytes())
    raw[len(raw) // 2] ^= 1
    large.write_bytes(raw)
    found = saved.restore(tree)
    assert (found.step, list(found.damaged)) == (1, [2])
    assert (np.asarray(found.tree["w"]) == tree["w"]).all()


def test_a_checkpoint_of_another_run_or_step_is_passed_over(run, folder, tmp_path, capsys):
    best = run / "checkpoints" / "best"
    shutil.copytree(best / "10", best / "15")
    adapt()
    said = capsys.readouterr().err
    assert "it is a copy of meta-step 10" in said
    shutil.rmtree(best / "15")
    run_cli("train", "sinusoid", "--seed", 1, "--steps", 10, "--out", "other", "--set", *SMALL)
    theirs = tmp_path / "other" / "checkpoints"
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(theirs, run / "checkpoints")
    capsys.readouterr()
    adapt(code=2)
    assert "it was saved by another run" in capsys.readouterr().err


def test_an_edited_recipe_is_told_and_no_training_goes_on_from_it(run, capsys):
    edit(run / "recipe.json", lambda t: t["learners"]["maml"].update(rate=0.5))
    adapt()
    assert "recipe.json was edited after the run was started" in capsys.readouterr().err
    run_cli("train", "sinusoid", "--steps", 15, "--out", "run", "--resume", code=2)
    assert "recipe.json was edited after the run was started. Restore" in capsys.readouterr().err
