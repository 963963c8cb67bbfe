"""Adapters that make a `Model` from a Flax or Equinox module, or from another model.

A plain pair of functions init and apply needs no adapter.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from metaprior.core.types import PLAIN, Call, Model


def from_flax(module: Any) -> Model:
    """Makes a model from a Flax (linen) module, which is called on a batch x.

    Its variable dict is theta, so it may have parameters only.

    Args:
        module: The module.

    Raises:
        ValueError: The module has other collections than params (raised by the model's init).
    """

    def init(key: PRNGKeyArray, x: PyTree) -> PyTree:
        variables = module.init(key, x)
        extra = sorted(set(variables) - {"params"})
        if extra:
            raise ValueError(
                f"module must have no collection besides params, got {', '.join(extra)}. Only parameters are adapted "
                "to a task, so use layers without running state: replace BatchNorm by GroupNorm, or by "
                "metaprior.networks.norm.batch_norm."
            )
        return variables

    return Model(init, module.apply)


def from_equinox(build: Callable[[PRNGKeyArray], Any]) -> Model:
    """Makes a model from an Equinox module, which is called on *one* example and vmapped over the batch.

    Args:
        build: Function (key) -> module.
    """
    import equinox as eqx  # imported here because it takes a sixth of a second

    skeleton = eqx.partition(build(jax.random.key(0)), eqx.is_inexact_array)[1]

    def init(key: PRNGKeyArray, x: PyTree) -> PyTree:
        return eqx.filter(build(key), eqx.is_inexact_array)

    def apply(params: PyTree, x: PyTree) -> Array:
        return jax.vmap(eqx.combine(params, skeleton))(x)

    return Model(init, apply)


def known_noise(model: Model) -> Model:
    """Makes a model for examples with one target whose noise is known: the last column of x is its standard deviation.

    The model sees the other columns. The outputs are those of the model and the log standard deviation, as
    `Gaussian(scale=None)` reads them. Inputs x are [n, d + 1].

    Args:
        model: The model of inputs [n, d].
    """

    def init(key: PRNGKeyArray, x: Array) -> PyTree:
        return model.init(key, x[:, :-1])

    def apply(params: PyTree, x: Array, call: Call = PLAIN) -> Array:
        return jnp.concatenate([model.outputs(params, x[:, :-1], call), jnp.log(x[:, -1:])], -1)

    return Model(init, apply, statistics=model.statistics, calls=model.calls)
