"""Few-shot classification from a pool of images by class: an episode is a gather inside the compiled step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from metaprior.core.options import Count, Way, checked
from metaprior.core.types import Splits, Task
from metaprior.tasks.checks import DataError, check_count
from metaprior.tasks.drawing import as_task, draw_rows


def rotate(images: UInt8[Array, "w m h h c"], turns: Int[Array, " w"]) -> UInt8[Array, "w m h h c"]:
    """Class i's images turned counterclockwise by turns[i] quarter turns."""
    turns = turns[:, None, None, None, None]
    images = jnp.where(turns % 2 == 1, jnp.swapaxes(images, 2, 3), images)
    images = jnp.where((turns == 1) | (turns == 2), images[:, :, ::-1], images)
    return jnp.where((turns == 2) | (turns == 3), images[:, :, :, ::-1], images)


def check_enough(
    classes: np.ndarray,
    counts: np.ndarray,
    names: Sequence[str] | None,
    way: int,
    shot: int,
    query: int,
    kind: str,
    turns: int = 1,
) -> None:
    """A DataError where a split has fewer classes than `way`, or one of them fewer examples than shot + query."""
    if len(classes) * turns < way:
        raise DataError(
            f"way: came {way}, but this split has {len(classes) * turns} classes; lower way or give it more classes"
        )
    small = classes[counts[classes] < shot + query]
    if len(small):
        name = names[small[0]] if names is not None else f"number {small[0]}"
        raise DataError(
            f"shot + query: came {shot} + {query}, but class {name} has {counts[small[0]]} {kind} and so have "
            f"{len(small)} classes too few; lower shot or query, or leave those classes out"
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassPool:
    """Episodes of `way` classes with `shot` support and `query` query examples a class.

    Class i's examples are images[starts[i] : starts[i] + counts[i]]; classes may differ in size, and splits share one
    array of images. With rotations = 4 each class turned by 90, 180 and 270 degrees is a class of its own (only square
    images). An image becomes (bytes / 255 - mean) / deviation, per channel.
    """

    images: UInt8[Array, "total h w c"]
    classes: Int[Array, " classes"]
    starts: Int[Array, " classes"]
    counts: Int[Array, " classes"]
    mean: Float[Array, " c"]
    deviation: Float[Array, " c"]
    way: int = field(metadata={"static": True})
    shot: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    rotations: int = field(metadata={"static": True})
    own_labels: bool = field(default=False, metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n tasks; support x float32 [n, way * shot, h, w, c] and y int32 [n, way * shot], class by class.

        A class's place in the task (its label) is random; the query follows the same order. With own_labels a label
        is the class's own number in 0..size * rotations - 1, the same in every task (turned classes come after all
        unturned ones): for plain classification, which baselines are pretrained by.
        """
        return jax.vmap(self._gather)(*jax.vmap(self._draw)(jax.random.split(key, n)))

    def _draw(self, key: PRNGKeyArray) -> tuple[Int[Array, "way m"], Int[Array, " way"], Int[Array, " way"]]:
        rows, chosen = draw_rows(key, self.starts, self.counts, self.way, self.shot + self.query, self.rotations)
        labels = chosen if self.own_labels else jnp.arange(self.way, dtype=jnp.int32)
        return rows, chosen // self.starts.shape[0], labels.astype(jnp.int32)

    def _gather(self, rows: Int[Array, "way m"], turns: Int[Array, " way"], labels: Int[Array, " way"]) -> Task:
        images = self.images[rows]
        if self.rotations > 1:
            images = rotate(images, turns)
        return as_task(self.normalised(images.astype(jnp.float32) / 255), labels, self.shot)

    def normalised(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Images in 0..1 as the tasks show them."""
        return (x - self.mean) / self.deviation

    def restored(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Images of tasks in 0..1 again."""
        return x * self.deviation + self.mean


def innermost(source: Any) -> Any:
    """The source within sources around it (augmented, of hidden labels)."""
    while hasattr(source, "source"):
        source = source.source
    return source


@checked
def class_pool(
    images: Any,
    counts: Sequence[int] | np.ndarray,
    *,
    classes: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
    way: Way = 5,
    shot: Count = 1,
    query: Count = 15,
    rotations: bool = False,
    own_labels: bool = False,
    mean: float | Sequence[float] = 0.0,
    deviation: float | Sequence[float] = 1.0,
) -> ClassPool:
    """Episodes from images that lie class by class.

    Args:
        images: uint8 [total, h, w, c], all of the first class, then all of the second, and so on.
        counts: how many images each class has; their sum is `total`.
        classes: the classes this source draws from (positions in `counts`); all by default.
        names: of all classes, for errors.
        own_labels: a label is the class's own number, not its place in the task.
        mean, deviation: subtracted from and divided into the images scaled to 0..1, one number or one a channel.

    Raises:
        DataError: fewer classes than `way`, fewer images in a class than shot + query, or arrays that do not fit.
    """
    way, shot, query = check_count("way", way, 2), check_count("shot", shot), check_count("query", query)
    counts = np.asarray(counts, np.int32)
    classes = np.arange(len(counts), dtype=np.int32) if classes is None else np.asarray(classes, np.int32)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != counts.sum():
        raise DataError(
            f"images: came {images.dtype} {images.shape}, needs uint8 [{counts.sum()}, h, w, c], one a count"
        )
    turns = 4 if rotations else 1
    if rotations and images.shape[1] != images.shape[2]:
        raise DataError(f"rotations: came images of {images.shape[1]} x {images.shape[2]}, needs square ones")
    check_enough(classes, counts, names, way, shot, query, "images", turns)
    scale = [np.broadcast_to(np.asarray(v, np.float32), images.shape[-1]) for v in (mean, deviation)]
    if not (scale[1] > 0).all():
        raise ValueError(f"deviation: came {deviation!r}, needs numbers above 0")
    starts = np.cumsum(counts) - counts
    return ClassPool(
        jnp.asarray(images), jnp.asarray(classes), jnp.asarray(starts[classes], jnp.int32),
        jnp.asarray(counts[classes]), jnp.asarray(scale[0]), jnp.asarray(scale[1]), way, shot, query, turns, own_labels,
    )  # fmt: skip


@checked
def pool_splits(
    images: Any,
    counts: Sequence[int] | np.ndarray,
    split: Sequence[Any],
    *,
    way: Way,
    shot: Count,
    query: Count,
    test_query: Count,
    rotations: bool = False,
    test_rotations: bool = False,
    train_way: Way | None = None,
    train_labels: Literal["task", "class"] = "task",
    names: Sequence[str] | None = None,
    mean: float | Sequence[float] = 0.0,
    deviation: float | Sequence[float] = 1.0,
) -> Splits:
    """Training, validation and test pools over one shared array; `split` lists each one's classes. As `class_pool`.

    train_way: classes a task in training (default: way). train_labels: "task", or "class" (`own_labels` in training).
    """
    if train_labels not in ("task", "class"):
        raise ValueError(f"train_labels: came {train_labels!r}, needs 'task' or 'class'")
    seen: set[int] = set()
    for part in split:
        if seen & set(np.asarray(part).tolist()):
            raise DataError("split: came lists with classes in common, needs disjoint ones")
        seen |= set(np.asarray(part).tolist())
    images = jnp.asarray(images)
    shared: dict[str, Any] = {"names": names, "shot": shot, "mean": mean, "deviation": deviation}
    training = {
        "way": way if train_way is None else train_way,
        "query": query,
        "rotations": rotations,
        "own_labels": train_labels == "class",
    }
    judging = {"way": way, "query": test_query, "rotations": test_rotations}
    return Splits(*(
        class_pool(images, counts, classes=part, **options, **shared)
        for part, options in zip(split, (training, judging, judging), strict=True)
    ))  # fmt: skip
