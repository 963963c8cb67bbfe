"""Drawings as points: matched pairs of pen drawings of one character, points of an image's ink, and images of points.

The pen drawings are those of the archives strokes_background_small1 and 2 (see `strokes`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import binary_closing
from scipy.optimize import linear_sum_assignment

from metaprior.core.options import Count, Seed, checked
from metaprior.tasks.images.omniglot import DRAWERS
from metaprior.tasks.images.strokes import Stroke, load_strokes

LEAST = 0.02  # sides of the image; the deviation of a straight stroke across its direction is not taken to be smaller
STEP = 0.005  # sides of the image between points of which a drawing's frame is computed
ALONG = 20  # points of each stroke that are compared to match strokes

Points = Float[np.ndarray, "n 2"]


class Frame(NamedTuple):
    """The frame of a drawing. A point x of the image has the coordinates (x - centre) / deviation.

    Attributes:
        centre: The mean of the drawing's points, in sides of the image.
        deviation: Their standard deviation per axis, at least 0.02.
    """

    centre: Float[np.ndarray, "*drawings 2"]
    deviation: Float[np.ndarray, "*drawings 2"]


class Pairs(NamedTuple):
    """Pairs of drawings of one character, each in its own frame. Points of equal index correspond.

    Attributes:
        source: Points of the first drawing.
        target: The corresponding points of the second drawing.
        pose: The second frame relative to the first: the difference of the centres, and of the log deviations.
        apart: The mean squared distance of corresponding points.
        character: The official number of the character.
    """

    source: Float[np.ndarray, "pairs n 2"]
    target: Float[np.ndarray, "pairs n 2"]
    pose: Float[np.ndarray, "pairs 4"]
    apart: Float[np.ndarray, " pairs"]
    character: Int[np.ndarray, " pairs"]


def framed(points: Points) -> Frame:
    """Returns the frame of points.

    Args:
        points: Points (x, y) in sides of the image.
    """
    return Frame(points.mean(0), np.maximum(points.std(0), LEAST))


def relative(first: Frame, second: Frame) -> Float[np.ndarray, "*pairs 4"]:
    """Returns the pose of a frame relative to another one, see `Pairs`.

    Args:
        first: The reference.
        second: The other frame.
    """
    moved = second.centre - first.centre
    return np.concatenate([moved, np.log(second.deviation) - np.log(first.deviation)], -1)


def along(stroke: Stroke, points: int) -> Points:
    """Returns points at equal distances along a stroke, from its first to its last point.

    Args:
        stroke: The stroke.
        points: Their number. One is the middle of the stroke.
    """
    walked = np.concatenate([[0.0], np.linalg.norm(np.diff(stroke, axis=0), axis=1).cumsum()])
    at = np.linspace(0, walked[-1], points) if points > 1 else walked[-1:] / 2
    return np.stack([np.interp(at, walked, stroke[:, i]) for i in (0, 1)], axis=-1)


def matched(first: list[Stroke], second: list[Stroke], points: int) -> tuple[Points, Points, np.ndarray] | None:
    """Finds corresponding points of two drawings with the same number of strokes.

    Strokes are matched, whatever their order and direction, so that the sum of the mean squared distances between their
    points is least. Each stroke of the first drawing then gets points in proportion to its length.

    Args:
        first: The strokes of the first drawing.
        second: The strokes of the second drawing.
        points: The number of points of each drawing.

    Returns:
        The points of both drawings in their own frames, and the pose of the second frame relative to the first. None
            if the drawings do not have the same number of strokes, or more strokes than points.
    """
    if len(first) != len(second) or len(first) > points:
        return None
    frames = [framed(np.concatenate([along(s, max(round(_length(s) / STEP), 1)) for s in d])) for d in (first, second)]
    parts = [
        [(along(s, ALONG) - frame.centre) / frame.deviation for s in drawing]
        for drawing, frame in zip((first, second), frames, strict=True)
    ]
    apart = np.array([[min(_apart(a, b), _apart(a, b[::-1])) for b in parts[1]] for a in parts[0]])
    order = linear_sum_assignment(apart)[1]
    pieces: tuple[list[Points], list[Points]] = ([], [])
    for i, count in enumerate(_shares([_length(s) for s in first], points)):
        other = second[order[i]]
        backwards = _apart(parts[0][i], parts[1][order[i]][::-1]) < _apart(parts[0][i], parts[1][order[i]])
        pieces[0].append(along(first[i], count))
        pieces[1].append(along(other[::-1] if backwards else other, count))
    a, b = ((np.concatenate(p) - f.centre) / f.deviation for p, f in zip(pieces, frames, strict=True))
    return a, b, relative(*frames)


def _apart(a: Points, b: Points) -> float:
    return float(((a - b) ** 2).mean())


def _length(stroke: Stroke) -> float:
    return float(np.linalg.norm(np.diff(stroke, axis=0), axis=1).sum())


def _shares(lengths: list[float], total: int) -> list[int]:
    """Divides `total` points among strokes in proportion to their lengths, at least one for each."""
    wanted = np.maximum(np.array(lengths), 1e-9) / max(sum(lengths), 1e-9) * total
    shares = np.maximum(np.floor(wanted), 1).astype(int)
    while shares.sum() != total:
        more = shares.sum() < total
        excess = np.where((shares > 1) | more, shares - wanted, -np.inf)
        shares[excess.argmin() if more else excess.argmax()] += 1 if more else -1
    return shares.tolist()


@checked
def pen_pairs(*, each: Count = 12, points: Count = 48, keep: float = 0.8, seed: Seed = 0) -> Pairs:
    """Makes pairs of pen drawings of one character by two drawers.

    Args:
        each: Random pairs of drawers per character. Pairs with different numbers of strokes are left out.
        points: Points per drawing.
        keep: The share of pairs that are kept, those with the nearest points. In the others, the drawers probably
            made different strokes, so that matched strokes do not correspond.
        seed: The seed of the pairs.

    Returns:
        The pairs, in random order.

    Raises:
        DataError: As in `omniglot_strokes`.
        ValueError: `keep` is not above 0 and at most 1.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a share above 0 and at most 1, got {keep}.")
    random, found, drawings = np.random.default_rng(seed), [], load_strokes()
    for character in sorted(drawings):
        for _ in range(each):
            i, j = random.choice(DRAWERS, 2, replace=False) + 1
            pair = matched(drawings[character][i], drawings[character][j], points)
            if pair is not None:
                found.append((*pair, _apart(*pair[:2]), character))
    pairs = Pairs(*(np.stack(part) for part in zip(*found, strict=True)))
    near = np.flatnonzero(pairs.apart <= np.quantile(pairs.apart, keep))
    rows = random.permutation(near)
    return Pairs(*(part[rows] for part in pairs))


