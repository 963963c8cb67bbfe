"""The outer loop, which compiles whole chunks of meta-steps into one scan and returns to the host between chunks.

It depends only on `Learner` and `TaskSource`. The random key of a meta-step is fold_in(key, step), so a resumed run
gives the same bits on the same devices, threads, kernels and versions.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from metaprior.core.devices import everywhere, mean_over_tasks, task_mesh
from metaprior.core.likelihoods import Counts
from metaprior.core.options import Count, NonNegative, OuterOptimizer, Positive, Seed, Whole, check_fields, checked
from metaprior.core.runtime import shared
from metaprior.core.signals import interruptible
from metaprior.core.types import (
    Joint,
    Learner,
    Splits,
    Task,
    TaskSource,
    check_source,
    counted,
    settled,
    weighted_mean,
    weights,
)
from metaprior.evaluation.protocol import check_targets

BLOCK_BYTES = 2**23  # the size of tasks that are drawn in advance, which fits in a processor's cache
SAVE_EVERY = 10.0  # seconds; a checkpoint takes 0.1 s, as long as a chunk of meta-steps on a GPU


@dataclass(frozen=True)
class Training:
    """Settings of the outer loop.

    Attributes:
        steps: The number of meta-steps.
        meta_batch: The number of tasks per meta-step.
        rate: The learning rate of the outer optimiser.
        optimizer: The outer optimiser: the name of an optax optimiser, or an optax transformation, which has its own
            learning rate. The transformation receives the mean loss as `value`.
        schedule: Of the learning rate: "constant", or "linear" or "cosine" decay to 0.
        warmup: The number of meta-steps in which the learning rate rises linearly from 0.
        clip_value: Clips each component of the meta-gradient to [-c, c], as in MAML.
        clip_norm: Clips the global norm of the meta-gradient.
        skip: How many meta-steps in a row may have a gradient that is not finite (one diverging task is enough). Such
            meta-steps change nothing. With 0, the first one ends training.
        chunk: The number of meta-steps per compiled call. If the process is killed, it loses the current chunk and at
            most ten seconds more.
        task_chunk: The number of tasks whose gradients are in memory at once, a divisor of `meta_batch`. None means
            all. "auto" means one on a processor, where its tensors stay in the cache, and all on an accelerator.
        validate_every: The number of meta-steps between validations, rounded up to whole chunks.
        validation_tasks: The number of validation tasks.
        seed: The seed of everything random.
        float64: Whether to train in float64.
    """

    steps: Count = 10_000
    meta_batch: Count = 25
    rate: NonNegative = 1e-3
    optimizer: OuterOptimizer | optax.GradientTransformation = "adam"
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Whole = 0
    clip_value: Positive | None = None
    clip_norm: Positive | None = None
    skip: Whole = 0
    chunk: Count = 100
    task_chunk: Count | Literal["auto"] | None = None
    validate_every: Count = 1000
    validation_tasks: Count = 200
    seed: Seed = 0
    float64: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "training.")
        if isinstance(self.task_chunk, int) and self.meta_batch % self.task_chunk:
            raise ValueError(
                f"training.task_chunk must divide training.meta_batch = {self.meta_batch}, got {self.task_chunk}."
            )
        if not isinstance(self.optimizer, str):
            for name, default in (("rate", 1e-3), ("schedule", "constant"), ("warmup", 0)):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"training.{name} must be left out if training.optimizer is an optax transformation, got "
                        f"{getattr(self, name)}. Set it in the transformation."
                    )

    def table(self) -> dict[str, Any]:
        """Returns the settings in a form for JSON. An optax transformation is replaced by a text that says so."""
        named = isinstance(self.optimizer, str)
        return asdict(self if named else replace(self, optimizer="sgd")) | (
            {} if named else {"optimizer": "an optax transformation"}
        )

    @property
    def at_once(self) -> int | None:
        """The number of tasks whose gradients are in memory at once on this machine. None means all."""
        if self.task_chunk == "auto":
            return 1 if jax.default_backend() == "cpu" else None
        return self.task_chunk


class TrainState(NamedTuple):
    """The state of training.

    Attributes:
        params: The meta-learned parameters theta.
        opt_state: The state of the outer optimiser.
        step: The number of completed meta-steps.
    """

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]


class Fitted(NamedTuple):
    """The result of training.

    Attributes:
        params: The last parameters.
        best: The parameters with the lowest validation nll, or the last ones without a validation.
        state: The last state.
        history: The metrics of each chunk.
        interrupted: The number of the signal that ended training early, or 0.
    """

    params: PyTree
    best: PyTree
    state: TrainState
    history: list[dict[str, float]]
    interrupted: int


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite.

    Args:
        step: The meta-step.
        name: The learner's name.
        state: The last good state.
        cause: The likely cause, if it is known.

    Attributes:
        step: The meta-step.
        state: The last good state.
    """

    def __init__(self, step: int, name: str, state: TrainState, cause: str | None = None):
        self.step, self.state = step, state
        if cause is not None:
            super().__init__(f"the loss of {name} became non-finite at meta-step {step}. The likely cause: {cause}")
            return
        super().__init__(
            f"the loss of {name} became non-finite at meta-step {step}. The state before its chunk (meta-step "
            f"{int(state.step)}) is kept. Try a lower inner rate (--set learner.rate=...), gradient clipping "
            "(--set training.clip_norm=10), fewer inner steps, float64 (--set training.float64=true), or skipping "
            "such meta-steps (--set training.skip=10)."
        )


