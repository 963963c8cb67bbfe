"""The basic types: batches, tasks, models, learners and predictives.

Tasks j = 1..J have parameters phi_j drawn from a shared prior p(phi | theta). A task has a *support* set to adapt on
and a *query* set to evaluate on. A learner defines how theta and a support give a posterior over phi, and the loss by
which theta is trained.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

LEAST_TOTAL, MOST_TOTAL = 1e-12, 1e12  # bounds on the sum of a batch's weights, unless all are 0


class Batch(NamedTuple):
    """A set of n examples.

    A mean over rows is sum(w l) / sum(w), so multiplying all weights by 10 does not change it. Sums over rows
    (curvature, evidence) are sum(w l), and the number of examples n that a prior is weighed against (KL / n) is sum(w).

    Attributes:
        x: Inputs. The leading axis of every leaf is n.
        y: Targets. The leading axis of every leaf is n.
        weight: The number of examples that each row represents [n]: 0 marks padding, and 0.1 is a tenth of an example.
            None means 1 for all. Weights are finite and at least 0. Their sum is 0 or from 1e-12 to 1e12, so that
            products of two sums do not overflow in float32.
        known: Whether the class of each row of a support is known [n]. None means that all are. Where it is not known,
            y is -1, or -2 - label if the label may be requested (active learning). Few learners read such rows
            (`Traits.reads_unlabelled`); the others raise an error for a batch with `known`.
    """

    x: PyTree
    y: PyTree
    weight: Float[Array, " n"] | None = None
    known: Bool[Array, " n"] | None = None


class Attributes(NamedTuple):
    """Attributes of classes, given instead of examples: the x of a zero-shot support.

    Attributes:
        values: The a attributes of n classes, one row per class.
    """

    values: Float[Array, "n a"]


class Task(NamedTuple):
    """A support set and a query set. A batch of tasks has one more leading axis.

    Attributes:
        support: The examples to adapt on.
        query: The examples to evaluate on.
    """

    support: Batch
    query: Batch


class Call(NamedTuple):
    """Optional arguments of a network's call, besides its parameters and inputs.

    Attributes:
        tap: Function (name, inputs [n, ..., k], s [n, ..., o]) -> s, called with the inputs and outputs of each linear
            map. It may replace the outputs. Curvatures read a network's layers with it, and learners change them.
        by: The statistics that batch norm uses: a mapping from layer names to statistics, or the weights [n] of the
            current examples in their statistics. None uses the current examples with equal weights.
        modulate: Function (name, s [n, ..., c]) -> s, applied to each hidden layer after its norm and before its
            activation.
        layer: Function (name, s [n, ..., c]) -> s, applied to the outputs of each layer: those of a hidden layer or
            block after its activation and pooling, and those of the head.
    """

    tap: Callable[[str, Array, Array], Array] | None = None
    by: Any = None
    modulate: Callable[[str, Array], Array] | None = None
    layer: Callable[[str, Array], Array] | None = None


PLAIN = Call()


class Model(NamedTuple):
    """A network as pure functions of its parameters and a *batch* x.

    Attributes:
        init: Function (key, x) -> params.
        apply: Function (params, x) -> outputs, or (params, x, call) -> outputs if `calls`.
        features: Function with the arguments of `apply` that returns the inputs of the last layer (the head), or None.
            NIL, metric learners and last-layer posteriors need it; other learners do not.
        statistics: The statistics that batch norm uses: "batch" (those of the examples in the same call, also for
            networks without batch norm), "task" (those of the support) or "running" (those of training tasks). See
            `networks/statistics.py`.
        calls: Whether `apply` and `features` take a `Call` as a third argument.
        support: The support whose statistics batch norm uses, if it has been set (`networks.statistics.beside`).
    """

    init: Callable[[PRNGKeyArray, PyTree], PyTree]
    apply: Callable[..., PyTree]
    features: Callable[..., Array] | None = None
    statistics: str = "batch"
    calls: bool = False
    support: Batch | None = None

    def outputs(self, params: PyTree, x: PyTree, call: Call = PLAIN) -> PyTree:
        """Applies the network with a `Call`.

        Args:
            params: The network's parameters.
            x: A batch of inputs.
            call: Optional arguments of the call.

        Returns:
            The outputs, with a leading axis of examples.

        Raises:
            ValueError: The call is not empty, and the model takes no `Call`.
        """
        if all(part is None for part in call):
            return self.apply(params, x)
        if not self.calls:
            raise ValueError(
                "model must take a `Call`, so that its layers can be read or changed, got apply(params, x). Use a "
                "network of metaprior.networks or, if a posterior needs the layers, curvature='dual', 'diagonal' or "
                "'lanczos' instead of 'kfac'."
            )
        return self.apply(params, x, call)


@runtime_checkable
class Predictive(Protocol):
    """The predictive distribution p(y | x, support, theta) at n inputs.

    A predictive is a pytree, usually a mixture with one component per posterior draw.
    """

    def mean(self) -> Array:
        """Returns the predictive mean [n, ...]; for classification, the class probabilities [n, way]."""
        ...

    def log_prob(self, y: Array) -> Float[Array, " n"]:
        """Returns the log density (or log probability) of each example's target.

        Args:
            y: Targets, with a leading axis of n.
        """
        ...


@runtime_checkable
class NumericPredictive(Predictive, Protocol):
    """A predictive of numbers, which also has the spread that intervals and reports of regressions need."""

    def variance(self) -> Float[Array, "n d"]:
        """Returns the predictive variance of each target."""
        ...

    def cdf(self, y: Array) -> Float[Array, "n d"]:
        """Returns P(target <= y) of each target.

        Args:
            y: Targets [n, d].
        """
        ...

    def quantile(self, q: float) -> Float[Array, "n d"]:
        """Returns the q-quantile of each target.

        Args:
            q: Probability, 0 < q < 1.
        """
        ...


@runtime_checkable
class ClassPredictive(Predictive, Protocol):
    """A predictive of classes, whose log probabilities can be divided by a temperature."""

    def tempered(self, temperature: float | Scalar) -> "ClassPredictive":
        """Returns the predictive with probabilities in proportion to p^(1 / temperature).

        Args:
            temperature: Above 1 the probabilities become less confident.
        """
        ...


class Joint(NamedTuple):
    """A term of the training objective that is a function of all tasks of a meta-batch.

    The objective is mean_j loss_j + measure(s_1, ..., s_J), where s_j is the score of task j. Training computes all
    scores first, on all devices, and then adds weight_j s_j to the loss of task j, where weight_j is the derivative of
    the measure by s_j. This gives the exact gradient, also where only some of the tasks are in memory at once.

    Attributes:
        name: The name of the term among the training metrics.
        score: Function (params, task, key) -> scalar. The key is that of the task's loss.
        measure: Function (scores [J]) -> scalar, which `jax.grad` differentiates. It raises a ValueError if it is not
            defined for this number of tasks or, outside compiled code, for these scores; in compiled code it is NaN.
    """

    name: str
    score: Callable[[PyTree, Task, PRNGKeyArray], Scalar]
    measure: Callable[[Float[Array, " J"]], Scalar]


class AtMean(NamedTuple):
    """The mean of a posterior over phi, and the network there.

    Attributes:
        phi: The mean, a pytree. Its leaves are named as the network's parameters where they are some of these.
        network: Function (x, call) -> outputs [n, ...].
    """

    phi: PyTree
    network: Callable[..., Array]


class Learner(NamedTuple):
    """A meta-learning algorithm: four pure functions and a few optional ones.

    Each function can be jitted, vmapped over tasks and sharded.

    Attributes:
        init: Function (key, task) -> params. The params are theta: all that is meta-learned.
        adapt: Function (params, support, key) -> posterior of phi given the support and theta, a pytree.
        predict: Function (params, posterior, x, key) -> `Predictive` at the inputs x.
        loss: Function (params, task, key) -> (scalar, metrics). Its `jax.grad` *is* the meta-gradient.
        path: Function (params, support, key) -> the posteriors after 0, 1, ..., k inner steps, stacked along a new
            leading axis. None for learners without inner steps.
        network: Function (params, support, key) -> ((x, call) -> outputs), the network before the first inner step, as
            this learner calls it. None if that is the model with params.
        settle: Function (params, source, key) -> the learner to use after training, if it uses statistics of training
            tasks (batch norm with norm="running"). None if training changes nothing but params.
        knobs: Pairs (name, value) of the positive scalars of its predictions that can be fitted on validation tasks:
            the noise of a Gaussian likelihood, the temperature or precision of a posterior, the temperature of a
            softmax.
        turn: Function (knobs) -> the learner with these values, a mapping by name. Values may be traced.
        transduce: Function (params, support, query, key) -> posterior, which may use all query inputs of the task.
            The query is a batch with weights and without targets. A learner with this function is evaluated by it
            instead of `adapt`.
        joint: A term of the training objective that is a function of all tasks of a meta-batch, or None.
        schedule: Function (progress) -> the learner whose loss training uses when this share of the meta-steps is done,
            from 0 to 1, a traced scalar. None if the loss does not change during training.
        at_mean: Function (params, posterior) -> `AtMean`, the posterior's mean and the network there, which sees all of
            its inputs in one batch. None for learners that infer no parameters of one network.
        kinds: Function (params, support, key) -> to which of the k kinds of tasks that it learned a task belongs,
            weights [k] with a sum of 1. None for learners that do not distinguish kinds of tasks.
    """

    init: Callable[[PRNGKeyArray, Task], PyTree]
    adapt: Callable[[PyTree, Batch, PRNGKeyArray], PyTree]
    predict: Callable[[PyTree, PyTree, PyTree, PRNGKeyArray], Any]
    loss: Callable[[PyTree, Task, PRNGKeyArray], tuple[Scalar, dict[str, Scalar]]]
    path: Callable[[PyTree, Batch, PRNGKeyArray], PyTree] | None = None
    network: Callable[[PyTree, Batch, PRNGKeyArray], Callable[..., Array]] | None = None
    settle: Callable[[PyTree, "TaskSource", PRNGKeyArray], "Learner"] | None = None
    knobs: tuple[tuple[str, float], ...] = ()
    turn: Callable[[Mapping[str, Any]], "Learner"] | None = None
    transduce: Callable[[PyTree, Batch, Batch, PRNGKeyArray], PyTree] | None = None
    joint: Joint | None = None
    schedule: Callable[[Scalar], "Learner"] | None = None
    at_mean: Callable[[PyTree, PyTree], AtMean] | None = None
    kinds: Callable[[PyTree, Batch, PRNGKeyArray], Float[Array, " k"]] | None = None

    def posterior(self, params: PyTree, support: Batch, query: Batch, key: PRNGKeyArray) -> PyTree:
        """Returns the posterior that predicts the queries: that of `transduce` if there is one, else that of `adapt`.

        Args:
            params: The meta-learned parameters.
            support: The labelled examples of the task.
            query: All queries of the task; no learner sees their targets.
            key: Random key.
        """
        if self.transduce is None:
            return self.adapt(params, support, key)
        return self.transduce(params, support, Batch(query.x, None, query.weight), key)

    def changed(self, change: Callable[["Learner"], "Learner"], **functions: Any) -> "Learner":
        """Returns this learner with some functions replaced.

        Args:
            change: Makes the same replacement in another learner. It is applied to the learners that `settle`, `turn`
                and `schedule` return.
            functions: The new functions, by name.
        """
        settle, turn, schedule = self.settle, self.turn, self.schedule
        if settle is not None:
            functions["settle"] = lambda params, source, key: change(settle(params, source, key))
        if turn is not None:
            functions.setdefault("turn", lambda knobs: change(turn(knobs)))
        if schedule is not None:
            functions.setdefault("schedule", lambda progress: change(schedule(progress)))
        return self._replace(**functions)


def as_knobs(scalars: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Returns scalars in the form of a learner's `knobs`.

    Args:
        scalars: The scalars by name. Values of None and arrays of several numbers are left out.

    Returns:
        Pairs (name, value). Numbers are converted to float; traced values stay as they are.
    """
    single = {
        name: value
        for name, value in scalars.items()
        if isinstance(value, int | float | np.generic | np.ndarray | jax.Array) and jnp.ndim(value) == 0
    }
    return tuple((name, v if isinstance(v, Tracer) else float(v)) for name, v in single.items())


