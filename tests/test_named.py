"""Components of other packages: registered by hand, or found by their entry points."""

from importlib.metadata import EntryPoint

import pytest

import metaprior as mp
from metaprior.core import named
from metaprior.experiments.recipe import build, load_recipe, with_overrides
from metaprior.learners import LEARNERS, make_learner, maml
from metaprior.learners.registry import traits_of
from metaprior.networks import NETWORKS, mlp
from metaprior.tasks import SOURCES, sinusoid
from metaprior.training.loop import fit
from scenarios import run_cli


@mp.learners.traits(small={"pace": 0.1})
def slow(model, likelihood, *, pace=0.001, steps: int = 2):
    """MAML by another name."""
    return maml(model, likelihood, rate=pace, steps=steps)


@pytest.fixture
def registries(monkeypatch):
    """The three registries, as they were after the test."""
    kept = [(table, dict(table), table._searched) for table in (LEARNERS, NETWORKS, SOURCES)]
    yield
    for table, before, searched in kept:
        table.clear()
        table.update(before)
        table._searched = searched


def own_network(width=3):
    return mlp(1, (width,))


def own_tasks(shot=4):
    return sinusoid(shot=shot, query=4)


@pytest.mark.usefixtures("registries")
def test_what_is_registered_is_known_to_recipes_and_errors(tmp_path):
    mp.register("learner", "slow", slow)
    mp.register("network", "own", own_network)
    mp.register("tasks", "own_sines", own_tasks)
    mp.register("learner", "slow", slow)  # again changes nothing
    assert traits_of("slow").small == {"pace": 0.1}
    path = tmp_path / "own.toml"
    path.write_text(
        'learner = "slow"\n[tasks]\nname = "own_sines"\nshot = 3\n[network]\nname = "own"\nwidth = 5\n'
        '[likelihood]\nname = "gaussian"\n[learners.slow]\npace = 0.2\n'
        "[training]\nsteps = 2\nmeta_batch = 2\nchunk = 2\nvalidation_tasks = 2\n"
    )
    run_cli("train", path, "--out", tmp_path / "run")
    run_cli("evaluate", tmp_path / "run", "--tasks", 3, "--no-memorisation")
    experiment = build(load_recipe(str(path)))
    fitted = fit(experiment.learner, experiment.splits, experiment.training)
    assert fitted.params["head"]["w"].shape == (5, 1)
    with pytest.raises(ValueError, match=r"learner.pase is not an option of slow.*did you mean 'pace'"):
        make_learner("slow", mlp(), mp.Gaussian(), pase=1)


@pytest.mark.usefixtures("registries")
def test_entry_points_are_found_when_a_name_is_not_known(monkeypatch):
    points = {"metaprior.learners": [EntryPoint("slow", "test_named:slow", "metaprior.learners")]}
    monkeypatch.setattr(named, "entry_points", lambda group: points.get(group, []))
    LEARNERS._searched = False
    recipe = with_overrides(load_recipe("sinusoid"), "slow", {"learner.pace": 0.5})
    assert build(recipe).learner.path is not None
    points["metaprior.networks"] = [EntryPoint("broken", "test_named:nothing", "metaprior.networks")]
    NETWORKS._searched = False
    with pytest.raises(ValueError, match="network broken cannot be loaded from test_named:nothing"):
        NETWORKS.discovered()


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("lerner", "slow", slow), "did you mean 'learner'"),
        (("learner", "maml", slow), "name must be new, got 'maml'"),
        (("learner", "slow", own_network), r"must take \(model, likelihood, \*, ...\), got \(width, ...\)"),
        (("network", "", own_network), "name must be text"),
        (("network", "own", 3), "must be a function that makes one, got 3"),
    ],
)
def test_what_cannot_be_registered_is_named(given, told):
    with pytest.raises(ValueError, match=told):
        mp.register(*given)
