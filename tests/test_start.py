"""Training that starts from the network of another run: what is taken, what stays frozen, and what is refused."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaprior as mp
from metaprior.experiments.recipe import load_recipe, recipe_from_dict, with_overrides
from metaprior.experiments.results import recipe_hash
from metaprior.experiments.runs import OtherSettings, Run
from metaprior.experiments.start import check_split
from metaprior.experiments.suite import load_suite
from metaprior.learners import LEARNERS
from metaprior.learners.builders.start import part_of, started_from
from metaprior.networks import conv4, mlp
from metaprior.training.loop import init_state, validator
from scenarios import KEY, batch, run_cli, same_bits

MODEL, WIDE = mlp(3, (8,)), mlp(12, (8,))
TASK = mp.Task(batch(6), batch(6, 2))
TRAINED = jax.tree.map(lambda leaf: leaf + 1, WIDE.init(KEY, TASK.query.x))


@pytest.mark.parametrize(
    "name", ["maml", "protonet", "sib", "gem_bml", "meta_sgd", "nearest_neighbour", "cnp", "versa"]
)
def test_a_learner_starts_from_the_network_below_a_head_of_another_size(name):
    plain = LEARNERS[name](MODEL, mp.Categorical())
    fresh, begun = (each.init(KEY, TASK) for each in (plain, started_from(plain, MODEL, TRAINED)))
    network = part_of(MODEL, begun, TASK.query.x)
    assert same_bits(network["layer1"], TRAINED["layer1"])
    assert same_bits(network["head"], part_of(MODEL, fresh, TASK.query.x)["head"])
    assert jax.tree.structure(fresh) == jax.tree.structure(begun)
    differ = sum(bool((a != b).any()) for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves(begun), strict=True))
    assert differ == 2  # the weights and the bias of one layer, and nothing else


def test_a_head_of_the_same_size_is_taken():
    trained = jax.tree.map(lambda leaf: leaf + 1, MODEL.init(KEY, TASK.query.x))
    assert same_bits(started_from(mp.learners.maml(MODEL, mp.Categorical()), MODEL, trained).init(KEY, TASK), trained)
    images = conv4(3, 4, 2, norm="running")
    x = jnp.zeros((2, 8, 8, 1))
    begun = started_from(mp.learners.maml(images, mp.Categorical()), images, conv4(9, 4, 2).init(KEY, x))
    assert begun.init(KEY, mp.Task(mp.Batch(x, jnp.arange(2)), mp.Batch(x, jnp.arange(2))))["head"]["b"].shape == (3,)


def test_what_does_not_fit_is_refused():
    learner = mp.learners.maml(MODEL, mp.Categorical())
    other = mlp(3, (9,)).init(KEY, TASK.query.x)
    with pytest.raises(ValueError, match=r"\['layer1'\]\['b'\] has shape \(9,\) there and shape \(8,\) here"):
        started_from(learner, MODEL, other).init(KEY, TASK)
    with pytest.raises(ValueError, match=r"\['layer2'\].* has no value there and shape"):
        started_from(mp.learners.maml(deep := mlp(3, (8, 8)), mp.Categorical()), deep, TRAINED).init(KEY, TASK)
    with pytest.raises(ValueError, match="start must be left out with this learner"):
        started_from(mp.learners.bmaml(MODEL, mp.Categorical()), MODEL, TRAINED).init(KEY, TASK)


@pytest.mark.parametrize("name", ["protonet", "sib", "taml"])
def test_a_frozen_network_stays_as_it_is_and_the_rest_is_trained(name):
    options = {"learn_temperature": True} if name == "protonet" else {}
    learner = LEARNERS[name](MODEL, mp.Categorical(), **options)
    begun = started_from(learner, MODEL, TRAINED, freeze=True)
    params = begun.init(KEY, TASK)
    np.testing.assert_allclose(begun.loss(params, TASK, KEY)[0], learner.loss(params, TASK, KEY)[0], rtol=1e-6)
    gradient = jax.grad(lambda p: begun.loss(p, TASK, KEY)[0])(params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(part_of(MODEL, gradient, TASK.query.x)))
    if name == "taml":
        assert begun.joint is not None
        gradient = jax.grad(lambda p: begun.joint.score(p, TASK, KEY))(params)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    else:
        assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradient))


RECIPE = """learner = "sib"
[tasks]
name = "images"
path = "{folder}/pictures.npz"
way = 2
query = 3
test_query = 3
size = 8
channels = 1
[tasks.fine_tune]
train_labels = "class"
[network]
name = "conv4"
filters = 4
blocks = 2
norm = "running"
outputs = 8
[likelihood]
name = "categorical"
[learners.fine_tune]
way = 2
steps = 2
[start]
freeze = true
[start.fine_tune]
freeze = false
[training]
steps = 10
meta_batch = 1
chunk = 5
validate_every = 5
validation_tasks = 3
rate = 1e-2
[evaluation]
tasks = 4
"""
SUITE = """title = "Start"
recipe = "{folder}/r.toml"
[runs.fine_tune]
[runs.sib]
start = "fine_tune"
[runs.alone]
learner = "sib"
start = "fine_tune"
judge = {{"learner.test_steps" = 0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe on a few pictures, and the runs and results of its suite."""
    folder = tmp_path_factory.mktemp("start")
    pictures = np.random.default_rng(0).integers(0, 256, (96, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "pictures.npz", images=pictures, labels=np.arange(96) % 12)
    (folder / "r.toml").write_text(RECIPE.format(folder=folder))
    (folder / "s.toml").write_text(SUITE.format(folder=folder))
    run_cli("reproduce", folder / "s.toml", "--results", folder / "results", "--out", folder / "runs")
    return folder


def runs_of(folder):
    runs = list((folder / "runs").iterdir())
    assert len(runs) == 2  # one training of sib, judged twice
    return (next(run for run in runs if learner in run.name) for learner in ("fine_tune", "sib"))


@pytest.mark.slow
def test_a_run_starts_from_a_frozen_pretrained_network(folder):
    pretrained, run = runs_of(folder)
    one, two = mp.load(pretrained), mp.load(run)
    assert all(same_bits(one.params[block], two.params.embedding[block]) for block in ("block1", "block2"))
    assert two.params.scale != 10  # which was trained
    record = json.loads((run / "training.json").read_text())["start"]
    assert record["run"] == str(pretrained)
    assert record["id"] == one.run.started["id"]
    # The statistics of a frozen network are the same in training and afterwards, so that validation can be repeated.
    training = two.experiment.training
    last = two.run.params(init_state(two.experiment.learner, two.splits.train, training), "last")
    found = validator(two.learner, training)(last, two.splits.validation, two.splits.train)
    np.testing.assert_allclose(found["nll"], two.run.metrics()[-1]["validation/nll"], rtol=1e-5)


@pytest.mark.slow
def test_a_suite_states_where_its_runs_start(folder):
    pretrained, _ = runs_of(folder)
    results = {path.stem: json.loads(path.read_text()) for path in (folder / "results" / "s").glob("*.json")}
    assert results.keys() == {"fine_tune", "sib", "alone"}
    assert results["sib"]["overrides"] == {"start.run": str(pretrained)}
    assert f"start.run={pretrained}" in results["sib"]["command"][0]
    assert any(note.startswith("transductive") for note in results["sib"]["report"]["notes"])
    assert not any(note.startswith("transductive") for note in results["alone"]["report"]["notes"])
    run_cli("results", "--results", folder / "results", "--out", folder / "pages")
    assert "has changed since" not in (folder / "pages" / "s.md").read_text()
    (folder / "bad.toml").write_text((folder / "s.toml").read_text().replace('start = "fine_tune"', 'start = "maml"'))
    with pytest.raises(ValueError, match=r"runs.sib.start must be an earlier run of the suite, fine_tune, got maml"):
        load_suite(str(folder / "bad.toml"))


def refused(capsys, *command):
    run_cli("train", *command, code=2)
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_starts_that_do_not_fit_are_refused_and_leave_no_folder(folder, tmp_path, capsys):
    recipe, run = folder / "r.toml", tmp_path / "run"
    given = ("--start-from", next(runs_of(folder)), "--out", run)
    said = refused(capsys, recipe, "--out", run)
    assert "start.run must be the folder of a run with start.freeze, got none" in said
    assert "--learner fine_tune" in said
    assert "no recipe.json" in refused(capsys, recipe, "--start-from", tmp_path, "--out", run)
    said = refused(capsys, recipe, *given, "--set", "network.downsample=stride", "network.outputs=9")
    assert "(there -> here): network.downsample: 'max_pool' -> 'stride'." in said
    assert "tasks.seed: 0 -> 1" in refused(capsys, recipe, *given, "--set", "tasks.seed=1")
    assert "got 'adamw'. Use adam or sgd" in refused(capsys, recipe, *given, "--set", "training.optimizer=adamw")
    said = refused(capsys, recipe, "--learner", "bmaml", *given, "--freeze")
    assert "start must be left out with this learner" in said
    assert "did you mean 'freeze'" in refused(capsys, recipe, *given, "--set", "start.freez=true")
    assert not run.exists()


def test_a_resumed_run_needs_the_network_that_it_started_from(tmp_path):
    with Run.create(tmp_path / "run", {"name": "r"}) as run:
        run.keep_start({"run": "there", "network": "a"})
        run.keep_start({"run": "moved", "network": "a"})
        with pytest.raises(OtherSettings, match="started from the network of there, which holds another one now"):
            run.keep_start({"run": "there", "network": "b"})
    with Run.create(tmp_path / "other", {"name": "r"}) as run:
        run.keep_start({})
        assert "start" not in run.started


def test_a_recipe_without_a_start_keeps_its_hash_and_a_moved_run_too():
    recipe = load_recipe("omniglot-5way-1shot")
    assert recipe_hash(recipe) == recipe_hash(recipe_from_dict({k: v for k, v in vars(recipe).items() if k != "start"}))
    here, there = (with_overrides(recipe, None, {"start.run": run}) for run in ("runs/a", "/elsewhere/a"))
    assert recipe_hash(here) == recipe_hash(there) != recipe_hash(recipe)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"group": "town"}, "training classes of this recipe.*tasks.group: 'county' -> 'town'"),
        ({"features": ["b", "a"]}, r"same columns in the same order.*tasks.features: \['a', 'b'\] -> \['b', 'a'\]"),
    ],
)
def test_a_table_is_read_as_by_the_other_run(changed, message):
    recipe = load_recipe("sinusoid")
    there, here = (
        replace(recipe, tasks={"name": "table", "group": "county", "features": ["a", "b"]} | extra)
        for extra in ({}, changed)
    )
    check_split(there, there)
    with pytest.raises(ValueError, match=message):
        check_split(here, there)
