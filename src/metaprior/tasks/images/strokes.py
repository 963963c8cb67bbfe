"""Omniglot's characters described by attributes of their pen strokes, for zero-shot learning.

The characters are those of the archives strokes_background_small1 and 2: ten alphabets, two of which are in both, with
242 characters. The attributes of a class are the mean over the strokes of ten drawers. Its images are those of the ten
other drawers, so no image is described by its own strokes.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.options import Count, Seed, Way, checked
from metaprior.core.types import Attributes, Batch, Splits, Task
from metaprior.tasks.checks import DataError
from metaprior.tasks.images.omniglot import DRAWERS, REPOSITORY, SIDE, load_omniglot
from metaprior.tasks.limits import open_zip
from metaprior.tasks.pool import ClassPool, class_pool
from metaprior.tasks.splitting import Split, split_groups
from metaprior.tasks.store import Arrays, cached, data_folder, download, reading, stamp

SOURCE = f"{REPOSITORY}/ceffff1ba059df9c19f12021b738dd1e0d8dd650/python/"
ARCHIVES = {  # and their sha256
    "strokes_background_small1.zip": "8cb3960fb6cf4ccf5f064ad83169f828c36c36782a0f6e7faacb7ecfae4468a2",
    "strokes_background_small2.zip": "345bf2141efbea062833dbb2828abbc23d9e07825e46f2afdd4daecddfed6e78",
}
DESCRIBING = DRAWERS // 2  # the drawers 1..10, whose strokes make the attributes
STEP = 3 / SIDE  # distance of points along a stroke before angles are computed: corners of pixels are not curvature
ATTRIBUTES = (
    "log strokes", "log length", "curvature", "straightness", "longest stroke", "width", "height", "centre x",
    "centre y", "spread x", "spread y", "tilt", "start x", "start y", "horizontal", "rising", "vertical", "falling",
)  # fmt: skip

Stroke = Float[np.ndarray, "m 2"]  # points (x, y), y downwards, in sides of the image


def describe(strokes: list[Stroke]) -> Float[np.ndarray, " a"]:
    """Computes the attributes of one drawing; lengths are in sides of the image.

    Args:
        strokes: The strokes of the drawing.

    Returns:
        The attributes [18], named in ATTRIBUTES. 'curvature' is the sum of the angles turned, in full turns.
            'straightness' is the sum of the distances between the ends of each stroke, divided by the total length.
            'horizontal' to 'falling' are the fractions of the length drawn within 22.5 degrees of that direction, in
            either sense.
    """
    curves = [_evenly(stroke) for stroke in strokes]
    steps = [np.diff(curve, axis=0) for curve in curves]
    length = [float(np.linalg.norm(step, axis=1).sum()) for step in steps]
    total = max(sum(length), 1e-9)
    angles = [np.arctan2(step[:, 1], step[:, 0]) for step in steps]
    turned = sum(float(np.abs((np.diff(a) + np.pi) % (2 * np.pi) - np.pi).sum()) for a in angles)
    ends = sum(float(np.linalg.norm(curve[-1] - curve[0])) for curve in curves)
    points = np.concatenate(curves)
    (x, y), (sx, sy) = points.mean(0), points.std(0)
    width, height = np.ptp(points, axis=0)
    tilt = float(((points[:, 0] - x) * (points[:, 1] - y)).mean() / max(sx * sy, 1e-9))
    # y points downwards, so a direction of angle 45 degrees falls to the right.
    sector = np.rint(np.concatenate(angles) / (np.pi / 4)).astype(int) % 4
    weight = np.concatenate([np.linalg.norm(step, axis=1) for step in steps])
    level, falling, upright, rising = np.bincount(sector, weight, 4)[:4] / total
    return np.array([
        np.log(len(strokes)), np.log(max(total, STEP)), turned / (2 * np.pi), ends / total, max(length) / total, width,
        height, x, y, sx, sy, tilt, *curves[0][0], level, rising, upright, falling,
    ])  # fmt: skip


def _evenly(stroke: Stroke) -> Stroke:
    """Returns points about STEP apart along the stroke, including both ends."""
    walked = np.concatenate([[0.0], np.linalg.norm(np.diff(stroke, axis=0), axis=1).cumsum()])
    at = np.linspace(0, walked[-1], max(round(walked[-1] / STEP), 1) + 1)
    return np.stack([np.interp(at, walked, stroke[:, i]) for i in (0, 1)], axis=-1)


def turned(strokes: list[Stroke], quarters: int) -> list[Stroke]:
    """Rotates a drawing counterclockwise by quarter turns, as `pool.rotate` rotates its image.

    Args:
        strokes: The strokes of the drawing.
        quarters: The number of quarter turns.
    """
    for _ in range(quarters):
        strokes = [np.stack([s[:, 1], 1 - s[:, 0]], axis=-1) for s in strokes]
    return strokes


def read_strokes(path: Path) -> dict[int, dict[int, list[Stroke]]]:
    """Reads the drawings of an archive.

    Args:
        path: The .zip file.

    Returns:
        Strokes by official character number and drawer.

    Raises:
        DataError: A damaged archive, or not 20 drawings of each character.
    """
    found: dict[int, dict[int, list[Stroke]]] = {}
    with reading(path), open_zip(path) as archive:
        for name in sorted(archive.namelist()):
            match = re.search(r"(?:^|/)(\d{4})_(\d{2})\.txt$", name)
            if match is None or name.startswith("__MACOSX"):
                continue
            character, drawer = map(int, match.groups())
            found.setdefault(character, {})[drawer] = _parse(archive.read(name).decode())
    if not found or any(len(drawings) != DRAWERS for drawings in found.values()):
        raise DataError(
            f"{path} must hold {DRAWERS} drawings of each character, but its {len(found)} characters have others. "
            "Delete it and download it again."
        )
    return found


def _parse(text: str) -> list[Stroke]:
    """Parses lines START, x,y,t and BREAK (after each stroke); y points upwards, from 0 at the top to -105."""
    parts = [part.split() for part in text.replace("START", "").split("BREAK")]
    rows = [[line.split(",")[:2] for line in part] for part in parts if part]
    return [np.array(row, float) * [1, -1] / SIDE for row in rows]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DescribedTasks:
    """Zero-shot episodes, whose support has one row of attributes per class instead of examples.

    Attributes:
        pool: Draws the queries, with the labels "class".
        attributes: The attributes of each class of the pool.
    """

    pool: ClassPool
    attributes: Float[Array, "classes a"]

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks.

        Returns:
            Support x `Attributes` [n, way, a] and y [n, way]; the query as the pool's, but a label is the place of the
                class in the task.
        """
        drawn = self.pool.sample(key, n)
        way, query = self.pool.way, self.pool.query
        classes = drawn.query.y[:, ::query]
        places = jnp.broadcast_to(jnp.arange(way, dtype=jnp.int32), (n, way))
        support = Batch(Attributes(self.attributes[classes]), places)
        return Task(support, drawn.query._replace(y=jnp.repeat(places, query, axis=1)))