def settled(learner: Learner, params: PyTree, source: "TaskSource", key: PRNGKeyArray) -> Learner:
    """Returns the learner to use with trained params.

    With norm="running", its batch norm uses statistics of tasks from `source`. Any other learner is returned as is.

    Args:
        learner: The learner.
        params: Its trained parameters, theta.
        source: Source of training tasks.
        key: Random key for the draw of tasks.
    """
    return learner if learner.settle is None else learner.settle(params, source, key)


def check_settled(learner: Learner) -> None:
    """Checks that a learner need not be `settled` before it is evaluated.

    Args:
        learner: The learner.

    Raises:
        ValueError: It must be settled first.
    """
    if learner.settle is not None:
        raise ValueError(
            "learner must be settled before it is evaluated, got one whose batch norm uses statistics of training "
            "tasks (norm='running') that have not been computed. "
            "Use learner = mp.settled(learner, params, splits.train, key)."
        )


@runtime_checkable
class TaskSource(Protocol):
    """A source of tasks: a pytree, so that its data enter compiled code as arguments and not as constants."""

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks, stacked along a new leading axis. The function is pure and traceable.

        Args:
            key: Random key.
            n: Number of tasks.
        """
        ...


@runtime_checkable
class GroupedSource(TaskSource, Protocol):
    """A source whose tasks come from a fixed number of groups, such as the subjects of a table.

    Tasks of the same group are not independent, so `evaluate` visits each group once before any group comes again, and
    computes intervals from one mean per group.
    """

    @property
    def group_count(self) -> int | None:
        """The number of groups. None if this source wraps one without groups."""
        ...

    def of_group(self, key: PRNGKeyArray, group: Int[Array, ""]) -> Task:
        """Draws a task of one group. The function is pure and traceable.

        Args:
            key: Random key.
            group: Index of the group, 0..group_count-1.
        """
        ...


@runtime_checkable
class FamilySource(TaskSource, Protocol):
    """A source whose tasks come from named families with equal probabilities, such as sinusoids and lines.

    Each task is an independent draw. `evaluate` draws all families equally often, and reports the figures of each.
    """

    @property
    def families(self) -> tuple[str, ...]:
        """The names of the families, different from each other. Empty if this source wraps one without families."""
        ...

    def of_family(self, key: PRNGKeyArray, family: Int[Array, ""]) -> Task:
        """Draws a task of one family. The function is pure and traceable.

        Args:
            key: Random key.
            family: Index of the family, 0..len(families)-1.

        Raises:
            ValueError: A concrete index that is out of this range (`check_family`).
        """
        ...


@runtime_checkable
class WrappedSource(TaskSource, Protocol):
    """A source that changes the tasks of another one (augmented images, hidden labels, ...).

    Attributes:
        source: The other source.
    """

    source: TaskSource


@runtime_checkable
class EncodingSource(TaskSource, Protocol):
    """A source that encodes a user's inputs, e.g. texts, as arrays.

    Attributes:
        encode: Function from the user's inputs to the arrays that a network reads.
    """

    encode: Callable[..., Any]


@runtime_checkable
class OutsideSource(TaskSource, Protocol):
    """A source that also has inputs that belong to no class, to test rejection.

    Attributes:
        outside: The inputs [m, ...], or None.
    """

    outside: Any


@runtime_checkable
class Embedded(Protocol):
    """Parameters of a learner that compares embeddings.

    Attributes:
        embedding: The parameters of the network that embeds.
    """

    embedding: PyTree


class Splits(NamedTuple):
    """The three task sources of a data set. Their classes or groups are disjoint.

    Attributes:
        train: Source of the tasks for meta-training.
        validation: Source of the tasks for choosing and calibrating.
        test: Source of the tasks for the final evaluation.
    """

    train: TaskSource
    validation: TaskSource
    test: TaskSource


def innermost(source: TaskSource) -> TaskSource:
    """Returns the source inside all sources that wrap it (augmented images, hidden labels).

    Args:
        source: A task source.
    """
    while isinstance(source, WrappedSource):
        source = source.source
    return source


def group_count(source: Any) -> int | None:
    """Returns the number of groups that a source's tasks come from, or None if tasks are independent draws.

    Args:
        source: A task source.
    """
    return source.group_count if isinstance(source, GroupedSource) else None


def families_of(source: Any) -> tuple[str, ...]:
    """Returns the names of the families that a source's tasks come from, or nothing if there is a single one.

    Args:
        source: A task source.
    """
    return tuple(source.families) if isinstance(source, FamilySource) else ()


def check_family(family: Any, families: tuple[str, ...]) -> None:
    """Checks the index of a family; a traced one passes.

    Args:
        family: The index.
        families: The names of the families.

    Raises:
        ValueError: It is not an integer from 0 to len(families) - 1.
    """
    if isinstance(family, Tracer):
        return
    if jnp.ndim(family) or not jnp.issubdtype(jnp.result_type(family), jnp.integer) or not 0 <= family < len(families):
        known = ", ".join(f"{i} {name}" for i, name in enumerate(families)) or "this source has none"
        raise ValueError(f"family must be the index of a family ({known}), got {family!r}.")


def group_order(source: Any, key: PRNGKeyArray, n: int) -> Int[Array, " n"]:
    """Returns the groups or families of n tasks: each of them once, in random order, before any of them comes again.

    Args:
        source: A task source.
        key: Random key for the order.
        n: Number of tasks.

    Returns:
        Indices of groups; of families if the source has these and no groups; else a permutation of 0..n-1.
    """
    groups = group_count(source) or len(families_of(source)) or n
    rounds = [jax.random.permutation(k, groups) for k in jax.random.split(key, -(-n // groups))]
    return jnp.concatenate(rounds)[:n]


def draw_task(source: Any, key: PRNGKeyArray, group: Int[Array, ""]) -> Task:
    """Draws one task.

    Args:
        source: A task source.
        key: Random key.
        group: The group to draw from, as `group_order` returns it: a family if the source has families and no groups.
            It is ignored if the source has neither.
    """
    if group_count(source) is not None:
        return source.of_group(key, group)
    if families_of(source):
        return source.of_family(key, group)
    return jax.tree.map(lambda leaf: leaf[0], source.sample(key, 1))


def check_numbers(name: str, values: Any) -> None:
    """Checks that values are an array of numbers.

    Args:
        name: The argument's name, for the message.
        values: The values.

    Raises:
        ValueError: They are something else, such as texts, objects or a list.
    """
    if not hasattr(values, "dtype"):
        raise ValueError(f"{name} must be an array of numbers, got {values!r}.")
    if isinstance(values, np.ndarray) and values.dtype.kind in "OSUMm":
        first = f" ({str(values.flat[0])!r})" if values.size else ""
        hint = " Number the classes with metaprior.tasks.encode_labels." if name.endswith("y") else ""
        raise ValueError(f"{name} must be numbers, got {values.dtype} values{first}.{hint}")


def check_rows(batch: Batch) -> None:
    """Checks that x, y, weight and known hold numbers, and one entry for each row of x.

    Args:
        batch: The batch.

    Raises:
        ValueError: They do not.
    """
    n = examples(batch)
    for name, part in batch._asdict().items():
        for leaf in jax.tree.leaves(part):
            check_numbers(name, leaf)
            if leaf.shape[:1] != (n,) or (name == "weight" and leaf.ndim > 1):
                whole = f"have shape {(n,)}" if name == "weight" else f"have {n} rows, as x has"
                raise ValueError(f"{name} must {whole}, got shape {tuple(leaf.shape)}.")


def check_known(batch: Batch) -> None:
    """Checks that the class of every row is known.

    Args:
        batch: The batch.

    Raises:
        ValueError: It has rows whose class is not known.
    """
    if batch.known is not None:
        raise ValueError(
            "support must have a known class for every example, got some without (`known`). This learner would treat "
            "their y as a class. Use a learner that reads unlabelled examples (gnn, protonet, ...; "
            "`reads_unlabelled`), or leave them out, e.g. with hide_labels(..., unlabelled='left_out')."
        )


def labelled(batch: Batch) -> Batch:
    """Returns the batch with weight 0 for the rows whose class is not known.

    Args:
        batch: The batch.
    """
    if batch.known is None:
        return batch
    return Batch(batch.x, jnp.where(batch.known, batch.y, 0), weights(batch) * batch.known)


def counted(batch: Batch) -> Batch:
    """Returns the batch with 0 as the target of every row of weight 0, so that padding cannot affect a gradient.

    Args:
        batch: The batch.

    Raises:
        ValueError: `check_rows` fails, or the class of some rows is not known.
    """
    check_known(batch)
    check_rows(batch)
    if batch.weight is None:
        return batch
    weight = batch.weight
    concrete = not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((batch.y, weight)))
    where = np.where if concrete else jnp.where  # numpy keeps concrete values concrete inside a trace

    def padded_out(leaf: Any) -> Any:
        there = (np.asarray(weight) if concrete else weight) > 0
        leaf = np.asarray(leaf) if concrete else jnp.asarray(leaf)
        kept = where(there.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)
        return kept.astype(leaf.dtype)

    return batch._replace(y=jax.tree.map(padded_out, batch.y))


def weights(batch: Batch) -> Float[Array, " n"]:
    """Returns the weight of each row, 1 if the batch has no weights.

    Args:
        batch: The batch.

    Returns:
        The weights. In compiled code, which cannot raise, all are NaN if one is negative or not finite.

    Raises:
        ValueError: `check_rows` fails, or `check_weight` fails for concrete weights.
    """
    check_rows(batch)
    if batch.weight is None:
        return jnp.ones(examples(batch))
    check_weight(batch.weight)
    good = ((batch.weight >= 0) & (batch.weight < jnp.inf)).all()
    return jnp.where(good, batch.weight, jnp.nan)


def weighted_mean(values: Float[Array, " n"], batch: Batch) -> Scalar:
    """Computes sum(w values) / sum(w), and 0 if all weights are 0.

    Args:
        values: One value per row. Those of rows with weight 0 may be anything, also NaN.
        batch: The batch that has the weights w.
    """
    if batch.weight is None:
        return values.sum() / max(examples(batch), 1)
    w = weights(batch)
    total = w.sum()
    # Not `w > 0`: NaN weights must give NaN.
    return jnp.where(w == 0, 0, w * jnp.where(w == 0, 0, values)).sum() / jnp.where(total == 0, 1, total)


def check_weight(weight: Any) -> None:
    """Checks concrete weights; traced ones and None pass.

    Args:
        weight: Weights [..., n].

    Raises:
        ValueError: A weight is negative or not finite, or the sum over n is neither 0 nor from 1e-12 to 1e12.
    """
    if weight is None or isinstance(weight, Tracer):
        return
    check_numbers("weight", weight)
    values = np.atleast_1d(np.asarray(weight, float))
    bad = values[~((values >= 0) & (values < np.inf))]
    if bad.size:
        raise ValueError(f"weight must be finite and at least 0, got {bad[0]}. Use 0 to leave a row out.")
    total = values.sum(-1).reshape(-1)
    wrong = total[(total != 0) & ((total < LEAST_TOTAL) | (total > MOST_TOTAL))]
    if wrong.size:
        raise ValueError(
            f"weight must have a sum of 0 or from {LEAST_TOTAL:g} to {MOST_TOTAL:g}, got {wrong[0]:.3g}. Multiply all "
            "weights by the same number, which does not change a mean over rows."
        )


def check_source(source: Any) -> None:
    """Checks the arrays of a task source.

    Args:
        source: A task source.

    Raises:
        ValueError: It holds values that are not numbers, or `check_weight` fails for its weights.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(source):
        name = jax.tree_util.keystr(path).removeprefix(".")
        if hasattr(leaf, "dtype"):
            check_numbers(name, leaf)
        if name.endswith(".weight"):
            check_weight(leaf)


