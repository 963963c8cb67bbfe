"""A bag of embeddings: the weighted sum of the vectors of a text's words or n-grams."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metaprior.core.options import Count, Way, checked
from metaprior.core.types import PLAIN, Call, Model
from metaprior.networks.layers import dense, dense_init, modulated, shown


def check_tokens(x: Array) -> None:
    """Checks that x is a batch of token numbers.

    Args:
        x: The batch.

    Raises:
        ValueError: It is not an array of integers [n, length].
    """
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"x must be integers [n, length] with 0 as padding, got {x.dtype} of shape {x.shape}.")


def table_init(key: PRNGKeyArray, rows: int, width: int) -> Float[Array, "rows width"]:
    """Draws random vectors of length about 1, which are nearly orthogonal in high dimensions.

    Args:
        key: Random key.
        rows: Number of vectors.
        width: Their dimension.
    """
    return jax.random.normal(key, (rows, width)) / width**0.5


@checked
def bag(
    outputs: Count = 5,
    buckets: Way = 16384,
    width: Count = 128,
    hidden: Sequence[Count] = (),
    places: bool = False,
    head: bool = True,
) -> Model:
    """Sums word vectors, sum_i w_i e_i / sqrt(sum_i w_i^2) over a text's words i, then dense layers and a linear head.

    Inputs are integers [n, length]: 0 is padding, and any other number is looked up modulo `buckets`. The number may be
    a hash, and words share rows if the table is smaller than the vocabulary. The weights w > 0 start at 1. With the
    division, the sum has a length of about 1 at first, however many words there are.

    Args:
        outputs: Number of outputs.
        buckets: Number of rows of the embedding table.
        width: Dimension of the word vectors.
        hidden: Widths of the dense layers with ReLU.
        places: Multiply each word vector by a learned vector of its position in the row (Mnih & Hinton 2007, diagonal
            case), for texts whose positions have a meaning.
        head: Whether the network has the linear head. False returns the embedding.

    References:
        Joulin et al. 2017, Bag of tricks for efficient text classification (bags of hashed n-grams).
    """
    names = [f"layer{i + 1}" for i in range(len(hidden))]

    def init(key: PRNGKeyArray, x: Int[Array, "n length"]) -> dict:
        check_tokens(x)
        key_table, *keys = jax.random.split(key, len(names) + 2)
        sizes = [width, *hidden, outputs]
        params: dict = {"table": table_init(key_table, buckets, width), "log_weight": jnp.zeros(buckets)}
        if places:
            params["places"] = jnp.ones((x.shape[1], width))
        layers = [*names, "head"] if head else names
        for name, k, (i, o) in zip(layers, keys, pairwise(sizes), strict=False):
            params[name] = dense_init(k, i, o)
        return params

    def features(params: dict, x: Int[Array, "n length"], call: Call = PLAIN) -> Float[Array, "n d"]:
        check_tokens(x)
        row = x % buckets
        weight = jnp.where(x > 0, jnp.exp(params["log_weight"][row]), 0)
        seen = params["table"][row]
        if places:
            seen = seen * params["places"]
        # The smallest normal number gives an empty text the value 0 with a finite derivative.
        scale = jax.lax.rsqrt((weight**2).sum(-1, keepdims=True) + jnp.finfo(weight.dtype).tiny)
        f = jnp.einsum("nl,nld->nd", weight * scale, seen)
        for name in names:
            f = shown(name, jax.nn.relu(modulated(name, dense(name, params[name], f, call), call)), call)
        return f

    def apply(params: dict, x: Int[Array, "n length"], call: Call = PLAIN) -> Array:
        f = features(params, x, call)
        return shown("head", dense("head", params["head"], f, call), call) if head else f

    return Model(init, apply, features, calls=True)
