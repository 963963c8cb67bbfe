"""Tasks of clusters: against the tasks of classes, scikit-learn, and what k-means must not see."""

import json
from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from metaprior.core.likelihoods import Categorical
from metaprior.core.types import Batch, Task, innermost
from metaprior.experiments.recipe import build, load_recipe, recipe_from_dict, with_overrides
from metaprior.experiments.results import published_for, recipe_hash
from metaprior.learners import make_learner
from metaprior.networks import mlp
from metaprior.tasks import DataError, class_pool, clustered, pool_splits, store
from metaprior.tasks.images.clusters import (
    Clustering,
    agreement,
    cluster_table,
    clusters_of,
    embedding_accuracy,
    kmeans_labels,
    kmeans_partitions,
    partitions,
)
from metaprior.tasks.images.embedding import Embedding, embedded
from scenarios import run_cli

KEY = jax.random.key(0)
CLASSES, EACH = 14, 12

sample = jax.jit(lambda source, key, n: source.sample(key, n), static_argnums=2)
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "cache_folder", lambda: tmp_path / "cache")


def images():
    """4 x 4 images: each class has its own picture, and each image a little noise and its own first two pixels."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 180, (CLASSES, 1, 4, 4, 1))
    noisy = (pictures + rng.integers(0, 30, (CLASSES, EACH, 4, 4, 1))).reshape(-1, 4, 4, 1)
    noisy[:, 0, 0, 0] = np.arange(CLASSES * EACH) % 250
    return noisy.astype(np.uint8)


def splits(**options):
    options = {"way": 3, "shot": 1, "query": 3, "test_query": 3} | options
    parts = (np.arange(8), np.arange(8, 11), np.arange(11, 14))
    return pool_splits(images(), [EACH] * CLASSES, parts, **options)


SMALL = {"embedding": "pixels", "pca": 0, "clusters": 8, "partitions": 2}


def rows_of(tasks):
    """The row in the pool of each image of stacked tasks."""
    flat = images().reshape(CLASSES * EACH, -1)
    place = {row.tobytes(): i for i, row in enumerate(flat)}
    x = np.rint(np.asarray(tasks) * 255).astype(np.uint8)
    return np.asarray([place[image.tobytes()] for image in x.reshape(-1, 16)]).reshape(x.shape[:2])


def test_with_the_true_classes_the_tasks_are_those_of_the_classes():
    plain = splits()
    oracle = clustered(plain, partition="classes")
    ours, theirs = (sample(part.train, KEY, 20) for part in (oracle, plain))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert oracle.test is plain.test
    assert oracle.validation is plain.validation


def test_images_of_a_task_differ_and_come_from_one_partition():
    source = clustered(splits(), **SMALL | {"partition": "random"}).train
    tasks = sample(source, KEY, 60)
    rows, starts, counts = rows_of(jnp.concatenate([tasks.support.x, tasks.query.x], 1)), source.starts, source.counts
    members, seen = np.asarray(source.members), Counter()
    found = [
        {int(row): c for c in range(int(source.left[p])) for row in members[starts[p, c] : starts[p, c] + counts[p, c]]}
        for p in range(2)
    ]
    labels = np.concatenate([tasks.support.y, tasks.query.y], 1)
    for images_of, y in zip(rows, labels, strict=True):
        assert len(set(images_of)) == len(images_of)
        fits = [
            p for p in range(2)
            if all(row in found[p] for row in images_of)
            and all(len({found[p][row] for row in images_of[y == label]}) == 1 for label in range(3))
            and len({found[p][row] for row in images_of}) == 3
        ]  # fmt: skip
        assert len(fits) == 1
        seen.update(fits)
    assert chisquare([seen[0], seen[1]]).pvalue > 1e-3
    assert rows.max() < 8 * EACH  # no image of validation or test


def test_labels_are_uniform_over_places():
    made = clustered(splits(way=2), **SMALL | {"partitions": 1})
    tasks, source = sample(made.train, KEY, 800), made.train
    rows = rows_of(tasks.support.x)
    members, starts, counts = (np.asarray(leaf) for leaf in (source.members, source.starts[0], source.counts[0]))
    home = {row: c for c in range(len(starts)) for row in members[starts[c] : starts[c] + counts[c]]}
    for place in range(2):
        number = Counter(home[row] for row in rows[:, place])
        assert chisquare([number[c] for c in range(int(source.left[0]))]).pvalue > 1e-3


def test_the_first_partition_has_no_scaling_and_a_scale_chooses_coordinates():
    z = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    z[:, 1] *= 5
    np.testing.assert_array_equal(kmeans_labels(z, 4, np.ones(3), 1, 7), kmeans_labels(z, 4, np.full(3, 1.0), 1, 7))
    how = Clustering(clusters=4, partitions=2)
    first, second = kmeans_partitions(z, how, 2, 2, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    np.testing.assert_array_equal(first, kmeans_labels(z, 4, np.ones(3), 1, int(rng.integers(2**31))))
    assert agreement(first, second)["ari"] < 0.99
    one = kmeans_labels(z, 4, np.asarray([0.0, 0, 1]), 1, 7)
    edges = sorted((z[one == c, 2].min(), z[one == c, 2].max()) for c in range(4))
    assert all(high < low for (_, high), (low, _) in pairwise(edges))


def test_small_clusters_are_dropped_and_counted():
    labels = np.asarray([[0, 0, 0, 1, 1, 2, 2, 2, -1], [0, 0, 0, 0, 0, 0, 0, 0, 0]])
    members, starts, counts, left = cluster_table(labels, 10 * np.arange(9), 3)
    np.testing.assert_array_equal(left, [2, 1])
    np.testing.assert_array_equal(counts, [[3, 3], [9, 0]])
    np.testing.assert_array_equal(members[starts[0, 1] : starts[0, 1] + 3], [50, 60, 70])
    np.testing.assert_array_equal(members[starts[1, 0] : starts[1, 0] + 9], 10 * np.arange(9))
    made = clustered(splits(), **SMALL).train
    assert f"2 partitions, with {int(made.left.min())} to {int(made.left.max())} of 8 clusters left" in str(made) or (
        made.left.min() == made.left.max()
    )
    assert innermost(made).way == 3


def test_agreement_is_scikit_learns_and_brute_force():
    from sklearn.metrics import normalized_mutual_info_score

    rng = np.random.default_rng(0)
    truth, labels = rng.integers(5, size=80), rng.integers(7, size=80)
    labels[:40] = truth[:40]
    found = agreement(labels, truth)
    np.testing.assert_allclose(found["nmi"], normalized_mutual_info_score(truth, labels))
    purity = sum(Counter(truth[labels == c]).most_common(1)[0][1] for c in set(labels)) / 80
    np.testing.assert_allclose(found["purity"], purity)
    pairs = [(i, j) for i in range(80) for j in range(i) if labels[i] == labels[j]]
    np.testing.assert_allclose(found["pair_precision"], np.mean([truth[i] == truth[j] for i, j in pairs]))
    assert agreement(truth, truth) == {"purity": 1.0, "pair_precision": 1.0, "nmi": 1.0, "ari": 1.0}
    assert agreement(np.r_[truth, -1], np.r_[truth, 0])["purity"] == 1


def test_the_random_partition_knows_nothing_and_kmeans_finds_the_pictures():
    plain = splits()
    random, found = (partitions(plain, Clustering(**SMALL | {"partition": p})) for p in ("random", "kmeans"))
    assert max(row["ari"] for row in random) < 0.1
    assert max(row["ari"] for row in found) > 0.7
    hits = embedding_accuracy(plain, Clustering(**SMALL), KEY, 20)
    assert {name: values.shape for name, values in hits.items()} == dict.fromkeys(hits, (20,))
    assert hits["nearest centroid"].mean() > 0.8


def test_hyperplanes_cut_the_images_into_regions():
    options = SMALL | {"partition": "hyperplanes", "hyperplanes": 10, "offset": 0.5, "partitions": 3}
    source = clustered(splits(query=1), **options | {"pca": 2}).train
    assert source.left.shape == (3,)
    assert source.left.min() >= 3
    with pytest.raises(
        DataError, match=r"clusters.margin and clusters.offset must suit .*, got 100.0 and 0.5: 0 splits"
    ):
        clustered(splits(query=1), **options | {"margin": 100.0})


def test_what_is_learned_sees_no_image_but_those_of_training():
    data, changed = splits(), images()
    changed[8 * EACH :] = 255 - changed[8 * EACH :]
    other = pool_splits(changed, [EACH] * CLASSES, (np.arange(8), np.arange(8, 11), np.arange(11, 14)), way=3, shot=1,
                        query=3, test_query=3)  # fmt: skip
    for options in (SMALL | {"pca": 3}, SMALL | {"embedding": "autoencoder", "steps": 3, "code": 4}):
        ours, theirs = (clustered(part, **options).train for part in (data, other))
        np.testing.assert_array_equal(ours.members, theirs.members)
    both = clustered(data, **SMALL | {"validation": True}).train
    assert both.members.max() >= 8 * EACH
    assert both.members.max() < 11 * EACH


def test_whitened_pixels_have_unit_covariance():
    pool, train = splits().train, np.arange(8 * EACH)
    z = embedded(pool, Embedding(embedding="whitened", pca=0), train, train)
    values = np.linalg.eigvalsh(np.cov(z, rowvar=False))
    np.testing.assert_allclose(values, [0, *[1] * 15], atol=0.01)  # each image's mean is subtracted


def test_an_autoencoder_keeps_what_tells_pictures_apart():
    rows = partitions(splits(), Clustering(**SMALL | {"embedding": "autoencoder", "steps": 100, "code": 6}))
    assert max(row["nmi"] for row in rows) > 0.7


def test_an_embedding_from_a_file(tmp_path):
    pool, train = splits().train, np.arange(8 * EACH)
    z = np.random.default_rng(0).normal(size=(CLASSES * EACH, 5))
    np.save(tmp_path / "all.npy", z)
    np.savez(tmp_path / "train.npz", z=z[: 8 * EACH])
    for name in ("all.npy", "train.npz"):
        how = Embedding(embedding=str(tmp_path / name), pca=0)
        np.testing.assert_allclose(embedded(pool, how, train, train), z[: 8 * EACH], rtol=1e-6)
    with pytest.raises(DataError, match=r"train.npz must hold 168 rows"):
        embedded(pool, Embedding(embedding=str(tmp_path / "train.npz"), pca=0), train, np.arange(100, 110))
    bad = {
        r"must be numbers \[168, d\].* or \[96, d\].*got float64 of shape \(167, 5\)": z[:-1],
        r"got float64 of shape \(168,\)": z[:, 0],
        r"got float64 of shape \(168, 0\)": z[:, :0],
        "finite": np.full_like(z, np.nan),
    }
    for message, array in bad.items():
        np.save(tmp_path / "bad.npy", array)
        with pytest.raises(DataError, match=message):
            clustered(splits(), **SMALL | {"embedding": str(tmp_path / "bad.npy")})
    np.savez(tmp_path / "two.npz", a=z, b=z)
    for name, message in (("two.npz", "must hold one array"), ("none.npy", "no such file")):
        with pytest.raises(DataError, match=message):
            clustered(splits(), **SMALL | {"embedding": str(tmp_path / name)})


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {"clusters": 97}, r"clusters.clusters must be at most 96, .* got 97"),
        ({}, {"clusters": 40}, r"clusters.clusters must leave more than 75 % .* more than 4 images"),
        ({"train_way": 8}, {"clusters": 4}, r"way must be at most 4, .* got 8 in training"),
        ({"rotations": True}, {}, "tasks.rotations must be false"),
        ({"train_labels": "class"}, {}, "tasks.train_labels must be 'task'"),
        ({}, {"pca": 200}, "clusters.pca must be at most 16"),
        ({}, {"embedding": "pixel"}, "pixels"),
        ({}, {"partition": "kmedians"}, "partition must be"),
        ({}, {"partitions": 0}, "partitions must be"),
    ],
)
def test_clusters_that_cannot_be(given, options, message):
    with pytest.raises(ValueError, match=message):
        clustered(splits(**given), **SMALL | options)


def test_clusters_need_a_pool_of_images():
    from metaprior.tasks import sinusoid

    with pytest.raises(DataError, match="clusters need a pool of images"):
        clustered(sinusoid(), **SMALL)


RECIPE = {
    "name": "clusters", "learner": "maml", "tasks": {"name": "omniglot", "way": 3, "train_way": 5},
    "network": {"name": "mlp", "hidden": [4]}, "likelihood": {"name": "categorical"}, "clusters": SMALL,
}  # fmt: skip


def test_a_recipe_has_clusters_and_hashes_without_them_stay():
    made = build(recipe_from_dict(RECIPE), splits=splits(train_way=5))
    assert clusters_of(made.splits.train) is not None
    assert clusters_of(made.splits.test) is None
    with pytest.raises(ValueError, match=r"clusters.cluster .*clusters"):
        build(with_overrides(recipe_from_dict(RECIPE), None, {"clusters.cluster": 3}), splits=splits())
    plain = recipe_from_dict({name: value for name, value in RECIPE.items() if name != "clusters"})
    assert recipe_hash(plain) == "565b0b7abeb426ff"  # as before the table existed
    assert recipe_hash(recipe_from_dict(RECIPE)) != recipe_hash(plain)
    assert load_recipe("omniglot-cactus").clusters["clusters"] == 500


@pytest.mark.parametrize("name", ["maml", "reptile"])
def test_a_network_with_more_outputs_than_a_task_has_classes_uses_those_that_the_support_shows(name):
    batch = Batch(jax.random.normal(KEY, (6, 3)), jnp.asarray([0, 0, 1, 1, 2, 2]))
    task = Task(batch, batch)
    learner = make_learner(name, mlp(5, (4,)), Categorical(), shown_classes=True, steps=2, rate=0.1)
    params = learner.init(KEY, task)
    p = learner.predict(params, learner.adapt(params, batch, KEY), batch.x, KEY).mean()
    assert p.shape == (6, 5)
    np.testing.assert_allclose(p[:, :3].sum(1), 1, rtol=1e-5)
    assert np.isfinite(learner.loss(params, task, KEY)[0])
    if name == "maml":  # as if the network had these outputs alone
        cut = jax.tree.map(lambda leaf: leaf, params)
        small = make_learner(name, mlp(5, (4,))._replace(apply=lambda w, x, call=None: mlp(5, (4,)).apply(w, x)[:, :3],
                                                         calls=False), Categorical(), steps=2, rate=0.1)  # fmt: skip
        q = small.predict(cut, small.adapt(cut, batch, KEY), batch.x, KEY).mean()
        np.testing.assert_allclose(p[:, :3], q, atol=1e-5)


def test_drawings_normalised_by_their_moments_are_what_tasks_hold():
    from metaprior.core.drawings import ink_of, moment_normalised

    pool = class_pool(images(), [EACH] * CLASSES, way=2, shot=1, query=2)
    normalised = class_pool(images(), [EACH] * CLASSES, way=2, shot=1, query=2, moments=True)
    x, y = (source.sample(KEY, 2).query.x.reshape(-1, 4, 4, 1) for source in (pool, normalised))
    np.testing.assert_allclose(moment_normalised(ink_of(x))[..., None], y, atol=1e-5)
    with pytest.raises(DataError, match="moments must be False for images of several channels"):
        class_pool(np.zeros((4, 4, 4, 3), np.uint8), [2, 2], way=2, shot=1, query=1, moments=True)


def test_the_command_line_trains_on_clusters_and_compares_them(tmp_path, capsys):
    np.savez(tmp_path / "own.npz", images=images(), labels=np.repeat(np.arange(CLASSES), EACH))
    recipe = tmp_path / "own.toml"
    recipe.write_text(
        f'learner = "protonet"\n[tasks]\nname = "images"\npath = "{tmp_path / "own.npz"}"\nway = 2\nshot = 1\n'
        "query = 2\ntest_query = 2\nsize = 4\nchannels = 1\nsplit = [0.6, 0.2, 0.2]\ntrain_way = 3\n"
        '[clusters]\nembedding = "pixels"\npca = 3\nclusters = 8\npartitions = 2\n'
        '[network]\nname = "mlp"\nhidden = [4]\n[likelihood]\nname = "categorical"\n'
        "[training]\nsteps = 1\nmeta_batch = 1\nchunk = 1\nvalidation_tasks = 1\n"
    )
    run_cli("train", recipe, "--out", tmp_path / "run")
    assert "training tasks of clusters: 2 partitions, with" in " ".join(capsys.readouterr().out.split())
    run_cli("study", "clusters", recipe, "--out", tmp_path / "study", "--tasks", 20)
    told = json.loads((tmp_path / "study" / "clusters.json").read_text())
    assert len(told["partitions"]) == 2
    assert told["partitions"][0]["nmi"] > 0.7
    assert told["embedding"]["nearest centroid"]["mean"] > 0.7
    assert "pair precision" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("partition", ["classes", "random"])
def test_training_on_other_than_clusters_is_not_compared_with_published_clusters(partition):
    recipe = load_recipe("omniglot-cactus")
    shown = published_for(recipe, recipe)
    assert not isinstance(shown, str)
    assert shown.figures["accuracy"].mean == 0.6812
    other = with_overrides(recipe, None, {"clusters.partition": partition})
    assert published_for(other, recipe) == f"clusters.partition is '{partition}', the published figure is for 'kmeans'"
