"""External memory with cosine addressing and least-recently-used access (Santoro et al. 2016, sec. 3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Memory(NamedTuple):
    """What is stored, where each head read last, and how recently each slot was used."""

    content: Float[Array, "slots width"]
    read: Float[Array, "heads slots"]
    usage: Float[Array, " slots"]


def blank(slots: int, width: int, heads: int) -> Memory:
    """Nothing stored, nowhere read."""
    return Memory(jnp.zeros((slots, width)), jnp.zeros((heads, slots)), jnp.zeros(slots))


def cosine(keys: Float[Array, "heads width"], content: Float[Array, "slots width"]) -> Float[Array, "heads slots"]:
    """Cosine similarity (eq. 2); a blank slot is similar to nothing."""
    keys, content = (a * jax.lax.rsqrt((a**2).sum(-1, keepdims=True) + 1e-12) for a in (keys, content))
    return keys @ content.T


def access(
    memory: Memory, keys: Float[Array, "heads width"], gate: Float[Array, " heads"], sharpness: Array, decay: float
) -> Memory:
    """Write the keys, then look them up; `new.read @ new.content` is what the heads read.

    Head i writes its key where it read last, in proportion to its gate, and else to the i-th least used slot, which is
    wiped first (eqs. 6-8, which are of one head). Reading weights are a softmax of the cosines times
    `sharpness` (eq. 3 has 1). Usage fades by `decay` (eq. 5).
    """
    slots = memory.usage.shape[0]
    least = jax.nn.one_hot(jax.lax.top_k(-memory.usage, keys.shape[0])[1], slots)
    write = gate[:, None] * memory.read + (1 - gate)[:, None] * least
    content = memory.content * (1 - least.sum(0))[:, None] + write.T @ keys
    read = jax.nn.softmax(sharpness[:, None] * cosine(keys, content))
    return Memory(content, read, decay * memory.usage + read.sum(0) + write.sum(0))
