"""The linear map without a bias: the model of the conjugate hierarchy and of random quadratic losses."""

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.options import Count, NonNegative, checked
from metaprior.core.types import PLAIN, Call, Model
from metaprior.networks.layers import shown


@checked
def linear(outputs: Count = 1, init_scale: NonNegative = 0.01) -> Model:
    """Computes x w on inputs [n, ...], which are flattened.

    Args:
        outputs: Number of outputs.
        init_scale: Standard deviation of the initial weights, which are normal.
    """

    def init(key: PRNGKeyArray, x: Array) -> dict:
        inputs = x.reshape(x.shape[0], -1).shape[1]
        return {"head": {"w": init_scale * jax.random.normal(key, (inputs, outputs))}}

    def apply(params: dict, x: Array, call: Call = PLAIN) -> Float[Array, "n o"]:
        x = x.reshape(x.shape[0], -1)
        s = x @ params["head"]["w"]
        return shown("head", s if call.tap is None else call.tap("head", x, s), call)

    return Model(init, apply, lambda params, x, call=PLAIN: x.reshape(x.shape[0], -1), calls=True)
