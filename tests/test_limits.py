"""Files of unknown origin: nothing that expands out of all proportion, claims any size, or is no regular file."""

import gzip
import io
import os
import tarfile
import zipfile
from functools import partial

import numpy as np
import pytest
from PIL import Image

from metaprior.tasks import limits, read_examples, read_texts
from metaprior.tasks.checks import DataError
from metaprior.tasks.images.decoding import decode_picture, find_pictures
from metaprior.tasks.images.folders import images
from metaprior.tasks.tables.table import read_columns, table


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(limits, "TOTAL_BYTES", 10_000)
    monkeypatch.setattr(limits, "FILE_BYTES", 2_000)
    monkeypatch.setattr(limits, "PIXELS", 400)


def picture(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "png")
    return file.getvalue()


def test_an_archive_that_expands_a_thousandfold_is_refused(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/notes.txt", bytes(300_000))
        archive.writestr("a/1.png", picture(4))
    with pytest.raises(DataError, match=r"bomb\.zip expands from .* more than 20 times"):
        find_pictures(path)


def test_arrays_that_expand_a_thousandfold_are_refused_and_uncompressed_ones_read(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((100, 60, 60), np.uint8))
    np.savez(tmp_path / "plain.npz", images=np.zeros((100, 10, 10), np.uint8))
    for read in (find_pictures, read_columns, read_examples):
        with pytest.raises(DataError, match=r"bomb\.npz expands"):
            read(tmp_path / "bomb.npz")
    assert len(find_pictures(tmp_path / "plain.npz")) == 100


def test_an_array_that_claims_more_than_its_file_holds_is_refused_before_memory_is_taken(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(80))
    with pytest.raises(DataError, match=r"x\.npy claims 8000000000000 bytes, but the file holds"):
        read_columns(tmp_path / "lie.npz")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_larger_than_a_picture_can_be_is_refused(kind, tmp_path):
    path, data = tmp_path / f"large.{kind}", np.random.default_rng(0).bytes(3_000)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/1.png", data)
    else:
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo("a/1.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(DataError, match=r"a/1\.png has .* more than the limit"):
        find_pictures(path)


def test_a_packed_text_that_expands_a_thousandfold_is_refused(tmp_path):
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"word " * 100_000))
    with pytest.raises(DataError, match=r"bomb\.txt\.gz expands"):
        read_texts(tmp_path / "bomb.txt.gz", labelled=False)


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path):
    (tmp_path / "wide.png").write_bytes(picture(30))
    with pytest.raises(DataError, match=r"wide\.png has 30 x 30 pixels, more than the limit"):
        decode_picture(find_pictures(tmp_path / "wide.png")[0], None, 1)


@pytest.mark.parametrize(
    ("name", "read"),
    [("x.png", read_examples), ("x.npz", read_examples), ("x.zip", read_examples), ("x.txt", read_texts),
     ("x.csv", partial(table, target="y", group="g"))],
)  # fmt: skip
def test_a_pipe_is_refused_and_not_waited_for(name, read, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="must be a regular file or a folder"):
        read(tmp_path / name)


def test_a_pipe_among_pictures_by_class_is_refused(tmp_path, own_cache):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "1.png").write_bytes(picture(4))
    os.mkfifo(tmp_path / "data" / "a" / "2.png")
    with pytest.raises(DataError, match=r"2\.png must be a regular file"):
        images(path=tmp_path / "data", size=4, channels=1)
