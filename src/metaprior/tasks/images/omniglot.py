"""Omniglot: 1623 characters of 50 alphabets, 20 drawings each.

The data are read from METAPRIOR_DATA/omniglot (`images_*.npz`, or the official `images_*.zip`), or else downloaded.
Drawings become uint8 with ink 255 on background 0, reduced from 105 x 105 pixels by exact area averaging.

References:
    Lake, Salakhutdinov & Tenenbaum 2015.
"""

import io
import re
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8

from metaprior.core.extras import extra
from metaprior.core.options import Count, Seed, Way, checked
from metaprior.core.types import Splits
from metaprior.tasks.checks import DataError
from metaprior.tasks.drawing import Labels
from metaprior.tasks.limits import open_zip
from metaprior.tasks.pool import pool_splits
from metaprior.tasks.store import Arrays, cached, data_folder, download, read_npz, reading, stamp

REPOSITORY = "https://github.com/brendenlake/omniglot/raw"
SOURCE = f"{REPOSITORY}/master/python/"

# The official archives: number of characters and sha256 (as published by TensorFlow Datasets).
ARCHIVES = {
    "images_background": (964, "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"),
    "images_evaluation": (659, "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"),
}
DRAWERS = 20
SIDE = 105

# The split of Vinyals et al. 2016, as used by Snell et al. 2017, by official character number (1-based, inclusive).
# Validation holds whole alphabets of the background set. Test holds the last 423 characters.
VINYALS_VALIDATION = ((27, 67), (132, 177), (251, 272), (466, 487), (729, 769))
VINYALS_TEST = (1201, 1623)


