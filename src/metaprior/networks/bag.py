"""A bag of embeddings: a text's words or n-grams, each with a vector and a weight of its own, summed."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metaprior.core.options import Count, Way, checked
from metaprior.core.types import PLAIN, Call, Model
from metaprior.networks.layers import dense, dense_init, modulated


def check_tokens(x: Array) -> None:
    """A ValueError where x is no batch of rows of whole numbers."""
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"x: came {x.dtype} {x.shape}, needs whole numbers [n, length], 0 where there is no word")


def table_init(key: PRNGKeyArray, rows: int, width: int) -> Float[Array, "rows width"]:
    """Random vectors of length about 1: in high dimensions nearly orthogonal, so that unlike words start unlike."""
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
    """sum_i w_i e_i / sqrt(sum_i w_i^2) over a text's words i, then layers with ReLU, and a linear head.

    x: whole numbers [n, length]; 0 is padding, any other number is looked up modulo `buckets` (so a hash may be given,
    and a table smaller than the vocabulary lets words share rows). The weights w > 0 start at 1; divided so, the bag of
    a new network has a length of about 1 whatever its size. places: a vector for each place in the row multiplies the
    words that stand there (Mnih & Hinton 2007, diagonal), for texts whose places mean something. head=False ends at
    the embedding.

    Source: Joulin et al. 2017 (bags of hashed n-grams).
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
        # The least normal number keeps an empty text at zero, with a derivative that is finite.
        scale = jax.lax.rsqrt((weight**2).sum(-1, keepdims=True) + jnp.finfo(weight.dtype).tiny)
        f = jnp.einsum("nl,nld->nd", weight * scale, seen)
        for name in names:
            f = jax.nn.relu(modulated(name, dense(name, params[name], f, call), call))
        return f

    def apply(params: dict, x: Int[Array, "n length"], call: Call = PLAIN) -> Array:
        f = features(params, x, call)
        return dense("head", params["head"], f, call) if head else f

    return Model(init, apply, features, calls=True)
