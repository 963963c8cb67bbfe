"""The outer loop: whole chunks of meta-steps in one compiled scan; the host is spoken to in between.

It knows only `Learner` and `TaskSource`. Randomness of a step is fold_in(key, step), so resuming gives the same bits on
the same devices, threads, kernels and versions.
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
from metaprior.core.types import Learner, Splits, Task, TaskSource, check_source, counted, settled, weighted_mean
from metaprior.evaluation.protocol import check_targets

BLOCK_BYTES = 2**23  # of tasks drawn ahead: what stays in a processor's cache
SAVE_EVERY = 10.0  # seconds: a checkpoint takes a tenth of one, as long as a chunk of meta-steps on a GPU


@dataclass(frozen=True)
class Training:
    """Settings of the outer loop.

    steps: meta-steps. meta_batch: tasks a meta-step. optimizer, rate, schedule ("constant", "linear" or "cosine" to 0),
    warmup (meta-steps from 0): the outer optimiser, an optax name; or an optax transformation, which has a rate of its
    own and is told the mean loss as `value`. clip_value: each component of the meta-gradient to
    +-c (MAML); clip_norm: its global norm. skip: so many meta-steps in a row may have a gradient that is not finite, as
    one diverging task makes it, and then change nothing (0: the first ends training). chunk: meta-steps a compiled
    call; a kill loses one, and ten seconds at most besides. task_chunk: tasks whose gradient is in memory at once
    (None: all; "auto": one on a processor, whose cache it stays in, all on an accelerator). validate_every: meta-steps,
    rounded up to whole chunks.
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
                        f"training.{name} must be left out where training.optimizer is an optax transformation, got "
                        f"{getattr(self, name)}; give the transformation its own."
                    )

    def table(self) -> dict[str, Any]:
        """The settings as JSON holds them; of an optax transformation it says only that it is one."""
        named = isinstance(self.optimizer, str)
        return asdict(self if named else replace(self, optimizer="sgd")) | (
            {} if named else {"optimizer": "an optax transformation"}
        )

    @property
    def at_once(self) -> int | None:
        """Tasks whose gradient is in memory at once on this machine; None: all."""
        if self.task_chunk == "auto":
            return 1 if jax.default_backend() == "cpu" else None
        return self.task_chunk


class TrainState(NamedTuple):
    """All that changes while training."""

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]


