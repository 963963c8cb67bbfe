"""What is true of a learner besides its functions.

Each learner states it in its own file; no other file lists names of learners.

    @traits(of_classes=True, small={"rate": 0.3})
    def my_learner(model, likelihood, *, rate=0.1): ...
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)


def five_steps(features: int) -> Mapping[str, Any]:
    """Returns options of gradient descent for standardised tables.

    A learner's own default rate suits no particular data: one step of 0.01 hardly leaves the prior. Five steps of 0.1
    have the lower RMSE on every table of docs/estimators.md. With more features the inner loss has more curvature, so
    the rate is min(0.1, 0.5 / features).

    Args:
        features: number of features of the table.
    """
    return {"steps": 5, "rate": min(0.1, 0.5 / features)}


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What recipes, estimators, referees and contract tests need to know of a learner. The defaults are those of MAML.

    Attributes:
        of_classes: it takes classes only.
        reads_names: its network reads labels as inputs, so other names for the classes give other answers.
        ordered: it reads the support as a sequence.
        reads_unlabelled: it takes a label below 0 in a support as an example without a label; for others it is an
            error.
        reads_attributes: its support holds the attributes of classes in place of examples.
        rules_out_unseen: a class without support examples has probability 0 (see `builders.metric.with_unseen`).
        pretrained: it trains by plain classification, in which a label means the same in every task.
        estimates: `jax.grad` of its loss is the meta-gradient, but not the derivative of the loss's value.
        descends: its inner steps follow a gradient, so they imply a prior.
        small: options with which it learns small problems in a few steps.
        silent: options, on top of `small`, with which nothing is random.
        training: fields of `Training` for small problems.
        referees: for each referee ("truth", "nuts", ...), the options with which the learner reaches its own answer.
        distance: the distance by which it compares embeddings, where it has no option of that name.
        on_table: (number of features) -> options that suit standardised tables, used where the user states none of
            them.
        gates: (model, likelihood, params, support, steps, p=...) -> the gates of its inner steps, for a plot.
        standard: (theta of zeros, options, key) -> params that state the prior N(0, I), for the referee "nuts".
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
    """Returns a decorator that states the traits of a learner's factory.

    Args:
        said: fields of `Traits`.
    """
    told = Traits(**said)

    def state(factory: F) -> F:
        factory.traits = told  # type: ignore[attr-defined]
        return factory

    return state


def stated(factory: Callable) -> Traits:
    """Returns the traits of a learner's factory; the defaults where it states none."""
    return getattr(factory, "traits", Traits())
