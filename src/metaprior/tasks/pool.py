"""Few-shot classification from a pool of images sorted by class. An episode is a gather inside the compiled step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from metaprior.core.drawings import ink_of, moment_normalised
from metaprior.core.options import Count, Way, checked
from metaprior.core.types import Splits, Task
from metaprior.tasks.checks import DataError, check_count
from metaprior.tasks.drawing import Labels, as_task, draw_rows


def rotate(images: UInt8[Array, "w m h h c"], turns: Int[Array, " w"]) -> UInt8[Array, "w m h h c"]:
    """Rotates the images of each class counterclockwise.

    Args:
        images: M square images of each of w classes, [w, m, h, h, c].
        turns: The number of quarter turns of each class, 0 to 3, [w].

    Returns:
        The rotated images, of the same shape.
    """
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
    """Checks that a split has enough classes, and each class enough examples.

    Args:
        classes: The classes of the split.
        counts: The number of examples of each class.
        names: The name of each class, for the error; None to name it by its number.
        way: The number of classes per task.
        shot: Support examples per class.
        query: Query examples per class.
        kind: What an example is, in the plural, for the error.
        turns: How many classes each class counts as, by rotation.

    Raises:
        DataError: Fewer classes than `way`, or a class of fewer examples than shot + query.
    """
    if len(classes) * turns < way:
        raise DataError(
            f"way must be at most {len(classes) * turns}, the number of classes of this split, got {way}. Lower way or "
            "give the split more classes."
        )
    small = classes[counts[classes] < shot + query]
    if len(small):
        name = names[small[0]] if names is not None else f"number {small[0]}"
        raise DataError(
            f"shot + query must be at most {counts[small[0]]}, the number of {kind} of class {name}, got {shot} + "
            f"{query}. Lower shot or query, or leave out the {len(small)} classes that have too few {kind}."
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClassPool:
    """Episodes of `way` classes with `shot` support and `query` query examples per class.

    An image is scaled to (bytes / 255 - mean) / deviation, per channel.

    Attributes:
        images: All images, sorted by class; the splits share this array.
        classes: The numbers of the classes that this source draws from.
        starts: The first image of each class. The images of class i are images[starts[i] : starts[i] + counts[i]].
        counts: The number of images of each class.
        mean: What is subtracted, per channel.
        deviation: What is divided by, per channel.
        way: Classes per task.
        shot: Support examples per class.
        query: Query examples per class.
        rotations: 1, or 4 if each class rotated by 90, 180 and 270 degrees is a separate class (square images only).
        labels: What the label of a class is, "task", "class" or "slot"; see `sample`.
        moments: Whether position and size of each drawing are normalised (`core.drawings.moment_normalised`) first.
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
    labels: Labels = field(default="task", metadata={"static": True})
    moments: bool = field(default=False, metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks.

        Returns:
            Support x float32 [n, way * shot, h, w, c] and y int32 [n, way * shot], sorted by class; the query likewise,
                in the same order of classes. With the labels "task", a label is the place of the class in the task,
                which is random. With "class", it is the number of the class, 0 to classes * rotations - 1, the same in
                every task; rotated classes come after all unrotated ones. Baselines are pretrained with these labels,
                by plain classification. With "slot", each class (rotated or not) has one of the labels 0..way-1 in all
                tasks, and a task has a random class of each label.
        """
        return jax.vmap(self._gather)(*jax.vmap(self._draw)(jax.random.split(key, n)))

    def _draw(self, key: PRNGKeyArray) -> tuple[Int[Array, "way m"], Int[Array, " way"], Int[Array, " way"]]:
        size, turns = self.shot + self.query, self.rotations
        rows, chosen, labels = draw_rows(key, self.starts, self.counts, self.way, size, self.labels, turns)
        return rows, chosen // self.starts.shape[0], labels

    def _gather(self, rows: Int[Array, "way m"], turns: Int[Array, " way"], labels: Int[Array, " way"]) -> Task:
        images = self.images[rows]
        if self.rotations > 1:
            images = rotate(images, turns)
        return as_task(self.normalised(images.astype(jnp.float32) / 255), labels, self.shot)

    def normalised(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Scales images in 0..1 to what tasks hold: (image - mean) / deviation, after `moments` if they are on."""
        if self.moments:
            x = moment_normalised(ink_of(x.reshape(-1, *x.shape[-3:]))).reshape(x.shape)
        return (x - self.mean) / self.deviation

    def restored(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """Scales images of tasks back to 0..1."""
        return x * self.deviation + self.mean


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
    labels: Labels = "task",
    mean: float | Sequence[float] = 0.0,
    deviation: float | Sequence[float] = 1.0,
    moments: bool = False,
) -> ClassPool:
    """Makes episodes from images that are sorted by class.

    Args:
        images: Uint8 [total, h, w, c]: all images of the first class, then all of the second, and so on.
        counts: The number of images of each class; the sum is `total`.
        classes: The classes that this source draws from, as positions in `counts`. By default all.
        names: The name of each class, for errors.
        way: Classes per task.
        shot: Support examples per class.
        query: Query examples per class.
        rotations: Whether each class rotated by 90, 180 and 270 degrees is a separate class (square images only).
        labels: What the label of a class is: "task" (its place in the task), "class" (its number) or "slot" (one of
            0..way-1 that the class keeps in all tasks); see `ClassPool.sample`.
        mean: Subtracted from the images scaled to 0..1; one number or one per channel.
        deviation: Divides the images after that; one number or one per channel, above 0.
        moments: Whether position and size of each drawing, light on dark in one channel, are normalised first.

    Returns:
        The source.

    Raises:
        DataError: Fewer classes than `way`, a class of fewer images than shot + query, or arrays that do not fit.
        ValueError: A deviation that is not above 0.
    """
    way, shot, query = check_count("way", way, 2), check_count("shot", shot), check_count("query", query)
    counts = np.asarray(counts, np.int32)
    classes = np.arange(len(counts), dtype=np.int32) if classes is None else np.asarray(classes, np.int32)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != counts.sum():
        raise DataError(
            f"images must be uint8 [{counts.sum()}, h, w, c], where {counts.sum()} is the sum of counts, got "
            f"{images.dtype} {images.shape}."
        )
    turns = 4 if rotations else 1
    if rotations and images.shape[1] != images.shape[2]:
        raise DataError(
            f"rotations must be False for images that are not square, got True for {images.shape[1]} x "
            f"{images.shape[2]} pixels."
        )
    if moments and images.shape[-1] != 1:
        raise DataError(
            f"moments must be False for images of several channels, got True for {images.shape[-1]} channels."
        )
    check_enough(classes, counts, names, way, shot, query, "images", turns)
    scale = [np.broadcast_to(np.asarray(v, np.float32), images.shape[-1]) for v in (mean, deviation)]
    if not (scale[1] > 0).all():
        raise ValueError(f"deviation must be above 0, got {deviation!r}.")
    starts = np.cumsum(counts) - counts
    return ClassPool(
        jnp.asarray(images), jnp.asarray(classes), jnp.asarray(starts[classes], jnp.int32),
        jnp.asarray(counts[classes]), jnp.asarray(scale[0]), jnp.asarray(scale[1]), way, shot, query, turns, labels,
        moments,
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
    train_labels: Labels = "task",
    names: Sequence[str] | None = None,
    mean: float | Sequence[float] = 0.0,
    deviation: float | Sequence[float] = 1.0,
    moments: bool = False,
) -> Splits:
    """Makes training, validation and test pools that share one array of images.

    Args:
        images: Uint8 [total, h, w, c], sorted by class.
        counts: The number of images of each class.
        split: The classes of training, validation and test: three disjoint lists of positions in `counts`.
        way: Classes per task.
        shot: Support examples per class.
        query: Query examples per class in training.
        test_query: Query examples per class in validation and test.
        rotations: Whether rotated classes are separate classes in training; see `class_pool`.
        test_rotations: The same in validation and test.
        train_way: Classes per task in training. By default `way`.
        train_labels: The labels of training tasks, as `labels` of `class_pool`. Validation and test tasks always have
            newly assigned labels ("task").
        names: The name of each class, for errors.
        mean: As in `class_pool`.
        deviation: As in `class_pool`.
        moments: As in `class_pool`.

    Returns:
        The three pools.

    Raises:
        DataError: Lists that share a class, or an argument that `class_pool` rejects.
        ValueError: Another word for `train_labels`, or a deviation that is not above 0.
    """
    seen: set[int] = set()
    for part in split:
        if seen & set(np.asarray(part).tolist()):
            raise DataError("split must be disjoint lists of classes, got lists with a class in common.")
        seen |= set(np.asarray(part).tolist())
    images = jnp.asarray(images)
    shared: dict[str, Any] = {"names": names, "shot": shot, "mean": mean, "deviation": deviation, "moments": moments}
    training = {
        "way": way if train_way is None else train_way,
        "query": query,
        "rotations": rotations,
        "labels": train_labels,
    }
    judging = {"way": way, "query": test_query, "rotations": test_rotations}
    return Splits(*(
        class_pool(images, counts, classes=part, **options, **shared)
        for part, options in zip(split, (training, judging, judging), strict=True)
    ))  # fmt: skip