class Fitted(NamedTuple):
    """What training ends with: the last parameters, those that validated best, and one row of figures a chunk.

    interrupted: the number of the signal that ended it early, 0 if none did.
    """

    params: PyTree
    best: PyTree
    state: TrainState
    history: list[dict[str, float]]
    interrupted: int


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; `state` is the last good one."""

    def __init__(self, step: int, name: str, state: TrainState, cause: str | None = None):
        self.step, self.state = step, state
        if cause is not None:
            super().__init__(f"the loss of {name} became non-finite at meta-step {step}. The likely cause: {cause}")
            return
        super().__init__(
            f"the loss of {name} became non-finite at meta-step {step}; the state before its chunk (meta-step "
            f"{int(state.step)}) is kept. Try a lower inner rate (--set learner.rate=...), gradient clipping "
            "(--set training.clip_norm=10), fewer inner steps, float64 (--set training.float64=true), or passing over "
            "such meta-steps (--set training.skip=10)"
        )


class Restored(NamedTuple):
    """Where a run stands: its state, the parameters that validated best (None before any did), their validation nll
    (infinite before), and one row of figures a chunk."""

    state: TrainState
    best: PyTree | None
    lowest: float
    history: list[dict[str, float]]


class Recorder(Protocol):
    """What keeps a run: asked where to go on from, told of each chunk (see `runs.Run`)."""

    def begin(self, like: TrainState, training: Training, resume: bool, splits: Splits) -> Restored: ...

    def record(self, row: dict[str, float]) -> None: ...

    def save(self, state: TrainState, best: bool = False) -> None: ...


def outer_optimizer(training: Training) -> optax.GradientTransformation:
    """The outer optimiser with its schedule and clipping."""
    clips = [] if training.clip_value is None else [optax.clip(training.clip_value)]
    clips += [] if training.clip_norm is None else [optax.clip_by_global_norm(training.clip_norm)]
    chained = optax.chain(*clips, _unclipped(training))
    return optax.apply_if_finite(chained, training.skip) if training.skip else chained


def _unclipped(training: Training) -> optax.GradientTransformation:
    if not isinstance(training.optimizer, str):
        return training.optimizer
    factory = getattr(optax, training.optimizer, None)
    if factory is None or training.optimizer.startswith("_"):
        raise ValueError(f"training.optimizer: came {training.optimizer!r}, needs an optax optimiser, e.g. 'adam'")
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
    """theta before training, from the seed."""
    key_task, key_init = jax.random.split(jax.random.key(training.seed))
    task = jax.tree.map(lambda leaf: leaf[0], _one_task(source, key_task))
    params = learner.init(key_init, task)
    return TrainState(params, outer_optimizer(training).init(params), jnp.zeros((), jnp.int32))


def meta_gradient(
    learner: Learner, params: PyTree, tasks: Task, keys: PRNGKeyArray, task_chunk: int | None
) -> tuple[dict[str, Array], PyTree]:
    """Mean metrics and mean meta-gradient over the tasks, with at most `task_chunk` tasks in memory at once."""

    def mean_loss(params: PyTree, tasks: Task, keys: PRNGKeyArray) -> tuple[Array, dict[str, Array]]:
        losses, metrics = jax.vmap(learner.loss, in_axes=(None, 0, 0))(params, tasks, keys)
        return losses.mean(), jax.tree.map(jnp.mean, metrics | {"loss": losses})

    grad = jax.grad(mean_loss, has_aux=True)
    n = keys.shape[0]
    if task_chunk is None or task_chunk == n:
        gradient, metrics = grad(params, tasks, keys)
        return metrics, gradient
    groups = jax.tree.map(lambda leaf: leaf.reshape(n // task_chunk, task_chunk, *leaf.shape[1:]), (tasks, keys))

    def add(total: PyTree, group: tuple[Task, PRNGKeyArray]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, grad(params, *group)), None

    shapes = jax.eval_shape(grad, params, *jax.tree.map(lambda leaf: leaf[0], groups))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total = jax.lax.scan(add, zero, groups)[0]
    gradient, metrics = jax.tree.map(lambda leaf: leaf * task_chunk / n, total)
    return metrics, gradient


def step_mesh(training: Training) -> Mesh | None:
    """The devices that share a meta-step's tasks; None where there is but one."""
    mesh = task_mesh(training.meta_batch, at_once := training.at_once or 1)
    if mesh is None and (n := jax.device_count()) > 1:
        raise ValueError(
            f"training.meta_batch: came {training.meta_batch} tasks for {n} devices, {at_once} (task_chunk) at once "
            f"on each; needs a multiple of {n * at_once}, or fewer devices (--devices)"
        )
    return mesh


def draw_tasks(training: Training) -> Callable[[Int[Array, ""], TaskSource], tuple[Task, PRNGKeyArray]]:
    """(step, source) -> a meta-step's tasks and the keys of their losses, whatever came before."""

    def draw(step: Int[Array, ""], source: TaskSource) -> tuple[Task, PRNGKeyArray]:
        key_tasks, key_loss = jax.random.split(jax.random.fold_in(jax.random.key(training.seed), step))
        return source.sample(key_tasks, training.meta_batch), jax.random.split(key_loss, training.meta_batch)

    return draw


def mean_gradient(learner: Learner, training: Training) -> Callable[..., tuple[dict[str, Array], PyTree]]:
    """(params, (tasks, keys)) -> the tasks' mean metrics and mean meta-gradient, shared out over devices."""

    def own_mean(params: PyTree, drawn: tuple[Task, PRNGKeyArray]) -> tuple[dict[str, Array], PyTree]:
        return meta_gradient(learner, params, *drawn, training.at_once)

    return mean_over_tasks(own_mean, step_mesh(training))


def outer_update(training: Training) -> Callable[..., TrainState]:
    """(state, gradient, metrics) -> the state after an outer step. The gradient may come from anywhere.

    The optimiser is told the mean loss (`value`), and the metric `divergence` where the learner's loss has one.
    """
    optimizer = optax.with_extra_args_support(outer_optimizer(training))

    def update(state: TrainState, gradient: PyTree, metrics: dict[str, Array]) -> TrainState:
        told = {"value": metrics["loss"]} | {name: metrics[name] for name in ("divergence",) if name in metrics}
        step, opt_state = optimizer.update(gradient, state.opt_state, state.params, **told)
        return TrainState(optax.apply_updates(state.params, step), opt_state, state.step + 1)

    return update