class Restored(NamedTuple):
    """The point from which a run continues.

    Attributes:
        state: The state.
        best: The parameters with the lowest validation nll, or None before the first validation.
        lowest: Their validation nll, or infinity before the first validation.
        history: The metrics of each chunk.
    """

    state: TrainState
    best: PyTree | None
    lowest: float
    history: list[dict[str, float]]


class Recorder(Protocol):
    """Persists a run: receives each chunk's metrics and restores the latest state (see `runs.Run`)."""

    def begin(self, like: TrainState, training: Training, resume: bool, splits: Splits) -> Restored:
        """Starts or resumes a run.

        Args:
            like: The initial state, from which a new run starts.
            training: The settings.
            resume: Whether the run may have been trained before.
            splits: The task sources.

        Returns:
            The point from which to continue.
        """
        ...

    def record(self, row: dict[str, float]) -> None:
        """Saves the metrics of a chunk.

        Args:
            row: The metrics by name, with the meta-step as "step".
        """
        ...

    def save(self, state: TrainState, best: bool = False) -> None:
        """Saves a state.

        Args:
            state: The state.
            best: Whether its parameters have the lowest validation nll so far.
        """
        ...


def outer_optimizer(training: Training) -> optax.GradientTransformation:
    """Returns the outer optimiser with its schedule and clipping.

    Args:
        training: The settings.
    """
    clips = [] if training.clip_value is None else [optax.clip(training.clip_value)]
    clips += [] if training.clip_norm is None else [optax.clip_by_global_norm(training.clip_norm)]
    chained = optax.chain(*clips, _unclipped(training))
    return optax.apply_if_finite(chained, training.skip) if training.skip else chained


def _unclipped(training: Training) -> optax.GradientTransformation:
    if not isinstance(training.optimizer, str):
        return training.optimizer
    factory = getattr(optax, training.optimizer, None)
    if factory is None or training.optimizer.startswith("_"):
        raise ValueError(f"training.optimizer must be an optax optimiser, e.g. 'adam', got {training.optimizer!r}.")
    left = max(training.steps - training.warmup, 1)
    schedule = {
        "constant": optax.constant_schedule(training.rate),
        "linear": optax.linear_schedule(training.rate, 0.0, left),
        "cosine": optax.cosine_decay_schedule(training.rate, left),
    }[training.schedule]
    if training.warmup:
        rise = optax.linear_schedule(0.0, training.rate, training.warmup)
        schedule = optax.join_schedules([rise, schedule], [training.warmup])
    return factory(schedule)


@jax.jit
def _one_task(source: TaskSource, key: PRNGKeyArray) -> Task:
    return source.sample(key, 1)


def init_state(learner: Learner, source: TaskSource, training: Training) -> TrainState:
    """Returns the state before training, which depends on the seed.

    Args:
        learner: The learner.
        source: The training tasks, of which one gives the shapes.
        training: The settings.
    """
    key_task, key_init = jax.random.split(jax.random.key(training.seed))
    task = jax.tree.map(lambda leaf: leaf[0], _one_task(source, key_task))
    params = learner.init(key_init, task)
    return TrainState(params, outer_optimizer(training).init(params), jnp.zeros((), jnp.int32))


