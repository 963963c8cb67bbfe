"""Tasks of images in several styles: each task's images go through one filter, and each filter is a family."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metaprior.core.options import Positive, checked, nearest, passes_options_to
from metaprior.core.types import Splits, Task, TaskSource, check_family, draw_task, families_of, group_count, innermost
from metaprior.tasks.images.folders import miniimagenet
from metaprior.tasks.mixture import drawn_families, with_family
from metaprior.tasks.pool import ClassPool

FILTERS = ("original", "blur", "pencil")
GREY = (0.299, 0.587, 0.114)  # of red, green and blue; ITU-R BT.601


def blurred(images: Float[Array, "n h w c"], deviation: float) -> Float[Array, "n h w c"]:
    """Blurs images by a Gaussian; beyond the edge, they go on with the pixels of the edge.

    Args:
        images: Images of any scale.
        deviation: Standard deviation in pixels.
    """
    from scipy.ndimage import gaussian_filter1d  # imported here because it takes a while

    rows, columns = (gaussian_filter1d(np.eye(n), deviation, axis=0, mode="nearest") for n in images.shape[1:3])
    rows, columns = jnp.asarray(rows, images.dtype), jnp.asarray(columns, images.dtype)
    return jnp.einsum("ih,jw,nhwc->nijc", rows, columns, images)


def pencilled(images: Float[Array, "n h w c"], deviation: float) -> Float[Array, "n h w c"]:
    """Draws images in pencil: grey values divided by their blur, which leaves dark lines on white ("colour dodge").

    Args:
        images: Images in 0..1 of one channel or three; further channels stay as they are.
        deviation: Standard deviation of the blur in pixels.

    Returns:
        Images with equal colour channels.
    """
    colours = 3 if images.shape[-1] >= 3 else 1
    share = jnp.asarray(GREY if colours == 3 else (1.0,), images.dtype)
    grey = (images[..., :colours] * share).sum(-1, keepdims=True)
    drawn = jnp.minimum(grey / jnp.maximum(blurred(grey, deviation), 1 / 255), 1)
    return jnp.concatenate([jnp.repeat(drawn, colours, -1), images[..., colours:]], -1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FilteredTasks:
    """Tasks of another source whose images go through a filter that the task draws; each filter is a family.

    Images are filtered when a task is drawn, so there is one copy of the pictures.

    Attributes:
        source: The other source.
        families: The names of the filters, with equal probabilities.
        blur: Standard deviation of the filter "blur" in pixels.
        pencil: Standard deviation of the blur in the filter "pencil".
        oracle: Whether the images also have a constant channel for each of the three filters, 1 for the task's.
    """

    source: TaskSource
    families: tuple[str, ...] = field(metadata={"static": True})
    blur: float = field(metadata={"static": True})
    pencil: float = field(metadata={"static": True})
    oracle: bool = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks. Each of them goes through its own filter only."""
        return jax.lax.map(lambda drawn: self.of_family(*drawn), drawn_families(self, key, n))

    def of_family(self, key: PRNGKeyArray, family: Int[Array, ""]) -> Task:
        """Draws a task through one filter."""
        check_family(family, self.families)
        task = draw_task(self.source, key, jnp.zeros((), int))
        filters = {
            "original": lambda images: images,
            "blur": lambda images: blurred(images, self.blur),
            "pencil": lambda images: pencilled(images, self.pencil),
        }
        pool = innermost(self.source)

        def changed(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
            shown = pool.restored(x) if isinstance(pool, ClassPool) else x
            shown = jax.lax.switch(family, [filters[name] for name in self.families], shown)
            return pool.normalised(shown) if isinstance(pool, ClassPool) else shown

        task = Task(*(batch._replace(x=changed(batch.x)) for batch in task))
        place = jnp.asarray([FILTERS.index(name) for name in self.families])[family]
        return with_family(task, place, len(FILTERS)) if self.oracle else task


@checked
def filtered(
    splits: Splits,
    *,
    families: tuple[str, ...] = FILTERS,
    blur: Positive = 2.0,
    pencil: Positive = 4.0,
    oracle: bool = False,
) -> Splits:
    """Makes tasks of images in several styles, with equal probabilities; all images of a task have one style.

    `evaluate` reports the figures of each filter. All splits have the same filters.

    Args:
        splits: Tasks of images in 0..1, or of a pool of classes.
        families: The filters to draw from: "original", "blur" (a Gaussian) and "pencil" (grey values divided by their
            blur).
        blur: Standard deviation of the blur in pixels.
        pencil: Standard deviation, in pixels, of the blur in "pencil".
        oracle: Whether the images also have a constant channel for each of the three filters, 1 for the task's. A
            learner that knows the filter shows how much there is to gain from it.

    Returns:
        The filtered splits.

    Raises:
        ValueError: No filter, an unknown one or one twice; tasks that do not hold images, or have groups or families.
    """
    for name in families:
        if name not in FILTERS:
            raise ValueError(
                f"families must be filters among {', '.join(FILTERS)}, got {name!r}{nearest(name, FILTERS) or '.'}"
            )
    if not families or len(set(families)) < len(families):
        raise ValueError(f"families must be at least one filter, and none twice, got {families!r}.")
    like = jax.eval_shape(lambda: splits.train.sample(jax.random.key(0), 1)).query.x
    if getattr(like, "ndim", 0) != 5:
        came = getattr(like, "shape", "a tree")
        raise ValueError(f"splits must be tasks of images [tasks, n, h, w, channels], got x of shape {came}.")
    for source in splits:
        if group_count(source) is not None or families_of(source):
            raise ValueError("splits must have no groups or families, got a source with some.")
    return Splits(*(FilteredTasks(source, families, blur, pencil, oracle) for source in splits))


@passes_options_to(miniimagenet)
def miniimagenet_art(
    *,
    families: tuple[str, ...] = FILTERS,
    blur: Positive = 2.0,
    pencil: Positive = 4.0,
    oracle: bool = False,
    **options: Any,
) -> Splits:
    """Makes tasks of miniImageNet in three styles: original, blurred, and drawn in pencil.

    The filters of Art-Multi (Yao et al. 2020) are not public, nor are the sizes of their kernels. These filters and
    their sizes are this library's own, and Art-Multi has other pictures, so figures are not comparable with its.

    Args:
        families: The filters to draw from, as in `filtered`.
        blur: As in `filtered`.
        pencil: As in `filtered`.
        oracle: As in `filtered`.
        options: As in `miniimagenet`.

    Returns:
        Tasks of the training, validation and test classes. All have the same filters.

    Raises:
        DataError: As in `miniimagenet`.
        ValueError: As in `filtered`.
    """
    return filtered(miniimagenet(**options), families=families, blur=blur, pencil=pencil, oracle=oracle)
