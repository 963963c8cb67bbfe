"""The image encoder of ARML (Yao et al. 2020): two convolutions with local response normalisation, two dense layers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.options import Count, checked
from metaprior.core.types import PLAIN, Call, Model
from metaprior.networks.layers import check_images, convolve, dense, dense_init, flat

RADIUS, ALPHA, BETA = 4, 0.001 / 9, 0.75


def local_response(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Divides each channel by (1 + alpha sum of squares of the channels up to 4 places away)^beta.

    Args:
        x: Images.

    References:
        Krizhevsky, Sutskever & Hinton (2012), sec. 3.3.
    """
    around = jax.lax.reduce_window(x**2, 0.0, jax.lax.add, (1, 1, 1, 2 * RADIUS + 1), (1, 1, 1, 1), "SAME")
    return x / (1 + ALPHA * around) ** BETA


def halved(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Takes the maximum over windows of 3x3 pixels with a stride of 2."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")


@checked
def lrn(outputs: Count = 128, filters: Count = 32, hidden: Count = 384) -> Model:
    """Applies 5x5 convolution, ReLU, pooling, norm, 5x5 convolution, ReLU, norm, pooling and two dense layers.

    Its norm uses each image alone, so no image depends on the others.

    Args:
        outputs: Number of outputs.
        filters: Number of channels of each convolution.
        hidden: Width of the dense hidden layer, whose activations are the network's features.

    References:
        Yao et al. (2020), image encoder of the authors' code.
    """

    def convolved(name: str, layer: dict[str, Array], x: Array, call: Call) -> Array:
        s = convolve(name, layer, x, call)
        return jax.nn.relu(s + layer["b"])

    def space(params: dict, x: Array, call: Call) -> Float[Array, "n d"]:
        check_images(x)
        x = local_response(halved(convolved("conv1", params["conv1"], x, call)))
        return flat(halved(local_response(convolved("conv2", params["conv2"], x, call))))

    def features(params: dict, x: Array, call: Call = PLAIN) -> Float[Array, "n d"]:
        return jax.nn.relu(dense("dense", params["dense"], space(params, x, call), call))

    def apply(params: dict, x: Array, call: Call = PLAIN) -> Array:
        return dense("head", params["head"], features(params, x, call), call)

    def init(key: PRNGKeyArray, x: Array) -> dict:
        keys, width, params = jax.random.split(key, 4), x.shape[-1], {}
        for name, k in zip(("conv1", "conv2"), keys[:2], strict=True):
            w = jax.nn.initializers.glorot_uniform()(k, (5, 5, width, filters))
            params[name], width = {"w": w, "b": jnp.zeros(filters)}, filters
        size = jax.eval_shape(lambda p, x: space(p, x, PLAIN), params, x).shape[-1]
        return params | {"dense": dense_init(keys[2], size, hidden), "head": dense_init(keys[3], hidden, outputs)}

    return Model(init, apply, features, calls=True)
