"""Random affine warps of images: the distortions by which Koch, Zemel & Salakhutdinov (2015, sec. 3.3) multiply pairs.

A warp turns by an angle of +-10 degrees, shears and scales each axis and shifts it, each of these with probability 1/2.
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, PRNGKeyArray

TURN, SHEAR, SCALE, SHIFT = 10.0, 0.3, 0.2, 2 / 105  # degrees, share, share, share of the image's side; each to +-
CHANCE = 0.5  # of each of the seven components


def warp(image: Float[Array, "h w c"], matrix: Float[Array, "2 2"], shift: Float[Array, " 2"]) -> Float[Array, "h w c"]:
    """The image under p -> matrix (p - centre) + centre + shift, p = (row, column): bilinear, 0 from outside."""
    h, w, _ = image.shape
    centre = jnp.array([(h - 1) / 2, (w - 1) / 2])
    rows, columns = jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij")
    target = jnp.stack([rows, columns]).reshape(2, -1) - (centre + shift)[:, None]
    # 2 x 2 by hand: a batched solver is dear where one is drawn an image.
    (a, b), (c, d) = matrix
    inverse = jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)
    source = inverse @ target + centre[:, None]

    def one(channel: Float[Array, "h w"]) -> Float[Array, "h w"]:
        return map_coordinates(channel, list(source), order=1, mode="constant", cval=0.0).reshape(h, w)

    return jax.vmap(one, in_axes=-1, out_axes=-1)(image)


def random_affine(key: PRNGKeyArray) -> tuple[Float[Array, "2 2"], Float[Array, " 2"]]:
    """A matrix (turn, then shear, then scale) and a shift in shares of the side, drawn as in the paper."""
    key_size, key_there = jax.random.split(key)
    u = jax.random.uniform(key_size, (7,), minval=-1.0) * jax.random.bernoulli(key_there, CHANCE, (7,))
    angle = jnp.deg2rad(TURN * u[0])
    turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    shear = jnp.eye(2).at[0, 1].set(SHEAR * u[1]).at[1, 0].set(SHEAR * u[2])
    return jnp.diag(1 + SCALE * u[3:5]) @ shear @ turn, SHIFT * u[5:]


def affine(key: PRNGKeyArray, image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """The image under a random warp; what comes in from outside is 0."""
    matrix, shift = random_affine(key)
    return warp(image, matrix, shift * jnp.array(image.shape[:2], image.dtype))