@checked
def omniglot_strokes(
    *,
    way: Way = 5,
    query: Count = 5,
    test_query: Count = 9,
    train_way: Way | None = None,
    split: Split = (0.7, 0.1, 0.2),
    rotations: bool = True,
    size: Count = 28,
    seed: Seed = 0,
) -> Splits:
    """Makes zero-shot classification tasks of characters, described by attributes of their strokes.

    Support x is `Attributes` [way, 18], standardised over the training classes; there are no support images. Query x is
    float32 [n, size, size, 1], ink 1 on background 0.

    Args:
        way: Classes per task.
        query: Images per class in training, at most 9.
        test_query: Images per class in validation and test, at most 9.
        train_way: Classes per task in training. By default `way`.
        split: How the 242 characters are assigned: three fractions, or three lists of official numbers.
        rotations: Whether quarter turns are training separate classes, with the attributes of the rotated strokes.
        size: The side of the images in pixels, at most 105.
        seed: The seed of the random assignment.

    Returns:
        Tasks of the training, validation and test characters.

    Raises:
        DataError: Damaged archives, or no METAPRIOR_DATA/omniglot/strokes_background_small1.zip (and 2) and no network.
        ValueError: Options out of range.

    References:
        Lake, Salakhutdinov & Tenenbaum 2015; zero-shot tasks as in Snell, Swersky & Zemel 2017, sec. 2.7 and 3.3.
    """
    described = load_attributes()
    characters, table = np.asarray(described["characters"]), np.asarray(described["attributes"])
    train, validation, test = split_groups(characters.tolist(), split, seed, "character")
    drawings = load_omniglot(size).reshape(-1, DRAWERS, size, size, 1)[characters - 1, DESCRIBING:]
    counts = np.full(len(characters), DRAWERS - DESCRIBING)
    images = jnp.asarray(drawings.reshape(-1, size, size, 1))
    described_train = np.concatenate(table[: 4 if rotations else 1, train])
    mean, deviation = described_train.mean(0), np.maximum(described_train.std(0), 1e-6)

    def source(classes: np.ndarray, rows: np.ndarray, **episode: Any) -> DescribedTasks:
        names = [f"{c:04d}" for c in characters]
        pool = class_pool(images, counts, classes=classes, names=names, shot=1, labels="class", **episode)
        return DescribedTasks(pool, jnp.asarray((rows - mean) / deviation, jnp.float32))

    training = {"way": way if train_way is None else train_way, "query": query, "rotations": rotations}
    judging = {"way": way, "query": test_query}
    return Splits(
        source(train, described_train, **training),
        source(validation, table[0, validation], **judging),
        source(test, table[0, test], **judging),
    )


def load_strokes() -> dict[int, dict[int, list[Stroke]]]:
    """Returns the pen drawings of all 242 characters.

    Returns:
        Strokes by official character number and drawer (1 to 20).

    Raises:
        DataError: Damaged archives, or no archives and no network.
    """
    drawings: dict[int, dict[int, list[Stroke]]] = {}
    for name, path in _local().items():
        drawings |= read_strokes(path or download(f"{SOURCE}{name}", ARCHIVES[name], "omniglot"))
    return drawings


def _local() -> dict[str, Path | None]:
    folder = data_folder("omniglot")
    return {name: folder / name if folder and (folder / name).is_file() else None for name in ARCHIVES}


def load_attributes() -> Arrays:
    """Returns the attributes of all characters; they are computed once and then cached.

    Returns:
        `characters` [242] (official numbers) and `attributes` [4, 242, 18], of the strokes rotated by 0 to 3 quarter
            turns.

    Raises:
        DataError: Damaged archives, or no archives and no network.
    """
    local = _local()

    def build() -> Arrays:
        drawings = load_strokes()
        characters = sorted(drawings)
        table = [
            [np.mean([describe(turned(drawings[c][d], k)) for d in range(1, DESCRIBING + 1)], 0) for c in characters]
            for k in range(4)
        ]
        return {"characters": np.array(characters), "attributes": np.array(table)}

    identity = {"version": 1, "names": ATTRIBUTES, "origin": [stamp(path) if path else None for path in local.values()]}
    return dict(cached("omniglot-strokes", identity, build))
