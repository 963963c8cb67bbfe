"""Calibration: measures of it as pure functions of predictions and outcomes, and the fit of a posterior's scalars."""

from collections.abc import Callable, Collection
from functools import lru_cache, partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categories, check_labels, one_hot
from metaprior.core.options import Count, Range, checked
from metaprior.core.runtime import shared
from metaprior.core.types import (
    Learner,
    Predictive,
    TaskSource,
    check_settled,
    check_source,
    counted,
    draw_task,
    group_count,
    group_order,
    weights,
)
from metaprior.learners.builders.knobs import SOFTMAX, temperature_scaled, turned

BINS = 20
LOST = 1e10  # replaces an nll that is not finite
PRIOR_SD = 1.0  # prior standard deviation of the logarithm of a calibrated scalar, around its starting value
NOISE_SD = 3.0  # the factor by which it is wider for the noise, whose starting value is arbitrary


Spread = Annotated[Any, Range(above=0)]  # a number, or infinity


class Reliability(NamedTuple):
    """Predictions by their confidence, in bins of equal width over (0, 1].

    Attributes:
        number: The number (or total weight) of predictions in each bin.
        confidence: Their mean confidence.
        accuracy: Their accuracy.
    """

    number: Float[Array, " bins"]
    confidence: Float[Array, " bins"]
    accuracy: Float[Array, " bins"]


