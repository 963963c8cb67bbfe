"""A long short-term memory cell (Hochreiter & Schmidhuber 1997; forget gate of Gers, Schmidhuber & Cummins 2000)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


class LSTMState(NamedTuple):
    """What a cell hands on: its output h and its memory c."""

    h: Float[Array, "*n d"]
    c: Float[Array, "*n d"]


def lstm_init(key: PRNGKeyArray, inputs: int, hidden: int) -> dict[str, Array]:
    """The weights of the four gates (input, forget, candidate, output); forgetting starts off, by a bias of 1."""
    w = jax.nn.initializers.glorot_uniform()(key, (inputs + hidden, 4 * hidden))
    return {"w": w, "b": jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(1.0)}


def lstm_start(layer: dict[str, Array], *shape: int) -> LSTMState:
    """A state of zeros, for a batch of that shape."""
    zero = jnp.zeros((*shape, layer["w"].shape[1] // 4), layer["w"].dtype)
    return LSTMState(zero, zero)


def lstm(layer: dict[str, Array], state: LSTMState, x: Float[Array, "*n i"]) -> LSTMState:
    """One step of the cell on one input, or on a batch of them."""
    return gated(jnp.concatenate([x, state.h], -1) @ layer["w"] + layer["b"], state.c)


def gated(gates: Float[Array, "*n g"], c: Float[Array, "*n d"]) -> LSTMState:
    """What the cell makes of its four gates' inputs and its memory."""
    take, keep, candidate, show = jnp.split(gates, 4, -1)
    c = jax.nn.sigmoid(keep) * c + jax.nn.sigmoid(take) * jnp.tanh(candidate)
    return LSTMState(jax.nn.sigmoid(show) * jnp.tanh(c), c)


def run_lstm(
    layer: dict[str, Array], x: Float[Array, "t i"], there: Bool[Array, " t"], reverse: bool = False
) -> Float[Array, "t d"]:
    """The outputs h at each place of a sequence; places that are not there leave the state as it is."""

    def step(state: LSTMState, at: tuple[Array, Array]) -> tuple[LSTMState, Array]:
        xi, here = at
        after = lstm(layer, state, xi)
        state = LSTMState(*(jnp.where(here, new, old) for new, old in zip(after, state, strict=True)))
        return state, state.h

    return jax.lax.scan(step, lstm_start(layer), (x, there), reverse=reverse)[1]
