"""Omniglot: the decoder on a small archive made here, the splits, damaged files, and the real data where present."""

import csv
import hashlib
import importlib
import io
import os
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from metaprior.tasks import DataError, omniglot, one_shot_runs, one_shot_source
from metaprior.tasks.images.omniglot import ARCHIVES, character_split, ink_bytes, load_omniglot, read_drawings, read_zip
from metaprior.tasks.images.oneshot import read_runs

# The package's name `omniglot` is the factory, not its module.
MODULE = importlib.import_module("metaprior.tasks.images.omniglot")
REAL = Path(os.environ.get("METAPRIOR_DATA", "/nowhere"), "omniglot")
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="METAPRIOR_DATA has no folder omniglot")


def png(paper):
    file = io.BytesIO()
    Image.fromarray(paper).convert("1").save(file, "PNG")
    return file.getvalue()


def write_archive(path, paper):
    """The layout of the official archives, in the order of alphabets, not of numbers, and with a Mac's debris."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/images_background/._0001_01.png", b"debris")
        for c in reversed(range(paper.shape[0])):
            for d in range(paper.shape[1]):
                name = f"{path.stem}/Alphabet_{c % 2}/character{c // 2 + 1:02d}/{c + 1:04d}_{d + 1:02d}.png"
                archive.writestr(name, png(paper[c, d]))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A tiny Omniglot of 6 + 4 characters in METAPRIOR_DATA, as archives; returns its drawings."""
    paper = np.random.default_rng(0).random((10, 20, 105, 105)) > 0.2
    folder = tmp_path / "data" / "omniglot"
    folder.mkdir(parents=True)
    write_archive(folder / "images_background.zip", paper[:6])
    write_archive(folder / "images_evaluation.zip", paper[6:])
    for name, characters in (("images_background", 6), ("images_evaluation", 4)):
        monkeypatch.setitem(ARCHIVES, name, (characters, ARCHIVES[name][1]))
    monkeypatch.setenv("METAPRIOR_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("METAPRIOR_CACHE", str(tmp_path / "cache"))
    return paper


def test_archive_decodes_to_the_very_arrays(small, tmp_path):
    folder = tmp_path / "data" / "omniglot"
    np.testing.assert_array_equal(read_zip(folder / "images_background.zip"), small[:6])
    from_zip = load_omniglot(28)
    for name, part in (("images_background", small[:6]), ("images_evaluation", small[6:])):
        np.savez_compressed(folder / f"{name}.npz", images=part)
        (folder / f"{name}.zip").unlink()
    from_npz = load_omniglot(28)
    np.testing.assert_array_equal(from_zip, from_npz)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_ink_is_the_exact_share_of_area():
    paper = np.ones((1, 105, 105), bool)
    paper[0, :7, :3] = False
    reduced = ink_bytes(paper, 28)[0] / 255
    # A cell is 3.75 pixels wide: 3 of 3.75 columns are inked; rows 0-3.75 fully, 3.75-7 for 3.25 of 3.75.
    np.testing.assert_allclose(reduced[0, 0], 3 / 3.75, atol=1 / 255)
    np.testing.assert_allclose(reduced[1, 0], 3 / 3.75 * 3.25 / 3.75, atol=1 / 255)
    assert reduced[2:].max() == reduced[:, 1:].max() == 0
    np.testing.assert_array_equal(ink_bytes(paper, 105)[0], np.where(paper[0], 0, 255))


def test_cache_is_used_checked_and_made_anew(small, tmp_path, monkeypatch):
    first = np.array(load_omniglot(28))
    with monkeypatch.context() as patch:
        patch.setattr(MODULE, "read_drawings", None)
        np.testing.assert_array_equal(load_omniglot(28), first)
    (array,) = (tmp_path / "cache").glob("omniglot-28-*/images.npy")
    for damage in (lambda data: data[:-10], lambda data: data[:-1] + bytes([data[-1] ^ 1])):
        array.write_bytes(damage(array.read_bytes()))
        with pytest.warns(UserWarning, match="The cached copy is rebuilt"):
            np.testing.assert_array_equal(load_omniglot(28), first)
    assert not list((tmp_path / "cache").glob(".partial*"))


def test_a_cache_that_cannot_be_written_is_no_obstacle(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("METAPRIOR_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot store the decoded data"):
        assert load_omniglot(28).shape == (200, 28, 28, 1)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_truncated_archives_name_the_file_and_the_fix(small, tmp_path, keep):
    path = tmp_path / "data" / "omniglot" / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"images_evaluation.zip is corrupt or truncated .* Delete it"):
        load_omniglot(28)
    with pytest.raises(DataError, match="no such file"):
        read_drawings(tmp_path / "absent.npz", 4)


def test_flipped_byte_and_missing_drawings(small, tmp_path):
    path = tmp_path / "data" / "omniglot" / "images_evaluation.zip"
    data = bytearray(path.read_bytes())
    data[5000] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"images_evaluation.zip is corrupt or truncated"):
        load_omniglot(28)
    write_archive(path, small[6:9])
    with pytest.raises(DataError, match=r"must hold drawings of shape \(4, 20, 105, 105\), got \(3, 20"):
        load_omniglot(28)
    np.savez(path.with_suffix(".npz"), pictures=small[6:])
    with pytest.raises(DataError, match="must hold the arrays images, got pictures"):
        load_omniglot(28)


