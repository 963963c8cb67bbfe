"""External memories that a controller asks: least-recently-used access, and the neural Turing machine's.

`least_used` (Santoro et al. 2016, sec. 3) writes to a slot that is new or was just read. `turing` (Graves, Wayne &
Danihelka 2014, sec. 3) writes where its heads are: by content, by where they were, and by shifts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

SHIFTS = (-1, 0, 1)  # that a Turing machine's head can make at once


class Memory(NamedTuple):
    """What is stored, where each head read last, and how recently each slot was used."""

    content: Float[Array, "slots width"]
    read: Float[Array, "heads slots"]
    usage: Float[Array, " slots"]


class Tape(NamedTuple):
    """What is stored, and where each head reads and writes."""

    content: Float[Array, "slots width"]
    read: Float[Array, "heads slots"]
    write: Float[Array, "heads slots"]


class Access(NamedTuple):
    """A kind of memory: its heads, each of which asks `numbers` and reads `width`; how it starts and how it goes on."""

    heads: int
    width: int
    numbers: int
    start: Callable[[], PyTree]
    step: Callable[[PyTree, Float[Array, "heads numbers"]], PyTree]


def found(memory: Memory | Tape) -> Float[Array, " n"]:
    """What the heads have read, one after another."""
    return (memory.read @ memory.content).reshape(-1)


def check_sizes(slots: int, width: int, heads: int) -> None:
    """A ValueError unless each head can have a slot of its own and a slot holds something; no heads are no memory."""
    if heads < 0 or heads > slots or (heads and width < 1):
        came = f"{slots}, {width}, {heads}"
        raise ValueError(f"slots, width, heads: came {came}; needs width >= 1 and 0 <= heads <= slots")


def least_used(slots: int, width: int, heads: int, decay: float = 0.95, sharpen: bool = True) -> Access:
    """Each head asks a key, its gate, and how sharply it reads (heeded if `sharpen`)."""
    check_sizes(slots, width, heads)

    def step(memory: Memory, asked: Float[Array, "heads numbers"]) -> Memory:
        sharpness = 1 + jax.nn.softplus(asked[:, -1]) if sharpen else jnp.ones(heads)
        return access(memory, jnp.tanh(asked[:, :width]), jax.nn.sigmoid(asked[:, -2]), sharpness, decay)

    return Access(heads, width, width + 2, lambda: blank(slots, width, heads), step)


def turing(slots: int, width: int, heads: int) -> Access:
    """Each head asks where to write and where to read (a key, three numbers, the shifts), what to wipe and to add.

    The tape starts blank with head i at slot i: a blank tape looks the same everywhere, so content finds no place.
    """
    check_sizes(slots, width, heads)
    address = width + 3 + len(SHIFTS)

    def start() -> Tape:
        return Tape(jnp.zeros((slots, width)), jnp.eye(heads, slots), jnp.eye(heads, slots))

    def step(tape: Tape, asked: Float[Array, "heads numbers"]) -> Tape:
        to_write, to_read, wipe, add = jnp.split(asked, [address, 2 * address, 2 * address + width], -1)
        write = locate(tape.content, tape.write, to_write)
        content = written(tape.content, write, jax.nn.sigmoid(wipe), jnp.tanh(add))
        return Tape(content, locate(content, tape.read, to_read), write)

    return Access(heads, width, 2 * address + 2 * width, start, step)


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
    """Write the keys, then look them up.

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


def locate(
    content: Float[Array, "slots width"], before: Float[Array, "heads slots"], asked: Float[Array, "heads numbers"]
) -> Float[Array, "heads slots"]:
    """Where each head goes: by its key, or from where it was, then shifted and sharpened (Graves et al., eqs. 5-9)."""
    width = content.shape[1]
    key, (strength, gate, sharpness) = jnp.tanh(asked[:, :width]), asked[:, width : width + 3].T
    found = jax.nn.softmax(jax.nn.softplus(strength)[:, None] * cosine(key, content))
    gate = jax.nn.sigmoid(gate)[:, None]
    mixed = gate * found + (1 - gate) * before
    share = jax.nn.softmax(asked[:, width + 3 :])
    moved = sum(share[:, i, None] * jnp.roll(mixed, shift, -1) for i, shift in enumerate(SHIFTS))
    # w^p / sum w^p by logarithms: a place that is as good as 0 has a derivative all the same.
    return jax.nn.softmax((1 + jax.nn.softplus(sharpness))[:, None] * jnp.log(moved + 1e-12))


def written(
    content: Float[Array, "slots width"],
    write: Float[Array, "heads slots"],
    wipe: Float[Array, "heads width"],
    add: Float[Array, "heads width"],
) -> Float[Array, "slots width"]:
    """Every head's wiping, then every head's adding (Graves et al., eqs. 3-4)."""
    return content * (1 - write[:, :, None] * wipe[:, None, :]).prod(0) + write.T @ add
