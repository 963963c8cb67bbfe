"""Studies: tasks with two explanations are what they say, and figures are right where the answer is known."""

import json
import shutil
from math import e, log, pi

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from metaprior.core.likelihoods import Categories, Counts, Normals
from metaprior.core.types import Learner
from metaprior.evaluation.calibration import auroc
from metaprior.experiments.recipe import Recipe, as_dict, build, load_recipe, with_overrides
from metaprior.experiments.runs import Run
from metaprior.studies import active, ambiguity, novelty, referee
from metaprior.studies.active import acquire, lay_out
from metaprior.studies.ambiguity import closeness, curves, exact, joint_log_prob
from metaprior.studies.novelty import KINDS, novel_images, uncertainty
from metaprior.studies.plots import explanations as picture
from metaprior.tasks import class_pool, linear, sinusoid, two_circles, wave_or_line
from metaprior.tasks.synthetic.explained import ExplainedTasks
from metaprior.training.loop import init_state
from scenarios import run_cli

KEY = jax.random.key(0)


# -- tasks with two explanations ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wave_and_line_both_pass_through_the_support_and_one_is_true():
    source = wave_or_line(query=200, noise=0.1).train
    task, targets = source.explained(KEY, 400)
    both = jax.vmap(source.explanations)(task.support, task.support.x)
    np.testing.assert_allclose(both, np.repeat(task.support.y[:, None], 2, 1), atol=1e-5)
    x = np.asarray(task.query.x[..., 0])
    for i, basis in enumerate(([np.sin(x), np.cos(x)], [x, np.ones_like(x)])):
        design = np.stack(basis, -1)
        fit = np.linalg.pinv(design) @ np.asarray(targets[:, i])
        np.testing.assert_allclose(design @ fit, targets[:, i], atol=2e-3)
        if i == 0:
            amplitude = np.linalg.norm(fit[..., 0], axis=-1)
            assert 0.49 < amplitude.min() < 0.6 < 1.4 < amplitude.max() < 1.51
    residual = np.asarray(task.query.y[:, None] - targets).std((2, 3))
    assert abs(np.median(residual.min(1)) - 0.1) < 0.01
    assert 0.43 < residual.argmin(1).mean() < 0.57
    assert np.abs(task.support.x).max() <= 3


@pytest.mark.slow
def test_two_circles_pass_through_the_support_and_one_is_true():
    source = two_circles(query=300, radius=2.0, apart=(0.5, 1.5)).test
    task, targets = source.explained(KEY, 400)
    centres = np.asarray(jax.vmap(source.centres)(task.support))
    rims = np.linalg.norm(centres[:, :, None] - task.support.x[:, None], axis=-1)
    np.testing.assert_allclose(rims, 2, atol=1e-4)
    between = np.linalg.norm(centres[:, 0] - centres[:, 1], axis=-1)
    assert 0.99 < between.min() < 1.2 < 2.8 < between.max() < 3.01
    inside = np.linalg.norm(np.asarray(task.query.x)[:, None] - centres[:, :, None], axis=-1) < 2
    np.testing.assert_array_equal(inside, targets)
    right = (np.asarray(task.query.y)[:, None] == np.asarray(targets)).all(-1)
    assert right.any(1).all()
    assert 0.43 < right.argmax(1).mean() < 0.57
    assert (task.support.y == 1).all()


@pytest.mark.parametrize("factory", [wave_or_line, two_circles])
@pytest.mark.slow
def test_sources_are_pure_and_their_splits_apart(factory):
    splits = factory(query=4, test_query=6)
    for source, size in zip(splits, (4, 6, 6), strict=True):
        assert isinstance(source, ExplainedTasks)
        eager, traced = source.sample(KEY, 3), jax.jit(lambda s: s.sample(KEY, 3))(source)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), eager, traced)
        assert eager.query.x.shape[:2] == (3, size)
    seen = [np.asarray(source.sample(KEY, 3).support.x) for source in splits]
    assert not np.isclose(seen[0], seen[1]).any()
    assert not np.isclose(seen[1], seen[2]).any()


