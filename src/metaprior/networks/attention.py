"""Scaled dot-product attention (Vaswani et al. 2017, eq. 1) over a set whose members have weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def shares(scores: Float[Array, "*m n"], weight: Float[Array, "*m n"]) -> Float[Array, "*m n"]:
    """Each member's share, in proportion to weight exp(score): a softmax in which weight 0 is not there.

    The shares add up to 1, or to 0 where there is no member at all.
    """
    there = weight > 0
    # The largest score that counts is taken off, so that no exponential overflows.
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
    """For each query and head the mean of the values, in proportion to weight exp(query . key / sqrt(d)).

    A key of weight 0 is not there; over no key at all the mean is 0.
    """
    scores = jnp.einsum("qhd,nhd->hqn", queries, keys) / keys.shape[-1] ** 0.5
    return jnp.einsum("hqn,nhe->qhe", shares(scores, weight), values)
