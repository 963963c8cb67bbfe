"""Zero-shot: stroke attributes of drawings that one can check by eye, and prototypes that are embedded attributes."""

import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Attributes, Batch, Model, Splits, Task
from metaprior.learners import zero_shot
from metaprior.tasks import DataError, DescribedTasks, augmented, class_pool, omniglot_strokes
from metaprior.tasks.images.strokes import ATTRIBUTES, describe, load_attributes, read_strokes, turned
from metaprior.tasks.pool import rotate

KEY = jax.random.key(0)
BARE = Model(lambda key, x: {}, lambda params, x: x)


def attributes(*strokes):
    return dict(zip(ATTRIBUTES, describe([np.array(s, float) for s in strokes]), strict=True))


def test_attributes_of_lines_and_circles():
    line = attributes([(0.2, 0.5), (0.8, 0.5)])
    expected = {"log strokes": 0, "log length": np.log(0.6), "curvature": 0, "straightness": 1, "width": 0.6,
                "height": 0, "centre x": 0.5, "start x": 0.2, "horizontal": 1, "vertical": 0}  # fmt: skip
    assert {name: line[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    ell = attributes([(0.2, 0.2), (0.2, 0.8), (0.8, 0.8)])
    assert ell["curvature"] == pytest.approx(1 / 4, abs=1e-6)
    assert ell["straightness"] == pytest.approx(2**-0.5, abs=1e-6)
    assert (ell["horizontal"], ell["vertical"]) == pytest.approx((0.5, 0.5), abs=0.03)
    at = np.linspace(0, 2 * np.pi, 200)
    circle = attributes(np.stack([0.5 + 0.3 * np.cos(at), 0.5 + 0.3 * np.sin(at)], 1))
    assert circle["curvature"] == pytest.approx(1, abs=0.05)
    assert circle["straightness"] == pytest.approx(0, abs=1e-6)
    assert np.exp(circle["log length"]) == pytest.approx(0.6 * np.pi, rel=0.01)
    # Drawn upwards to the right: rising; the second stroke is half as long and falls.
    two = attributes([(0.1, 0.9), (0.5, 0.5)], [(0.5, 0.5), (0.7, 0.7)])
    assert np.exp(two["log strokes"]) == pytest.approx(2)
    assert two["longest stroke"] == pytest.approx(2 / 3)
    assert (two["rising"], two["falling"]) == pytest.approx((2 / 3, 1 / 3))
    assert np.isfinite(describe([np.array([[0.3, 0.3]])])).all()  # a dot


@pytest.mark.parametrize("quarters", range(4))
def test_strokes_turn_as_pictures_do(quarters):
    points = (np.array([[2, 1], [5, 1], [5, 4]]) + 0.5) / 8  # (x, y) of pixels' middles
    picture = np.zeros((1, 1, 8, 8, 1), np.uint8)
    picture[0, 0, (points[:, 1] * 8).astype(int), (points[:, 0] * 8).astype(int)] = 1
    after = (turned([points], quarters)[0] * 8).astype(int)
    inked = np.argwhere(np.asarray(rotate(jnp.asarray(picture), jnp.array([quarters])))[0, 0, :, :, 0])
    assert {(x, y) for x, y in after} == {(x, y) for y, x in inked}


def write_strokes(path, drawers=20):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/small/A/character01/._0007_01.txt", "debris")
        for d in range(1, drawers + 1):
            text = f"START\n{d},-21,0\n42,-21,5\nBREAK\n10.5,0,9\nBREAK\n"
            archive.writestr(f"small/A/character01/0007_{d:02d}.txt", text)


def test_archives_are_read_as_points_with_y_downwards(tmp_path):
    write_strokes(tmp_path / "strokes.zip")
    found = read_strokes(tmp_path / "strokes.zip")
    assert {c: len(drawings) for c, drawings in found.items()} == {7: 20}
    first, second = found[7][3]
    np.testing.assert_allclose(first, [[3 / 105, 0.2], [0.4, 0.2]])
    np.testing.assert_allclose(second, [[0.1, 0]])
    write_strokes(tmp_path / "short.zip", drawers=19)
    with pytest.raises(DataError, match=r"must hold 20 drawings of each .* Delete it"):
        read_strokes(tmp_path / "short.zip")
    (tmp_path / "broken.zip").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="corrupt or truncated"):
        read_strokes(tmp_path / "broken.zip")


@pytest.mark.slow
def test_a_class_s_row_belongs_to_its_pictures():
    """Pictures of one grey each, in one corner: turned, a class's corner tells by how much."""
    greys = np.arange(1, 7, dtype=np.uint8) * 40
    images = np.zeros((30, 4, 4, 1), np.uint8)
    images[:, 0, 0, 0] = np.repeat(greys, 5)
    pool = class_pool(images, [5] * 6, way=4, shot=1, query=3, rotations=True, labels="class")
    grey, turn = np.tile(greys, 4), np.repeat(np.arange(4), 6)
    source = DescribedTasks(pool, jnp.stack([jnp.asarray(grey, float), jnp.asarray(turn, float)], 1))
    task = jax.tree.map(np.asarray, jax.jit(source.sample, static_argnums=1)(KEY, 5))
    assert task.support.x.values.shape == (5, 4, 2)
    corners = [(0, 0), (3, 0), (3, 3), (0, 3)]  # counterclockwise, from the upper left
    for t, q in np.ndindex(5, 12):
        label = int(task.query.y[t, q])
        grey, turn = task.support.x.values[t, np.argmax(task.support.y[t] == label)]
        assert task.query.x[t, q, *corners[int(turn)], 0] == pytest.approx(grey / 255)
    kept = jax.eval_shape(lambda: augmented(Splits(source, source, source), warp=True).train.sample(KEY, 2))
    assert kept.support.x.values.shape == (2, 4, 2)


@pytest.mark.slow
def test_prototypes_are_embedded_attributes_of_length_one():
    learner = zero_shot(BARE, Categorical(), temperature=2.0)
    v, x = jnp.array([[1.0, 0, 2], [0, 1, 1], [3, 1, 0]]), jnp.array([[0.5, -0.5], [1.0, 2.0]])
    support = Batch(Attributes(v), jnp.array([2, 0, 1]))
    params = learner.init(KEY, Task(support, Batch(x, jnp.array([0, 1]))))
    w = np.asarray(params.attributes["head"]["w"])
    prototypes = np.asarray(v @ w)
    prototypes = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    scores = np.exp(-((np.asarray(x)[:, None] - prototypes) ** 2).sum(-1) / 2)
    p = scores / scores.sum(1, keepdims=True)
    got = learner.predict(params, learner.adapt(params, support, KEY), x, KEY).mean()
    np.testing.assert_allclose(got[:, jnp.array([2, 0, 1])], p, rtol=1e-5)
    # Two rows of a class are averaged once embedded; a class without a row is not there.
    wider = zero_shot(BARE, Categorical(), temperature=2.0, way=4, normalise=False)
    got = wider.adapt(params, Batch(Attributes(v), jnp.array([0, 0, 3])), KEY)
    np.testing.assert_allclose(got.prototypes[0], (v[0] + v[1]) @ w / 2, rtol=1e-5)
    assert (wider.predict(params, got, x, KEY).mean()[:, 1:3] == 0).all()


def test_bad_input_is_named():
    learner = zero_shot(BARE, Categorical())
    examples = Batch(jnp.zeros((3, 2)), jnp.arange(3))
    for call in (lambda: learner.init(KEY, Task(examples, examples)), lambda: learner.adapt({}, examples, KEY)):
        with pytest.raises(ValueError, match=r"support.x must be Attributes, .* got examples \(3, 2\)"):
            call()
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        zero_shot(BARE, Categorical(), temperature=0)
    with pytest.raises(ValueError, match="zero_shot, which tells classes apart"):
        zero_shot(BARE, Gaussian())


@pytest.mark.data
def test_characters_of_omniglot_are_told_by_the_strokes_of_other_drawers(data_dir):
    described = load_attributes()
    assert described["attributes"].shape == (4, 242, len(ATTRIBUTES))
    splits = omniglot_strokes(way=5, query=2)
    sizes = [split.pool.starts.shape[0] for split in splits]
    assert sum(sizes) == 242
    assert splits.train.attributes.shape[0] == 4 * sizes[0]
    np.testing.assert_allclose(splits.train.attributes.mean(0), 0, atol=1e-4)
    # A turn changes no length.
    assert (np.ptp(described["attributes"][:, :, ATTRIBUTES.index("log length")], axis=0) < 1e-6).all()