@pytest.mark.parametrize(
    ("factory", "options", "words"),
    [
        (wave_or_line, {"gap": (1.0, 4.0)}, "gap must be an interval inside"),
        (wave_or_line, {"gap": (0.0, 1.0)}, "gap must be an interval inside"),
        (wave_or_line, {"domain": (0.0, 2.0)}, "longer than the gap"),
        (wave_or_line, {"noise": -1.0}, "noise must be"),
        (wave_or_line, {"query": 0}, "query must be"),
        (two_circles, {"apart": (1.0, 2.0)}, "apart must be an interval inside"),
        (two_circles, {"radius": 0}, "radius must be"),
        (two_circles, {"test_query": 0}, "test_query must be"),
    ],
)
def test_bad_tasks(factory, options, words):
    with pytest.raises(ValueError, match=words):
        factory(**options)


# -- ambiguity ---------------------------------------------------------------------------------------------------------


def explaining(source, which=(0, 1)):
    """A learner that knows the explanations and believes in some of them; `None` is their average."""

    def predict(params, support, x, key):
        every = source.explanations(support, x)
        believed = every.mean(0, keepdims=True) if which is None else every[jnp.asarray(which)]
        return exact(believed, source.noise)

    return Learner(lambda key, task: None, lambda params, support, key: support, predict, None)


@pytest.mark.slow
def test_closeness_by_hand():
    def constant(*values):
        return jnp.asarray(values, float)[:, None, None] * jnp.ones((1, 5, 1))

    close = closeness(constant(0.9, 1.1, 1.5, 2.5, -1.0), constant(0.0, 3.0), 1 / 3)
    np.testing.assert_array_equal(close, [[1, 0], [0, 0], [0, 0], [0, 1], [1, 0]])
    np.testing.assert_array_equal(closeness(constant(1.0), constant(1.0, 1.0), 0.4), [[0, 0]])
    # Labels: 6 inputs, explanations differ at 4; one flipped label is near at 1/3, two are not.
    explanations = jnp.array([[0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 1]])
    flipped = jnp.array([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1]])
    np.testing.assert_array_equal(closeness(flipped, explanations, 1 / 3), [[1, 0], [0, 0], [0, 1]])


@pytest.mark.slow
def test_joint_log_prob_by_hand():
    predictive = Categories(jnp.log(jnp.array([[[0.9, 0.1], [0.9, 0.1]], [[0.2, 0.8], [0.2, 0.8]]])))
    assert joint_log_prob(predictive, jnp.array([0, 1])) == pytest.approx(log((0.9 * 0.1 + 0.2 * 0.8) / 2), abs=1e-5)
    normals = Normals(jnp.array([[[0.0]], [[2.0]]]), jnp.ones((2, 1, 1)))
    y = jnp.array([[0.5]])
    assert joint_log_prob(normals, y) == pytest.approx(float(normals.log_prob(y)[0]), abs=1e-6)
    with pytest.raises(ValueError, match=r"predictive must be a mixture of draws, .* got Counts"):
        curves(Counts(jnp.ones((1, 2, 1))))


@pytest.mark.parametrize("factory", [wave_or_line, two_circles])
@pytest.mark.slow
def test_the_truth_covers_all_and_its_nll_is_the_exact_one(factory):
    source = factory(test_query=60).test
    truth = referee(source, KEY, tasks=150)
    assert truth.covered.mean == truth.explaining.mean == 1
    assert truth.draws == 2
    targets = source.explained(jax.random.split(KEY)[0], 150).targets  # of the tasks that the study draws
    if factory is two_circles:
        differ = np.asarray(targets[:, 0] != targets[:, 1])
        assert truth.nll.mean == pytest.approx(log(2) * differ.mean(), rel=1e-4)
        assert truth.joint_nll.mean == pytest.approx(log(2) / 60, rel=1e-4)
    else:
        noise = 0.5 * log(2 * pi * e * 0.2**2)
        assert truth.joint_nll.mean == pytest.approx(noise + log(2) / 60, abs=1.5 * truth.joint_nll.interval)
        assert truth.joint_nll.mean < truth.nll.mean < noise + log(2)
    found = ambiguity(explaining(source), None, source, KEY, tasks=150)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.mean, b.mean, rtol=1e-4), found[:4], truth[:4])