@pytest.fixture
def server(tmp_path):
    """A local web server on tmp_path/web."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{httpd.server_port}/"
    httpd.shutdown()
    thread.join()


def test_download(small, tmp_path, server, monkeypatch):
    folder, address = server
    monkeypatch.setattr(MODULE, "SOURCE", address)
    local = load_omniglot(28)
    for name in ARCHIVES:
        data = (tmp_path / "data" / "omniglot" / f"{name}.zip").read_bytes()
        (folder / f"{name}.zip").write_bytes(data)
        monkeypatch.setitem(ARCHIVES, name, (ARCHIVES[name][0], hashlib.sha256(data).hexdigest()))
    monkeypatch.delenv("METAPRIOR_DATA")
    np.testing.assert_array_equal(load_omniglot(28), local)
    # A file that is not the official one is refused and not kept.
    monkeypatch.setenv("METAPRIOR_CACHE", str(tmp_path / "other"))
    (folder / "images_background.zip").write_bytes(b"an error page")
    with pytest.raises(DataError, match="is not the official one"):
        load_omniglot(28)
    assert not list((tmp_path / "other").rglob("*.zip"))


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.delenv("METAPRIOR_DATA", raising=False)
    monkeypatch.setenv("METAPRIOR_CACHE", str(tmp_path))
    monkeypatch.setattr(MODULE, "SOURCE", "http://127.0.0.1:9/")
    with pytest.raises(DataError, match=r"cannot download .* Check the network .* METAPRIOR_DATA"):
        omniglot()


@pytest.mark.parametrize(("split", "sizes"), [("vinyals", (1028, 172, 423)), ("maml", (1100, 100, 423)),
                                              ("lake", (792, 172, 659))])  # fmt: skip
def test_splits(split, sizes):
    parts = character_split(split, seed=3)
    assert tuple(map(len, parts)) == sizes
    assert len(np.unique(np.concatenate(parts))) == 1623
    if split == "maml":
        assert not np.array_equal(parts[0], character_split(split, seed=4)[0])
        np.testing.assert_array_equal(parts[0], character_split(split, seed=3)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "vinyal"}, "split must be"),
        ({"size": 106}, "size must be 1 to 105 pixels, got 106"),
        (
            {"shot": 6, "query": 15},
            r"shot \+ query must be at most 20, .* of class 0001, got 6 \+ 15",
        ),
    ],
)
@needs_data
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        omniglot(**options)


@needs_data
def test_vinyals_split_is_the_index():
    with open(REAL / "index.csv") as file:
        rows = list(csv.DictReader(file))
    for part, name in zip(character_split("vinyals"), ("train", "val", "test"), strict=True):
        np.testing.assert_array_equal(part, [int(r["code"]) - 1 for r in rows if r["vinyals_split"] == name])
    lake = character_split("lake")
    np.testing.assert_array_equal(lake[2], [int(r["code"]) - 1 for r in rows if r["set"] == "evaluation"])


@needs_data
@pytest.mark.parametrize("split", ["vinyals", "maml", "lake"])
@pytest.mark.slow
def test_real_episodes(split):
    splits = omniglot(way=20, shot=1, query=1, test_query=15, split=split)
    classes = [set(np.asarray(source.classes).tolist()) for source in splits]
    assert sum(map(len, classes)) == len(set.union(*classes)) == 1623
    task = splits.test.sample(jax.random.key(0), 2)
    assert task.query.x.shape == (2, 300, 28, 28, 1)
    assert 0 <= task.query.x.min() < task.query.x.max() <= 1
    # Ink is the rare colour.
    assert 0.02 < float(task.query.x.mean()) < 0.2


@needs_data
def test_one_shot_runs():
    runs = one_shot_runs()
    assert runs.support.x.shape == runs.query.x.shape == (20, 20, 28, 28, 1)
    for labels in np.asarray(runs.query.y):
        assert sorted(labels) == list(range(20))
    assert runs.query.y[0, :3].tolist() == [7, 8, 1]
    # Each drawing is one of the evaluation set's, and a test item shows the character of its label.
    pool = load_omniglot(28)[964 * 20 :].reshape(-1, 784)
    which = {row.tobytes(): i // 20 for i, row in enumerate(pool)}

    def characters(x):
        return [[which[np.rint(np.asarray(v) * 255).astype(np.uint8).tobytes()] for v in run] for run in x]

    support, query = characters(runs.support.x), characters(runs.query.x)
    for s, q, y in zip(support, query, np.asarray(runs.query.y), strict=True):
        assert [s[label] for label in y] == q
    assert one_shot_source().sample(jax.random.key(0), 20).query.y.shape == (20, 20)


def test_runs_of_a_small_archive(tmp_path, monkeypatch):
    paper = np.random.default_rng(1).random((2, 2, 3, 105, 105)) > 0.3
    path = tmp_path / "omniglot" / "all_runs.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for r in range(2):
            for i in range(3):
                archive.writestr(f"all_runs/run0{r + 1}/training/class0{i + 1}.png", png(paper[r, 0, i]))
                archive.writestr(f"all_runs/run0{r + 1}/test/item0{i + 1}.png", png(paper[r, 1, i]))
            names = [(f"test/item0{i + 1}.png", f"training/class0{(i + r) % 3 + 1}.png") for i in range(3)]
            lines = [f"run0{r + 1}/{item} run0{r + 1}/{character}" for item, character in names]
            archive.writestr(f"all_runs/run0{r + 1}/class_labels.txt", "\n".join(lines) + "\n")
    training, test, labels = read_runs(path)
    np.testing.assert_array_equal(training, paper[:, 0])
    np.testing.assert_array_equal(test, paper[:, 1])
    assert labels.tolist() == [[0, 1, 2], [1, 2, 0]]
    monkeypatch.setenv("METAPRIOR_DATA", str(tmp_path))
    with pytest.raises(DataError, match="not those of the official runs"):
        one_shot_runs()
