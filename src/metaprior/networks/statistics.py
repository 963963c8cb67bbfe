"""Networks whose batch norm goes by statistics of other examples than those at hand: a support, or training tasks.

Statistics are neither theta nor phi. No step of the inner loop moves them and no posterior is put on them: they are a
function of parameters and examples (`statistics_of`), and a model that goes by them is another model (`given`,
`beside`) with the same parameters.
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
    """Mean and variance of each layer's outputs, channel by channel, while the examples are normalised by themselves.

    In proportion to the examples' weights, so that padding does not count.
    """
    weight = jnp.ones(jax.tree.leaves(x)[0].shape[0]) if weight is None else weight
    seen: dict[str, Statistics] = {}

    def record(name: str, inputs: Array, s: Array) -> Array:
        seen[name] = moments(s, weight)
        return s

    network(x, Call(record, weight))
    return seen


def given(model: Model, statistics: Mapping[str, Statistics] | str) -> Model:
    """The model under fixed statistics, so that what it says of an example depends on no other; or under `AT_HAND`."""

    def under(network: Network) -> Network:
        def told(params: PyTree, x: PyTree, call: Call = PLAIN) -> Array:
            return network(params, x, call._replace(by=statistics) if call.by is None else call)

        return told

    return _under(model, under)


def _under(model: Model, under: Callable[[Network], Network], **told: Any) -> Model:
    see = None if model.features is None else under(model.features)
    return model._replace(apply=under(model.apply), features=see, statistics="batch", **told)


def by_support(network: Network, support: Batch | None) -> Network:
    """The network with its batch norm by the support's statistics, whatever it makes of its inputs and layers.

    The support goes through the network together with the examples at hand, and it alone counts in the statistics. A
    tap is shown the examples at hand. Without a support, or where statistics are given, nothing changes.
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
                "norm: 'task' normalises queries by a support of examples, but this support has other inputs than its "
                "queries (attributes, for instance); use norm='batch', 'running', 'layer' or 'group'"
            )
        both = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), support.x, x)
        by = jnp.concatenate([weight, jnp.zeros(jax.tree.leaves(x)[0].shape[0], weight.dtype)])
        return network(both, call._replace(tap=_of_rows_from(n, call.tap), by=by))[n:]

    return beside


def _of_rows_from(n: int, tap: Callable | None) -> Callable | None:
    """The tap on the examples from the n-th on; the others pass."""
    if tap is None:
        return None
    return lambda name, inputs, s: jnp.concatenate([s[:n], tap(name, inputs[n:], s[n:])])


def beside(model: Model, support: Batch) -> Model:
    """The model with its batch norm by the statistics that the support has under the parameters of each call."""

    def under(network: Network) -> Network:
        return lambda params, x, call=PLAIN: by_support(partial(network, params), support)(x, call)

    return _under(model, under, support=support)