@pytest.mark.slow
def test_one_sided_and_undecided_learners_are_told():
    source = wave_or_line().test
    line = ambiguity(explaining(source, (1,)), None, source, KEY, tasks=40)
    assert (line.covered.mean, line.explaining.mean, line.draws) == (0.5, 1.0, 1)
    between = ambiguity(explaining(source, None), None, source, KEY, tasks=40)
    assert (between.covered.mean, between.explaining.mean) == (0, 0)
    assert between.joint_nll.mean == pytest.approx(between.nll.mean, rel=1e-4)
    assert line.nll.mean > 3 * referee(source, KEY, tasks=40).nll.mean


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (sinusoid().test, {}, "whose explanations are known"),
        (wave_or_line().test, {"near": 0.5}, r"near must be inside \(0, 1/2\), got 0.5"),
        (wave_or_line().test, {"tasks": 0}, "tasks must be .*, got 0"),
    ],
)
def test_ambiguity_refuses(source, options, words):
    with pytest.raises(ValueError, match=words):
        ambiguity(explaining(source), None, source, KEY, **options)


@pytest.mark.parametrize("factory", [wave_or_line, two_circles])
@pytest.mark.slow
def test_picture_of_draws_and_explanations(factory):
    source = factory(test_query=30).test
    learners = {"all": (explaining(source), None), "one": (explaining(source, (0,)), None)}
    figure = picture(source, learners, KEY, show=2)
    assert len(figure.axes) == 4
    drawn = [len(ax.lines) + len(ax.collections) for ax in figure.axes]
    assert drawn == [5, 4, 5, 4]  # two explanations, as many draws as there are, the support


# -- active ------------------------------------------------------------------------------------------------------------


def ridge(noise=0.3, prior=3.0):
    """Exact Bayesian lines: a learner whose weights are respected by the arithmetic itself."""

    def features(x):
        return jnp.concatenate([x, jnp.ones_like(x)], -1)

    def adapt(params, support, key):
        f = features(support.x)
        w = jnp.ones(f.shape[0]) if support.weight is None else support.weight
        covariance = jnp.linalg.inv(jnp.eye(2) / prior**2 + (f * w[:, None]).T @ f / noise**2)
        return covariance @ (f * w[:, None]).T @ support.y / noise**2, covariance

    def predict(params, posterior, x, key):
        mean, covariance = posterior
        f = features(x)
        variance = noise**2 + jnp.einsum("ni,ij,nj->n", f, covariance, f)
        return Normals((f @ mean)[None], variance[None, :, None])

    return Learner(lambda key, task: None, adapt, predict, None)


def test_acquisition_is_the_greedy_loop_without_padding():
    learner = ridge()
    task = jax.tree.map(lambda leaf: leaf[0], linear(shot=3, test_query=40).test.sample(KEY, 1))
    found = jax.jit(lambda: acquire(learner, None, lay_out(task, 2, 15), KEY, 5, informed=True))()

    def design(x):
        return np.concatenate([x, np.ones_like(x)], -1)

    support, query = jax.tree.map(lambda leaf: np.asarray(leaf, float), task)
    x, y, left = support.x[:2], support.y[:2], list(range(15))
    for k in range(6):
        covariance = np.linalg.inv(np.eye(2) / 9 + design(x).T @ design(x) / 0.09)
        mean = covariance @ design(x).T @ y / 0.09
        assert found[k] == pytest.approx(((design(query.x[15:]) @ mean - query.y[15:]) ** 2).mean(), rel=1e-3)
        candidates = design(query.x[left])
        best = left.pop(np.einsum("ni,ij,nj->n", candidates, covariance, candidates).argmax())
        x, y = np.vstack([x, query.x[best]]), np.vstack([y, query.y[best]])


