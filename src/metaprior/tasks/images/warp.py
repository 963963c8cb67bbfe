"""Random affine warps of images.

A warp rotates by an angle of at most 10 degrees, shears and scales each axis, and shifts the image. Each of the seven
components is applied with probability 1/2.

References:
    Koch, Zemel & Salakhutdinov 2015, sec. 3.3, who use these distortions to augment pairs.
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, PRNGKeyArray

TURN, SHEAR, SCALE, SHIFT = (
    10.0,
    0.3,
    0.2,
    2 / 105,
)  # degrees, fraction, fraction, fraction of the side; largest values of either sign
CHANCE = 0.5  # probability of each of the seven components


def warp(image: Float[Array, "h w c"], matrix: Float[Array, "2 2"], shift: Float[Array, " 2"]) -> Float[Array, "h w c"]:
    """Warps an image by p -> matrix (p - centre) + centre + shift, with p = (row, column).

    Values are interpolated bilinearly, and are 0 outside the image.

    Args:
        image: [h, w, c].
        matrix: [2, 2], invertible.
        shift: Rows and columns, in pixels.

    Returns:
        The warped image, of the same shape.
    """
    h, w, _ = image.shape
    centre = jnp.array([(h - 1) / 2, (w - 1) / 2])
    rows, columns = jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij")
    target = jnp.stack([rows, columns]).reshape(2, -1) - (centre + shift)[:, None]
    # The 2 x 2 inverse is written out, because a batched solver is slow with one matrix per image.
    (a, b), (c, d) = matrix
    inverse = jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)
    source = inverse @ target + centre[:, None]

    def one(channel: Float[Array, "h w"]) -> Float[Array, "h w"]:
        return map_coordinates(channel, list(source), order=1, mode="constant", cval=0.0).reshape(h, w)

    return jax.vmap(one, in_axes=-1, out_axes=-1)(image)


def random_affine(key: PRNGKeyArray) -> tuple[Float[Array, "2 2"], Float[Array, " 2"]]:
    """Draws a warp as in the paper.

    Args:
        key: Random key.

    Returns:
        The matrix (rotation, then shear, then scaling), and the shift in sides of the image.
    """
    key_size, key_there = jax.random.split(key)
    u = jax.random.uniform(key_size, (7,), minval=-1.0) * jax.random.bernoulli(key_there, CHANCE, (7,))
    angle = jnp.deg2rad(TURN * u[0])
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    shear = jnp.eye(2).at[0, 1].set(SHEAR * u[1]).at[1, 0].set(SHEAR * u[2])
    return jnp.diag(1 + SCALE * u[3:5]) @ shear @ turn, SHIFT * u[5:]


def affine(key: PRNGKeyArray, image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """Warps an image at random; values outside the image are 0."""
    matrix, shift = random_affine(key)
    return warp(image, matrix, shift * jnp.array(image.shape[:2], image.dtype))
