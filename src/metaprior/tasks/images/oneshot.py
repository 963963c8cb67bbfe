"""The official one-shot benchmark of Omniglot: 20 runs of 20-way 1-shot within an alphabet (Lake et al. 2015)."""

import hashlib
import io
import re
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from metaprior.core.drawings import ink_of, moment_normalised
from metaprior.core.options import Count, checked
from metaprior.core.types import Batch, Task
from metaprior.tasks.checks import DataError
from metaprior.tasks.fixed import FixedTasks
from metaprior.tasks.images.omniglot import REPOSITORY, check_size, ink_bytes, read_png
from metaprior.tasks.limits import open_zip
from metaprior.tasks.store import data_folder, download, reading

ARCHIVE = f"{REPOSITORY}/32aee47094f15296299b761dcaa01400b90c60d5/python/one-shot-classification/all_runs.zip"
SHA256 = "437c1eeab0af8484112e1b4cc0f3d541ec727f7c47b9b202da738af9dfd6c325"
# sha256 of the decoded drawings and labels. It does not depend on how the archive is compressed.
CONTENT = "6b10142f1dffc947516e48506057cf1bd70c62985d53877fe7f3fad57bf4b419"

Drawings = Bool[np.ndarray, "runs way h w"]


def one_shot_runs(*, size: int = 28) -> Task:
    """Returns the 20 runs as stacked tasks.

    Train on the split 'lake', because the other splits train on some of these characters. `FixedTasks(one_shot_runs())`
    is the source for `evaluate`. The results of Lake et al. are 95.5 % for humans and 21.7 % for the nearest neighbour.

    Args:
        size: The side of the images in pixels, 1 to 105.

    Returns:
        Support and query x float32 [20, 20, size, size, 1], ink 1 on background 0, and y int32 [20, 20].

    Raises:
        DataError: An archive that is not the official one, or no METAPRIOR_DATA/omniglot/all_runs.zip and no network.
        ValueError: Another size.

    References:
        Lake, Salakhutdinov & Tenenbaum 2015.
    """
    check_size(size)
    path = _local() or download(ARCHIVE, SHA256, "omniglot")
    training, test, labels = read_runs(path)
    digest = hashlib.sha256()
    for array in (training, test, labels.astype("<i4")):
        digest.update(np.ascontiguousarray(array).tobytes())
    if digest.hexdigest() != CONTENT:
        raise DataError(f"{path}: its drawings are not those of the official runs. Delete it and download it again.")
    ways = np.broadcast_to(np.arange(labels.shape[1], dtype=np.int32), labels.shape)
    return Task(Batch(_scaled(training, size), jnp.asarray(ways)), Batch(_scaled(test, size), jnp.asarray(labels)))


@checked
def one_shot_source(*, size: Count = 28, moments: bool = False) -> FixedTasks:
    """Returns the 20 runs as a task source.

    Args:
        size: As in `one_shot_runs`.
        moments: Whether position and size of each drawing are normalised, as in `omniglot`.

    Raises:
        DataError: As in `one_shot_runs`.
        ValueError: As in `one_shot_runs`.
    """
    runs = one_shot_runs(size=size)
    return FixedTasks(Task(*map(_normalised, runs)) if moments else runs)


def _normalised(batch: Batch) -> Batch:
    flat = batch.x.reshape(-1, *batch.x.shape[2:])
    return batch._replace(x=moment_normalised(ink_of(flat)).reshape(batch.x.shape))


def _local() -> Path | None:
    folder = data_folder("omniglot")
    candidates = [folder / name for name in ("one_shot_runs.zip", "all_runs.zip")] if folder else []
    return next((path for path in candidates if path.is_file()), None)


def _scaled(paper: Drawings, size: int) -> jnp.ndarray:
    side = paper.shape[-1]
    ink = ink_bytes(paper.reshape(-1, side, side), size).reshape(*paper.shape[:2], size, size, 1)
    return jnp.asarray(ink, jnp.float32) / 255


def read_runs(path: Path) -> tuple[Drawings, Drawings, Int[np.ndarray, "runs way"]]:
    """Reads the drawings and labels of all runs.

    Args:
        path: An archive of runNN/training/classMM.png, runNN/test/itemMM.png and runNN/class_labels.txt. Each line of
            the last pairs a test file with the training file of the same character.

    Returns:
        Training drawings and test drawings (True for paper), and the labels of the test drawings, run by run.

    Raises:
        DataError: A damaged archive, or another one.
    """
    with reading(path), open_zip(path) as archive:
        listings = sorted(name for name in archive.namelist() if re.search(r"run\d+/class_labels\.txt$", name))
        if not listings:
            raise DataError(f"{path} must be the official runs, got no runNN/class_labels.txt. Download it again.")
        runs = [_read_run(archive, listing) for listing in listings]
        training, test, labels = (np.stack(part) for part in zip(*runs, strict=True))
        return training, test, labels


def _read_run(archive: zipfile.ZipFile, listing: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    root = listing.removesuffix("class_labels.txt").rsplit("run", 1)[0]
    pairs = [line.split() for line in io.TextIOWrapper(archive.open(listing), "utf-8") if line.strip()]
    training = sorted({right for _, right in pairs})
    place = {name: i for i, name in enumerate(training)}
    test = sorted(pairs)
    drawings = [np.stack([read_png(archive.read(root + name)) for name in names])
                for names in (training, [left for left, _ in test])]  # fmt: skip
    return drawings[0], drawings[1], np.asarray([place[right] for _, right in test], np.int32)
