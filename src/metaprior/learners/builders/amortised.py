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
from metaprior.core.types import Batch, Learner, Model, Task
from metaprior.inference.descent import mean_nll
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.knobs import with_noise


def embedding(model: Model) -> Callable[[PyTree, PyTree], Float[Array, "n d"]]:
    """Returns (params, x) -> the model's flat features, or its outputs where it has no features; x may be empty."""
    see = model.apply if model.features is None else model.features

    def embed(params: PyTree, x: PyTree) -> Float[Array, "n d"]:
        n = jax.tree.leaves(x)[0].shape[0]
        f = see(params, x if n else jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), x))[:n]
        return f.reshape(n, prod(f.shape[1:]))

    return embed


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
    shown = one_hot(y, outputs) if isinstance(likelihood, Categorical) else y.reshape(y.shape[0], -1).astype(float)
    return jnp.where(lost, jnp.nan, shown)


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
