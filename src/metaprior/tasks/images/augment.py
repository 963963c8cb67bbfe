"""Augmentation: a source whose images are warped, cropped, mirrored and recoloured at random."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.options import Fraction, Whole, checked
from metaprior.core.types import Attributes, Splits, Task, TaskSource, innermost
from metaprior.tasks.images.warp import affine
from metaprior.tasks.pool import ClassPool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Augmented:
    """The tasks of another source, with every image of support and query changed at random.

    Attributes:
        source: The source of the tasks.
        warp: Whether images are warped; see `augmented`.
        crop: The width of the border for random crops, in pixels.
        flip: Whether images are mirrored at random.
        jitter: The largest relative change of brightness, contrast and saturation.
    """

    source: TaskSource
    warp: bool = field(metadata={"static": True})
    crop: int = field(metadata={"static": True})
    flip: bool = field(metadata={"static": True})
    jitter: float = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks of the source and changes each image with its own random key; shapes stay the same."""
        key_task, key_change = jax.random.split(key)
        task = self.source.sample(key_task, n)
        sides = zip(task, jax.random.split(key_change), strict=True)
        return Task(*(batch._replace(x=self._change(k, batch.x)) for batch, k in sides))

    def _change(self, key: PRNGKeyArray, x: Float[Array, "t n h w c"] | Attributes) -> PyTree:
        if isinstance(x, Attributes):
            return x
        pool = innermost(self.source)  # its images are scaled back to 0..1 first
        flat = x.reshape(-1, *x.shape[2:])
        flat = pool.restored(flat) if isinstance(pool, ClassPool) else flat
        flat = jax.vmap(self._one)(jax.random.split(key, len(flat)), flat)
        return (pool.normalised(flat) if isinstance(pool, ClassPool) else flat).reshape(x.shape)

    def _one(self, key: PRNGKeyArray, image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        key_warp, key_crop, key_flip, key_jitter = jax.random.split(key, 4)
        if self.warp:
            image = affine(key_warp, image)
        if self.crop:
            image = shifted(image, jax.random.randint(key_crop, (2,), 0, 2 * self.crop + 1), self.crop)
        if self.flip:
            image = jnp.where(jax.random.bernoulli(key_flip), image[:, ::-1], image)
        if self.jitter:
            factors = 1 + self.jitter * jax.random.uniform(key_jitter, (3,), minval=-1, maxval=1)
            image = recoloured(image, *factors)
        return image


def shifted(image: Float[Array, "h w c"], corner: Array, crop: int) -> Float[Array, "h w c"]:
    """Cuts a window of the image's size out of the image with a border of zeros.

    Args:
        image: [h, w, c].
        corner: The row and column where the window starts, each 0 to 2 * crop.
        crop: The width of the border in pixels.
    """
    padded = jnp.pad(image, ((crop, crop), (crop, crop), (0, 0)))
    return jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), image.shape)


def recoloured(image: Float[Array, "h w c"], light: Array, contrast: Array, colour: Array) -> Float[Array, "h w c"]:
    """Changes brightness, contrast and saturation.

    Args:
        image: [h, w, c].
        light: Factor of all values.
        contrast: Factor of the differences from the mean of the image, applied second.
        colour: Factor of the differences from the grey value of each pixel, applied last.
    """
    image = light * image
    image = image.mean() + contrast * (image - image.mean())
    grey = image.mean(-1, keepdims=True)
    return grey + colour * (image - grey)


@checked
def augmented(
    splits: Splits, *, warp: bool = False, crop: Whole = 0, flip: bool = False, jitter: Fraction = 0.0
) -> Splits:
    """Augments the training images; validation, test, and attributes in place of images stay as they are.

    Args:
        splits: Tasks of images.
        warp: Whether to rotate, shear, scale and shift images at random; see `random_affine`.
        crop: The width of a border of zeros in pixels. A window of the image's size is cut out at random.
        flip: Whether to mirror images left to right with probability 1/2.
        jitter: Brightness, contrast and saturation are multiplied by random factors of 1 - jitter to 1 + jitter; 0 to
            1.

    Returns:
        The splits with an augmented training source.

    Raises:
        ValueError: Tasks whose x are not images, or options out of range.

    References:
        Koch, Zemel & Salakhutdinov 2015, for the warps.
    """
    like = jax.eval_shape(lambda: splits.train.sample(jax.random.key(0), 1)).query.x
    if getattr(like, "ndim", 0) != 5:
        came = getattr(like, "shape", "a tree")
        raise ValueError(f"augmentation needs tasks of images [tasks, n, h, w, channels], got x of shape {came}.")
    return splits._replace(train=Augmented(splits.train, warp, crop, flip, jitter))