@pytest.mark.slow
def test_variance_chooses_better_than_chance_on_lines():
    result = active(ridge(), None, linear(shot=2, test_query=80).test, KEY, tasks=200, start=1, pool=30, points=3)
    assert result.seen == [1, 2, 3, 4]
    assert result.difference[0].mean == pytest.approx(0, abs=1e-5)
    assert result.difference[0].interval == pytest.approx(0, abs=1e-5)
    for k in (1, 2, 3):
        assert result.difference[k].mean + result.difference[k].interval < 0
        gap = result.by_variance[k].mean - result.at_random[k].mean
        assert result.difference[k].mean == pytest.approx(gap, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": 11}, "start must be 0 to 10, got 11"),
        ({"pool": 20}, "pool must be 1 to 19, got 20"),
        ({"pool": 5, "points": 6}, "points must be 1 to 5, got 6"),
        ({"tasks": 0}, "tasks must be .*, got 0"),
    ],
)
def test_active_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        active(ridge(), None, sinusoid(test_query=20).test, KEY, **{"pool": 10, "points": 2} | options)
    with pytest.raises(ValueError, match="tasks of classes"):
        active(ridge(), None, two_circles().test, KEY)


# -- novelty -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [2, 5, 10**6])
def test_auroc_is_the_share_of_ordered_pairs_with_ties(values):
    rng = np.random.default_rng(values)
    high, low = rng.integers(0, values, 37).astype(np.float32), rng.integers(0, values, 23).astype(np.float32)
    high = high + (values > 5) * values // 4
    pairs = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    found = jax.jit(auroc)(jnp.asarray(high), jnp.asarray(low))
    assert found == pytest.approx(pairs.mean(), abs=1e-6)
    truth = np.r_[np.ones(37), np.zeros(23)]
    assert found == pytest.approx(roc_auc_score(truth, np.r_[high, low]), abs=1e-6)


def test_auroc_at_its_ends():
    assert auroc(jnp.array([2.0, 3.0]), jnp.array([0.0, 1.0, 1.0])) == 1
    assert auroc(jnp.zeros(4), jnp.array([0.0, 1.0])) == 0.25
    assert auroc(jnp.ones(4), jnp.ones(3)) == 0.5


@pytest.mark.slow
def test_uncertainty_by_hand():
    sure, unsure = jnp.array([[1.0, 0.0]]), jnp.array([[0.5, 0.5]])
    found = uncertainty(Categories(jnp.log(jnp.stack([sure, sure[:, ::-1]]))))
    assert found["entropy"] == pytest.approx(log(2))
    assert found["mutual information"] == pytest.approx(log(2))
    found = uncertainty(Categories(jnp.log(jnp.stack([unsure, unsure]))))
    assert found["mutual information"] == pytest.approx(0, abs=1e-6)
    assert list(uncertainty(Categories(jnp.log(unsure)[None]))) == ["entropy"]


SIDE = 6


