"""Embeddings of images that no label has touched: from a file, fixed, or learned here from the training images."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt8

from metaprior.core.drawings import FEATURES, fixed_features
from metaprior.core.extras import extra
from metaprior.core.named import lookup
from metaprior.core.options import Count, NonNegative, Seed, Whole, check_fields
from metaprior.tasks.checks import DataError
from metaprior.tasks.limits import open_arrays
from metaprior.tasks.pool import ClassPool
from metaprior.tasks.store import cached, reading, stamp

FILES = (".npy", ".npz")
LEARNED = ("autoencoder", "whitened")
CHUNK = 500  # images at once


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How images become vectors. Everything that is learned is learned from the training images alone.

    Attributes:
        embedding: A fixed feature (see `core.drawings.fixed_features`); "autoencoder", learned here; "whitened", the
            ZCA-whitened pixels of Hsu et al. (2019); or the path of a .npy or .npz file with one row per image.
        pca: The number of principal components to keep; 0 keeps the coordinates as they are.
        blur: The standard deviation for blurred features, in 28ths of the side.
        ink: Whether drawings are light on dark or dark on light, for normalised features.
        code: The number of outputs of the autoencoder's encoder.
        steps: The number of steps of the autoencoder's training, on 256 images each.
        seed: The seed of what is learned.
    """

    embedding: str = "normalised_orientation"
    pca: Whole = 64
    blur: NonNegative = 2.0
    ink: Literal["light", "dark"] = "light"
    code: Count = 64
    steps: Count = 1000
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self, "clusters.")
        if not self.embedding.endswith(FILES):
            lookup(
                "clusters.embedding (or the path of a .npy or .npz file)", self.embedding, dict.fromkeys(self.names())
            )

    @staticmethod
    def names() -> tuple[str, ...]:
        """Returns the names of all embeddings that do not come from a file."""
        return (*FEATURES, *LEARNED)


def embedded(
    pool: ClassPool, how: Embedding, train: Int[np.ndarray, " n"], rows: Int[np.ndarray, " m"]
) -> Float[np.ndarray, "m d"]:
    """Embeds images of a pool. The result is cached on disk.

    Args:
        pool: The pool.
        how: The embedding.
        train: The rows of the images from which it is learned.
        rows: The rows of the images to embed.

    Returns:
        One vector per row.

    Raises:
        DataError: A file of another length, with values that are not finite, or more components than images or
            coordinates.
    """
    file = how.embedding.endswith(FILES)
    origin = stamp(how.embedding) if file and Path(how.embedding).is_file() else how.embedding
    images = np.asarray(pool.images)
    names = ("embedding", "pca", "blur", "ink", "code", "steps", "seed")
    identity = {"version": 1, "how": [getattr(how, name) for name in names], "origin": origin}
    identity |= {"images": digest(images), "train": digest(train), "rows": digest(rows)}

    def build() -> dict[str, np.ndarray]:
        return {"z": _embed(images, how, train, rows)}

    return np.asarray(cached("embedding", identity, build)["z"])


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's type, shape and values."""
    contiguous = np.ascontiguousarray(array)
    return sha256(f"{contiguous.dtype} {contiguous.shape}".encode() + contiguous.tobytes()).hexdigest()


def _embed(images: UInt8[np.ndarray, "total h w c"], how: Embedding, train: Any, rows: Any) -> np.ndarray:
    parts = [train, rows] if how.pca else [rows]
    if how.embedding.endswith(FILES):
        found = [_from_file(how.embedding, len(images), train, part) for part in parts]
    elif how.embedding == "autoencoder":
        encoder = autoencoder(images[train].reshape(len(train), -1), how.code, how.steps, jax.random.key(how.seed))
        found = [_by_chunks(lambda x: encode(encoder, x.reshape(len(x), -1)), images, part) for part in parts]
    elif how.embedding == "whitened":
        found = _whitened(images[train].reshape(len(train), -1), images[rows].reshape(len(rows), -1))
    else:

        def features(x: Array) -> Array:
            return fixed_features(how.embedding, x, dark=how.ink == "dark", blur=how.blur)

        found = [_by_chunks(jax.jit(features), images, part) for part in parts]
    if how.pca == 0:
        return found[-1].astype(np.float32)
    if how.pca > (most := min(found[0].shape)):
        raise DataError(
            f"clusters.pca must be at most {most}, the smaller of the {len(train)} training images and the "
            f"{found[0].shape[1]} coordinates of the embedding, got {how.pca}."
        )
    with extra("sklearn", "Principal components"):
        from sklearn.decomposition import PCA
    fitted = PCA(how.pca, svd_solver="covariance_eigh" if found[0].shape[1] <= 2000 else "auto", random_state=how.seed)
    return fitted.fit(found[0]).transform(found[1]).astype(np.float32)


