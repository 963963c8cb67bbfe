"""The layers our networks are made of. A `tap` sees each linear map: K-FAC records and probes through it."""

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Tap = Callable[[str, Array, Array], Array]


def flat(x: Float[Array, "n *rest"]) -> Float[Array, "n d"]:
    """One row an example, also where there are none."""
    return x.reshape(x.shape[0], prod(x.shape[1:]))


def dense_init(key: PRNGKeyArray, inputs: int, outputs: int, scale: float | None = None) -> dict[str, Array]:
    """A dense layer's weights: Glorot uniform, or a normal of sd `scale` cut at two; zero bias."""
    if scale is None:
        w = jax.nn.initializers.glorot_uniform()(key, (inputs, outputs))
    else:
        w = scale * jax.random.truncated_normal(key, -2, 2, (inputs, outputs))
    return {"w": w, "b": jnp.zeros(outputs)}


def dense(name: str, layer: dict[str, Array], x: Float[Array, "n i"], tap: Tap | None = None) -> Float[Array, "n o"]:
    """x w + b, seen by the tap."""
    w = layer["w"]
    # A one-wide layer is an outer product: as a broadcast it fuses, as a matrix product it is a call on its own.
    product = x * w if w.shape[0] == 1 else x @ w
    s = product + layer["b"]
    return s if tap is None else tap(name, x, s)


def batch_norm(
    x: Float[Array, "n *space c"], shift: Float[Array, " c"], gain: Float[Array, " c"] | None = None
) -> Float[Array, "n *space c"]:
    """Normalise each channel with the statistics of the batch at hand, then shift (and stretch).

    No running statistics: a query set is normalised by itself, which makes predictions transductive, as in MAML.
    """
    axes = tuple(range(x.ndim - 1))
    centred = x - x.mean(axes)
    normal = centred * jax.lax.rsqrt((centred**2).mean(axes) + 1e-5)
    return normal * gain + shift if gain is not None else normal + shift


def head_names(params: dict) -> str:
    """The name of the last layer."""
    return list(params)[-1]
