"""A gated recurrent unit (Cho et al. 2014) and an autoencoder of sequences."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Scalar

from metaprior.networks.layers import dense_init


def gru_init(key: PRNGKeyArray, inputs: int, hidden: int) -> dict[str, dict[str, Array]]:
    """Initialises the weights of the two gates and of the candidate.

    The gates' biases are 1, so that a new unit keeps most of its state.

    Args:
        key: Random key.
        inputs: Number of inputs.
        hidden: Number of units d.
    """
    of_gates, of_candidate = jax.random.split(key)
    gates = dense_init(of_gates, inputs + hidden, 2 * hidden)
    return {
        "gates": gates | {"b": jnp.ones_like(gates["b"])},
        "candidate": dense_init(of_candidate, inputs + hidden, hidden),
    }


def gru(layer: dict[str, dict[str, Array]], h: Float[Array, " d"], x: Float[Array, " i"]) -> Float[Array, " d"]:
    """Computes one step: u h + (1 - u) tanh([x, r h] w + b), with the gates (r, u) = sigmoid([x, h] w + b).

    Args:
        layer: The unit's weights.
        h: The state before the step.
        x: The input.

    Returns:
        The state after the step, which is also the output.
    """
    gates, candidate = layer["gates"], layer["candidate"]
    r, u = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, h]) @ gates["w"] + gates["b"]), 2)
    new = jnp.tanh(jnp.concatenate([x, r * h]) @ candidate["w"] + candidate["b"])
    return u * h + (1 - u) * new


class Coded(NamedTuple):
    """What an autoencoder makes of a sequence.

    Attributes:
        code: The code [d].
        loss: Mean squared error of the reconstruction.
    """

    code: Float[Array, " d"]
    loss: Scalar


def autoencoder_init(key: PRNGKeyArray, inputs: int, hidden: int) -> dict[str, dict]:
    """Initialises the weights of `autoencode`.

    Args:
        key: Random key.
        inputs: Length of a row.
        hidden: Length of the code.
    """
    keys = jax.random.split(key, 3)
    return {
        "encoder": gru_init(keys[0], inputs, hidden),
        "decoder": gru_init(keys[1], inputs, hidden),
        "back": dense_init(keys[2], hidden, inputs),
    }


def autoencode(params: dict[str, dict], x: Float[Array, "t i"], there: Bool[Array, " t"]) -> Coded:
    """Computes the code of a sequence and how well the sequence can be reconstructed from the last state.

    The code is the mean of the encoder's outputs. The decoder starts from the encoder's last state and from an input of
    zeros, then reads its own output. Its targets are the rows in reversed order (Srivastava et al. 2015).

    Args:
        params: The weights.
        x: The rows.
        there: Which rows exist [t]. The others change nothing. Without any row, the code and the loss are 0.

    Returns:
        The code and the loss.
    """
    hidden = params["back"]["w"].shape[0]
    zero = jnp.zeros(hidden, x.dtype)

    def encode(h: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        xi, here = at
        h = jnp.where(here, gru(params["encoder"], h, xi), h)
        return h, h

    def decode(state: tuple[Array, Array], here: Array) -> tuple[tuple[Array, Array], Array]:
        h, said = state
        after = gru(params["decoder"], h, said)
        h, said = jnp.where(here, after, h), jnp.where(here, after @ params["back"]["w"] + params["back"]["b"], said)
        return (h, said), said

    last, outputs = jax.lax.scan(encode, zero, (x, there))
    rebuilt = jax.lax.scan(decode, (last, jnp.zeros(x.shape[1:], x.dtype)), there, reverse=True)[1]
    number = jnp.maximum(there.sum(), 1)
    code = jnp.where(there[:, None], outputs, 0).sum(0) / number
    error = jnp.where(there[:, None], (rebuilt - x) ** 2, 0).mean(-1).sum() / number
    return Coded(code, error)