def reliability(
    confidence: Float[Array, " n"], correct: Bool[Array, " n"], weight: Float[Array, " n"], bins: int = BINS
) -> Reliability:
    """Bins predictions by the confidence of the predicted class.

    Args:
        confidence: The probability of the predicted class.
        correct: Whether the prediction is correct.
        weight: The weight of each prediction.
        bins: The number of bins. Bin b holds (b / bins, (b + 1) / bins].

    Returns:
        The number, mean confidence and accuracy of each bin, which are 0 in empty bins.
    """
    index = jnp.clip(jnp.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    # A confidence of NaN belongs to no bin, and rows of weight 0 may have one.
    confidence, correct = (jnp.where(weight > 0, values, 0) for values in (confidence, correct))

    def total(values: Array) -> Float[Array, " bins"]:
        return jnp.zeros(bins, confidence.dtype).at[index].add(values)

    count = total(weight)
    safe = jnp.maximum(count, 1e-12)
    return Reliability(count, total(weight * confidence) / safe, total(weight * correct) / safe)


def expected_error(table: Reliability) -> Scalar:
    """Computes the expected calibration error (ECE): the mean of |accuracy - confidence| over bins, weighted by counts.

    Args:
        table: The bins.

    References:
        Naeini et al. 2015; Guo et al. 2017.
    """
    share = table.number / jnp.maximum(table.number.sum(), 1e-12)
    return (share * jnp.abs(table.accuracy - table.confidence)).sum()


def maximum_error(table: Reliability) -> Scalar:
    """Computes the maximum calibration error (MCE): the largest |accuracy - confidence| of the bins that are not empty.

    Args:
        table: The bins.
    """
    return jnp.where(table.number > 0, jnp.abs(table.accuracy - table.confidence), 0).max()


def brier(probabilities: Float[Array, "n c"], y: Int[Array, " n"]) -> Float[Array, " n"]:
    """Computes the Brier score, the sum over classes of (probability - outcome)^2, which lies between 0 and 2.

    Args:
        probabilities: The predicted probabilities.
        y: The labels.

    References:
        Brier 1950.
    """
    possible = check_labels(y, probabilities.shape[-1])
    return ((probabilities - one_hot(y, probabilities.shape[-1])) ** 2).sum(-1) * possible


def auroc(higher: Float[Array, " n"], lower: Float[Array, " m"]) -> Scalar:
    """Computes the area under the ROC curve (AUROC), exactly.

    It is the probability that a score of `higher` exceeds one of `lower`, where ties count one half, and equals the
    Mann-Whitney statistic divided by n m. It is computed from ranks, in time (n + m) log m.

    Args:
        higher: Scores that should be high.
        lower: Scores that should be low.

    Returns:
        The area, or NaN if any score is NaN.

    Raises:
        ValueError: `higher` or `lower` is empty.

    References:
        Hanley & McNeil 1982.
    """
    n, m = higher.shape[0], lower.shape[0]
    if not (n and m):
        raise ValueError(f"auroc needs scores of both kinds, got {n} and {m}.")
    ordered = jnp.sort(lower)
    below, upto = (jnp.searchsorted(ordered, higher, side=side) for side in ("left", "right"))
    # As a difference from 1/2, so that ties give exactly 1/2, and by means, since n m may overflow 32 bits.
    lead = (below + upto - m).astype(float).mean() / m
    lost = jnp.isnan(higher).any() | jnp.isnan(lower).any()
    return jnp.where(lost, jnp.nan, jnp.clip(0.5 + lead / 2, 0, 1))


class Calibration(NamedTuple):
    """Scalars of a posterior or of its predictions, fitted on validation tasks.

    Attributes:
        knobs: The fitted scalars by name.
        nll_before: The mean nll of the queries with the starting values.
        nll_after: The mean nll of the queries with the fitted values.
    """

    knobs: dict[str, float]
    nll_before: float
    nll_after: float


@checked
def calibrate(
    learner: Learner,
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    *,
    tasks: Count = 200,
    evaluations: Count = 40,
    chunk: Count = 25,
    prior_sd: Spread = PRIOR_SD,
) -> Learner:
    """Calibrates a learner: fits its knobs by the nll of the queries of validation tasks.

    The knobs are positive scalars. Those of the posterior and the noise of a Gaussian likelihood are fitted first, by
    `fit_knobs`. For a classifier, the temperature of the softmax is fitted next, by `calibrate_softmax`. The values are
    in the `knobs` of the result.

    Args:
        learner: A trained learner. With norm="running" it must be settled first (`Learner.settle`).
        params: Its meta-learned parameters.
        source: The validation tasks. Training tasks would give an overconfident learner.
        key: The random key of the tasks and of the adaptation.
        tasks: The number of tasks. A source with groups draws each group once before any group is drawn again.
        evaluations: The largest number of evaluations of the nll.
        chunk: The number of tasks at once in memory.
        prior_sd: The prior standard deviation of each knob's logarithm around its current value. With `inf` the fit is
            by maximum likelihood.

    Returns:
        The calibrated learner.

    Raises:
        ValueError: The learner has no knob to fit, or its nll is not finite at any value that was tried.
    """
    options = {"tasks": tasks, "evaluations": evaluations, "chunk": chunk, "prior_sd": prior_sd}
    return turned(learner, calibration(learner, params, source, key, **options).knobs)


def calibration(
    learner: Learner,
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    *,
    tasks: int = 200,
    evaluations: int = 40,
    chunk: int = 25,
    prior_sd: float = PRIOR_SD,
    held: Collection[str] = (),
) -> Calibration:
    """Returns the values that `calibrate` fits, and the mean nll before and after.

    Args:
        learner: As in `calibrate`.
        params: As in `calibrate`.
        source: As in `calibrate`.
        key: As in `calibrate`.
        tasks: As in `calibrate`.
        evaluations: As in `calibrate`.
        chunk: As in `calibrate`.
        prior_sd: As in `calibrate`.
        held: The names of knobs that keep their values.

    Raises:
        ValueError: As in `calibrate`.
    """
    check_settled(learner)
    check_source(source)
    common: dict[str, Any] = {"tasks": tasks, "chunk": chunk, "prior_sd": prior_sd}
    knobs, found = {name: value for name, value in learner.knobs if name not in held}, []
    softmax = {SOFTMAX: knobs.pop(SOFTMAX)} if SOFTMAX in knobs else {}
    if knobs:
        found.append(fit_knobs(_turning(learner), params, source, key, knobs, evaluations=evaluations, **common))
    before = found[0].knobs if found else {}
    if softmax:
        build = _turning(turned(learner, before))
        found.append(fit_knobs(build, params, source, key, softmax, evaluations=evaluations, **common))
    elif SOFTMAX not in held and _classifies(learner, params, source, key):
        found.append(_softmax(learner, before, params, source, key, **common))
    if not found:
        raise ValueError(
            "learner must have a knob to fit, got none: this likelihood has no noise, and the posterior has no scalar. "
            "Use posterior=implicit() or laplace() if the learner takes a posterior."
        )
    return Calibration({n: v for f in found for n, v in f.knobs.items()}, found[0].nll_before, found[-1].nll_after)


@lru_cache(maxsize=32)
def _turning(learner: Learner) -> Callable[[dict[str, Array]], Learner]:
    """Returns knobs -> learner, as the same function for each learner, since compiled programs are cached by it."""
    return partial(turned, learner)


def _classifies(learner: Learner, params: PyTree, source: TaskSource, key: PRNGKeyArray) -> bool:
    """Whether the learner predicts classes on these tasks."""
    kinds = []

    def traced(params: PyTree, source: TaskSource, key: PRNGKeyArray) -> Array:
        support, query = draw_task(source, key, jnp.zeros((), int))
        kinds.append(type(learner.predict(params, learner.posterior(params, support, query, key), query.x, key)))
        return jnp.zeros(())

    jax.eval_shape(traced, params, source, key)
    return issubclass(kinds[0], Categories)


@checked
def fit_knobs(
    build: Callable[[dict[str, Array]], Learner],
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    knobs: dict[str, float],
    *,
    tasks: Count = 200,
    evaluations: Count = 40,
    chunk: Count = 25,
    prior_sd: Spread = PRIOR_SD,
) -> Calibration:
    """Fits any positive scalars, e.g. {"temperature": 1.0, "noise": 0.5}, by the nll of the queries of many tasks.

    For the knobs of a learner, use `calibrate`.

    The fit is a posterior mode. Each scalar k has a log-normal prior around its starting value k0, so that a few tasks
    cannot drive it to 0 or infinity. The objective is

        mean nll + sum (log(k / k0) / prior_sd)^2 / (2 g),   g = the number of tasks, or of groups if there are fewer.

    The prior of "noise" is three times as wide, since its starting value is arbitrary. The optimiser is Nelder and
    Mead's simplex on the logarithms, so the posterior need not be differentiable in the scalars. All evaluations use
    the same tasks and random numbers.

    Args:
        build: Makes the learner from the scalars, which are traced.
        params: The meta-learned parameters.
        source: The validation tasks.
        key: The random key of the tasks and of the adaptation.
        knobs: The starting values of the scalars by name, which must be positive.
        tasks: The number of tasks. A source with groups draws each group once before any group is drawn again.
        evaluations: The largest number of evaluations of the nll.
        chunk: The number of tasks at once in memory.
        prior_sd: The prior standard deviation of the logarithm of each scalar. With `inf` the fit is by maximum
            likelihood.

    Raises:
        ValueError: A starting value is not positive, or the nll is not finite at any value that was tried.

    References:
        Nelder & Mead 1965.
    """
    from scipy.optimize import minimize  # imported here because it takes a third of a second

    if any(value <= 0 for value in knobs.values()):
        raise ValueError(f"knobs must have positive starting values, got {knobs}.")

    check_source(source)
    nll, place = _mean_nll(build, chunk), group_order(source, jax.random.fold_in(key, 1), tasks)
    names, start = list(knobs), np.log(list(knobs.values()))
    evidence = _evidence(source, tasks)
    sds = np.array([NOISE_SD * prior_sd if name == "noise" else prior_sd for name in names])

    def fit_at(logs: np.ndarray) -> float:
        given = {name: jnp.asarray(log, float) for name, log in zip(names, logs, strict=True)}
        value = float(nll(given, params, source, key, place))
        return value if np.isfinite(value) else LOST

    def objective(logs: np.ndarray) -> float:
        return fit_at(logs) + float((((logs - start) / sds) ** 2).sum()) / (2 * evidence)

    simplex = np.vstack([start, start + 1.5 * np.eye(len(names))])
    options = {"maxfev": evaluations, "initial_simplex": simplex, "xatol": 0.02, "fatol": 1e-4}
    found = minimize(objective, start, method="Nelder-Mead", options=options)
    fitted = dict(zip(names, np.exp(found.x).tolist(), strict=True))
    before, after = fit_at(start), fit_at(found.x)
    if after >= LOST:
        raise ValueError(
            f"the query nll is not finite at any value of {', '.join(names)} that was tried, so nothing can be fitted. "
            "Check that the labels are classes, that some queries have a weight above 0, and that the learner does not "
            "diverge."
        )
    return Calibration(fitted, before, after)


@shared()
def _mean_nll(build: Callable[[dict[str, Array]], Learner], chunk: int) -> Callable[..., Scalar]:
    """Returns a compiled function (log scalars, params, source, key, place) -> mean nll of the queries."""

    def lost(predicted: Predictive, y: Array, weight: Float[Array, " n"]) -> Scalar:
        return -jnp.where(weight > 0, weight * predicted.log_prob(y), 0).sum()

    @jax.jit
    def nll(
        logs: dict[str, Array], params: PyTree, source: TaskSource, key: PRNGKeyArray, place: Int[Array, " tasks"]
    ) -> Scalar:
        learner = build({name: jnp.exp(value) for name, value in logs.items()})
        sums, counts = _asked(lost, learner, params, source, key, place, chunk)
        return sums.sum() / counts.sum()

    return nll


@shared()
def _log_probs(build: Callable[[dict[str, Array]], Learner], chunk: int) -> Callable[..., tuple[Array, Array, Array]]:
    """Returns a compiled function (knobs, params, source, key, place) -> log probabilities, labels and weights."""

    def kept(predicted: Categories, y: Array, weight: Float[Array, " n"]) -> tuple[Array, Array, Array]:
        return predicted.tempered(1.0).log_probs[0], y, weight

    @jax.jit
    def asked(
        knobs: dict[str, Array], params: PyTree, source: TaskSource, key: PRNGKeyArray, place: Int[Array, " tasks"]
    ) -> tuple[Array, Array, Array]:
        return _asked(kept, build(knobs), params, source, key, place, chunk)[0]

    return asked


@checked
def calibrate_softmax(
    learner: Learner,
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    *,
    tasks: Count = 200,
    chunk: Count = 25,
    prior_sd: Spread = PRIOR_SD,
) -> Calibration:
    """Fits "softmax_temperature", for `temperature_scaled`, by the nll of the queries of many tasks.

    Each task is adapted to and predicted once. The temperature lies between 1/50 and 50, and has the prior of
    `calibrate` around 1, since the likelihood alone would be highest at 0 if every query is classified correctly.

    Args:
        learner: The classifier.
        params: Its meta-learned parameters.
        source: The validation tasks.
        key: The random key of the tasks and of the adaptation.
        tasks: The number of tasks. A source with groups draws each group once before any group is drawn again.
        chunk: The number of tasks at once in memory.
        prior_sd: The prior standard deviation of the logarithm of the temperature.

    Raises:
        ValueError: See `fit_temperature`.

    References:
        Guo et al. 2017.
    """
    return _softmax(learner, {}, params, source, key, tasks=tasks, chunk=chunk, prior_sd=prior_sd)


def _softmax(
    learner: Learner,
    knobs: dict[str, float],
    params: PyTree,
    source: TaskSource,
    key: PRNGKeyArray,
    *,
    tasks: int,
    chunk: int,
    prior_sd: float,
) -> Calibration:
    """Fits the softmax temperature at given knobs, which are traced, so that one program serves all values."""
    check_source(source)
    place = group_order(source, jax.random.fold_in(key, 1), tasks)
    given = {name: jnp.asarray(value, float) for name, value in knobs.items()}
    found = _log_probs(_turning(learner), chunk)(given, params, source, key, place)
    logs, y, weight = (np.asarray(leaf).reshape(-1, *leaf.shape[2:]) for leaf in found)
    return fit_temperature(logs, y, weight, _evidence(source, tasks), prior_sd)


def fit_temperature(
    log_probs: Float[np.ndarray, "n c"], y: Int[np.ndarray, " n"], weight: Float[np.ndarray, " n"], evidence: int,
    prior_sd: float = PRIOR_SD,
) -> Calibration:  # fmt: skip
    """Fits the temperature of a softmax to given predictions (see `calibrate_softmax`).

    Args:
        log_probs: The predicted log probabilities.
        y: The labels.
        weight: The weight of each prediction.
        evidence: The number of independent tasks or groups that they come from.
        prior_sd: The prior standard deviation of the logarithm of the temperature.

    Raises:
        ValueError: No prediction has a weight above 0, a label is no class, a prediction is NaN, or the class of a
            query has probability 0.
    """
    from scipy.optimize import minimize_scalar

    log_probs, y, weight = (np.asarray(v)[np.asarray(weight) > 0] for v in (log_probs, y, weight))
    if not len(y):
        raise ValueError("query: no task has an example with a weight above 0, so there is nothing to fit.")
    check_labels(y, log_probs.shape[-1])
    if lost := int(np.isnan(log_probs).any(-1).sum()):
        raise ValueError(f"{lost} of {len(y)} predictions are NaN: the learner diverged, so nothing can be fitted.")
    logs, of_label = np.asarray(log_probs, float), np.arange(len(y))

    def nll(log: float) -> float:
        scaled = logs / np.exp(log)
        most = scaled.max(-1)
        told = scaled[of_label, y.astype(int)] - most - np.log(np.exp(scaled - most[:, None]).sum(-1))
        return float(-(weight * told).sum() / weight.sum())

    def objective(log: float) -> float:
        return nll(log) + (log / prior_sd) ** 2 / (2 * evidence)

    if not np.isfinite(nll(0.0)):
        raise ValueError("a query's class has probability 0, so its nll is infinite at any temperature: nothing can be "
                         "fitted. Check that the labels are classes of the support.")  # fmt: skip
    found = minimize_scalar(objective, bounds=(-np.log(50), np.log(50)), method="bounded")
    return Calibration({"softmax_temperature": float(np.exp(found.x))}, nll(0.0), nll(found.x))


def _asked(
    of: Callable[..., PyTree], learner: Learner, params: PyTree, source: TaskSource, key: PRNGKeyArray,
    place: Int[Array, " tasks"], chunk: int,
) -> tuple[PyTree, Float[Array, " tasks"]]:  # fmt: skip
    """Computes of(predictive, y, weight) for the queries of a task of each group in `place`, and their total weight."""
    check_settled(learner)

    def one(drawn: tuple[PRNGKeyArray, Array]) -> tuple[PyTree, Scalar]:
        key_task, key_adapt, key_predict = jax.random.split(drawn[0], 3)
        task = draw_task(source, key_task, drawn[1])
        query = counted(task.query)
        posterior = learner.posterior(params, task.support, query, key_adapt)
        weight = weights(query)
        return of(learner.predict(params, posterior, query.x, key_predict), query.y, weight), weight.sum()

    return jax.lax.map(one, (jax.random.split(key, place.shape[0]), place), batch_size=min(chunk, place.shape[0]))


def _evidence(source: TaskSource, tasks: int) -> int:
    """The number of independent observations in so many tasks."""
    return min(tasks, group_count(source) or tasks)


__all__ = [
    "BINS", "Calibration", "Reliability", "auroc", "brier", "calibrate", "calibrate_softmax", "calibration",
    "expected_error", "fit_knobs", "fit_temperature", "maximum_error", "reliability", "temperature_scaled",
]  # fmt: skip
