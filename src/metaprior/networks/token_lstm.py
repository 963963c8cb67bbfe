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
BLANK = 1  # the number of the place that a cloze task leaves open


@checked
def token_lstm(
    outputs: Count = 5,
    buckets: Way = 16384,
    width: Count = 64,
    hidden: Count = 64,
    pool: str = "mean",
    head: bool = True,
) -> Model:
    """Word vectors, an LSTM in either direction, what they make of the text, and a linear head.

    x: whole numbers [n, length]; 0 is padding and leaves the states as they are, any other number is looked up modulo
    `buckets`. pool: the "mean" of the outputs over the words; the "last" of each direction; or those at the "blank"
    (number 1), where one direction has read all before it and the other all after it (Melamud et al. 2016). head=False
    ends at the embedding [n, 2 * hidden].
    """
    if pool not in POOLS:
        raise ValueError(f"pool: came {pool!r}, needs one of {', '.join(POOLS)}")

    def init(key: PRNGKeyArray, x: Int[Array, "n length"]) -> dict:
        check_tokens(x)
        keys = jax.random.split(key, 4)
        params: dict = {
            # Of unit deviation: a gate sums over them with weights that shrink by the width.
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
