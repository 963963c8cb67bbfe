"""How honest probabilities are: pure functions of predictions and outcomes, and the fit of a posterior's scalars."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from metaprior.likelihoods import Categories
from metaprior.types import Learner, Predictive, TaskSource, examples

BINS = 20


class Reliability(NamedTuple):
    """Predictions by confidence, in bins of equal width over (0, 1]: number, mean confidence and accuracy of each."""

    number: Float[Array, " bins"]
    confidence: Float[Array, " bins"]
    accuracy: Float[Array, " bins"]


def reliability(
    confidence: Float[Array, " n"], correct: Bool[Array, " n"], weight: Float[Array, " n"], bins: int = BINS
) -> Reliability:
    """Bin the confidences of the predicted classes; bin b holds (b / bins, (b + 1) / bins]. Empty bins are 0."""
    index = jnp.clip(jnp.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)

    def total(values: Array) -> Float[Array, " bins"]:
        return jnp.zeros(bins, confidence.dtype).at[index].add(values)

    count = total(weight)
    safe = jnp.maximum(count, 1e-12)
    return Reliability(count, total(weight * confidence) / safe, total(weight * correct) / safe)


def expected_error(table: Reliability) -> Scalar:
    """ECE: the mean of |accuracy - confidence| over bins, by their counts (Naeini et al. 2015; Guo et al. 2017)."""
    share = table.number / jnp.maximum(table.number.sum(), 1e-12)
    return (share * jnp.abs(table.accuracy - table.confidence)).sum()


def maximum_error(table: Reliability) -> Scalar:
    """MCE: the largest |accuracy - confidence| of a bin that holds any prediction."""
    return jnp.where(table.number > 0, jnp.abs(table.accuracy - table.confidence), 0).max()


def brier(probabilities: Float[Array, "n c"], y: Int[Array, " n"]) -> Float[Array, " n"]:
    """Sum over classes of (probability - outcome)^2, between 0 and 2 (Brier 1950)."""
    return ((probabilities - jax.nn.one_hot(y, probabilities.shape[-1])) ** 2).sum(-1)


def auroc(higher: Float[Array, " n"], lower: Float[Array, " m"]) -> Scalar:
    """P(a score of `higher` is above one of `lower`), ties counted half: the area under the ROC curve, exactly.

    By ranks, in (n + m) log m (Hanley & McNeil 1982: it is the Mann-Whitney statistic over n m).
    """
    ordered = jnp.sort(lower)
    below, upto = (jnp.searchsorted(ordered, higher, side=side) for side in ("left", "right"))
    # In whole numbers up to here, so that ties give exactly 1/2.
    return (below + upto).sum() / (2 * higher.shape[0] * lower.shape[0])


class Calibration(NamedTuple):
    """Scalars of a posterior or of its predictions, fitted on validation tasks, and the mean nll before and after."""

    knobs: dict[str, float]
    nll_before: float
    nll_after: float


def calibrate(
    build: Callable[[dict[str, Array]], Learner],
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    knobs: dict[str, float],
    *,
    tasks: int = 200,
    evaluations: int = 40,
    chunk: int = 25,
) -> Calibration:
    """Fit positive scalars, e.g. {"temperature": 1.0, "noise": 0.5}, to the query nll of `tasks` tasks.

    build makes the learner from the knobs (traced). Nelder and Mead's simplex on their logarithms: the posterior need
    not be differentiable in them. One draw of tasks and of noise serves all evaluations.
    """
    from scipy.optimize import minimize  # not above: it takes a third of a second, and few commands calibrate

    if any(value <= 0 for value in knobs.values()):
        raise ValueError(f"knobs: came {knobs}, need positive starting values")

    @jax.jit
    def nll(logs: dict[str, Array], params: PyTree, source: TaskSource) -> Scalar:
        learner = build({name: jnp.exp(value) for name, value in logs.items()})

        def lost(predicted: Predictive, y: Array, weight: Float[Array, " n"]) -> Scalar:
            return -(weight * predicted.log_prob(y)).sum()

        sums, counts = _asked(lost, learner, params, source, key, tasks, chunk)
        return sums.sum() / counts.sum()

    names, start = list(knobs), np.log(list(knobs.values()))
    def objective(logs: np.ndarray) -> float:
        given = {name: jnp.asarray(log, float) for name, log in zip(names, logs, strict=True)}
        value = float(nll(given, params, source))
        return value if np.isfinite(value) else 1e10

    simplex = np.vstack([start, start + 1.5 * np.eye(len(names))])
    options = {"maxfev": evaluations, "initial_simplex": simplex, "xatol": 0.02, "fatol": 1e-4}
    found = minimize(objective, start, method="Nelder-Mead", options=options)
    fitted = dict(zip(names, np.exp(found.x).tolist(), strict=True))
    return Calibration(fitted, objective(start), float(found.fun))


def calibrate_softmax(
    learner: Learner, params: PyTree, source: TaskSource, key: PRNGKeyArray, *, tasks: int = 200, chunk: int = 25
) -> Calibration:
    """Fit "softmax_temperature", for `temperature_scaled`, to the query nll of `tasks` tasks of a classifier.

    Each task is adapted to and predicted once. The nll is convex in 1 / temperature, sought between 1/50 and 50.
    """
    from scipy.optimize import minimize_scalar

    def kept(predicted: Categories, y: Array, weight: Float[Array, " n"]) -> tuple[Array, Array, Array]:
        return predicted.tempered(1.0).log_probs[0], y, weight

    @jax.jit
    def asked(params: PyTree, source: TaskSource) -> tuple[Array, Array, Array]:
        return _asked(kept, learner, params, source, key, tasks, chunk)[0]

    logs, y, weight = (leaf.reshape(-1, *leaf.shape[2:]) for leaf in asked(params, source))

    @jax.jit
    def nll(log: Scalar) -> Scalar:
        return -(weight * Categories(logs[None]).tempered(jnp.exp(log)).log_prob(y)).sum() / weight.sum()

    found = minimize_scalar(lambda log: float(nll(log)), bounds=(-np.log(50), np.log(50)), method="bounded")
    return Calibration({"softmax_temperature": float(np.exp(found.x))}, float(nll(0.0)), float(found.fun))


def temperature_scaled(learner: Learner, temperature: float | Scalar) -> Learner:
    """The classifier with its predicted probabilities `tempered`; the classes it names stay the same."""

    def predict(params: PyTree, posterior: PyTree, x: PyTree, key: PRNGKeyArray) -> Categories:
        return learner.predict(params, posterior, x, key).tempered(temperature)

    return learner._replace(predict=predict)


def _asked(
    of: Callable[..., PyTree], learner: Learner, params: PyTree, source: TaskSource, key: PRNGKeyArray, tasks: int,
    chunk: int,
) -> tuple[PyTree, Float[Array, " tasks"]]:  # fmt: skip
    """of(predictive, y, weight) of the queries of each of `tasks` new tasks, and how many queries each has."""

    def one(key: PRNGKeyArray) -> tuple[PyTree, Scalar]:
        key_task, key_adapt, key_predict = jax.random.split(key, 3)
        task = jax.tree.map(lambda leaf: leaf[0], source.sample(key_task, 1))
        posterior = learner.adapt(params, task.support, key_adapt)
        predicted, y = learner.predict(params, posterior, task.query.x, key_predict), task.query.y
        weight = jnp.ones(examples(task.query)) if task.query.weight is None else task.query.weight
        return of(predicted, y, weight), weight.sum()

    return jax.lax.map(one, jax.random.split(key, tasks), batch_size=chunk)
