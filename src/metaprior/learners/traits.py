"""Facts about a learner besides its functions. Each learner's file declares them; no other file lists names.

@traits(of_classes=True, small={"rate": 0.3})
def my_learner(model, likelihood, *, rate=0.1): ...
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)


def five_steps(features: int) -> Mapping[str, Any]:
    """Returns options of gradient descent for standardised tables.

    A learner's default rate suits no particular data: one step of 0.01 barely leaves the prior. Five steps of 0.1 have
    the lower RMSE on every table of docs/estimators.md. The curvature of the inner loss grows with the number of
    features, so the rate is min(0.1, 0.5 / features).

    Args:
        features: Number of features of the table.
    """
    return {"steps": 5, "rate": min(0.1, 0.5 / features)}


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Facts about a learner for recipes, estimators, referees and contract tests. The defaults are those of MAML.

    Attributes:
        of_classes: It only classifies.
        reads_names: Its network reads labels as inputs, so renaming the classes changes its predictions.
        ordered: It reads the support as a sequence.
        reads_unlabelled: A support label below 0 is an example without a label; other learners raise an error.
        reads_attributes: Its support holds attributes of classes instead of examples.
        rules_out_unseen: A class without support examples has probability 0 (see `builders.metric.with_unseen`).
        pretrained: It trains by plain classification, in which labels mean the same in every task.
        estimates: `jax.grad` of its loss is the meta-gradient, but not the derivative of the loss's value.
        descends: Its inner steps follow a gradient, so they imply a prior.
        small: Options with which it learns small problems in a few steps.
        silent: Options, on top of `small`, that make it deterministic.
        training: Fields of `Training` for small problems.
        referees: For each referee ("truth", "nuts", ...) the options with which the learner converges there.
        distance: The distance between embeddings, where the learner has no option of that name.
        on_table: (number of features) -> default options for standardised tables, unless the user gives any of them.
        gates: (model, likelihood, params, support, steps, p=...) -> the gates of its inner steps, for a plot.
        standard: (theta of zeros, options, key) -> params that express the prior N(0, I), for the referee "nuts".
    """

    of_classes: bool = False
    reads_names: bool = False
    ordered: bool = False
    reads_unlabelled: bool = False
    reads_attributes: bool = False
    rules_out_unseen: bool = False
    pretrained: bool = False
    estimates: bool = False
    descends: bool = True
    small: Mapping[str, Any] = field(default_factory=dict)
    silent: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    referees: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    distance: str = "euclidean"
    on_table: Callable[[int], Mapping[str, Any]] = lambda features: {}
    gates: Callable[..., Any] | None = None
    standard: Callable[[Any, Mapping[str, Any], Any], Any] | None = None


def traits(**said: Any) -> Callable[[F], F]:
    """Declares the traits of a learner's factory, as a decorator.

    Args:
        said: Fields of `Traits`.
    """
    told = Traits(**said)

    def state(factory: F) -> F:
        factory.traits = told  # type: ignore[attr-defined]
        return factory

    return state


def stated(factory: Callable) -> Traits:
    """Returns the traits of a learner's factory."""
    return getattr(factory, "traits", Traits())
