"""The vocabulary: batches, tasks, models, learners and predictives. Everything else speaks in these words.

Tasks j = 1..J have parameters phi_j drawn from a shared prior p(phi | theta). A task shows a *support* set and is
judged on a *query* set. A learner is how (theta, support) becomes a posterior over phi and how theta is scored.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Scalar


class Batch(NamedTuple):
    """Examples: every leaf of x and y has the examples as its leading axis.

    `weight` [n] multiplies each example's loss; 0 marks padding, None means all ones. A class label below 0 in a
    support set is not known; -2 - label is one that is hidden but may be asked for.
    """

    x: PyTree
    y: PyTree
    weight: Float[Array, " n"] | None = None


class Attributes(NamedTuple):
    """What is known of classes in place of examples of them: the x of a zero-shot support, a row a class."""

    values: Float[Array, "n a"]


class Task(NamedTuple):
    """A support set to adapt on and a query set to be judged by. A batch of tasks has one more leading axis."""

    support: Batch
    query: Batch


class Model(NamedTuple):
    """A network as two pure functions on a *batch* x: `init(key, x) -> params`, `apply(params, x) -> outputs`.

    `features(params, x)` gives what the last layer (the head) sees; NIL, the metric learners and last-layer
    posteriors need it, the others do not.

    `statistics`: whose statistics its batch norm goes by: "batch" (of what comes together, or it has none), "task" (of
    the support) or "running" (of training tasks). A model knows neither support nor training tasks, so with the last
    two its functions take them as a further argument, which `networks/statistics.py` provides.
    """

    init: Callable[[PRNGKeyArray, PyTree], PyTree]
    apply: Callable[..., PyTree]
    features: Callable[..., Array] | None = None
    statistics: str = "batch"


@runtime_checkable
class Predictive(Protocol):
    """p(y | x, support, theta) at n inputs: a pytree, usually a mixture with one component a posterior draw."""

    def mean(self) -> Array:
        """The predictive mean [n, ...]; class probabilities [n, way] for classification."""
        ...

    def log_prob(self, y: Array) -> Float[Array, " n"]:
        """Log density (or log mass) of each example's target."""
        ...


class Learner(NamedTuple):
    """Four pure functions (and one optional); each can be jitted, vmapped over tasks and sharded.

    init:    (key, task)                 -> params       theta: all that is meta-learned
    adapt:   (params, support, key)      -> posterior    a pytree: phi | support, theta
    predict: (params, posterior, x, key) -> Predictive
    loss:    (params, task, key)         -> (scalar, metrics); `jax.grad` of it *is* the meta-gradient
    path:    (params, support, key)      -> posterior after 0, 1, ..., k inner steps (one more leading axis), for
             those learners that have inner steps
    """

    init: Callable[[PRNGKeyArray, Task], PyTree]
    adapt: Callable[[PyTree, Batch, PRNGKeyArray], PyTree]
    predict: Callable[[PyTree, PyTree, PyTree, PRNGKeyArray], Any]
    loss: Callable[[PyTree, Task, PRNGKeyArray], tuple[Scalar, dict[str, Scalar]]]
    path: Callable[[PyTree, Batch, PRNGKeyArray], PyTree] | None = None


@runtime_checkable
class TaskSource(Protocol):
    """Where tasks come from: a pytree, so that its data travel into compiled code as arguments, not as constants."""

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draw n tasks, stacked along a new leading axis; pure and traceable."""
        ...


class Splits(NamedTuple):
    """The three task sources of one data set; where tasks are made from classes, the classes are disjoint."""

    train: TaskSource
    validation: TaskSource
    test: TaskSource


def examples(batch: Batch) -> int:
    """The number of examples of a batch (padding included)."""
    return jax.tree.leaves(batch.x)[0].shape[0]


__all__ = ["Array", "Attributes", "Batch", "Bool", "Float", "Learner", "Model", "PRNGKeyArray", "Predictive", "PyTree",
           "Scalar", "Splits", "Task", "TaskSource", "examples"]
