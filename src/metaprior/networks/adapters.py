"""A `Model` from a Flax module or an Equinox one (a plain pair of functions needs no adapter), or around another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from metaprior.core.types import PLAIN, Call, Model


def from_flax(module: Any) -> Model:
    """A Flax (linen) module on a batch x; its whole variable dict is theta, so it may have parameters only."""

    def init(key: PRNGKeyArray, x: PyTree) -> PyTree:
        variables = module.init(key, x)
        extra = sorted(set(variables) - {"params"})
        if extra:
            raise ValueError(
                f"module: has the collections {', '.join(extra)} beside params; a task's parameters are all that is "
                "adapted, so use layers without running state, e.g. BatchNorm(use_running_average=False) replaced by "
                "GroupNorm, or metaprior.networks.norm.batch_norm"
            )
        return variables

    return Model(init, module.apply)


def from_equinox(build: Callable[[PRNGKeyArray], Any]) -> Model:
    """An Equinox module on *one* example, from build(key) -> module; it is vmapped over the batch."""
    import equinox as eqx  # not above: it takes a sixth of a second

    skeleton = eqx.partition(build(jax.random.key(0)), eqx.is_inexact_array)[1]

    def init(key: PRNGKeyArray, x: PyTree) -> PyTree:
        return eqx.filter(build(key), eqx.is_inexact_array)

    def apply(params: PyTree, x: PyTree) -> Array:
        return jax.vmap(eqx.combine(params, skeleton))(x)

    return Model(init, apply)


def known_noise(model: Model) -> Model:
    """The last feature of x is the sd of that example's target, known; the model sees the others.

    Outputs are the model's and the log sd, as `Gaussian(scale=None)` reads them; only the model's have parameters. For
    one target an example, x [n, d + 1].
    """

    def init(key: PRNGKeyArray, x: Array) -> PyTree:
        return model.init(key, x[:, :-1])

    def apply(params: PyTree, x: Array, call: Call = PLAIN) -> Array:
        return jnp.concatenate([model.outputs(params, x[:, :-1], call), jnp.log(x[:, -1:])], -1)

    return Model(init, apply, statistics=model.statistics, calls=model.calls)
