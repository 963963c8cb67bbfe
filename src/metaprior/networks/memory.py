"""External memories of a controller: least-recently-used access and the neural Turing machine.

`least_used` (Santoro et al. 2016, sec. 3) writes to the least used slot or to the one that was just read. `turing`
(Graves, Wayne & Danihelka 2014, sec. 3) writes at the heads' positions, which depend on content, on the previous
positions and on shifts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

SHIFTS = (-1, 0, 1)  # possible moves of a Turing machine's head in one step


class Memory(NamedTuple):
    """The state of a least-recently-used memory.

    Attributes:
        content: The slots' contents [slots, width].
        read: Weights of each head's last reading [heads, slots].
        usage: How much each slot was used recently [slots].
    """

    content: Float[Array, "slots width"]
    read: Float[Array, "heads slots"]
    usage: Float[Array, " slots"]


class Tape(NamedTuple):
    """The state of a neural Turing machine's memory.

    Attributes:
        content: The slots' contents [slots, width].
        read: Weights of each head's reading [heads, slots].
        write: Weights of each head's writing [heads, slots].
    """

    content: Float[Array, "slots width"]
    read: Float[Array, "heads slots"]
    write: Float[Array, "heads slots"]


class Access(NamedTuple):
    """A kind of memory.

    Attributes:
        heads: Number of heads.
        width: Numbers that a head reads per step.
        numbers: Numbers that a head needs from the controller per step.
        start: Function () -> the state of an empty memory.
        step: Function (state, the controller's numbers [heads, numbers]) -> the next state.
    """

    heads: int
    width: int
    numbers: int
    start: Callable[[], PyTree]
    step: Callable[[PyTree, Float[Array, "heads numbers"]], PyTree]


def found(memory: Memory | Tape) -> Float[Array, " n"]:
    """Returns what the heads have read, concatenated [heads width].

    Args:
        memory: The memory's state.
    """
    return (memory.read @ memory.content).reshape(-1)


def check_sizes(slots: int, width: int, heads: int) -> None:
    """Checks the sizes of a memory. Without heads there is no memory.

    Args:
        slots: Number of slots.
        width: Numbers in a slot.
        heads: Number of heads.

    Raises:
        ValueError: There are more heads than slots, or a slot is empty.
    """
    if heads < 0 or heads > slots or (heads and width < 1):
        came = f"slots={slots}, width={width}, heads={heads}"
        raise ValueError(f"width must be at least 1 and heads from 0 to slots, got {came}.")


def least_used(slots: int, width: int, heads: int, decay: float = 0.95, sharpen: bool = True) -> Access:
    """Makes a memory with least-recently-used access. A head takes a key, a gate and a sharpness of reading.

    Args:
        slots: Number of slots.
        width: Numbers in a slot.
        heads: Number of heads.
        decay: Factor by which usage decreases per step (eq. 5).
        sharpen: Use the sharpness. False uses 1, as in eq. 3.

    References:
        Santoro, Bartunov, Botvinick, Wierstra & Lillicrap 2016, sec. 3.
    """
    check_sizes(slots, width, heads)

    def step(memory: Memory, asked: Float[Array, "heads numbers"]) -> Memory:
        sharpness = 1 + jax.nn.softplus(asked[:, -1]) if sharpen else jnp.ones(heads)
        return access(memory, jnp.tanh(asked[:, :width]), jax.nn.sigmoid(asked[:, -2]), sharpness, decay)

    return Access(heads, width, width + 2, lambda: blank(slots, width, heads), step)


def turing(slots: int, width: int, heads: int) -> Access:
    """Makes the memory of a neural Turing machine.

    A head takes an address to write and one to read (a key, three numbers and the shifts), a vector to erase and one
    to add. The memory starts blank with head i at slot i, because content cannot distinguish blank slots.

    Args:
        slots: Number of slots.
        width: Numbers in a slot.
        heads: Number of heads.

    References:
        Graves, Wayne & Danihelka 2014, Neural Turing machines, sec. 3.
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
    """Returns an empty memory that has not been read.

    Args:
        slots: Number of slots.
        width: Numbers in a slot.
        heads: Number of heads.
    """
    return Memory(jnp.zeros((slots, width)), jnp.zeros((heads, slots)), jnp.zeros(slots))


def cosine(keys: Float[Array, "heads width"], content: Float[Array, "slots width"]) -> Float[Array, "heads slots"]:
    """Computes the cosine similarity of keys and slots (eq. 2). That of a blank slot is 0.

    Args:
        keys: Keys [heads, width].
        content: Contents [slots, width].
    """
    keys, content = (a * jax.lax.rsqrt((a**2).sum(-1, keepdims=True) + 1e-12) for a in (keys, content))
    return keys @ content.T


def access(
    memory: Memory, keys: Float[Array, "heads width"], gate: Float[Array, " heads"], sharpness: Array, decay: float
) -> Memory:
    """Writes the keys, then reads the memory with them.

    Head i writes its key with weight `gate` where it read last, and with weight 1 - gate to the i-th least used slot,
    which is erased first (eqs. 6-8, which are for one head). Reading weights are a softmax of the cosines times
    `sharpness` (1 in eq. 3). Usage decreases by the factor `decay` (eq. 5).

    Args:
        memory: The state before.
        keys: The heads' keys [heads, width].
        gate: The heads' gates in (0, 1) [heads].
        sharpness: The heads' factors of the cosines [heads].
        decay: Factor of the usage.

    Returns:
        The state after.
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
    """Computes the next weights of each head (Graves et al., eqs. 5-9).

    The weights are those of the key's content or the previous ones, mixed by a gate, then shifted and sharpened.

    Args:
        content: Contents [slots, width].
        before: The previous weights [heads, slots].
        asked: A key, a strength, a gate, a sharpness and the shifts of each head [heads, width + 6].
    """
    width = content.shape[1]
    key, (strength, gate, sharpness) = jnp.tanh(asked[:, :width]), asked[:, width : width + 3].T
    found = jax.nn.softmax(jax.nn.softplus(strength)[:, None] * cosine(key, content))
    gate = jax.nn.sigmoid(gate)[:, None]
    mixed = gate * found + (1 - gate) * before
    share = jax.nn.softmax(asked[:, width + 3 :])
    moved = sum(share[:, i, None] * jnp.roll(mixed, shift, -1) for i, shift in enumerate(SHIFTS))
    # w^p / sum w^p by logarithms, so that the derivative is not 0 where w is almost 0.
    return jax.nn.softmax((1 + jax.nn.softplus(sharpness))[:, None] * jnp.log(moved + 1e-12))


def written(
    content: Float[Array, "slots width"],
    write: Float[Array, "heads slots"],
    wipe: Float[Array, "heads width"],
    add: Float[Array, "heads width"],
) -> Float[Array, "slots width"]:
    """Applies every head's erasing, then every head's adding (Graves et al., eqs. 3-4).

    Args:
        content: Contents [slots, width].
        write: Weights of each head's writing [heads, slots].
        wipe: What each head erases, in (0, 1) [heads, width].
        add: What each head adds [heads, width].
    """
    return content * (1 - write[:, :, None] * wipe[:, None, :]).prod(0) + write.T @ add
