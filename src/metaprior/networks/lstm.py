"""A long short-term memory cell (Hochreiter & Schmidhuber 1997; forget gate of Gers, Schmidhuber & Cummins 2000)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


class LSTMState(NamedTuple):
    """The state of a cell.

    Attributes:
        h: Its output [..., d].
        c: Its memory [..., d].
    """

    h: Float[Array, "*n d"]
    c: Float[Array, "*n d"]


def lstm_init(key: PRNGKeyArray, inputs: int, hidden: int) -> dict[str, Array]:
    """Initialises the weights of the four gates (input, forget, candidate, output).

    The forget gate's bias is 1, so that a new cell forgets little.

    Args:
        key: Random key.
        inputs: Number of inputs.
        hidden: Number of units d.
    """
    w = jax.nn.initializers.glorot_uniform()(key, (inputs + hidden, 4 * hidden))
    return {"w": w, "b": jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(1.0)}


def lstm_start(layer: dict[str, Array], *shape: int) -> LSTMState:
    """Returns a state of zeros.

    Args:
        layer: The cell's weights.
        shape: The batch's shape.
    """
    zero = jnp.zeros((*shape, layer["w"].shape[1] // 4), layer["w"].dtype)
    return LSTMState(zero, zero)


def lstm(layer: dict[str, Array], state: LSTMState, x: Float[Array, "*n i"]) -> LSTMState:
    """Computes one step of the cell.

    Args:
        layer: The cell's weights.
        state: The state before the step.
        x: One input [i], or a batch [..., i].

    Returns:
        The state after the step.
    """
    return gated(jnp.concatenate([x, state.h], -1) @ layer["w"] + layer["b"], state.c)


def gated(gates: Float[Array, "*n g"], c: Float[Array, "*n d"]) -> LSTMState:
    """Computes the state after a step from the gates' inputs.

    Args:
        gates: Inputs of the four gates [..., 4 d].
        c: The memory before the step [..., d].
    """
    take, keep, candidate, show = jnp.split(gates, 4, -1)
    c = jax.nn.sigmoid(keep) * c + jax.nn.sigmoid(take) * jnp.tanh(candidate)
    return LSTMState(jax.nn.sigmoid(show) * jnp.tanh(c), c)


def run_lstm(
    layer: dict[str, Array], x: Float[Array, "t i"], there: Bool[Array, " t"], reverse: bool = False
) -> Float[Array, "t d"]:
    """Runs the cell over a sequence.

    Args:
        layer: The cell's weights.
        x: Inputs [t, i].
        there: Which positions exist [t]. The others do not change the state.
        reverse: Run from the last position to the first.

    Returns:
        The outputs h at each position [t, d].
    """

    def step(state: LSTMState, at: tuple[Array, Array]) -> tuple[LSTMState, Array]:
        xi, here = at
        after = lstm(layer, state, xi)
        state = LSTMState(*(jnp.where(here, new, old) for new, old in zip(after, state, strict=True)))
        return state, state.h

    return jax.lax.scan(step, lstm_start(layer), (x, there), reverse=reverse)[1]