def _by_chunks(function: Any, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    chunks = np.split(rows, range(CHUNK, len(rows), CHUNK))
    return np.concatenate([np.asarray(function(jnp.asarray(images[chunk], jnp.float32) / 255)) for chunk in chunks])


def _from_file(path: str, total: int, train: np.ndarray, rows: np.ndarray) -> np.ndarray:
    with reading(path):
        if path.endswith(".npz"):
            with open_arrays(path) as file:
                if len(file.files) != 1:
                    raise DataError(
                        f"{path} must hold one array, the embedding, got {', '.join(file.files) or 'none'}."
                    )
                z = file[file.files[0]]
        else:
            z = np.load(path, allow_pickle=False)
    if z.ndim != 2 or not z.shape[1] or z.dtype.kind not in "fiu" or len(z) not in (total, len(train)):
        raise DataError(
            f"{path} must be numbers [{total}, d], one row per image of the pool in its order, or [{len(train)}, d], "
            f"one per training image, got {z.dtype} of shape {z.shape}."
        )
    if not np.isfinite(z).all():
        raise DataError(f"{path} must hold finite numbers, got NaN or infinity.")
    if len(z) == total:
        return z[rows].astype(np.float32)
    place = np.searchsorted(train, rows)  # training rows are sorted
    if not np.array_equal(train[np.minimum(place, len(train) - 1)], rows):
        raise DataError(
            f"{path} must hold {total} rows, as images that are not for training are embedded too, got {len(z)}."
        )
    return z[place].astype(np.float32)


def _whitened(train: np.ndarray, rows: np.ndarray, epsilon: float = 1e-5) -> list[np.ndarray]:
    """Whitens pixels after scaling each image by its own mean and its variance plus 10 (of 255 x 255)."""
    scaled = []
    for part in (train, rows):
        x = part.astype(np.float64)
        x -= x.mean(1, keepdims=True)
        scaled.append(x / np.sqrt(x.var(1, keepdims=True) + 10))
    mean = scaled[0].mean(0)
    values, vectors = np.linalg.eigh(np.cov(scaled[0] - mean, rowvar=False))
    matrix = (vectors / np.sqrt(np.maximum(values, 0) + epsilon)) @ vectors.T
    return [(x - mean) @ matrix for x in scaled]


Layers = list[tuple[Float[Array, "a b"], Float[Array, " b"]]]


def encode(layers: Layers, x: Float[Array, "n d"]) -> Float[Array, "n c"]:
    """Applies dense layers with ReLU between them.

    Args:
        layers: Weights and biases.
        x: Inputs.
    """
    for place, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        x = jax.nn.relu(x) if place < len(layers) - 1 else x
    return x


def autoencoder(images: UInt8[np.ndarray, "n d"], code: int, steps: int, key: PRNGKeyArray) -> Layers:
    """Learns an autoencoder d-512-256-code-256-512-d by the mean squared error of the pixels.

    The optimiser is Adam with rate 1e-3 on 256 random images a step. Longer training makes clusters worse: the code
    then holds details of the drawing.

    Args:
        images: Flat training images, 0 to 255.
        code: The number of the code's coordinates.
        steps: The number of steps.
        key: Random key.

    Returns:
        The layers of the encoder.
    """
    sizes, key_init, key_draw = [images.shape[1], 512, 256, code], *jax.random.split(key)
    widths = [*sizes, *sizes[-2::-1]]
    keys = jax.random.split(key_init, len(widths) - 1)
    layers = [
        (jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, jnp.zeros(b))
        for k, a, b in zip(keys, widths, widths[1:], strict=False)
    ]
    optimizer = optax.adam(1e-3)
    depth = len(sizes) - 1

    def loss(layers: Layers, x: Array) -> Array:
        return ((encode(layers[depth:], encode(layers[:depth], x)) - x) ** 2).mean()

    @jax.jit
    def train(layers: Layers, data: UInt8[Array, "n d"]) -> Layers:
        def step(carry: PyTree, key: PRNGKeyArray) -> tuple[PyTree, None]:
            layers, state = carry
            x = data[jax.random.randint(key, (min(256, len(data)),), 0, len(data))].astype(jnp.float32) / 255
            updates, state = optimizer.update(jax.grad(loss)(layers, x), state)
            return (optax.apply_updates(layers, updates), state), None

        return jax.lax.scan(step, (layers, optimizer.init(layers)), jax.random.split(key_draw, steps))[0][0]

    return train(layers, jnp.asarray(images))[:depth]
