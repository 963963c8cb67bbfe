"""What is true of a learner besides its functions. Each learner states it in its own file; nothing else lists names.

@traits(of_classes=True, small={"rate": 0.3})
def my_learner(model, likelihood, *, rate=0.1): ...
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)


def five_steps(features: int) -> Mapping[str, Any]:
    """Options of gradient descent on standardised tables of so many features.

    A learner's own rate is made for no particular data: one step of 0.01 hardly leaves the prior. Five of 0.1 have the
    lower RMSE on every table of docs/estimators.md. The inner loss bends more with more features, so the rate is
    min(0.1, 0.5 / features).
    """
    return {"steps": 5, "rate": min(0.1, 0.5 / features)}


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What recipes, estimators, referees and contract tests ask of a learner. The defaults are those of MAML.

    Args:
        of_classes: it takes classes only.
        reads_names: its network reads labels as inputs, so other names for the classes give other answers.
        ordered: the support is a sequence to it.
        reads_unlabelled: a label below 0 in a support is an example without a label; to others it is an error.
        reads_attributes: its support holds the attributes of classes in place of examples.
        rules_out_unseen: a class without support examples has probability 0 (see `builders.metric.with_unseen`).
        pretrained: it trains by plain classification, in which labels mean the same in every task.
        estimates: `jax.grad` of its loss is the meta-gradient, but not the derivative of the loss's value.
        descends: its inner steps follow a gradient, so they imply a prior.
        small: options that make small problems learnable in a few steps.
        silent: options under which nothing is drawn, on top of `small`.
        training: fields of `Training` for small problems.
        referees: by referee ("truth", "nuts", ...) the options under which the learner comes to its own answer there.
        distance: by which it compares embeddings, where it has no option of that name.
        on_table: (number of features) -> options that suit standardised tables, where the user says none of them.
        gates: (model, likelihood, params, support, steps, p=...) -> the gates of its inner steps, to be drawn.
        standard: (theta of zeros, options, key) -> params that say the prior N(0, I), for the referee "nuts".
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
    """State the traits of a learner's factory."""
    told = Traits(**said)

    def state(factory: F) -> F:
        factory.traits = told  # type: ignore[attr-defined]
        return factory

    return state


def stated(factory: Callable) -> Traits:
    """The traits of a learner's factory."""
    return getattr(factory, "traits", Traits())
