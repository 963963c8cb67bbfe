"""Networks some of whose layers are constants to gradients, so that steps that follow a gradient do not move them."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from metaprior.core.types import PLAIN, Call, Model


def layer_of(path: tuple, names: Iterable[str]) -> str | None:
    """Returns the layer that a leaf of the network's parameters belongs to, or None.

    A leaf belongs to the layer "block1" if a component of its path is "block1" or begins with "block1_".

    Args:
        path: The leaf's path, as `jax.tree_util.tree_leaves_with_path` returns it.
        names: The layers' names.
    """
    parts = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return next((name for name in names if any(p == name or p.startswith(f"{name}_") for p in parts)), None)


def layer_names(network: Callable[..., PyTree], x: PyTree) -> list[str]:
    """Returns the names of a network's layers in the order of its call.

    Args:
        network: Function (x, call) -> outputs.
        x: A batch of inputs.

    Raises:
        ValueError: The network names no layers.
    """
    seen: list[str] = []

    def name_it(name: str, s: Array) -> Array:
        seen.append(name)
        return s

    jax.eval_shape(lambda x: network(x, Call(layer=name_it)), x)
    if not seen:
        raise ValueError(
            "network must call `layer` of its `Call` with the outputs of its layers, got one that never does. Use mlp, "
            "conv4 or another network of metaprior.networks."
        )
    return list(dict.fromkeys(seen))


def frozen(model: Model, moves: Mapping[str, bool | Bool[Array, ""]]) -> Model:
    """Returns the model with some layers as constants to gradients. Its outputs do not change.

    An inner loop that follows a gradient leaves these layers where they are.

    Args:
        model: The model.
        moves: Whether each layer moves, by name. The values may be traced. Other layers move.
    """

    def held(path: tuple, leaf: Array) -> Array:
        name = layer_of(path, moves)
        return leaf if name is None else jnp.where(moves[name], leaf, jax.lax.stop_gradient(leaf))

    def under(network: Callable[..., PyTree]) -> Callable[..., PyTree]:
        def partly(params: PyTree, x: PyTree, call: Call = PLAIN) -> PyTree:
            params = jax.tree_util.tree_map_with_path(held, params)
            return network(params, x, call) if model.calls else network(params, x)

        return partly

    return model._replace(apply=under(model.apply), features=None if model.features is None else under(model.features))
