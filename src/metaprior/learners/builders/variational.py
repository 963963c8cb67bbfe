"""Builds learners whose prior is a diagonal Gaussian, from their inference and their meta-objective."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jaxtyping import PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.options import Whole
from metaprior.core.types import AtMean, Batch, Learner, Model, Task
from metaprior.inference.descent import Descent, trajectory
from metaprior.inference.gaussian import DiagonalGaussian, around
from metaprior.inference.posteriors import predict
from metaprior.inference.variational import Variational, free_energy, infer
from metaprior.learners.builders.knobs import with_noise
from metaprior.learners.builders.normalised import predicts_alone

# Traits of these learners (see `learners/traits.py`). SILENT: options under which they are deterministic; "sgd", since
# Adam would amplify tiny gradients. BUDGETS: by referee, options with which they converge.
SILENT = {"kl_weight": 0.0, "log_sd": -15.0, "optimizer": "sgd"}
_NATURAL = {"steps": 100, "rate": 0.2, "optimizer": "natural", "samples": 16}
BUDGETS = {
    "truth": {"steps": 60, "rate": 0.5, "optimizer": "natural", "samples": 8, "log_sd": -1.0, "draws": 0},
    "nuts": _NATURAL,
    "nuts prior": _NATURAL | {"steps": 30, "test_steps": 100, "log_sd": -1.0},
}

Objective = Callable[[DiagonalGaussian, Task, PRNGKeyArray], tuple[Scalar, dict[str, Scalar]]]


def variational_learner(
    model: Model,
    likelihood: Likelihood,
    how: Variational,
    objective: Objective,
    *,
    log_sd: float,
    draws: Whole,
    differentiated: bool = True,
) -> Learner:
    """Builds a learner whose theta is the prior N(mean, sd^2) and whose posterior is a fitted Gaussian.

    Args:
        model: The network.
        likelihood: Likelihood of the support and the query.
        how: Options of the inference.
        objective: (theta, task, key) -> the meta-loss and its metrics.
        log_sd: Logarithm of the prior's standard deviation before training.
        draws: Number of networks that a prediction averages. 0: the linearised predictive, in closed form.
        differentiated: Whether the meta-gradient flows through the steps in training.

    Raises:
        ValueError: `log_sd` is out of range.
    """
    if not -30 < log_sd < 10:
        raise ValueError(f"log_sd must be between -30 (below, the variance underflows) and 10, got {log_sd}.")

    def init(key: PRNGKeyArray, task: Task) -> DiagonalGaussian:
        return around(model.init(key, task.support.x), log_sd)

    def adapt(params: DiagonalGaussian, support: Batch, key: PRNGKeyArray) -> DiagonalGaussian:
        options = {"steps": how.on_new_task, "first_order": True, "differentiated": differentiated}
        return infer(model, likelihood, params, support, key, how, **options)

    def path(params: DiagonalGaussian, support: Batch, key: PRNGKeyArray) -> DiagonalGaussian:
        energy = free_energy(model, likelihood, params, support, how)
        keys = jax.random.split(key, how.on_new_task)
        inner = how.on(support, differentiated)
        course: Descent = trajectory(energy, params, inner, how.on_new_task, data=keys)
        return course.phi

    def at_mean(params: DiagonalGaussian, posterior: DiagonalGaussian) -> AtMean:
        return AtMean(posterior.mean, partial(model.outputs, posterior.mean))

    def predicting(shown: Likelihood) -> Learner:
        def predictive(model: Model) -> Callable[..., Any]:
            def predict_by(params: DiagonalGaussian, posterior: DiagonalGaussian, x: PyTree, key: PRNGKeyArray) -> Any:
                return predict(model.apply, shown, posterior, x, key, draws=draws)

            return predict_by

        learner = Learner(init, adapt, predictive(model), objective, path, at_mean=at_mean)
        return learner if how.transductive else predicts_alone(learner, predictive, model)

    return with_noise(predicting, likelihood)
