"""Pictures by class from folders, archives and NPZ files, and the readers for one task's examples."""

import csv
import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import metaprior as mp
from metaprior.core.types import Splits
from metaprior.tasks import DataError, augmented, class_pool, images, miniimagenet, read_examples
from metaprior.tasks.examples import check_same_form
from metaprior.tasks.images.decoding import decode_pictures, find_pictures
from scenarios import run_cli

COUNTS = {"ant": 4, "bee": 6, "cat": 5, "dog": 4, "elk": 4, "fox": 4}
SPLIT = (("ant", "bee"), ("cat", "dog"), ("elk", "fox"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAPRIOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(c, i):
    """8 x 8 colour: class in red, example in green."""
    return np.broadcast_to(np.asarray([10 * c, 10 * i, 7], np.uint8), (8, 8, 3))


def png(array):
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(file, "PNG")
    return file.getvalue()


def members(prefix=""):
    return {f"{prefix}{name}/{i}.png": png(picture(c, i))
            for c, (name, count) in enumerate(COUNTS.items()) for i in range(count)}  # fmt: skip


@pytest.fixture(params=["folder", "zip", "tar.gz", "npz"])
def source(request, tmp_path):
    path = tmp_path / f"animals.{request.param}"
    if request.param == "folder":
        for name, data in members().items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        (path / "notes.txt").write_text("not a picture")
    elif request.param == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members("animals/").items():
                archive.writestr(name, data)
            archive.writestr("__MACOSX/animals/ant/._0.png", b"debris")
    elif request.param == "tar.gz":
        with tarfile.open(path, "w:gz") as archive:
            for name, data in members("./animals/").items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        pairs = [(name, picture(c, i)) for c, (name, n) in enumerate(COUNTS.items()) for i in range(n)]
        np.savez(path, images=np.stack([p for _, p in pairs]), labels=np.asarray([name for name, _ in pairs]))
    return path


@pytest.mark.slow
def test_every_form_gives_the_same_episodes(source, cache):
    for _ in range(2):
        splits = images(path=source, way=2, shot=1, query=3, test_query=2, size=8, split=SPLIT)
        for part, (classes, query) in enumerate((((0, 1), 3), ((2, 3), 2), ((4, 5), 2))):
            task = splits[part].sample(jax.random.key(0), 4)
            assert task.query.x.shape == (4, 2 * query, 8, 8, 3)
            pixels = np.rint(np.concatenate([task.support.x, task.query.x], 1) * 255).astype(int)
            assert set((pixels[..., 0, 0, 0] // 10).ravel()) == set(classes)
            for episode in pixels[..., 0, 0, :2]:
                assert len({tuple(row) for row in episode}) == 2 * (1 + query)
    assert len(list(cache.glob("images-*"))) == 1


@pytest.mark.slow
def test_folders_name_the_split(tmp_path):
    for part, name in (("train", "ant"), ("train", "bee"), ("val", "cat"), ("val", "dog"), ("test", "elk"),
                       ("test", "fox")):  # fmt: skip
        folder = tmp_path / "set" / part / name
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"{i}.png").write_bytes(png(picture(list(COUNTS).index(name), i)))
    splits = images(path=tmp_path / "set", way=2, shot=1, query=2, test_query=2, size=8)
    red = [set(np.rint(s.sample(jax.random.key(0), 3).query.x[..., 0, 0, 0] * 255).ravel() // 10) for s in splits]
    assert red == [{0, 1}, {2, 3}, {4, 5}]


@pytest.mark.slow
def test_resizing_grey_and_normalising(source):
    splits = images(
        path=source, way=2, shot=1, query=3, test_query=2, size=(4, 6), channels=1, split=SPLIT, normalise=True
    )
    x = splits.train.sample(jax.random.key(0), 50).query.x
    assert x.shape == (50, 6, 4, 6, 1)
    assert abs(float(x.mean())) < 0.3
    assert 0.7 < float(x.std()) < 1.3


def test_fractions_are_seeded_and_disjoint(source):
    def parts(seed):
        thirds = (1 / 3, 1 / 3, 1 / 3)
        splits = images(path=source, way=2, shot=1, query=3, test_query=2, size=8, split=thirds, seed=seed)
        return [tuple(np.asarray(s.classes)) for s in splits]

    assert parts(0) == parts(0)
    assert len({tuple(map(tuple, parts(seed))) for seed in range(4)}) > 1
    assert sorted(sum(parts(1), ())) == list(range(6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"way": 3}, "way must be at most 2, the number of classes of this split, got 3"),
        ({"query": 4}, r"shot \+ query must be at most 4, the number of images of class ant, got 1 \+ 4"),
        ({"split": (("ant", "gnu"), ("cat",), ("dog",))}, "unknown class 'gnu'"),
        ({"split": (("ant", "bee"), ("bee", "cat"), ("dog",))}, "class 'bee' twice"),
        ({"split": (0.5, 0.5)}, r"split must be three parts \(training, validation, test\), got 2"),
        ({"split": (0.5, 0.2, 0.2)}, "three fractions of at least 0 that sum to 1"),
        ({"split": (1.0, 0.0, 0.0)}, "at least one group in each part, got 6 / 0 / 0"),
        ({"size": 0}, "size must be"),
        ({"channels": 2}, "channels must be .*, got 2"),
    ],
)
def test_bad_options(tmp_path, options, words):
    for name, data in members().items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    with pytest.raises(ValueError, match=words):
        images(**{"path": tmp_path / "set", "way": 2, "query": 3, "test_query": 2, "size": 8, "split": SPLIT} | options)


def test_drop_small_leaves_classes_out(tmp_path):
    for name, data in members().items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    splits = images(
        path=tmp_path / "set", way=2, query=4, test_query=3, size=8, drop_small=True,
        split=(("ant", "bee", "cat"), ("dog", "elk"), ("fox",)), test_rotations=True,
    )  # fmt: skip
    assert splits.train.classes.tolist() == [1, 2]


def test_files_copied_anew_share_what_was_decoded(source, cache):
    options = {"path": source, "way": 2, "query": 2, "test_query": 2, "size": 8, "split": SPLIT}
    images(**options)
    for file in [source, *source.rglob("*")]:
        os.utime(file, (1, 1))
    images(**options)
    copies = sorted(cache.glob("images-*/images.npy"))
    assert len(copies) == 2
    assert copies[0].samefile(copies[1])
    # A damaged copy is not built upon: both are damaged, and each is decoded again when it is next asked for.
    copies[0].write_bytes(b"\0" * copies[0].stat().st_size)
    with pytest.warns(UserWarning, match="The cached copy is rebuilt"):
        decoded = images(**options).train.images
    assert decoded.max() > 0
    assert not copies[0].samefile(copies[1])


def test_nothing_damaged_or_absent(tmp_path, source):
    with pytest.raises(DataError, match=r"path must be .*absent, which does not exist"):
        images(path=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="got no pictures"):
        images(path=tmp_path / "empty")
    if source.is_dir():
        file = source / "cat" / "1.png"
        file.write_bytes(file.read_bytes()[:40])
        with pytest.raises(DataError, match=r"cat/1.png cannot be decoded .* Delete it"):
            images(path=source, size=8)
    else:
        source.write_bytes(source.read_bytes()[:200])
        with pytest.raises(DataError, match=rf"{source.name} .*truncated.*Delete it"):
            images(path=source, size=8)


def test_read_examples_of_labelled_folders_and_flat_queries(tmp_path):
    for name, data in members().items():
        (tmp_path / "support" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "support" / name).write_bytes(data)
    support = read_examples(tmp_path / "support", size=4)
    assert support.x.shape == (27, 4, 4, 3)
    assert support.labels is not None
    assert support.labels[:5] == ["ant"] * 4 + ["bee"]
    assert support.names[0] == "ant/0.png"
    query = read_examples(tmp_path / "support" / "bee", labelled=False)
    assert (query.labels, query.x.shape, query.names[1]) == (None, (6, 8, 8, 3), "1.png")
    single = read_examples(tmp_path / "support" / "bee" / "2.png", labelled=False, channels=1, invert=True)
    assert single.x.shape == (1, 8, 8, 1)
    assert single.x.min() > 0.9
    with pytest.raises(DataError, match="must have labels, got examples without labels"):
        read_examples(tmp_path / "support" / "bee")
    with pytest.raises(DataError, match=r"query must have .* of the support's shape \(4, 4, 3\), got \(8, 8, 3\)"):
        check_same_form(support.x, query.x)
    check_same_form(support.x, support.x[:1])
    with pytest.raises(DataError, match="no such file or folder"):
        read_examples(tmp_path / "absent")


def test_read_examples_of_one_class_folder(tmp_path):
    (tmp_path / "support" / "ant").mkdir(parents=True)
    (tmp_path / "support" / "ant" / "0.png").write_bytes(png(picture(0, 0)))
    assert read_examples(tmp_path / "support").labels == ["ant"]


def test_read_examples_of_tables(tmp_path):
    (tmp_path / "s.csv").write_text("a,b,label\n1,x,yes\n2,y,no\n")
    support = read_examples(tmp_path / "s.csv")
    assert support.labels == ["yes", "no"]
    np.testing.assert_array_equal(support.x, [[1, 1, 0], [2, 0, 1]])
    (tmp_path / "q.csv").write_text("a,b\n1,2\n3,4\n")
    assert read_examples(tmp_path / "q.csv", labelled=False).labels is None
    with pytest.raises(DataError, match="without labels"):
        read_examples(tmp_path / "q.csv")
    assert read_examples(tmp_path / "q.csv", target="b").labels == [2, 4]
    np.savez(tmp_path / "s.npz", x=np.ones((3, 2)), y=np.asarray([5, 5, 9]))
    support = read_examples(tmp_path / "s.npz")
    assert (support.x.shape, support.labels) == ((3, 2), [5, 5, 9])
    np.savez(tmp_path / "nan.npz", x=np.asarray([[1.0, np.nan]]), y=np.ones(1))
    with pytest.raises(DataError, match=r"NaN or infinity in row 0, column \[1\]"):
        read_examples(tmp_path / "nan.npz")
    (tmp_path / "nan.csv").write_text("a,b,label\n1,2,yes\n,3,no\n")
    with pytest.raises(DataError, match="column 'a', row 1"):
        read_examples(tmp_path / "nan.csv")


def test_miniimagenet_needs_data(monkeypatch, tmp_path):
    monkeypatch.setenv("METAPRIOR_DATA", str(tmp_path))
    with pytest.raises(DataError, match="METAPRIOR_DATA has no folder miniimagenet"):
        miniimagenet()


REAL = Path(os.environ.get("METAPRIOR_DATA", "/nowhere"), "miniimagenet")


@pytest.mark.skipif(not REAL.is_dir(), reason="METAPRIOR_DATA has no folder miniimagenet")
@pytest.mark.slow
def test_miniimagenet_is_the_published_benchmark():
    found = find_pictures(REAL)
    assert len(found) == 60_000
    parts = {part: {p.group for p in found if p.group.startswith(part)} for part in ("train/", "val/", "test/")}
    assert [len(groups) for groups in parts.values()] == [64, 16, 20]
    wnids = [{group.split("/")[1] for group in groups} for groups in parts.values()]
    assert sum(map(len, wnids)) == len(set.union(*wnids)) == 100
    some = found[::20_000]
    with np.load(REAL / "train.npz") as file:
        first = file["jpeg"][: file["offsets"][1]].tobytes()
    decoded = decode_pictures(some, (84, 84), 3)
    np.testing.assert_array_equal(decoded[0], np.asarray(Image.open(io.BytesIO(first)).convert("RGB")))


def pictures(folder, rng, shape=(8, 8)):
    """9 classes of 6 grey pictures, each class of a brightness of its own."""
    for c in range(9):
        (folder / f"c{c}").mkdir(parents=True)
        for i in range(6):
            level = 20 + 25 * c + rng.integers(-4, 5, shape)
            Image.fromarray(level.astype(np.uint8)).save(folder / f"c{c}" / f"{i}.png")
    return folder


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("size", ["8", "[8, 16]"])
def test_adapt_shows_pictures_as_training_did(tmp_path, size):
    """Normalised, and of the same size: prototypes of the pictures themselves, computed by hand."""
    shape = (8, 8) if size == "8" else (8, 16)
    folder = pictures(tmp_path / "pics", np.random.default_rng(0), shape)
    recipe = tmp_path / "own.toml"
    recipe.write_text(
        f'learner = "nearest_neighbour"\n[tasks]\nname = "images"\npath = "{folder}"\nway = 2\nshot = 2\nquery = 2\n'
        f"test_query = 2\nsize = {size}\nchannels = 1\nsplit = [0.4, 0.3, 0.3]\nnormalise = true\n"
        '[network]\nname = "mlp"\nhidden = [4]\n[likelihood]\nname = "categorical"\n'
        '[learners.nearest_neighbour]\non = "pixels"\ndistance = "euclidean"\n'
        "[training]\nsteps = 1\nmeta_batch = 1\nchunk = 1\nvalidation_tasks = 1\n"
    )
    run_cli("train", recipe, "--out", tmp_path / "run")
    support = tmp_path / "support"
    for c in (0, 8):
        shutil.copytree(folder / f"c{c}", support / f"c{c}")
    out = tmp_path / "told.csv"
    run_cli("adapt", tmp_path / "run", "--support", support, "--query", folder / "c1" / "0.png", "--out", out)
    told = next(csv.DictReader(out.open()))
    run = mp.load(tmp_path / "run")
    pool = run.splits.train
    assert float(pool.deviation[0]) != 1

    def image(path):
        return (np.asarray(Image.open(path), np.float32)[..., None] / 255 - np.asarray(pool.mean)) / pool.deviation

    x = jnp.stack([image(support / c / f"{i}.png") for c in ("c0", "c8") for i in range(6)])
    batch = mp.Batch(x, jnp.repeat(jnp.arange(2), 6))
    posterior = run.learner.adapt(run.params, batch, jax.random.key(0))
    query = image(folder / "c1" / "0.png")[None]
    p = run.learner.predict(run.params, posterior, jnp.asarray(query), jax.random.key(0)).mean()[0]
    np.testing.assert_allclose([float(told["p(c0)"]), float(told["p(c8)"])], p, atol=1e-4)


@pytest.mark.slow
def test_augmentation_changes_pictures_in_0_to_1_before_they_are_normalised():
    """A border of a crop is black, and brighter is brighter, whatever the mean and deviation."""
    raw = np.full((8, 6, 6, 1), 128, np.uint8)
    options = {"way": 2, "shot": 1, "query": 1}
    plain, normal = (class_pool(raw, [4, 4], **options, **more) for more in ({}, {"mean": 0.4, "deviation": 0.2}))
    for change in ({"crop": 2}, {"jitter": 0.4}):
        one, other = (augmented(Splits(p, p, p), **change).train.sample(jax.random.key(0), 3) for p in (plain, normal))
        np.testing.assert_allclose(other.support.x, (one.support.x - 0.4) / 0.2, rtol=1e-4, atol=1e-5)
