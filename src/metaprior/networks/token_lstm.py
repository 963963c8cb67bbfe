"""A bidirectional LSTM over a text's words (Graves & Schmidhuber 2005)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metaprior.core.options import Count, Way, checked
from metaprior.core.types import PLAIN, Call, Model
from metaprior.networks.bag import check_tokens, table_init
from metaprior.networks.layers import dense, dense_init
from metaprior.networks.lstm import lstm_init, run_lstm

POOLS = ("mean", "last", "blank")
BLANK = 1  # the token number of the blank in a cloze task


@checked
def token_lstm(
    outputs: Count = 5,
    buckets: Way = 16384,
    width: Count = 64,
    hidden: Count = 64,
    pool: str = "mean",
    head: bool = True,
) -> Model:
    """Applies word vectors, an LSTM in each direction, pooling and a linear head to a text.

    Inputs are integers [n, length]: 0 is padding, which does not change the states. Any other number is looked up
    modulo `buckets`.

    Args:
        outputs: Number of outputs.
        buckets: Number of rows of the embedding table.
        width: Dimension of the word vectors.
        hidden: Number of units of each LSTM.
        pool: "mean" averages the LSTMs' outputs over the words; "last" takes the last output of each direction; "blank"
            takes the outputs at the blank (number 1), where one direction has read all words before it, and the other
            all words after it (Melamud et al. 2016).
        head: Whether the network has the linear head. False returns the embedding [n, 2 hidden].

    Raises:
        ValueError: The pooling is unknown.
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}.")

    def init(key: PRNGKeyArray, x: Int[Array, "n length"]) -> dict:
        check_tokens(x)
        keys = jax.random.split(key, 4)
        params: dict = {
            # Unit standard deviation: a gate sums over them with weights that decrease with the width.
            "table": width**0.5 * table_init(keys[0], buckets, width),
            "forward": lstm_init(keys[1], width, hidden),
            "backward": lstm_init(keys[2], width, hidden),
        }
        return params | ({"head": dense_init(keys[3], 2 * hidden, outputs)} if head else {})

    def features(params: dict, x: Int[Array, "n length"], call: Call = PLAIN) -> Float[Array, "n d"]:
        check_tokens(x)
        seen, there = params["table"][x % buckets], x > 0

        def read(name: str, reverse: bool) -> Float[Array, "n length hidden"]:
            return jax.vmap(lambda s, t: run_lstm(params[name], s, t, reverse))(seen, there)

        forward, backward = read("forward", False), read("backward", True)
        if pool == "last":
            return jnp.concatenate([forward[:, -1], backward[:, 0]], -1)
        chosen = (x == BLANK if pool == "blank" else there).astype(forward.dtype)
        share = chosen / jnp.maximum(chosen.sum(-1, keepdims=True), 1)
        return jnp.einsum("nl,nld->nd", share, jnp.concatenate([forward, backward], -1))

    def apply(params: dict, x: Int[Array, "n length"], call: Call = PLAIN) -> Array:
        f = features(params, x, call)
        return dense("head", params["head"], f, call) if head else f

    return Model(init, apply, features, calls=True)