def meta_gradient(
    learner: Learner,
    params: PyTree,
    tasks: Task,
    keys: PRNGKeyArray,
    task_chunk: int | None,
    axis: str | None = None,
) -> tuple[dict[str, Array], PyTree]:
    """Computes the mean metrics and the mean meta-gradient over tasks.

    Args:
        learner: The learner.
        params: The meta-learned parameters.
        tasks: A stack of tasks.
        keys: A random key for each task.
        task_chunk: The number of tasks in memory at once, a divisor of their number. None means all.
        axis: The name of the axis of devices that hold the other tasks of the meta-batch. None means that these are
            all. It matters for learners with a `joint` term only.

    Returns:
        The metrics by name, with the loss, and the gradient.
    """
    n, joint = keys.shape[0], learner.joint
    weight, value = (jnp.zeros(n), None) if joint is None else _joint(joint, params, tasks, keys, task_chunk, axis)

    def mean_loss(params: PyTree, tasks: Task, keys: PRNGKeyArray, weight: Array) -> tuple[Array, dict[str, Array]]:
        losses, metrics = jax.vmap(learner.loss, in_axes=(None, 0, 0))(params, tasks, keys)
        metrics = jax.tree.map(jnp.mean, metrics | {"loss": losses})
        if joint is None:
            return losses.mean(), metrics
        scores = jax.vmap(joint.score, in_axes=(None, 0, 0))(params, tasks, keys)
        return (losses + weight * scores).mean(), metrics

    grad = jax.grad(mean_loss, has_aux=True)
    if task_chunk is None or task_chunk == n:
        gradient, metrics = grad(params, tasks, keys, weight)
    else:
        groups = _grouped((tasks, keys, weight), task_chunk)

        def add(total: PyTree, group: tuple[Task, PRNGKeyArray, Array]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, grad(params, *group)), None

        shapes = jax.eval_shape(grad, params, *jax.tree.map(lambda leaf: leaf[0], groups))
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total = jax.lax.scan(add, zero, groups)[0]
        gradient, metrics = jax.tree.map(lambda leaf: leaf * task_chunk / n, total)
    if joint is not None and value is not None:
        metrics = metrics | {"loss": metrics["loss"] + value, joint.name: value}
    return metrics, gradient


def _grouped(tree: PyTree, size: int) -> PyTree:
    """Splits the leading axis of all leaves into groups of equal size."""
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] // size, size, *leaf.shape[1:]), tree)


def _joint(
    joint: Joint, params: PyTree, tasks: Task, keys: PRNGKeyArray, task_chunk: int | None, axis: str | None
) -> tuple[Array, Array]:
    """Computes the joint term of a meta-batch, without a gradient.

    Returns:
        The weight of each of these tasks' scores beside its loss, and the term's value.
    """
    n = keys.shape[0]
    groups = _grouped((tasks, keys), task_chunk or n)
    score = jax.vmap(joint.score, in_axes=(None, 0, 0))
    scores = jax.lax.map(lambda group: score(params, *group), groups).reshape(n)
    every = scores if axis is None else jax.lax.all_gather(scores, axis, tiled=True)
    value, slope = jax.value_and_grad(joint.measure)(every)
    start = 0 if axis is None else jax.lax.axis_index(axis) * n
    # Each task's loss counts 1/J in the mean, so a score that should count `slope` gets the weight J * slope.
    own = every.shape[0] * jax.lax.dynamic_slice_in_dim(slope, start, n)
    return jax.lax.stop_gradient(own), jax.lax.stop_gradient(value)


def step_mesh(training: Training) -> Mesh | None:
    """Returns the devices that share a meta-step's tasks, or None if there is only one.

    Args:
        training: The settings.

    Raises:
        ValueError: The tasks cannot be divided equally.
    """
    mesh = task_mesh(training.meta_batch, at_once := training.at_once or 1)
    if mesh is None and (n := jax.device_count()) > 1:
        raise ValueError(
            f"training.meta_batch must be a multiple of {n * at_once} for {n} devices with {at_once} tasks at once "
            f"(task_chunk), got {training.meta_batch}. Change it, or use fewer devices (--devices)."
        )
    return mesh


def draw_tasks(training: Training) -> Callable[[Int[Array, ""], TaskSource], tuple[Task, PRNGKeyArray]]:
    """Returns (step, source) -> (a meta-step's tasks, the random keys of their losses), which depends on no other step.

    Args:
        training: The settings.
    """

    def draw(step: Int[Array, ""], source: TaskSource) -> tuple[Task, PRNGKeyArray]:
        key_tasks, key_loss = jax.random.split(jax.random.fold_in(jax.random.key(training.seed), step))
        return source.sample(key_tasks, training.meta_batch), jax.random.split(key_loss, training.meta_batch)

    return draw


