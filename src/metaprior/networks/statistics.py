"""Networks whose batch norm uses statistics of other examples than the current ones: of a support or training tasks.

Statistics are neither theta nor phi. The inner loop does not change them, and they have no posterior. They are a
function of parameters and examples (`statistics_of`). A model that uses them is another model (`given`, `beside`) with
the same parameters.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from metaprior.core.types import PLAIN, Batch, Call, Model, examples
from metaprior.networks.norm import Statistics, moments

Network = Callable[..., Array]  # (x, call) -> outputs, the network under some parameters


def statistics_of(network: Network, x: PyTree, weight: Float[Array, " n"] | None = None) -> dict[str, Statistics]:
    """Computes the mean and variance of each channel of each layer, with each layer normalised by its own statistics.

    Args:
        network: Function (x, call) -> outputs.
        x: Inputs [n, ...].
        weight: Weights of the examples [n], so that padding does not count. None is 1.

    Returns:
        The statistics by the layers' names.
    """
    weight = jnp.ones(jax.tree.leaves(x)[0].shape[0]) if weight is None else weight
    seen: dict[str, Statistics] = {}

    def record(name: str, inputs: Array, s: Array) -> Array:
        seen[name] = moments(s, weight)
        return s

    network(x, Call(record, weight))
    return seen


def given(model: Model, statistics: Mapping[str, Statistics] | str) -> Model:
    """Returns the model with fixed statistics, so that the outputs of an example depend on no other example.

    Args:
        model: The model.
        statistics: The statistics by the layers' names, or `AT_HAND` for those of the current examples.
    """

    def under(network: Network) -> Network:
        def told(params: PyTree, x: PyTree, call: Call = PLAIN) -> Array:
            return network(params, x, call._replace(by=statistics) if call.by is None else call)

        return told

    return _under(model, under)


def _under(model: Model, under: Callable[[Network], Network], **told: Any) -> Model:
    see = None if model.features is None else under(model.features)
    return model._replace(apply=under(model.apply), features=see, statistics="batch", **told)


def by_support(network: Network, support: Batch | None) -> Network:
    """Returns the network with a batch norm that uses the support's statistics.

    The support goes through the network together with the current examples, but only the support counts in the
    statistics. So they are right however the network transforms its inputs and layers. The call's `tap` and `layer` see
    only the current examples. Without a support, or if the call gives statistics, nothing changes.

    Args:
        network: Function (x, call) -> outputs.
        support: The support, or None.

    Raises:
        ValueError: The current inputs are of another kind than the support's (raised by the returned network).
    """
    if support is None:
        return network
    n = examples(support)
    weight = jnp.ones(n) if support.weight is None else support.weight

    def beside(x: PyTree, call: Call = PLAIN) -> Array:
        if call.by is not None:
            return network(x, call)
        if x is support.x:  # the same values at half the cost
            return network(x, call._replace(by=weight))
        if jax.tree.structure(x) != jax.tree.structure(support.x):
            raise ValueError(
                "norm='task' needs a support of examples like the queries, got a support with other inputs, e.g. "
                "attributes. Use norm='batch', 'running', 'layer' or 'group'."
            )
        both = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), support.x, x)
        by = jnp.concatenate([weight, jnp.zeros(jax.tree.leaves(x)[0].shape[0], weight.dtype)])
        seen = {name: _of_rows_from(n, getattr(call, name)) for name in ("tap", "layer")}
        return network(both, call._replace(by=by, **seen))[n:]

    return beside


def _of_rows_from(n: int, function: Callable | None) -> Callable | None:
    """Returns a tap or layer function that is applied to the examples from the n-th on only."""
    if function is None:
        return None
    return lambda name, *seen: jnp.concatenate([seen[-1][:n], function(name, *(rows[n:] for rows in seen))])


def beside(model: Model, support: Batch) -> Model:
    """Returns the model with a batch norm that uses the support's statistics under the parameters of each call.

    Args:
        model: The model.
        support: The support.
    """

    def under(network: Network) -> Network:
        return lambda params, x, call=PLAIN: by_support(partial(network, params), support)(x, call)

    return _under(model, under, support=support)
