"""Knobs: positive scalars of a learner's predictions that are fitted after training."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categories, Gaussian, Likelihood
from metaprior.core.types import Learner, as_knobs

SOFTMAX = "softmax_temperature"


def with_noise(make: Callable[[Likelihood], Learner], likelihood: Likelihood) -> Learner:
    """Returns a learner whose noise can be fitted after training, by its knob "noise".

    Args:
        make: (likelihood of predictions) -> learner.
        likelihood: Likelihood of training and predictions. Nothing changes for one without a noise (classes, counts).
    """
    learner = make(likelihood)
    knobs = as_knobs({"noise": likelihood.scale}) if isinstance(likelihood, Gaussian) else ()
    if not knobs:
        return learner
    return learner._replace(knobs=knobs, turn=lambda knobs: with_noise(make, Gaussian(knobs["noise"])))


def temperature_scaled(learner: Learner, temperature: float | Scalar) -> Learner:
    """Returns a classifier whose predicted probabilities are tempered; the most probable classes stay the same.

    Args:
        learner: The classifier.
        temperature: Divides the logarithms of the probabilities.
    """

    def predict(params: PyTree, posterior: PyTree, x: PyTree, key: PRNGKeyArray) -> Categories:
        return learner.predict(params, posterior, x, key).tempered(temperature)

    def turn(knobs: Mapping[str, Any]) -> Learner:
        others = {name: value for name, value in knobs.items() if name != SOFTMAX}
        return temperature_scaled(turned(learner, others), knobs.get(SOFTMAX, temperature))

    return learner.changed(
        lambda other: temperature_scaled(other, temperature),
        predict=predict,
        knobs=(*learner.knobs, *as_knobs({SOFTMAX: temperature})),
        turn=turn,
    )


def turned(learner: Learner, knobs: Mapping[str, Any]) -> Learner:
    """Returns the learner with new values of some of its knobs.

    Args:
        learner: Any learner; a classifier's "softmax_temperature" need not be among its knobs.
        knobs: Values by name; they may be traced.

    Raises:
        ValueError: The learner has no such knob.
    """
    own = dict(learner.knobs)
    scale = None if SOFTMAX in own else knobs.get(SOFTMAX)
    rest = {name: value for name, value in knobs.items() if not (name == SOFTMAX and scale is not None)}
    if unknown := sorted(rest.keys() - own.keys()):
        has = ", ".join(own) or "none"
        raise ValueError(f"knobs must be among those of the learner ({has}), got {', '.join(unknown)}.")
    if rest:
        assert learner.turn is not None
        learner = learner.turn(rest)
    return learner if scale is None else temperature_scaled(learner, scale)
