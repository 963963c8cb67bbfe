"""What learners share whose network reads the support.

How such a network sees inputs and targets, and a learner whose loss is the nll of the query.
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

INSTANCES = range(1, 11)  # whose accuracy is shown, as in the paper's figure 2 and table 1


def embedding(model: Model) -> Callable[[PyTree, PyTree], Float[Array, "n d"]]:
    """Returns (params, x) -> flat features [n, d] of the model, or its outputs where it has none.

    x may hold no example.
    """
    see = model.apply if model.features is None else model.features

    def embed(params: PyTree, x: PyTree) -> Float[Array, "n d"]:
        n = jax.tree.leaves(x)[0].shape[0]
        f = see(params, x if n else jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), x))[:n]
        return f.reshape(n, prod(f.shape[1:]))

    return embed


def output_width(model: Model, params: PyTree, x: PyTree) -> int:
    """Returns the number of outputs per example: the number of classes of a classifier."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), x)
    return jax.eval_shape(model.apply, params, one).shape[-1]


def as_inputs(likelihood: Likelihood, y: Array, outputs: int) -> Float[Array, "n t"]:
    """Returns targets as a network reads them: classes one-hot among `outputs`, everything else unchanged.

    Raises:
        ValueError: the likelihood's own, where y cannot be targets of so many outputs. Compiled code gives NaN.
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
    """Builds a learner from `init`, `adapt` and its outputs; its loss is the mean nll of the query after `adapt`.

    Args:
        init: (key, task) -> params.
        adapt: (params, support, key) -> posterior.
        outputs: (params, posterior, x) -> [n, c].
        likelihood: of the support and the query.
    """

    def loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        predicted = outputs(params, adapt(params, task.support, key), task.query.x)
        return mean_nll(likelihood, predicted, task.query), fit_metrics(likelihood, predicted, task.query)

    def predicting(shown: Likelihood) -> Learner:
        def predict(params: PyTree, posterior: PyTree, x: PyTree, key: PRNGKeyArray) -> Any:
            return shown.predictive(outputs(params, posterior, x)[None])

        return Learner(init, adapt, predict, loss)

    return with_noise(predicting, likelihood)


def by_instance(outputs: Float[Array, "n way"], y: Array, weight: Float[Array, " n"]) -> dict[str, Scalar]:
    """Returns the accuracy where a class is seen for the 1st, 2nd, ... time; 0 where no class is seen so often."""
    hot = one_hot(y, outputs.shape[1]) * (weight > 0)[:, None]
    seen = (jnp.cumsum(hot, 0) * hot).sum(-1)
    shown = [k for k in INSTANCES if k * outputs.shape[1] <= outputs.shape[0]]
    hits = {k: ((outputs.argmax(-1) == y) & (seen == k)).sum() for k in shown}
    return {f"instance_{k}": hits[k] / jnp.maximum((seen == k).sum(), 1) for k in shown}
