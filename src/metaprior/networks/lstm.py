"""Long short-term memory, one step at a time (Hochreiter & Schmidhuber 1997; forget gate of Gers et al. 2000)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class LSTMState(NamedTuple):
    """What a layer carries from one step to the next: its output and its cell."""

    h: Float[Array, "n u"]
    c: Float[Array, "n u"]


def lstm_init(key: PRNGKeyArray, inputs: int, units: int) -> dict[str, Array]:
    """A layer's weights: Glorot uniform; biases 0, but 1 at the forget gate, so that an untrained cell remembers."""
    w = jax.nn.initializers.glorot_uniform()(key, (inputs + units, 4 * units))
    return {"w": w, "b": jnp.zeros(4 * units).at[units : 2 * units].set(1.0)}


def lstm_start(n: int, units: int, dtype: jnp.dtype | None = None) -> LSTMState:
    """The state before the first step, zeros."""
    return LSTMState(jnp.zeros((n, units), dtype), jnp.zeros((n, units), dtype))


def lstm(layer: dict[str, Array], state: LSTMState, x: Float[Array, "n i"]) -> LSTMState:
    """One step of a layer on n rows."""
    gates = jnp.concatenate([x, state.h], -1) @ layer["w"] + layer["b"]
    take, keep, new, show = jnp.split(gates, 4, -1)
    c = jax.nn.sigmoid(keep) * state.c + jax.nn.sigmoid(take) * jnp.tanh(new)
    return LSTMState(jax.nn.sigmoid(show) * jnp.tanh(c), c)