def mean_gradient(learner: Learner, training: Training) -> Callable[..., tuple[dict[str, Array], PyTree]]:
    """Returns (params, (tasks, keys)) -> (mean metrics, mean meta-gradient), computed on all devices.

    Args:
        learner: The learner.
        training: The settings.
    """
    mesh = step_mesh(training)
    axis = None if mesh is None else mesh.axis_names[0]

    def own_mean(params: PyTree, drawn: tuple[Task, PRNGKeyArray]) -> tuple[dict[str, Array], PyTree]:
        return meta_gradient(learner, params, *drawn, training.at_once, axis)

    return mean_over_tasks(own_mean, mesh)


def outer_update(training: Training) -> Callable[..., TrainState]:
    """Returns (state, gradient, metrics) -> the state after an outer step.

    The gradient can be computed elsewhere. The optimiser receives the mean loss as `value`, and the metric `divergence`
    if the learner's loss has one.

    Args:
        training: The settings.
    """
    optimizer = optax.with_extra_args_support(outer_optimizer(training))

    def update(state: TrainState, gradient: PyTree, metrics: dict[str, Array]) -> TrainState:
        told = {"value": metrics["loss"]} | {name: metrics[name] for name in ("divergence",) if name in metrics}
        step, opt_state = optimizer.update(gradient, state.opt_state, state.params, **told)
        return TrainState(optax.apply_updates(state.params, step), opt_state, state.step + 1)

    return update