def meta_step(learner: Learner, training: Training) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One outer step as a pure function (state, (tasks, keys)): `mean_gradient`, then `outer_update`."""
    mean, update = mean_gradient(learner, training), outer_update(training)

    def step(state: TrainState, drawn: tuple[Task, PRNGKeyArray]) -> tuple[TrainState, dict[str, Array]]:
        metrics, gradient = mean(state.params, drawn)
        after = update(state, gradient, metrics)
        metrics["finite"] = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(gradient))
        return after, metrics

    return step


@shared()
def run_chunk(learner: Learner, training: Training) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compiled (state, source, steps) -> (state after `steps` meta-steps, their metrics, stacked)."""
    step, draw = meta_step(learner, training), draw_tasks(training)

    @partial(jax.jit, static_argnums=2)
    def chunk(state: TrainState, source: TaskSource, steps: int) -> tuple[TrainState, dict[str, Array]]:
        # Random numbers are cheap by the thousand and dear by the dozen: tasks are drawn for a block of steps at once.
        block = block_length(jax.eval_shape(draw, state.step, source)[0], steps)

        def run_block(state: TrainState, _: None) -> tuple[TrainState, dict[str, Array]]:
            drawn = jax.vmap(draw, in_axes=(0, None))(state.step + jnp.arange(block), source)
            return jax.lax.scan(step, state, drawn)

        state, metrics = jax.lax.scan(run_block, state, length=steps // block)
        return state, jax.tree.map(lambda leaf: leaf.reshape(steps, *leaf.shape[2:]), metrics)

    return chunk


def block_length(tasks: Task, steps: int) -> int:
    """The largest divisor of `steps` for which so many batches of tasks fit into BLOCK_BYTES."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tasks))
    most = max(BLOCK_BYTES // max(size, 1), 1)
    return max(d for d in range(1, steps + 1) if steps % d == 0 and d <= most)


@shared()
def validator(learner: Learner, training: Training) -> Callable[[PyTree, TaskSource, TaskSource], dict[str, Array]]:
    """Compiled (params, source, train) -> mean query nll (and accuracy) of adapted posteriors on always the same tasks.

    train: the source of training tasks, by which a learner is `settled`.
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
    """Why the loss of this meta-step is not finite, where its tasks tell: labels, counts or numbers that cannot be."""
    tasks = draw_tasks(training)(jnp.asarray(step), source)[0]

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
            "a rate exp(output) that overflowed. Counts need small steps: lower the inner and outer rates (--set "
            "learner.rate=..., --set training.rate=...), or clip gradients (--set training.clip_norm=1)."
        )
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
    refresh: Callable[[TaskSource, PyTree, int], TaskSource] | None = None,
) -> Fitted:
    """Meta-train: theta that minimises the learner's loss over tasks of `splits.train`.

    run keeps checkpoints and figures; resume=True goes on where it stands, with the same bits as if never stopped
    (under the conditions that the run notes; others are warned of).
    refresh(source, params, step) is called before each chunk and returns the source of its training tasks, where they
    come from what was collected so far (a replay buffer, a policy's trajectories). It gets the last source and the
    present params. A source of other shapes is compiled for anew. Checkpoints do not keep it, so such a training
    cannot be resumed.
    report is called with each chunk's figures. seconds: after so many, training ends with the chunk at hand, validated
    and saved, and `Fitted.state.step` says how far it came; a resume goes on from there. Raises NonFiniteLoss with the
    last good state. Ctrl-C,
    SIGTERM and SIGHUP end it after the chunk, saved; a second one ends the process at once. Raises ValueError for
    arguments of a wrong type, and for sources that hold no numbers or weights that cannot be.
    """
    training = training or Training()
    if refresh is not None and resume:
        raise ValueError("resume must be False with refresh, as checkpoints do not keep what was collected, got True.")
    train = splits.train
    for source in (splits.train, splits.validation):
        check_source(source)
    start = time.monotonic()
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
            began = time.perf_counter()
            # A chunk ends at a multiple of its size, wherever an earlier, shorter training ended.
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
            took = time.perf_counter() - began
            row = {"step": done + steps, "seconds": took, "steps_per_second": steps / took}
            row |= {f"train/{k}": float(v[finite].mean()) for k, v in metrics.items() if finite.any()}
            row |= {"train/skipped": float(steps - finite.sum())} if training.skip else {}
            validated = better = False
            over = seconds is not None and time.monotonic() - start >= seconds
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