@checked
def omniglot(
    *,
    way: Way = 5,
    shot: Count = 1,
    query: Count = 15,
    test_query: Count = 15,
    train_way: Way | None = None,
    train_labels: Labels = "task",
    split: Literal["vinyals", "maml", "lake"] = "vinyals",
    rotations: bool = True,
    test_rotations: bool = True,
    size: Count = 28,
    seed: Seed = 0,
    moments: bool = False,
) -> Splits:
    """Makes few-shot classification tasks of characters: x float32 [n, size, size, 1], y int32 [n].

    Ink is 1 and the background 0.

    Args:
        way: Classes per task.
        shot: Support examples per class.
        query: Query examples per class in training.
        test_query: Query examples per class in validation and test.
        train_way: Classes per task in training. By default `way`; Snell et al. 2017 train with more classes than they
            test with.
        train_labels: The labels of training tasks: 'task' for the place of the class in the task, which is random;
            'class' for the number of the class among the training classes, for learners that are pretrained by plain
            classification; or 'slot' for one of 0..train_way-1 that the class keeps in all tasks, so that a network
            can memorise the labels (Yin et al. 2020). Validation and test tasks always have newly assigned labels.
        split: 'vinyals' (1028 / 172 / 423 characters); 'maml' (1100 / 100 / 423 at random by `seed`); or 'lake' (the
            background set without the validation alphabets of Vinyals et al., those alphabets, and the evaluation set).
            Use 'lake' before `one_shot_runs`, because the other two train on characters of its runs.
        rotations: Whether characters rotated by 90, 180 and 270 degrees are separate classes in training.
        test_rotations: The same in validation and test, as in the published protocols.
        size: The side of the images in pixels, at most 105.
        seed: The seed of the split 'maml'.
        moments: Whether position and size of each drawing are normalised by the moments of its ink, see
            `core.drawings.moment_normalised`. Published figures are of drawings as they are.

    Returns:
        Tasks of the training, validation and test characters.

    Raises:
        DataError: Damaged or absent data, no network, or fewer examples than shot + query.
        ValueError: Options out of range.

    References:
        Lake, Salakhutdinov & Tenenbaum 2015; the splits are those of Vinyals et al. 2016 and Finn, Abbeel & Levine
            2017.
    """
    parts = character_split(split, seed)
    images = load_omniglot(size)
    counts = np.full(len(images) // DRAWERS, DRAWERS)
    return pool_splits(
        images, counts, parts, way=way, shot=shot, query=query, test_query=test_query, rotations=rotations,
        test_rotations=test_rotations, train_way=train_way, train_labels=train_labels,
        names=[f"{code:04d}" for code in range(1, len(counts) + 1)], moments=moments,
    )  # fmt: skip


def character_split(split: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the characters of training, validation and test.

    Args:
        split: 'vinyals', 'maml' or 'lake'; see `omniglot`.
        seed: The seed of 'maml'.

    Returns:
        Three arrays of indices: official numbers less 1.

    Raises:
        ValueError: Another split.
    """
    total = sum(characters for characters, _ in ARCHIVES.values())
    if split == "maml":
        order = np.random.default_rng(seed).permutation(total)
        return order[:1100], order[1100:1200], order[1200:]
    if split not in ("vinyals", "lake"):
        raise ValueError(f"split must be 'vinyals', 'maml' or 'lake', got {split!r}.")
    validation = np.concatenate([np.arange(first - 1, last) for first, last in VINYALS_VALIDATION])
    background = ARCHIVES["images_background"][0]
    first_test = background if split == "lake" else VINYALS_TEST[0] - 1
    return np.setdiff1d(np.arange(first_test), validation), validation, np.arange(first_test, total)


def load_omniglot(size: int = 28) -> UInt8[np.ndarray, "32460 size size 1"]:
    """Returns all drawings; they are decoded once, and later calls memory-map them from the cache.

    Args:
        size: The side in pixels, 1 to 105.

    Returns:
        uint8 [32460, size, size, 1], ink 255 on background 0, in the order (character, drawer).

    Raises:
        DataError: Damaged data, or no data and no network.
        ValueError: Another size.
    """
    check_size(size)
    folder = data_folder("omniglot")
    local = {name: _local(folder, name) for name in ARCHIVES}

    def build() -> Arrays:
        parts = []
        for name, (characters, sha256) in ARCHIVES.items():
            path = local[name] or download(f"{SOURCE}{name}.zip", sha256, "omniglot")
            paper = read_drawings(path, characters)
            parts.append(ink_bytes(paper.reshape(-1, SIDE, SIDE), size))
        return {"images": np.concatenate(parts)[..., None]}

    origin = [stamp(path) if path else ARCHIVES[name][1] for name, path in local.items()]
    return cached(f"omniglot-{size}", {"version": 1, "size": size, "origin": origin}, build)["images"]


def check_size(size: int) -> None:
    """Checks the side of the images.

    Raises:
        ValueError: Anything but 1 to 105.
    """
    if not 1 <= size <= SIDE:
        raise ValueError(f"size must be 1 to {SIDE} pixels, got {size!r}.")


def _local(folder: Path | None, name: str) -> Path | None:
    candidates = [folder / f"{name}{suffix}" for suffix in (".npz", ".zip")] if folder else []
    return next((path for path in candidates if path.is_file()), None)


def read_drawings(path: Path, characters: int) -> Bool[np.ndarray, "characters 20 105 105"]:
    """Reads the drawings of one archive.

    Args:
        path: The .npz file or the official .zip file.
        characters: The number of characters that it must hold.

    Returns:
        bool [characters, 20, 105, 105], True for paper, in the order of the official numbers.

    Raises:
        DataError: A damaged archive, or another one.
    """
    paper = read_zip(path) if path.suffix == ".zip" else read_npz(path, ("images",))[0]
    if paper.shape != (characters, DRAWERS, SIDE, SIDE):
        raise DataError(
            f"{path} must hold drawings of shape {(characters, DRAWERS, SIDE, SIDE)}, got {paper.shape}. It is not the "
            "official archive, or it is truncated. Delete it and download it again."
        )
    return paper.astype(bool)


def read_zip(path: Path) -> Bool[np.ndarray, "characters drawers h w"]:
    """Decodes an archive of files alphabet/character/NNNN_MM.png, with character number NNNN and drawer MM.

    Args:
        path: The .zip file.

    Returns:
        bool [characters, drawers, h, w], True for paper.

    Raises:
        DataError: A damaged archive, or one with missing drawings.
    """
    pattern = re.compile(r"(?:^|/)(\d{4})_(\d{2})\.png$")
    with reading(path), open_zip(path) as archive:
        found = {match.groups(): name for name in archive.namelist() if (match := pattern.search(name))}
        numbers = sorted({number for number, _ in found})
        drawers = sorted({drawer for _, drawer in found})
        if not found or len(found) != len(numbers) * len(drawers):
            raise DataError(
                f"{path} must hold {DRAWERS} drawings of each character, got {len(found)} of {len(numbers)} characters."
            )
        return np.stack([
            np.stack([read_png(archive.read(found[number, drawer])) for drawer in drawers]) for number in numbers
        ])  # fmt: skip


def read_png(data: bytes) -> Bool[np.ndarray, "h w"]:
    """Decodes one drawing; True for paper."""
    with extra("data", "Reading drawings"):
        from PIL import Image
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("L")) > 127


def ink_bytes(paper: Bool[np.ndarray, "n h h"], size: int) -> UInt8[np.ndarray, "n size size"]:
    """Computes the fraction of ink in each of size x size equal areas, exactly, including parts of pixels.

    Args:
        paper: True for paper, [n, h, h].
        size: The side of the result in pixels.

    Returns:
        uint8 [n, size, size], 0 (no ink) to 255.
    """
    if size == paper.shape[1]:
        return np.where(paper, 0, 255).astype(np.uint8)
    edges = np.linspace(0, paper.shape[1], size + 1)
    pixels = np.arange(paper.shape[1])
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = (np.maximum(overlap, 0) * size / paper.shape[1]).astype(np.float32)
    reduced = np.empty((len(paper), size, size), np.uint8)
    for start in range(0, len(paper), 1000):
        ink = (~paper[start : start + 1000]).astype(np.float32)
        reduced[start : start + 1000] = np.rint(255 * (weights @ ink @ weights.T))
    return reduced