def meta_step(learner: Learner, training: Training) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Returns one outer step, (state, (tasks, keys)) -> (state, metrics): `mean_gradient`, then `outer_update`.

    A learner with a `schedule` receives the share of meta-steps that are done.

    Args:
        learner: The learner.
        training: The settings.
    """
    mean, update = mean_gradient(learner, training), outer_update(training)

    def step(state: TrainState, drawn: tuple[Task, PRNGKeyArray]) -> tuple[TrainState, dict[str, Array]]:
        if learner.schedule is None:
            metrics, gradient = mean(state.params, drawn)
        else:
            now = learner.schedule(state.step / training.steps)
            metrics, gradient = mean_gradient(now, training)(state.params, drawn)
        after = update(state, gradient, metrics)
        metrics["finite"] = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(gradient))
        return after, metrics

    return step


@shared()
def run_chunk(learner: Learner, training: Training) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Returns a compiled function (state, source, steps) -> (state after `steps` meta-steps, their stacked metrics).

    Args:
        learner: The learner.
        training: The settings.
    """
    step, draw = meta_step(learner, training), draw_tasks(training)

    @partial(jax.jit, static_argnums=2)
    def chunk(state: TrainState, source: TaskSource, steps: int) -> tuple[TrainState, dict[str, Array]]:
        # Drawing many random numbers at once is much cheaper per number, so tasks are drawn for a block of meta-steps.
        block = block_length(jax.eval_shape(draw, state.step, source)[0], steps)

        def run_block(state: TrainState, _: None) -> tuple[TrainState, dict[str, Array]]:
            drawn = jax.vmap(draw, in_axes=(0, None))(state.step + jnp.arange(block), source)
            return jax.lax.scan(step, state, drawn)

        state, metrics = jax.lax.scan(run_block, state, length=steps // block)
        return state, jax.tree.map(lambda leaf: leaf.reshape(steps, *leaf.shape[2:]), metrics)

    return chunk


def block_length(tasks: Task, steps: int) -> int:
    """Returns the largest divisor of `steps` for which as many batches of tasks fit into BLOCK_BYTES.

    Args:
        tasks: The shapes of a batch of tasks.
        steps: The number of meta-steps.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tasks))
    most = max(BLOCK_BYTES // max(size, 1), 1)
    return max(d for d in range(1, steps + 1) if steps % d == 0 and d <= most)


@shared()
def validator(learner: Learner, training: Training) -> Callable[[PyTree, TaskSource, TaskSource], dict[str, Array]]:
    """Returns a compiled function (params, source, train) -> the mean metrics of queries on a fixed set of tasks.

    The metrics are nll, and accuracy or mse. `train` is the source of training tasks, with which a learner is settled
    (`Learner.settle`) first.

    Args:
        learner: The learner.
        training: The settings.
    """

    def own_mean(shared: tuple[PyTree, TaskSource, TaskSource], keys: PRNGKeyArray) -> dict[str, Array]:
        params, source, train = shared
        judged = settled(learner, params, train, jax.random.key(training.seed))

        def one(key: PRNGKeyArray) -> dict[str, Array]:
            key_task, key = jax.random.split(key)
            task = jax.tree.map(lambda leaf: leaf[0], source.sample(key_task, 1))
            query = counted(task.query)
            posterior = judged.posterior(params, task.support, query, key)
            predictive = judged.predict(params, posterior, query.x, key)
            y = query.y

            def mean(per_example: Float[Array, " n"]) -> Array:
                return weighted_mean(per_example, query)

            figures = {"nll": -mean(predictive.log_prob(y))}
            centre = predictive.mean()
            if not jnp.issubdtype(y.dtype, jnp.inexact) and centre.ndim == y.ndim + 1:
                figures["accuracy"] = mean((centre.argmax(-1) == y).astype(float))
            elif centre.shape == y.shape:
                figures["mse"] = mean(((centre - y) ** 2).reshape(y.shape[0], -1).mean(-1))
            return figures

        return jax.tree.map(jnp.mean, jax.lax.map(one, keys, batch_size=training.at_once or 25))

    mean = mean_over_tasks(own_mean, task_mesh(training.validation_tasks))

    @jax.jit
    def validate(params: PyTree, source: TaskSource, train: TaskSource) -> dict[str, Array]:
        keys = jax.random.split(jax.random.key(training.seed + 1), training.validation_tasks)
        return mean((params, source, train), keys)

    return validate


def likely_cause(learner: Learner, source: TaskSource, training: Training, state: TrainState, step: int) -> str | None:
    """Returns the likely cause of a loss that is not finite, if the meta-step's tasks reveal it.

    Causes are targets that are not possible (labels, counts or numbers), counts whose rate overflowed, too few queries
    in a task for a learner that reads them together, and a term of the whole meta-batch (`Learner.joint`) that is not
    defined for its tasks.

    Args:
        learner: The learner.
        source: The tasks.
        training: The settings.
        state: The last good state.
        step: The meta-step.
    """
    tasks, keys = draw_tasks(training)(jnp.asarray(step), source)

    def predicted(params: PyTree, task: Task, key: PRNGKeyArray) -> PyTree:
        return learner.predict(params, learner.posterior(params, task.support, task.query, key), task.query.x, key)

    one = jax.tree.map(lambda leaf: leaf[0], tasks)
    kind = jax.eval_shape(jax.jit(predicted), state.params, one, jax.random.key(0))
    try:
        check_targets(kind, *((batch.y, batch.weight) for batch in tasks), lost=False)
    except ValueError as error:
        return str(error)
    if isinstance(kind, Counts):
        return (
            "a rate exp(output) that overflowed. Counts need small steps. Lower the inner and outer rates (--set "
            "learner.rate=..., --set training.rate=...), or clip gradients (--set training.clip_norm=1)."
        )
    if learner.transduce is not None:
        # Compiled code cannot see how many queries count, so run the task with the fewest of them as it is.
        there = np.asarray(jax.vmap(weights)(tasks.query)) > 0
        fewest = int(there.sum(1).argmin())
        support, query = jax.tree.map(lambda leaf: leaf[fewest], tasks)
        query = jax.tree.map(lambda leaf: leaf[there[fewest]], query)
        try:
            learner.transduce(state.params, support, query, keys[fewest])
        except ValueError as error:
            return str(error)
    if learner.joint is not None:
        scores = jax.jit(jax.vmap(learner.joint.score, in_axes=(None, 0, 0)))(state.params, tasks, keys)
        try:
            learner.joint.measure(scores)
        except ValueError as error:
            return str(error)
    return None


def _floats(params: PyTree) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


@checked
def fit(
    learner: Learner,
    splits: Splits,
    training: Training | None = None,
    *,
    run: Recorder | None = None,
    resume: bool = False,
    report: Callable[[dict[str, float]], None] | None = None,
    name: str = "the learner",
    seconds: NonNegative | None = None,
    clock: Callable[[], float] = time.monotonic,
    refresh: Callable[[TaskSource, PyTree, int], TaskSource] | None = None,
) -> Fitted:
    """Meta-trains a learner: minimises its loss over tasks of `splits.train`.

    Ctrl-C, SIGTERM and SIGHUP end training after the current chunk, whose state is saved. A second signal ends the
    process at once.

    Args:
        learner: The learner.
        splits: The task sources.
        training: The settings. The default is `Training()`.
        run: Saves checkpoints and metrics (see `runs.Run`).
        resume: Whether to continue the run, with the same bits as if it had never stopped, in the same environment. A
            changed environment gives a warning.
        report: Is called with the metrics of each chunk.
        name: The learner's name, for error messages.
        seconds: A time limit. Training then ends after the current chunk, is validated and saved, and
            `Fitted.state.step` is the number of completed meta-steps. It can be resumed.
        clock: The clock of `seconds` and of the reported times, in seconds. `time.process_time` counts the seconds that
            processors spend on this process, which do not depend on other work of the machine.
        refresh: refresh(source, params, step) is called before each chunk, with the last source and the current
            parameters, and returns the chunk's source of training tasks. Use it where tasks come from data that are
            collected during training, such as a replay buffer or a policy's trajectories. A source with other shapes
            is compiled again. Checkpoints do not contain the source, so such training cannot be resumed.

    Returns:
        The last and the best parameters, and the metrics of each chunk.

    Raises:
        NonFiniteLoss: The loss or its gradient is not finite. The error holds the last good state.
        ValueError: An argument has a wrong type, a source has no numbers or impossible weights, or `refresh` is given
            with `resume`.
    """
    training = training or Training()
    if refresh is not None and resume:
        raise ValueError("resume must be False with refresh, as checkpoints hold no collected data, got True.")
    train = splits.train
    for source in (splits.train, splits.validation):
        check_source(source)
    start = clock()
    state = init_state(learner, splits.train, training)
    best, lowest, history = None, float("inf"), []
    if run is not None:
        state, best, lowest, history = run.begin(state, training, resume, splits)
        state = everywhere(state, step_mesh(training)) if resume else state
    chunk, validate = run_chunk(learner, training), validator(learner, training)
    every = -(-training.validate_every // training.chunk) * training.chunk
    interrupted, saved = 0, -SAVE_EVERY
    with interruptible() as asked:
        while (done := int(state.step)) < training.steps:
            began = clock()
            # Chunks end at multiples of their size, even if an earlier, shorter training ended in between.
            steps = min(training.chunk - done % training.chunk, training.steps - done)
            if refresh is not None:
                check_source(train := refresh(train, state.params, done))
            after, metrics = chunk(state, train, steps)
            metrics = jax.device_get(metrics)
            finite = metrics.pop("finite")
            lost = optax.tree.get(after.opt_state, "notfinite_count") if training.skip else steps - finite.sum()
            if lost > training.skip:
                if run is not None:
                    run.save(state)
                first = done + int(np.argmin(finite))
                raise NonFiniteLoss(first + 1, name, state, likely_cause(learner, train, training, state, first))
            if not all(bool(jnp.isfinite(leaf).all()) for leaf in _floats(after.params)):
                if run is not None:
                    run.save(state)
                raise NonFiniteLoss(done + steps, name, state)
            state = after
            took = max(clock() - began, 1e-9)  # some clocks have a coarse resolution
            row = {"step": done + steps, "seconds": took, "steps_per_second": steps / took}
            row |= {f"train/{k}": float(v[finite].mean()) for k, v in metrics.items() if finite.any()}
            row |= {"train/skipped": float(steps - finite.sum())} if training.skip else {}
            validated = better = False
            over = seconds is not None and clock() - start >= seconds
            if row["step"] % every == 0 or row["step"] == training.steps or over:
                figures = jax.device_get(validate(state.params, splits.validation, train))
                row |= {f"validation/{k}": float(v) for k, v in figures.items()}
                validated, better = True, row["validation/nll"] < lowest
                if better:
                    lowest, best = row["validation/nll"], state.params
            history.append(row)
            if run is not None:
                run.record(row)
            if report is not None:
                report(row)
            interrupted = asked() if row["step"] < training.steps else 0
            if run is not None and (validated or interrupted or time.monotonic() - saved >= SAVE_EVERY):
                run.save(state, better)
                saved = time.monotonic()
            if interrupted or (over and row["step"] < training.steps):
                break
            if row["step"] == training.steps and not np.isfinite(row["validation/nll"]):
                raise NonFiniteLoss(row["step"], f"{name} on validation tasks", state,
                                    likely_cause(learner, splits.validation, training, state, 0))  # fmt: skip
    return Fitted(state.params, state.params if best is None else best, state, history, interrupted)