def known_labels(y: Any) -> Any:
    """Returns the labels with class 0 for hidden ones, which are below 0. Concrete labels stay so inside a trace.

    Args:
        y: Integer labels.
    """
    check_numbers("y", y)
    return jnp.maximum(y, 0) if isinstance(y, Tracer) else np.maximum(y, 0)


def examples(batch: Batch) -> int:
    """Returns the number of rows of a batch, padding included.

    Args:
        batch: The batch.
    """
    return jax.tree.leaves(batch.x)[0].shape[0]


__all__ = [
    "PLAIN", "Array", "AtMean", "Attributes", "Batch", "Bool", "Call", "FamilySource", "Float", "GroupedSource",
    "Learner", "Model", "PRNGKeyArray", "Predictive", "PyTree", "Scalar", "Splits", "Task", "TaskSource",
    "check_family", "check_known", "check_numbers", "check_rows", "check_settled", "check_source", "check_weight",
    "counted", "draw_task", "examples", "families_of", "group_count", "group_order", "known_labels", "labelled",
    "settled", "weighted_mean", "weights",
]  # fmt: skip


def joined(task: Task) -> Batch:
    """Concatenates the support and the query of a task. The result has weights if either of them has.

    Args:
        task: The task.

    Raises:
        ValueError: The shapes of their targets differ in more than the number of rows, or `known` is set.
    """
    check_known(task.support)
    for batch in task:
        check_rows(batch)
    for s, q in zip(jax.tree.leaves(task.support.y), jax.tree.leaves(task.query.y), strict=True):
        if s.shape[1:] != q.shape[1:]:
            raise ValueError(
                f"y must have the same shape in support and query, but for the rows, got {tuple(s.shape)} and "
                f"{tuple(q.shape)}."
            )
    if (task.support.weight is None) != (task.query.weight is None):
        task = Task(*(batch._replace(weight=weights(batch)) for batch in task))
    concrete = not any(isinstance(leaf, Tracer) for batch in task for leaf in jax.tree.leaves(batch.y))
    together = np.concatenate if concrete else jnp.concatenate  # numpy keeps concrete values concrete inside a trace
    both = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), *(batch._replace(y=None) for batch in task))
    return both._replace(y=jax.tree.map(lambda s, q: together([s, q]), task.support.y, task.query.y))
