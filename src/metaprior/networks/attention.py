"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1) over a weighted set."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def shares(scores: Float[Array, "*m n"], weight: Float[Array, "*m n"]) -> Float[Array, "*m n"]:
    """Computes a weighted softmax: shares in proportion to weight exp(score).

    Args:
        scores: Scores [..., n].
        weight: Weights [..., n] of at least 0. A member of weight 0 is ignored.

    Returns:
        Shares [..., n]. They add up to 1, or to 0 if all weights are 0.
    """
    there = weight > 0
    # The largest score of a member with weight is subtracted, so that no exponential overflows.
    top = jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True, initial=-1e30, where=there))
    mass = weight * jnp.exp(jnp.where(there, scores - top, 0))
    total = mass.sum(-1, keepdims=True)
    return mass / jnp.where(total > 0, total, 1)


def attend(
    queries: Float[Array, "q h d"],
    keys: Float[Array, "n h d"],
    values: Float[Array, "n h e"],
    weight: Float[Array, "*q n"],
) -> Float[Array, "q h e"]:
    """Computes for each query and head the mean of the values, weighted by weight exp(query . key / sqrt(d)).

    Args:
        queries: q queries for h heads [q, h, d].
        keys: n keys [n, h, d].
        values: n values [n, h, e].
        weight: Weights of the n keys [n] or, for each query, [q, n]. A key of weight 0 is ignored.

    Returns:
        Means [q, h, e]; 0 if all weights are 0.

    References:
        Vaswani et al. 2017, Attention is all you need, eq. 1.
    """
    scores = jnp.einsum("qhd,nhd->hqn", queries, keys) / keys.shape[-1] ** 0.5
    return jnp.einsum("hqn,nhe->qhe", shares(scores, weight), values)
