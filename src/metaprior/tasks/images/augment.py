"""Augmentation: a source whose images are warped, cropped, mirrored and recoloured at random, each by its own key."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.options import Fraction, Whole, checked
from metaprior.core.types import Attributes, Splits, Task, TaskSource
from metaprior.tasks.images.warp import affine
from metaprior.tasks.pool import ClassPool, innermost


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Augmented:
    """The tasks of `source`, with every image of support and query changed at random; see `augmented`."""

    source: TaskSource
    warp: bool = field(metadata={"static": True})
    crop: int = field(metadata={"static": True})
    flip: bool = field(metadata={"static": True})
    jitter: float = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n tasks, as the source's own."""
        key_task, key_change = jax.random.split(key)
        task = self.source.sample(key_task, n)
        sides = zip(task, jax.random.split(key_change), strict=True)
        return Task(*(batch._replace(x=self._change(k, batch.x)) for batch, k in sides))

    def _change(self, key: PRNGKeyArray, x: Float[Array, "t n h w c"] | Attributes) -> PyTree:
        if isinstance(x, Attributes):
            return x
        pool = innermost(self.source)  # whose images, in 0..1, are what is changed
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
    """The window of the image's size at this corner of the image with a border of `crop` zeros."""
    padded = jnp.pad(image, ((crop, crop), (crop, crop), (0, 0)))
    return jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), image.shape)


def recoloured(image: Float[Array, "h w c"], light: Array, contrast: Array, colour: Array) -> Float[Array, "h w c"]:
    """Brightness times `light`, then contrast about the image's mean and saturation about its grey by their factors."""
    image = light * image
    image = image.mean() + contrast * (image - image.mean())
    grey = image.mean(-1, keepdims=True)
    return grey + colour * (image - grey)


@checked
def augmented(
    splits: Splits, *, warp: bool = False, crop: Whole = 0, flip: bool = False, jitter: Fraction = 0.0
) -> Splits:
    """The splits with training images augmented; validation, test and attributes in place of images stay as they are.

    Args:
        warp: turned, sheared, scaled and shifted as by Koch, Zemel & Salakhutdinov 2015, see `random_affine`.
        crop: a border of so many zeros is put around an image, and a window of the image's size cut out at random.
        flip: mirror left and right, every other time.
        jitter: brightness, contrast and saturation times factors of 1 +- jitter, in 0..1.

    Raises:
        ValueError: tasks whose x are no images, or options out of range.
    """
    like = jax.eval_shape(lambda: splits.train.sample(jax.random.key(0), 1)).query.x
    if getattr(like, "ndim", 0) != 5:
        came = getattr(like, "shape", "a tree")
        raise ValueError(f"augmentation: needs tasks of images [tasks, n, h, w, channels], came x of {came}")
    return splits._replace(train=Augmented(splits.train, warp, crop, flip, jitter))
