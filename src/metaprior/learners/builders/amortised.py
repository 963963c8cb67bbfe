"""Shared parts of amortised learners, in which a network reads the support and its summary takes the place of phi.

They hold the network's inputs (features and encoded targets) and a learner whose loss is the query's mean nll.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Likelihood, one_hot
from metaprior.core.types import PLAIN, Batch, Call, Learner, Model, Task
from metaprior.inference.descent import mean_nll
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.knobs import with_noise

INSTANCES = range(1, 11)  # of a class, whose accuracy is reported: Santoro et al. (2016), figure 2 and table 1


def embedding(model: Model) -> Callable[..., Float[Array, "n d"]]:
    """Returns (params, x, call=PLAIN) -> the model's flat features, else its outputs; x may be empty."""
    see = model if model.features is None else model._replace(apply=model.features)

    def embed(params: PyTree, x: PyTree, call: Call = PLAIN) -> Float[Array, "n d"]:
        n = jax.tree.leaves(x)[0].shape[0]
        some = x if n else jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), x)
        f = see.outputs(params, some, call)[:n]
        return f.reshape(n, prod(f.shape[1:]))

    return embed


def modulated_layers(model: Model, params: PyTree, x: PyTree) -> dict[str, int]:
    """Returns the number of channels of each layer that the `modulate` of a `Call` can change.

    Args:
        model: The network. One that takes no `Call` has no such layer.
        params: Its parameters.
        x: Inputs of the network.
    """
    widths: dict[str, int] = {}

    def modulate(name: str, s: Array) -> Array:
        widths[name] = s.shape[-1]
        return s

    if model.calls:
        by = jnp.ones(jax.tree.leaves(x)[0].shape[0])
        jax.eval_shape(lambda p, x: model.outputs(p, x, Call(by=by, modulate=modulate)), params, x)
    return widths


def output_width(model: Model, params: PyTree, x: PyTree) -> int:
    """Returns the number of outputs per example: for a classifier, the number of classes."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), x)
    return jax.eval_shape(model.apply, params, one).shape[-1]


def as_inputs(likelihood: Likelihood, y: Array, outputs: int) -> Float[Array, "n t"]:
    """Encodes targets as inputs of a network: classes one-hot, other targets unchanged.

    Args:
        likelihood: Likelihood of the targets.
        y: Targets.
        outputs: Number of the model's outputs; for classes, the length of the one-hot code.

    Raises:
        ValueError: y does not fit that many outputs (the likelihood's message). Compiled code returns NaN instead.
    """
    lost = jnp.isnan(likelihood.nll(jnp.zeros((y.shape[0], outputs)), y))[:, None]
    if isinstance(likelihood, Categorical):
        return jnp.where(lost, jnp.nan, one_hot(y, outputs))
    return jnp.where(lost, jnp.nan, y.reshape(y.shape[0], prod(y.shape[1:])).astype(float))


def by_instance(outputs: Float[Array, "n way"], y: Array, weight: Float[Array, " n"]) -> dict[str, Scalar]:
    """Computes the accuracy where a class is seen for the 1st, 2nd, ... time; 0 where no class is seen so often.

    Args:
        outputs: Logits at each time step.
        y: Labels.
        weight: Weights; a time step of weight 0 is not counted.
    """
    hot = one_hot(y, outputs.shape[1]) * (weight > 0)[:, None]
    seen = (jnp.cumsum(hot, 0) * hot).sum(-1)
    shown = [k for k in INSTANCES if k * outputs.shape[1] <= outputs.shape[0]]
    hits = {k: ((outputs.argmax(-1) == y) & (seen == k)).sum() for k in shown}
    return {f"instance_{k}": hits[k] / jnp.maximum((seen == k).sum(), 1) for k in shown}


def amortised_learner(
    init: Callable[[PRNGKeyArray, Task], PyTree],
    adapt: Callable[[PyTree, Batch, PRNGKeyArray], PyTree],
    outputs: Callable[[PyTree, PyTree, PyTree], Float[Array, "n c"]],
    likelihood: Likelihood,
) -> Learner:
    """Builds a learner whose loss is the mean nll of the query after `adapt`.

    Args:
        init: (key, task) -> params.
        adapt: (params, support, key) -> posterior.
        outputs: (params, posterior, x) -> [n, c].
        likelihood: Likelihood of the query.
    """

    def loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        predicted = outputs(params, adapt(params, task.support, key), task.query.x)
        return mean_nll(likelihood, predicted, task.query), fit_metrics(likelihood, predicted, task.query)

    def predicting(shown: Likelihood) -> Learner:
        def predict(params: PyTree, posterior: PyTree, x: PyTree, key: PRNGKeyArray) -> Any:
            return shown.predictive(outputs(params, posterior, x)[None])

        return Learner(init, adapt, predict, loss)

    return with_noise(predicting, likelihood)
