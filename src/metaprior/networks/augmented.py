"""Layer augmentation: layers that have two sets of weights, slow W and fast W*, and whose outputs are added.

A layer F of inputs h computes F(h; W) + F(h; W*), where F includes the activation and pooling, and the sum is the input
of the next layer. For a linear head this is h (W + W*). Fast weights of 0 change nothing if F(h; 0) = 0, as for ReLU.

The network runs with both sets of weights, and the sum is taken where it calls the `layer` of its `Call`. So every
network that calls it can be augmented.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from metaprior.core.types import Call, Model
from metaprior.networks.frozen import layer_names, layer_of

LANES = "slow and fast weights"
Network = Callable[[PyTree, PyTree, Call], Array]  # (params, x, call) -> outputs


class Layers(NamedTuple):
    """The layers that are augmented.

    Attributes:
        names: Their names.
        before: The layer before the first of them. None: the first is that of the inputs.
    """

    names: tuple[str, ...]
    before: str | None


def last_layers(network: Callable[..., PyTree], x: PyTree, count: int | None) -> Layers:
    """Returns the last layers of a network.

    Args:
        network: Function (x, call) -> outputs.
        x: A batch of inputs.
        count: Number of layers. None, or more than there are: all.

    Raises:
        ValueError: The network names no layers.
    """
    names = layer_names(network, x)
    first = 0 if count is None else max(len(names) - count, 0)
    return Layers(tuple(names[first:]), names[first - 1] if first else None)


def weights_of(params: PyTree, layers: Layers) -> dict[str, Array]:
    """Returns the weights of some layers.

    Args:
        params: Parameters of the network.
        layers: The layers.

    Returns:
        The arrays by their paths in `params`.
    """
    found = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found if layer_of(path, layers.names) is not None}


def with_weights(params: PyTree, weights: dict[str, Array]) -> PyTree:
    """Returns parameters of the network with other values of some weights.

    Args:
        params: Parameters of the network.
        weights: Arrays by their paths, as `weights_of` returns them.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: weights.get(jax.tree_util.keystr(path), leaf), params)


def convolutional(params: PyTree, layers: Layers) -> list[str]:
    """Returns the paths of those weights that belong to a layer with a convolution.

    Args:
        params: Parameters of the network.
        layers: The layers.
    """
    found = [(p, leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(params) if layer_of(p, layers.names)]
    own = {layer_of(path, layers.names) for path, leaf in found if jnp.ndim(leaf) > 2}
    return [jax.tree_util.keystr(path) for path, _ in found if layer_of(path, layers.names) in own]


def inputs_of(network: Network, params: PyTree, layers: Layers, x: PyTree) -> Array | None:
    """Returns the inputs of the first augmented layer, or None if they are x.

    Args:
        network: Function (params, x, call) -> outputs.
        params: Its parameters.
        layers: The layers.
        x: A batch of inputs.
    """
    seen: list[Array] = []

    def see(name: str, s: Array) -> Array:
        seen.extend([s] if name == layers.before else [])
        return s

    network(params, x, Call(layer=see))
    return seen[-1] if seen else None


def from_inputs(network: Network, params: PyTree, layers: Layers, x: PyTree, h: Array | None) -> Array:
    """Computes the outputs from the inputs of the first augmented layer on.

    Args:
        network: Function (params, x, call) -> outputs.
        params: Its parameters.
        layers: The layers.
        x: A batch of inputs. The compiler removes what only the layers before would need.
        h: The inputs of the first augmented layer (`inputs_of`), or None.
    """
    return network(params, x, Call(layer=lambda name, s: h if name == layers.before and h is not None else s))


def augmented(
    network: Network, slow: PyTree, fast: dict[str, Array], layers: Layers, x: PyTree, h: Array | None = None
) -> Array:
    """Computes the outputs of the network whose layers have slow and fast weights.

    Args:
        network: Function (params, x, call) -> outputs.
        slow: Its parameters.
        fast: Fast weights of the layers, by their paths in `slow` (`weights_of`).
        layers: The layers.
        x: A batch of inputs.
        h: The inputs of the first augmented layer, or None to compute them.
    """

    def layer(name: str, s: Array) -> Array:
        if name in layers.names:
            return jax.lax.psum(s, LANES)
        return h if name == layers.before and h is not None else s

    def lane(weights: dict[str, Array]) -> Array:
        return network(with_weights(slow, weights), x, Call(layer=layer))

    if not fast:
        return lane({})
    both = {path: jnp.stack([w, fast[path]]) for path, w in weights_of(slow, layers).items()}
    return jax.vmap(lane, axis_name=LANES)(both)[0]


def check_apart(model: Model, layers: Layers, x: PyTree) -> None:
    """Checks that the augmented layers compute the outputs of an example from this example alone.

    The fast weights of a query are its own, so that batch norm would have one example.

    Args:
        model: The network.
        layers: The layers.
        x: A batch of inputs. Its shapes are used, but not its values.

    Raises:
        ValueError: The layers have a batch norm.
    """
    if len(layers.names) == 1:  # the head
        return

    def gap(key: Array) -> Array:
        def random(leaf: Array) -> Array:
            shape = (2, *leaf.shape[1:])
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                return jax.random.normal(key, shape, leaf.dtype)
            return jax.random.randint(key, shape, 0, 100).astype(leaf.dtype)

        two = jax.tree.map(random, x)
        params = model.init(key, two)
        h = inputs_of(model.outputs, params, layers, two)
        together, alone = (
            from_inputs(model.outputs, params, layers, *jax.tree.map(lambda leaf, n=n: leaf[:n], (two, h)))[0]
            for n in (2, 1)
        )
        return jnp.abs(together - alone).max() / (jnp.abs(together).max() + 1e-6)

    mixed = model.support is not None
    if not mixed:
        with jax.ensure_compile_time_eval():
            mixed = bool(jax.jit(gap)(jax.random.key(0)) > 1e-3)
    if mixed:
        raise ValueError(
            f"norm must be 'none', 'layer' or 'group' where weights below the head depend on the query (augmented are "
            f"{', '.join(layers.names)}), got a batch norm. Use such a norm, or augment the head alone."
        )


__all__: Sequence[str] = [
    "Layers", "augmented", "check_apart", "convolutional", "from_inputs", "inputs_of", "last_layers", "weights_of",
    "with_weights",
]  # fmt: skip
