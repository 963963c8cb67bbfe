"""Images by class: few-shot classification from the user's own pictures, and miniImageNet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metaprior.core.options import Count, Seed, Way, checked
from metaprior.core.types import Splits
from metaprior.tasks.checks import DataError, check_count
from metaprior.tasks.drawing import Labels
from metaprior.tasks.images.decoding import check_channels, decode_pictures, find_pictures, fingerprint
from metaprior.tasks.pool import pool_splits
from metaprior.tasks.splitting import Split, rows_of, split_groups
from metaprior.tasks.store import Arrays, cached, data_folder

PARTS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}


@checked
def images(
    *,
    path: str | Path,
    way: Way = 5,
    shot: Count = 1,
    query: Count = 15,
    test_query: Count = 15,
    train_way: Way | None = None,
    train_labels: Labels = "task",
    size: Count | tuple[int, int] = 84,
    channels: Count = 3,
    split: Split | None = None,
    seed: Seed = 0,
    drop_small: bool = False,
    rotations: bool = False,
    test_rotations: bool = False,
    normalise: bool = False,
) -> Splits:
    """Makes few-shot classification tasks from pictures by class: x float32 [n, h, w, channels] in 0..1, y int32 [n].

    The pictures are decoded once to bytes. Later calls memory-map them from the cache.

    Args:
        path: A folder of class folders, a zip or tar archive of one, an NPZ file (`images`, `labels`), or a folder of
            `train.npz`, `val.npz` and `test.npz`.
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
        size: The side in pixels, or (height, width). Pictures of another size are resized with antialiasing.
        channels: 1 (grey), 3 (colour) or 4 (with transparency).
        split: How classes are assigned: three fractions, three lists of class names, or a table of 'train',
            'validation' and 'test'. By default by folders named train, val and test if they exist, else (0.64, 0.16,
            0.2).
        seed: The seed of the random assignment.
        drop_small: Whether to leave out classes of fewer than shot + query examples instead of raising an error.
        rotations: Whether each class rotated by 90, 180 and 270 degrees is a separate class in training.
        test_rotations: The same in validation and test.
        normalise: Whether to scale each channel by the mean and standard deviation of the training classes, which are
            computed from about 2,000 pictures.

    Returns:
        Tasks of the training, validation and test classes.

    Raises:
        DataError: Nothing to read, damaged files, unknown class names, or too few classes or examples.
        ValueError: Options out of range.
    """
    height, width = (size, size) if isinstance(size, int) else size
    shape = check_count("size", height), check_count("size", width)
    check_channels(channels)
    if not Path(path).expanduser().exists():
        raise DataError(f"path must be a folder, an archive or an NPZ file, got {path}, which does not exist.")

    def build() -> Arrays:
        pictures = sorted(find_pictures(path), key=lambda picture: picture.group)
        names, counts = np.unique([picture.group for picture in pictures], return_counts=True)
        return {"images": decode_pictures(pictures, shape, channels), "counts": counts, "names": names}

    identity = {"version": 2, "shape": shape, "channels": channels, "origin": fingerprint(path)}
    arrays = cached(f"images-{Path(path).stem}-{height}x{width}", identity, build)
    names, counts = [str(name) for name in arrays["names"]], np.asarray(arrays["counts"])
    if "" in names:
        raise DataError(
            f"{path} must hold each picture in a folder named by its class (or labels in the NPZ), got "
            f"{counts[names.index('')]} pictures without a class."
        )
    parts = _assign_classes(names, split, seed)
    if drop_small:
        least = (shot + query, shot + test_query, shot + test_query)
        parts = tuple(part[counts[part] >= need] for part, need in zip(parts, least, strict=True))
    mean, deviation = _moments(arrays["images"], counts, parts[0]) if normalise else (0.0, 1.0)
    return pool_splits(
        arrays["images"], counts, parts, way=way, shot=shot, query=query, test_query=test_query, rotations=rotations,
        test_rotations=test_rotations, train_way=train_way, train_labels=train_labels, names=names, mean=mean,
        deviation=deviation,
    )  # fmt: skip


@checked
def miniimagenet(
    *,
    way: Way = 5,
    shot: Count = 1,
    query: Count = 15,
    test_query: Count = 15,
    train_way: Way | None = None,
    train_labels: Labels = "task",
    path: str | Path | None = None,
    size: Count = 84,
    normalise: bool = False,
) -> Splits:
    """Makes tasks of miniImageNet, 64 / 16 / 20 classes of 600 pictures: x float32 [n, 84, 84, 3] in 0..1, y int32 [n].

    The pictures may not be redistributed, so this function reads files that you already have.

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
        path: A folder with train.npz, val.npz and test.npz, or with folders train, val and test of class folders. By
            default METAPRIOR_DATA/miniimagenet.
        size: The side in pixels.
        normalise: As in `images`.

    Returns:
        Tasks of the training, validation and test classes.

    Raises:
        DataError: No such folder, or an argument that `images` rejects.

    References:
        Vinyals et al. 2016; the classes are those of Ravi & Larochelle 2017.
    """
    folder = path or data_folder("miniimagenet")
    if folder is None:
        raise DataError(
            "miniimagenet: METAPRIOR_DATA has no folder miniimagenet/, and the pictures may not be redistributed. Set "
            "path= to a folder that contains train, val and test with class folders."
        )
    return images(
        path=folder, way=way, shot=shot, query=query, test_query=test_query, train_way=train_way,
        train_labels=train_labels, size=size, normalise=normalise,
    )  # fmt: skip


def _assign_classes(names: Sequence[str], split: Split | None, seed: int) -> tuple[np.ndarray, ...]:
    if split is None:
        tops = [name.split("/", 1)[0] for name in names]
        if {PARTS.get(top) for top in tops} == {0, 1, 2}:
            return tuple(np.flatnonzero([PARTS[top] == k for top in tops]) for k in range(3))
        split = (0.64, 0.16, 0.2)
    if isinstance(split, Mapping):
        split = tuple(split.get(name, ()) for name in ("train", "validation", "test"))
    return split_groups(names, split, seed, "class")


def _moments(pixels: Any, counts: np.ndarray, classes: np.ndarray) -> tuple[list[float], list[float]]:
    rows = rows_of(classes, counts)
    some = pixels[rows[:: max(1, len(rows) // 2000)]].astype(np.float64) / 255
    return some.mean((0, 1, 2)).tolist(), np.maximum(some.std((0, 1, 2)), 1e-6).tolist()