def spread_points(images: Float[np.ndarray, "n h h"], points: int) -> tuple[Float[np.ndarray, "n p 2"], Frame]:
    """Chooses points of each image's ink, evenly: each next one is the pixel that is farthest from those before it.

    Args:
        images: Square images, with ink above 1/2.
        points: Points per image. An image with fewer pixels of ink has each of them several times.

    Returns:
        The points (x, y) in the image's own frame, and the frames.

    Raises:
        ValueError: An image has no ink.
    """
    chosen, frames = [], []
    for i, image in enumerate(images):
        ink = _pixels(image > 0.5)
        if not len(ink):
            raise ValueError(f"images must have ink (pixels above 1/2), got none in image {i}.")
        frame = framed(ink)
        chosen.append((_spread(ink, points) - frame.centre) / frame.deviation)
        frames.append(frame)
    return np.stack(chosen), Frame(*(np.stack(part) for part in zip(*frames, strict=True)))


def _pixels(ink: Bool[np.ndarray, "h h"]) -> Points:
    y, x = np.nonzero(ink)
    return (np.stack([x, y], axis=-1) + 0.5) / ink.shape[0]


def _spread(ink: Points, points: int) -> Points:
    squared = ((ink - ink.mean(0)) ** 2).sum(-1)
    chosen = []
    for _ in range(points):
        chosen.append(int(squared.argmax()))
        nearer = ((ink - ink[chosen[-1]]) ** 2).sum(-1)
        squared = nearer if len(chosen) == 1 else np.minimum(squared, nearer)
    return ink[chosen]


def drawn(
    image: Float[np.ndarray, "h h"], change: Callable[[Any], Any], pose: Float[np.ndarray, " 4"] | None = None
) -> Bool[np.ndarray, "h h"]:
    """Draws an image's ink again, with its points changed.

    Args:
        image: The image, with ink above 1/2.
        change: Maps points [n, 2] in the image's frame to new points in it.
        pose: The pose of the new drawing's frame relative to the image's. By default they are the same.

    Returns:
        True for ink. Points that leave the image are lost.
    """
    side, ink = image.shape[0], _pixels(image > 0.5)
    frame = framed(ink)
    quarters = np.array([(x, y) for x in (-0.25, 0.25) for y in (-0.25, 0.25)]) / side
    points = (ink[:, None] + quarters).reshape(-1, 2)
    moved = np.asarray(change((points - frame.centre) / frame.deviation))
    pose = np.zeros(4) if pose is None else np.asarray(pose)
    at = frame.centre + pose[:2] + moved * frame.deviation * np.exp(pose[2:])
    x, y = np.floor(at * side).astype(int).T
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    new = np.zeros((side, side), bool)
    new[y[inside], x[inside]] = True
    return binary_closing(np.pad(new, 2), np.ones((3, 3)))[2:-2, 2:-2] | new  # fills holes where ink is stretched
