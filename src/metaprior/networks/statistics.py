"""Networks whose batch norm goes by statistics of other examples than those at hand: a support, or training tasks.

Statistics are neither theta nor phi. No step of the inner loop moves them and no posterior is put on them: they are a
function of parameters and examples (`statistics_of`), and a model that goes by them is another model (`given`,
`beside`) with the same parameters.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from metaprior.networks.norm import Statistics, moments
from metaprior.types import Model


def statistics_of(
    model: Model, params: PyTree, x: PyTree, weight: Float[Array, " n"] | None = None
) -> dict[str, Statistics]:
    """Mean and variance of each layer's outputs, channel by channel, while the examples are normalised by themselves.

    In proportion to the examples' weights, so that padding does not count.
    """
    weight = jnp.ones(jax.tree.leaves(x)[0].shape[0]) if weight is None else weight
    seen: dict[str, Statistics] = {}

    def record(name: str, inputs: Array, s: Array) -> Array:
        seen[name] = moments(s, weight)
        return s

    model.apply(params, x, record, weight)
    return seen


def given(model: Model, statistics: Mapping[str, Statistics]) -> Model:
    """The model under fixed statistics: what it says of an example depends on no other."""
    see = None if model.features is None else partial(model.features, by=statistics)
    return Model(model.init, partial(model.apply, by=statistics), see)


def beside(model: Model, x: PyTree, weight: Float[Array, " n"] | None = None) -> Model:
    """The model under the statistics that the examples x have with the parameters of each call."""

    def by(params: PyTree, at: PyTree) -> Any:
        # The examples themselves need no second pass: their statistics are those of the batch at hand.
        if at is x:
            return jnp.ones(jax.tree.leaves(x)[0].shape[0]) if weight is None else weight
        return statistics_of(model, params, x, weight)

    def apply(params: PyTree, at: PyTree, *tap: Any) -> Array:
        return model.apply(params, at, *tap, by=by(params, at))

    see = model.features

    def features(params: PyTree, at: PyTree, *tap: Any) -> Array:
        assert see is not None
        return see(params, at, *tap, by=by(params, at))

    return Model(model.init, apply, None if see is None else features)