def pictures(classes=12, each=8, side=SIDE):
    """Classes of images: each its own pattern, with a little noise."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(60, 195, (classes, 1, side, side, 1))
    images = patterns + rng.integers(-20, 20, (classes, each, side, side, 1))
    return images.reshape(-1, side, side, 1).astype(np.uint8), [each] * classes


@pytest.fixture(scope="module")
def pool():
    images, counts = pictures()
    return class_pool(images, counts, way=3, shot=2, query=4)


def kernel(spread):
    """Classes by a kernel about their means, over a floor: far from all is uniform."""

    def adapt(params, support, key):
        return jax.nn.one_hot(support.y, 3).T @ support.x.reshape(len(support.y), -1) / 2

    def predict(params, means, x, key):
        square = ((x.reshape(x.shape[0], 1, -1) - means) ** 2).sum(-1)
        return Categories(jax.nn.log_softmax(jnp.log(jnp.exp(-square / spread) + 1e-3))[None])

    return Learner(lambda key, task: None, adapt, predict, None)


@pytest.mark.slow
def test_novel_images_are_of_the_kinds_they_are_named_by(pool):
    task, novel = novel_images(pool, jax.random.key(5))
    np.testing.assert_array_equal(task.support.y, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(task.query.y, np.repeat(range(3), 4))
    known, support = np.asarray(task.query.x).reshape(12, -1), np.asarray(task.support.x).reshape(3, 2, -1).mean(1)
    nearest = ((known[:, None] - support) ** 2).sum(-1)
    assert (nearest.argmin(1) == task.query.y).all()
    other = np.asarray(novel["other classes"]).reshape(12, -1)
    assert ((other[:, None] - support) ** 2).sum(-1).min() > 2 * nearest.min(1).max()
    np.testing.assert_array_equal(novel["rotated"][3, ..., 0], np.rot90(task.query.x[3, ..., 0]))
    noise = np.asarray(novel["noise"])
    low, high = known.min(), known.max()
    assert low <= noise.min() < low + 0.05
    assert high - 0.05 < noise.max() <= high
    assert abs(noise.std() - (high - low) / 12**0.5) < 0.02


@pytest.mark.slow
def test_a_learner_that_knows_what_it_knows_and_one_that_does_not(pool):
    wise = novelty(kernel(0.3), None, pool, KEY, tasks=12)
    assert wise.accuracy.mean == 1
    for kind in KINDS:
        assert wise.auroc["entropy"][kind].mean > 0.98
        assert wise.means["entropy"][kind].mean > wise.means["entropy"]["known"].mean + 0.5
    same = kernel(1.0)._replace(predict=lambda params, means, x, key: Categories(jnp.full((2, len(x), 3), -log(3))))
    blind = novelty(same, None, pool, KEY, tasks=4)
    for score in ("entropy", "mutual information"):
        assert all(figure.mean == 0.5 and figure.interval == 0 for figure in blind.auroc[score].values())


def test_novelty_refuses(pool):
    images, counts = pictures()
    with pytest.raises(ValueError, match="must be a pool of images"):
        novelty(kernel(1.0), None, sinusoid().test, KEY)
    with pytest.raises(ValueError, match=r"must have at least twice the .* got 5"):
        novelty(kernel(1.0), None, class_pool(images, counts, classes=range(5), way=3, shot=2, query=4), KEY)
    with pytest.raises(ValueError, match="must have square images"):
        novelty(kernel(1.0), None, class_pool(images[:, :4], counts, way=3, shot=2, query=4), KEY)
    with pytest.raises(ValueError, match=r"tasks must be .*, got 0"):
        novelty(kernel(1.0), None, pool, KEY, tasks=0)


# -- the command line --------------------------------------------------------------------------------------------------


def untrained(folder, recipe):
    """A run folder as training leaves it, at meta-step 0: what a study does does not depend on how good a run is."""
    experiment = build(recipe)
    state = init_state(experiment.learner, experiment.splits.train, experiment.training)
    Run.create(folder, as_dict(recipe)).save(state, best=True)
    return folder


@pytest.mark.slow
def test_study_reuse(tmp_path, capsys):
    small = {"learner.steps": 1, "network.hidden": [8], "tasks.test_query": 12}
    first = untrained(tmp_path / "maml", with_overrides(load_recipe("sinusoid"), "maml", small))
    second = untrained(tmp_path / "anil", with_overrides(load_recipe("sinusoid"), "anil", small))
    run_cli("study", "reuse", first, second, "--out", tmp_path, "--tasks", 3, "--steps", 2)
    shown = capsys.readouterr().out
    assert "first layers frozen" in shown
    assert "fewer than ten rows per column" in shown
    found = json.loads((tmp_path / "reuse.json").read_text())
    assert list(found) == ["maml", "anil", "maml | anil"]
    layers = found["anil"]["layers"]
    assert layers["layer1"]["cka"]["mean"] == pytest.approx(1, abs=1e-9)
    assert layers["layer1"]["change"] == {"mean": 0.0, "interval": 0.0}
    assert (layers["layer1"]["cosine"]["mean"], layers["head"]["cosine"]["mean"] < 1) == (1, True)
    assert (layers["layer1"]["rows"], layers["layer1"]["columns"]) == (12, 8)
    assert found["anil"]["frozen"][0] == found["anil"]["frozen"][1] != found["anil"]["frozen"][2]
    assert len({str(figure) for figure in found["maml"]["frozen"]}) == 3
    assert list(found["maml | anil"]["before"]) == ["layer1", "head"]
    assert (tmp_path / "reuse.png").stat().st_size > 10_000


@pytest.mark.slow
def test_study_universality(tmp_path, capsys):
    small = {"network.hidden": [4], "tasks.shot": 5}
    runs = [
        untrained(tmp_path / name, with_overrides(load_recipe("cubics"), learner, small | options))
        for name, learner, options in (
            ("maml", "maml", {}),
            ("deep", "maml", {"network.hidden": [4, 4]}),
            ("oracle", "maml", {"tasks.given": True, "learner.steps": 0}),
            ("cnp", "cnp", {}),
        )
    ]
    moved = "tasks.coefficients=[1.0,2.0]"
    run_cli("study", "universality", *runs, "--out", tmp_path, "--tasks", 3, "--steps", 0, 2, "--elsewhere", moved)
    assert "by depth, 3 tasks" in capsys.readouterr().out
    found = json.loads((tmp_path / "universality.json").read_text())
    assert list(found) == ["maml", "deep", "oracle", "cnp"]
    assert [it["hidden"] for it in found.values()] == [1, 2, 1, 1]
    assert [it["steps"] for it in found.values()] == [1, 1, None, None]
    assert [it["oracle"] for it in found.values()] == [False, False, True, False]
    assert list(found["maml"]["tasks"]) == ["as trained", moved]
    course = found["maml"]["tasks"][moved]
    assert course["trained"]["steps"] == course["random"]["steps"] == [0, 1, 2]
    assert found["cnp"]["tasks"][moved]["random"] is None
    assert (tmp_path / "universality.png").stat().st_size > 10_000


def test_study_ambiguity_and_active(tmp_path, capsys):
    recipe = with_overrides(load_recipe("ambiguous"), "maml", {"learner.steps": 1, "network.hidden": [8]})
    ambiguous_run, twin = untrained(tmp_path / "ambiguous", recipe), tmp_path / "twin"
    shutil.copytree(ambiguous_run, twin)
    out = tmp_path / "out"
    run_cli("study", "ambiguity", ambiguous_run, twin, "--out", out, "--tasks", 8)
    assert "the truth" in capsys.readouterr().out
    found = json.loads((out / "ambiguity.json").read_text())
    assert list(found) == ["the truth", "ambiguous", "twin"]
    assert found["ambiguous"] == found["twin"]
    assert found["the truth"]["covered"] == {"mean": 1.0, "interval": 0.0}
    assert (out / "ambiguity.png").stat().st_size > 10_000
    small = ("--tasks", 4, "--pool", 10, "--points", 2)
    run_cli("study", "active", ambiguous_run, "--out", out, *small, "--posterior", "implicit")
    assert "by variance" in capsys.readouterr().out
    found = json.loads((out / "active.json").read_text())["maml"]
    assert found["seen"] == [2, 3, 4]
    assert len(found["difference"]) == 3
    assert (out / "active.png").exists()


def test_study_novelty(tmp_path, capsys):
    images, counts = pictures(side=8)
    np.savez(tmp_path / "pictures.npz", images=images, labels=np.repeat(range(len(counts)), counts))
    tasks = {"name": "images", "path": str(tmp_path / "pictures.npz"), "way": 2, "shot": 2, "query": 3, "test_query": 3}
    recipe = Recipe(
        "patterns",
        learner="protonet",
        tasks=tasks | {"size": 8, "channels": 1, "split": [0.34, 0.33, 0.33]},
        network={"name": "mlp", "hidden": [8]},
        likelihood={"name": "categorical"},
    )
    folder = untrained(tmp_path / "run", recipe)
    run_cli("study", "novelty", folder, "--out", tmp_path / "out", "--tasks", 6)
    assert "AUROC" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "novelty.json").read_text())["protonet"]
    assert set(found["auroc"]["entropy"]) == set(KINDS)
    assert 0 <= found["auroc"]["entropy"]["noise"]["mean"] <= 1
    assert (tmp_path / "out" / "novelty.png").exists()
    run_cli("study", "ambiguity", folder, "--out", tmp_path / "none", code=2)
    assert "whose explanations are known" in capsys.readouterr().err.replace("\n", " ")
    run_cli("study", "active", "--out", tmp_path / "none", code=2)
    assert "at least one run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
