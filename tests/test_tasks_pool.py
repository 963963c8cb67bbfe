"""Episodes from a pool: every image of the test pool says which class and example it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaprior.core.types import Batch, Task, TaskSource
from metaprior.tasks import DataError, FixedTasks, class_pool, pool_splits
from metaprior.tasks.drawing import distinct
from metaprior.tasks.pool import rotate

COUNTS = [6, 9, 7, 6, 8, 12]

sample = jax.jit(lambda source, key, n: source.sample(key, n), static_argnums=2)


def marked_images(counts=COUNTS):
    """2 x 2 x 1 images: class, example, and two marks that show the turn."""
    rows = [[[[c], [i]], [[200], [201]]] for c, count in enumerate(counts) for i in range(count)]
    return np.asarray(rows, np.uint8)


def decode(x):
    """(class, example, turns) of each image."""
    pixels = np.rint(np.asarray(x)[..., 0] * 255).astype(int).reshape(-1, 2, 2)
    out = []
    for image in pixels:
        turns = next(k for k in range(4) if tuple(np.rot90(image, -k)[1]) == (200, 201))
        out.append((*np.rot90(image, -turns)[0], turns))
    return out


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.sampled_from([(2, 1, 1, False), (5, 2, 4, False), (6, 1, 2, True), (24, 1, 5, True)]),
)
@pytest.mark.slow
def test_episodes(seed, sizes):
    way, shot, query, rotations = sizes
    source = class_pool(marked_images(), COUNTS, way=way, shot=shot, query=query, rotations=rotations)
    task = sample(source, jax.random.key(seed), 3)
    assert task.support.x.shape == (3, way * shot, 2, 2, 1)
    assert task.support.x.dtype == jnp.float32
    assert task.query.y.dtype == jnp.int32
    for j in range(3):
        classes = {}
        seen = set()
        for batch, m in ((task.support, shot), (task.query, query)):
            labels = np.asarray(batch.y[j])
            assert sorted(labels) == sorted(list(range(way)) * m)
            for label, (c, i, turns) in zip(labels, decode(batch.x[j]), strict=True):
                assert classes.setdefault(label, (c, turns)) == (c, turns)
                assert (c, i, turns) not in seen
                assert i < COUNTS[c]
                assert rotations or turns == 0
                seen.add((c, i, turns))
        assert len(set(classes.values())) == way


@pytest.mark.slow
def test_same_key_same_bits_and_jit_equals_eager():
    source = class_pool(marked_images(), COUNTS, way=3, shot=1, query=2, rotations=True, mean=0.3, deviation=0.7)
    assert isinstance(source, TaskSource)
    a, b = sample(source, jax.random.key(5), 4), sample(source, jax.random.key(5), 4)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    eager = source.sample(jax.random.key(5), 4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), a, eager)
    other = sample(source, jax.random.key(6), 4)
    assert not np.array_equal(a.support.x, other.support.x)


def test_data_are_arguments_not_constants():
    source = class_pool(marked_images([100] * 6), [100] * 6, way=3)
    text = jax.jit(lambda s, key: s.sample(key, 1)).lower(source, jax.random.key(0)).as_text()
    assert 'dense<"0x' not in text


def test_distinct_is_uniform():
    draws = np.asarray(jax.vmap(lambda k: distinct(k, 5, 3))(jax.random.split(jax.random.key(0), 20_000)))
    assert all(len(set(row)) == 3 for row in draws[:500])
    for place in range(3):
        np.testing.assert_allclose(np.bincount(draws[:, place], minlength=5) / 20_000, 0.2, atol=0.015)
    pairs = np.bincount(draws[:, 0] * 5 + draws[:, 1], minlength=25).reshape(5, 5) / 20_000
    np.testing.assert_allclose(pairs, (1 - np.eye(5)) / 20, atol=0.008)


def test_rotate_is_rot90():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5, 2), np.uint8)
    turned = rotate(jnp.asarray(images), jnp.arange(4))
    for k in range(4):
        np.testing.assert_array_equal(turned[k], np.rot90(images[k], k, axes=(1, 2)))


@pytest.mark.slow
def test_normalisation_per_channel():
    images = np.full((6, 2, 2, 3), 51, np.uint8)
    task = class_pool(images, [3, 3], way=2, query=2, mean=[0.1, 0.2, 0.3], deviation=[1, 2, 4]).sample(
        jax.random.key(0), 1
    )
    np.testing.assert_allclose(task.query.x[0, 0, 0, 0], [0.1, 0.0, -0.025], atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_splits_have_no_class_in_common(turned):
    parts = ([0, 2], [1, 5], [3, 4])
    splits = pool_splits(
        marked_images(), COUNTS, parts, way=2, shot=1, query=2, test_query=4, rotations=turned, test_rotations=turned
    )
    seen = []
    for source, part, query in zip(splits, parts, (2, 4, 4), strict=True):
        task = sample(source, jax.random.key(0), 40)
        assert task.query.y.shape == (40, 2 * query)
        found = decode(np.concatenate([task.support.x, task.query.x], 1))
        assert {c for c, _, _ in found} == set(part)
        seen.append({c for c, _, _ in found})
        if turned:
            assert len({turn for _, _, turn in found}) == 4
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert splits.train.images is splits.test.images


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"way": 7, "query": 2}, "way must be at most 6, the number of classes of this split, got 7"),
        ({"way": 1}, "way must be"),
        (
            {"shot": 2, "query": 5},
            r"shot \+ query must be at most 6, .* of class number 0, got 2 \+ 5",
        ),
        ({"shot": 2, "query": 5, "names": list("abcdef")}, "at most 6, the number of images of class a"),
        ({"query": 2, "deviation": 0.0}, "deviation must be above 0, got 0.0"),
        ({"counts": [6, 9]}, r"images must be uint8 \[15, h, w, c\], .*, got uint8 \(48, 2, 2, 1\)"),
    ],
)
def test_bad_options(options, words):
    counts = options.pop("counts", COUNTS)
    with pytest.raises(ValueError, match=words):
        class_pool(marked_images(), counts, **options)


def test_overlapping_splits_and_oblong_rotations_are_refused():
    with pytest.raises(DataError, match="with a class in common"):
        pool_splits(marked_images(), COUNTS, ([0, 1], [1, 2], [3, 4]), way=2, shot=1, query=1, test_query=1)
    with pytest.raises(DataError, match="square"):
        class_pool(np.zeros((8, 2, 3, 1), np.uint8), [4, 4], way=2, query=2, rotations=True)


def test_fixed_tasks():
    values = jnp.arange(6.0)[:, None, None]
    source = FixedTasks(Task(Batch(values, values), Batch(values, values)))
    np.testing.assert_array_equal(source.sample(jax.random.key(0), 6).support.x, values)
    some = source.sample(jax.random.key(0), 4).support.x.ravel().tolist()
    assert len(set(some)) == 4
    with pytest.raises(ValueError, match="n must be at most 6, the number of fixed tasks, got 7"):
        source.sample(jax.random.key(0), 7)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.slow
def test_training_may_have_more_ways_and_labels_of_its_own(turned):
    parts = ([0, 1, 3, 5], [2], [4])
    splits = pool_splits(
        marked_images(), COUNTS, parts, way=2, shot=1, query=2, test_query=2, rotations=turned, test_rotations=True,
        train_way=4, train_labels="class",
    )  # fmt: skip
    task = sample(splits.train, jax.random.key(0), 30)
    assert task.query.y.shape == (30, 8)
    assert task.query.y.dtype == jnp.int32
    meaning = {}
    for batch in task:
        for label, (c, _, turns) in zip(np.asarray(batch.y).ravel(), decode(batch.x), strict=True):
            assert meaning.setdefault(label, (c, turns)) == (c, turns)
    assert sorted(meaning) == list(range(16 if turned else 4))
    assert len(set(meaning.values())) == len(meaning)
    # Tests are of `way` classes, labelled by their places in the task.
    assert set(np.asarray(sample(splits.test, jax.random.key(0), 9).query.y).ravel()) == {0, 1}
    with pytest.raises(ValueError, match="train_labels must be one of"):
        pool_splits(marked_images(), COUNTS, parts, way=2, shot=1, query=2, test_query=2, train_labels="clas")


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
def test_slots_make_the_label_a_function_of_the_image(turned):
    """Training tasks are not mutually exclusive (Yin et al. 2020): a class has one label in all of them."""
    splits = pool_splits(
        marked_images(), COUNTS, ([0, 1, 3, 5], [2], [4]), way=3, shot=1, query=2, test_query=2, rotations=turned,
        test_rotations=True, train_labels="slot",
    )  # fmt: skip
    labels_of = {}
    for part in (splits.train, splits.test):
        task, tally = sample(part, jax.random.key(0), 200), {}
        for batch in task:
            each = batch.y.shape[1] // 3
            np.testing.assert_array_equal(np.sort(batch.y, -1), np.tile(np.repeat(np.arange(3), each), (200, 1)))
            for label, (c, _, turns) in zip(np.asarray(batch.y).ravel(), decode(batch.x), strict=True):
                tally.setdefault((c, turns), np.zeros(3, int))[label] += 1
        labels_of[part is splits.train] = tally
    tally = labels_of[True]
    assert len(tally) == (16 if turned else 4)  # every class is drawn
    assert all((seen > 0).sum() == 1 for seen in tally.values())  # under one label
    members = [[seen[k] for seen in tally.values() if seen[k]] for k in range(3)]
    sizes = sorted(map(len, members))
    assert sizes[-1] - sizes[0] <= 1
    for seen in members:  # as often as the others of its slot: 3 examples of it in a task, within 5 sd
        assert abs(np.array(seen) / 3 - 200 / len(seen)).max() < 5 * (200 / len(seen)) ** 0.5 * (len(seen) > 1) + 1e-9
    assert all((seen > 0).all() for seen in labels_of[False].values())  # test classes are labelled anew in each task


def test_slots_need_a_class_each():
    with pytest.raises(DataError, match="way must be at most 6, the number of classes"):
        class_pool(marked_images(), COUNTS, way=7, query=2, labels="slot")
    with pytest.raises(ValueError, match="labels must be one of"):
        class_pool(marked_images(), COUNTS, way=3, query=2, labels="slots")
