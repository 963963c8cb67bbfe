"""Siamese networks: pairs by hand, Bayes' rule over classes, the published network, warps, and the official runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import expit

from metaprior import evaluate
from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Model, Splits, Task
from metaprior.learners import siamese
from metaprior.learners.siamese import Twins
from metaprior.networks import twin
from metaprior.tasks import FixedTasks, augmented, class_pool
from metaprior.tasks.images.warp import affine, random_affine, warp

KEY = jax.random.key(0)
BARE = Model(lambda key, x: {}, lambda params, x: x)
PARAMS = Twins({}, jnp.array([-1.0, -2.0]), jnp.array(3.0))
SIAMESE = siamese(BARE, Categorical(), way=3)
SUPPORT = Batch(jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]]), jnp.array([0, 0, 1]))
X = jnp.array([[0.5, 1.0], [0.0, 2.0]])


def answer(support, x=X):
    return SIAMESE.predict(PARAMS, SIAMESE.adapt(PARAMS, support, KEY), x, KEY).mean()


def test_classes_have_probabilities_in_proportion_to_their_odds():
    log_odds = np.array([[3 - 0.5 - 2, 3 - 0.5 - 2, 3 - 0.5 - 4], [3 - 4, 3 - 1 - 4, 3 - 2]])
    odds = np.exp(np.stack([log_odds[:, :2].mean(1), log_odds[:, 2]], 1))
    np.testing.assert_allclose(answer(SUPPORT)[:, :2], odds / odds.sum(1, keepdims=True), rtol=1e-5)
    assert (answer(SUPPORT)[:, 2] == 0).all()  # a class that the support does not show


@pytest.mark.slow
def test_the_loss_is_the_cross_entropy_of_all_pairs_half_of_it_by_pairs_of_one_class():
    task = Task(SUPPORT, Batch(X, jnp.array([0, 1])))
    x, y = np.concatenate([SUPPORT.x, X]), [0, 0, 1, 0, 1]
    same, different, right = [], [], {True: [], False: []}
    for i in range(5):
        for j in range(i + 1, 5):
            p = expit(3 - abs(x[i] - x[j]) @ [1, 2])
            (same if y[i] == y[j] else different).append(-np.log(p if y[i] == y[j] else 1 - p))
            right[y[i] == y[j]].append((p > 0.5) == (y[i] == y[j]))
    loss, metrics = SIAMESE.loss(PARAMS, task, KEY)
    np.testing.assert_allclose(loss, (np.mean(same) + np.mean(different)) / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["verification"], (np.mean(right[True]) + np.mean(right[False])) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], (answer(SUPPORT).argmax(-1) == task.query.y).mean())


@pytest.mark.slow
def test_padding_and_unlabelled_examples_are_in_no_pair():
    query = Batch(X, jnp.array([0, 1]))
    loss = SIAMESE.loss(PARAMS, Task(SUPPORT, query), KEY)[0]
    longer = Batch(jnp.concatenate([SUPPORT.x, X + 9]), jnp.array([0, 0, 1, 1, -1]), jnp.array([1.0, 1, 1, 0, 1]))
    np.testing.assert_allclose(SIAMESE.loss(PARAMS, Task(longer, query), KEY)[0], loss, rtol=1e-6)
    np.testing.assert_allclose(answer(longer), answer(SUPPORT), rtol=1e-6)


@pytest.mark.slow
def test_the_published_network_has_the_published_sizes():
    network = twin(head=False)
    params = jax.eval_shape(network.init, KEY, jax.ShapeDtypeStruct((1, 105, 105, 1), jnp.float32))
    assert [params[f"conv{i}"]["w"].shape for i in range(1, 5)] == [
        (10, 10, 1, 64), (7, 7, 64, 128), (4, 4, 128, 128), (4, 4, 128, 256)
    ]  # fmt: skip
    assert params["dense"]["w"].shape == (9216, 4096)
    small = twin(filters=(2, 3), kernels=(3, 2), width=4, outputs=6)
    theta = small.init(KEY, jnp.zeros((1, 8, 9, 1)))
    assert small.apply(theta, jnp.ones((5, 8, 9, 1))).shape == (5, 6)
    assert small.features(theta, jnp.ones((5, 8, 9, 1))).shape == (5, 4)


@pytest.mark.slow
def test_warps_move_pixels_where_they_say():
    image = jnp.zeros((7, 7, 1)).at[3, 5, 0].set(1.0)
    quarter = jnp.array([[0.0, -1], [1, 0]])  # (row, column) from the centre: (0, 2) -> (-2, 0)
    np.testing.assert_allclose(warp(image, quarter, jnp.zeros(2))[1, 3, 0], 1, atol=1e-5)
    np.testing.assert_allclose(warp(image, jnp.eye(2), jnp.array([1.0, -2]))[4, 3, 0], 1, atol=1e-5)
    shifted = warp(image, jnp.eye(2), jnp.array([0.25, 0]))
    np.testing.assert_allclose([shifted[3, 5, 0], shifted[4, 5, 0]], [0.75, 0.25], atol=1e-5)
    np.testing.assert_allclose(warp(image, 4 * jnp.eye(2), jnp.zeros(2)).sum(), 0, atol=1e-5)  # pushed out of sight


@pytest.mark.slow
def test_random_warps_are_keyed_and_of_the_stated_extent():
    image = jax.random.uniform(KEY, (9, 9, 2))
    warped = jax.jit(affine)(KEY, image)
    assert (warped == jax.jit(affine)(KEY, image)).all()
    assert not np.allclose(warped, affine(jax.random.key(1), image))
    matrices, shifts = jax.vmap(random_affine)(jax.random.split(KEY, 2000))
    assert abs(shifts).max() <= 2 / 105
    assert 0.45 < (shifts[:, 0] == 0).mean() < 0.55  # each component is there with probability 1/2
    size = jnp.sqrt(jnp.linalg.det(matrices))
    assert 0.75 < size.min() < 0.9
    assert 1.1 < size.max() < 1.26


@pytest.mark.slow
def test_only_training_images_are_warped():
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    pool = class_pool(images, [10] * 4, way=2, shot=2, query=1)
    splits = augmented(Splits(pool, pool, pool), warp=True)
    assert splits.test is pool
    task = jax.jit(splits.train.sample, static_argnums=1)(KEY, 1)
    assert task.support.x.shape == (1, 4, 8, 8, 1)
    stored = {image.tobytes() for image in images}
    assert any(np.rint(255 * x).astype(np.uint8).tobytes() not in stored for x in np.asarray(task.support.x)[0])


def test_given_tasks_are_judged_once_each_with_the_loss_s_own_figures():
    y = jnp.array([[0, 1], [0, 1], [1, 0]])
    x = jnp.broadcast_to(jnp.array([[0.0, 0.0], [5.0, 0.0]]), (3, 2, 2))
    tasks = Task(Batch(x, jnp.broadcast_to(jnp.arange(2), (3, 2))), Batch(x, y))
    report = evaluate(SIAMESE, PARAMS, FixedTasks(tasks), KEY, tasks=3, metrics=("verification",))
    np.testing.assert_allclose(report.figures["accuracy"].mean, 2 / 3)
    # Right pairs: all six, or, where the queries' labels are exchanged, of two same none and of four different two.
    np.testing.assert_allclose(report.figures["verification"].mean, (1 + 1 + 0.25) / 3, rtol=1e-6)
    assert "verification" not in evaluate(SIAMESE, PARAMS, FixedTasks(tasks), KEY, tasks=3).figures


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="siamese, which tells classes apart"):
        siamese(BARE, Gaussian())
    with pytest.raises(ValueError, match="way must be an integer of at least 2 or None, got 1"):
        siamese(BARE, Categorical(), way=1)
    with pytest.raises(ValueError, match="filters and kernels must have one entry"):
        twin(filters=(4,), kernels=(3, 3))
    with pytest.raises(ValueError, match="Give larger images or smaller kernels"):
        twin().init(KEY, jnp.zeros((1, 28, 28, 1)))
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'sigmoidd'; did you mean 'sigmoid'"):
        twin(activation="sigmoidd")
