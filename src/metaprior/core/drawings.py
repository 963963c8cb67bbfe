"""Fixed features of images, without any learning: the baselines that a learned representation must beat.

Positions and widths are in 28ths of an image's side, so that features of the same drawing in two sizes are alike.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metaprior.core.named import lookup

UNIT = 28  # the side on which widths are stated
SPREAD = 0.21  # standard deviation of normalised ink along each axis, in sides
LEAST = 0.8  # smallest standard deviation of ink that is scaled as such: a dot or a straight line stays thin
DIRECTIONS = 8
GRID = 7  # cells along each side of the grid of orientation energies
POSITIVE = 1e-12

Images = Float[Array, "n h w c"]
Ink = Float[Array, "n h w"]


def ink_of(images: Images, dark: bool = False) -> Ink:
    """Computes how much ink each pixel has, from 0 to 1.

    The value is the mean over the channels, scaled so that each image spans 0 to 1. If a data set
    subtracts a mean and divides by a deviation, the value of images of one channel does not change. The channels of
    colour images then have other weights in the mean. A blank image has no ink.

    Args:
        images: Images [n, h, w, c] in any units.
        dark: Whether ink is darker than the background instead of lighter.
    """
    grey = images.mean(-1)
    low, high = (find(grey, (1, 2), keepdims=True) for find in (jnp.min, jnp.max))
    scaled = (grey - low) / jnp.maximum(high - low, POSITIVE)
    return jnp.where(high > low, 1 - scaled, 0) if dark else scaled


def blurred(images: Images, width: float) -> Images:
    """Blurs images by a Gaussian; at a border, the weights are those of the pixels inside, scaled to sum to 1.

    Args:
        images: Images [n, h, w, c].
        width: Standard deviation in 28ths of each side. 0 changes nothing.
    """
    if width == 0:
        return images
    rows, columns = (_gaussian(side, width * side / UNIT) for side in images.shape[1:3])
    return jnp.einsum("ih,nhwc,jw->nijc", rows, images, columns, precision="highest")


def _gaussian(side: int, deviation: float) -> Float[Array, "side side"]:
    apart = jnp.arange(side)[:, None] - jnp.arange(side)
    weights = jnp.exp(-(apart**2) / (2 * deviation**2))
    return weights / weights.sum(1, keepdims=True)


def moments(ink: Ink) -> tuple[Float[Array, "n 2"], Float[Array, "n 2"]]:
    """Computes the mean position of each image's ink and its standard deviation along each axis, in pixels.

    Args:
        ink: Ink [n, h, w] of at least 0. An image without ink has the centre as mean, and 0 as deviation.
    """
    found = []
    for axis in (2, 1):  # the rows' positions, from what is left after summing over columns; then the columns'
        share, place = ink.sum(axis), jnp.arange(ink.shape[3 - axis], dtype=ink.dtype)
        mass = share.sum(1)
        there, total = mass > 0, jnp.maximum(mass, POSITIVE)
        mean = jnp.where(there, (share * place).sum(1) / total, (place.size - 1) / 2)
        found.append((mean, jnp.sqrt((share * (place - mean[:, None]) ** 2).sum(1) / total)))
    (row, row_deviation), (column, column_deviation) = found
    return jnp.stack([row, column], 1), jnp.stack([row_deviation, column_deviation], 1)


def moment_normalised(ink: Ink) -> Ink:
    """Moves and scales each drawing: its mean comes to the centre, and its deviation along each axis to 0.21 sides.

    The pixel at position i takes the value at mean + (i - centre) * deviation / (0.21 side), by bilinear interpolation.
    Outside of the image there is no ink.

    Args:
        ink: Ink [n, h, w] of at least 0.

    Returns:
        Ink of the same shape.
    """
    mean, deviation = moments(ink)
    weights = []
    for axis, side in enumerate(ink.shape[1:]):
        scale = jnp.maximum(deviation[:, axis], LEAST * side / UNIT) / (SPREAD * side)
        source = mean[:, axis, None] + (jnp.arange(side) - (side - 1) / 2) * scale[:, None]
        weights.append(jnp.maximum(1 - jnp.abs(source[:, :, None] - jnp.arange(side)), 0))
    return jnp.einsum("nih,nhw,njw->nij", weights[0], ink, weights[1], precision="highest")


def orientation_energies(grey: Ink, directions: int = DIRECTIONS, grid: int = GRID) -> Float[Array, "n d"]:
    """Computes how strong the edges of each direction are around each point of a grid.

    The image is blurred with width 1. Its gradient of length r and angle a is shared among the directions by
    r max(0, cos(2 a - 2 pi k / directions))^2, which is the same for opposite gradients. Each direction's map is
    blurred with width 2 and read at the middle of each cell of the grid. The result has unit length; that of a blank
    image is 0.

    Args:
        grey: Images of one channel [n, h, w], in any units; light on dark and dark on light give the same.
        directions: The number of directions.
        grid: The number of cells along each side.

    Returns:
        Features [n, grid * grid * directions].
    """
    rows, columns = jnp.gradient(blurred(grey[..., None], 1.0)[..., 0], axis=(1, 2))
    squares = rows**2 + columns**2 + POSITIVE
    double = jnp.stack([columns**2 - rows**2, 2 * rows * columns], -1) / squares[..., None]  # cos 2a and sin 2a
    wanted = 2 * math.pi * jnp.arange(directions) / directions
    along = jnp.matmul(double, jnp.stack([jnp.cos(wanted), jnp.sin(wanted)]), precision="highest")
    energy = jnp.sqrt(squares)[..., None] * jnp.maximum(along, 0) ** 2
    smooth = blurred(energy, 2.0)
    for axis in (1, 2):
        side = grey.shape[axis]
        smooth = jnp.take(smooth, jnp.asarray([int((i + 0.5) * side / grid) for i in range(grid)]), axis)
    flat = smooth.reshape(len(grey), -1)
    norm = jnp.sqrt((flat**2).sum(1, keepdims=True))
    return jnp.where(norm > 1e-9, flat / jnp.maximum(norm, 1e-9), 0)


def ink_points(ink: Ink, most: int, scaled: bool = False) -> Float[Array, "n most 3"]:
    """Returns the centred positions of each drawing's ink: the pixels with more than half of the darkest one's.

    Args:
        ink: Ink [n, h, w] from 0 to 1.
        most: The number of points. A drawing of more ink is thinned evenly in the order of its pixels.
        scaled: Whether each axis is divided by its standard deviation.

    Returns:
        Row, column and weight of each point. The weight is 1, or 0 after the last point. A blank image has one point.
    """
    width = ink.shape[2]

    def one(image: Float[Array, "h w"]) -> Float[Array, "most 3"]:
        there = image.reshape(-1) > 0.5
        total = there.sum()
        (places,) = jnp.nonzero(there, size=there.size, fill_value=0)
        turn = jnp.arange(most)
        chosen = places[jnp.where(total > most, turn * total // most, jnp.minimum(turn, there.size - 1))]
        weight = (turn < jnp.maximum(total, 1)).astype(image.dtype)
        points = jnp.stack([chosen // width, chosen % width], 1).astype(image.dtype)
        points = points - (points * weight[:, None]).sum(0) / weight.sum()
        if scaled:
            deviation = jnp.sqrt((points**2 * weight[:, None]).sum(0) / weight.sum())
            points = points / jnp.maximum(deviation, LEAST * width / UNIT)
        return jnp.concatenate([points, weight[:, None]], 1)

    return jax.vmap(one)(ink)


def modified_hausdorff(a: Float[Array, "n most 3"], b: Float[Array, "m most 3"]) -> Float[Array, "n m"]:
    """Computes the modified Hausdorff distance between sets of points: the larger of the two mean nearest distances.

    Args:
        a: Points of n drawings, as `ink_points` returns them.
        b: Points of m drawings.

    References:
        Dubuisson & Jain (1994), distance 22 of their table; Lake et al. (2015) use it as a baseline.
    """

    def one_way(p: Float[Array, "most 3"], q: Float[Array, "most 3"]) -> Float[Array, ""]:
        absent = jnp.where(q[:, 2] > 0, 0, jnp.inf)
        apart = (p[:, None, 0] - q[None, :, 0]) ** 2 + (p[:, None, 1] - q[None, :, 1]) ** 2 + absent
        return (jnp.sqrt(apart.min(1)) * p[:, 2]).sum() / p[:, 2].sum()

    def row(p: Float[Array, "most 3"]) -> Float[Array, " m"]:
        return jax.vmap(lambda q: jnp.maximum(one_way(p, q), one_way(q, p)))(b)

    return jax.lax.map(row, a)


def _pixels(x: Array, dark: bool, blur: float) -> Float[Array, "n d"]:
    return x.reshape(len(x), -1)


def _blurred(x: Images, dark: bool, blur: float) -> Float[Array, "n d"]:
    return blurred(x, blur).reshape(len(x), -1)


def _orientation(x: Images, dark: bool, blur: float) -> Float[Array, "n d"]:
    return orientation_energies(x.mean(-1))


def _normalised(features: Callable[..., Array], x: Images, dark: bool, blur: float) -> Float[Array, "n d"]:
    return features(moment_normalised(ink_of(x, dark))[..., None], dark, blur)


PLAIN = {"pixels": _pixels, "blurred": _blurred, "orientation": _orientation}
FEATURES = PLAIN | {f"normalised_{name}": partial(_normalised, features) for name, features in PLAIN.items()}
POINTS = {"hausdorff": False, "normalised_hausdorff": True}  # whether each axis is divided by its deviation


def check_images(x: Array, name: str) -> None:
    """Checks that inputs are images.

    Raises:
        ValueError: Inputs that are not [n, h, w, channels].
    """
    if getattr(x, "ndim", 0) != 4:
        raise ValueError(
            f"x must be images [n, height, width, channels] for the features {name!r}, got shape "
            f"{tuple(getattr(x, 'shape', ()))}. Use 'pixels' for other inputs."
        )


def fixed_features(name: str, x: Array, *, dark: bool = False, blur: float = 1.5) -> Float[Array, "n d"]:
    """Computes fixed features of images by name.

    | name | what |
    | --- | --- |
    | "pixels" | the inputs, flat; they need not be images |
    | "blurred" | the images blurred by a Gaussian |
    | "orientation" | `orientation_energies` of the grey image |
    | "normalised_pixels", "normalised_blurred", "normalised_orientation" | the same after `moment_normalised` |

    The channels of a colour image are averaged for all but the first two.

    Args:
        name: The features' name.
        x: Images [n, h, w, c].
        dark: Whether ink is darker than the background; only the normalised features depend on it.
        blur: The standard deviation for "blurred" and "normalised_blurred", in 28ths of the side.

    Raises:
        ValueError: The name is unknown, or x are not images.

    References:
        Lake, Salakhutdinov & Tenenbaum (2015) for the drawings.
    """
    features = lookup("features", name, FEATURES)
    if name != "pixels":
        check_images(x, name)
    return features(x, dark, blur)
