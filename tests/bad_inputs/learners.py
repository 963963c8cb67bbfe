"""Labels, targets, weights and supports that cannot be or are unusual, to every learner: adapt, predict and loss."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bad_inputs.judging import Case
from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.named import option_names
from metaprior.core.types import Attributes, Batch, Learner, Task
from metaprior.learners import LEARNERS, make_learner
from metaprior.learners.registry import learners_having
from metaprior.networks import mlp

WAY, N, KEY = 3, 6, jax.random.key(0)
CLASSES_ONLY = learners_having("of_classes")
VALUES = ("maml", "protonet", "gnn")  # whose values are compared, not types alone
SMALL: dict[str, dict[str, Any]] = {
    "zero_shot": {"way": WAY},
    "fine_tune": {"steps": 2},
    "imaml": {"steps": 2},
    "gem_mixture": {"components": 2},
    "cnp": {"width": 4, "encoder": (4,), "decoder": (4,)},
    "anp": {"width": 4, "encoder": (4,), "decoder": (4,), "heads": 2},
    "snail": {"filters": 4, "attention": ((4, 4),) * 2},
    "mann": {"hidden": 4, "slots": 4, "width": 2, "heads": 1},
    "ntm": {"hidden": 4, "slots": 4, "width": 2, "heads": 1},
    "lstm": {"hidden": 4},
    "gnn": {"layers": 1, "filters": 4},
    "l2l": {"steps": 2, "unroll": 1},
}


class Problem(NamedTuple):
    """A learner, its parameters before training, a task, and how it answers queries."""

    learner: Learner
    params: Any
    task: Task
    answers: Callable[[Any, Batch, Any], Any]


@cache
def problem(name: str, classes: bool) -> Problem:
    options = dict(SMALL.get(name, {}))
    options |= {"steps": 2} if "steps" in option_names(LEARNERS[name]) and "steps" not in options else {}
    options |= {"draws": 2} if "draws" in option_names(LEARNERS[name]) else {}
    options |= {"test_steps": 2} if "test_steps" in option_names(LEARNERS[name]) else {}
    model = mlp(WAY if classes else 1, (4,), "tanh")
    learner = make_learner(name, model, Categorical() if classes else Gaussian(), **options)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, N, 2)).astype(np.float32)
    y = np.arange(2 * N).reshape(2, N) % WAY if classes else rng.normal(size=(2, N, 1)).astype(np.float32)
    support = Batch(Attributes(x[0]) if name == "zero_shot" else x[0], y[0])
    task = Task(support, Batch(x[1], y[1]))

    def answers(params: Any, support: Batch, x: Any) -> Any:
        return learner.predict(params, learner.adapt(params, support, KEY), x, KEY).mean()

    return Problem(learner, learner.init(KEY, task), task, answers)


def refused(name: str, classes: bool, change: Callable[[Batch], Batch], _: Path) -> Any:
    """What `adapt` and `loss` make of a bad support, and `loss` of a bad query, whose values are concrete.

    Traced only: what is refused is so before anything is computed. The last error is raised if all of them refuse.
    """
    learner, params, task, _ = problem(name, classes)
    support, query = change(task.support), change(task.query)
    calls = {
        "adapt": lambda p: learner.adapt(p, support, KEY),
        "loss (support)": lambda p: learner.loss(p, Task(support, task.query), KEY),
        "loss (query)": lambda p: learner.loss(p, Task(task.support, query), KEY),
    }
    errors, took = [], []
    for title, call in calls.items():
        try:
            jax.eval_shape(call, params)
            took.append(title)
        except ValueError as error:
            errors.append(error)
    if took:
        return took
    for error in errors[1:]:
        if str(error) != str(errors[0]):
            errors[0].args = (f"{errors[0]} | {error}",)
    raise errors[0]


def changed(part: str, value: Any) -> Callable[[Batch], Batch]:
    """The batch with this as its first target or weight."""

    def change(batch: Batch) -> Batch:
        old = np.ones(N, np.float32) if part == "weight" else np.asarray(batch.y)
        new = old.astype(np.result_type(old, np.asarray(value)))
        new[0] = value
        return batch._replace(**{part: new})

    return change


def becomes(part: str, how: Callable[[np.ndarray], Any]) -> Callable[[Batch], Batch]:
    """The batch with its targets or weights (ones) made into something else."""

    def change(batch: Batch) -> Batch:
        old = np.ones(N, np.float32) if part == "weight" else np.asarray(batch.y)
        return batch._replace(**{part: how(old)})

    return change


WEIGHTS: dict[str, tuple[Callable[[Batch], Batch], tuple[str, ...]]] = {
    "weight negative": (changed("weight", -1.0), ("weight must be", "-1")),
    "weight nan": (changed("weight", np.nan), ("weight must be", "nan")),
    "weight inf": (changed("weight", np.inf), ("weight must be", "inf")),
    "weights subnormal": (becomes("weight", lambda w: w * np.float32(1e-38)), ("weight", "1e-12")),
    "weights 1e38": (becomes("weight", lambda w: w * np.float32(1e38)), ("weight", "1e+12")),
    "weight a column": (becomes("weight", lambda w: w[:, None]), ("weight must have shape (6,)", "(6, 1)")),
    "weight short": (becomes("weight", lambda w: w[:4]), ("weight must have shape (6,)", "(4,)")),
    "weight text": (becomes("weight", lambda w: w.astype(str)), ("weight must be numbers",)),
}
LABELS: dict[str, tuple[Callable[[Batch], Batch], tuple[str, ...]]] = {
    "label out of range": (changed("y", WAY), ("labels", "classes 0..2, got 3")),
    "label not whole": (changed("y", 0.5), ("got 0.5", "classes 0..2")),
    "label nan": (changed("y", np.nan), ("got nan", "classes 0..2")),
    "labels text": (becomes("y", lambda y: np.array(list("abc"))[y]), ("y must be numbers", "encode_labels")),
    "labels objects": (becomes("y", lambda y: np.array(["a", 1, None], object)[y]), ("y must be numbers",)),
    "labels one-hot": (becomes("y", lambda y: np.eye(WAY)[y]), ("shape (6,)", "(6, 3)")),
    "labels a column": (becomes("y", lambda y: y[:, None]), ("shape (6,)", "(6, 1)")),
    "labels short": (becomes("y", lambda y: y[:4]), ("y", "6", "4")),
}
TARGETS: dict[str, tuple[Callable[[Batch], Batch], tuple[str, ...]]] = {
    "target nan": (changed("y", np.nan), ("must hold finite numbers, got nan",)),
    "target inf": (changed("y", np.inf), ("must hold finite numbers, got inf",)),
    "targets text": (becomes("y", lambda y: y.astype(str)), ("y must be numbers",)),
    "targets flat": (becomes("y", lambda y: y[:, 0]), ("shape (6, 1)", "(6,)")),
    "targets wide": (becomes("y", lambda y: np.repeat(y, 2, 1)), ("shape (6, 1)", "(6, 2)")),
    "targets short": (becomes("y", lambda y: y[:4]), ("y", "6", "4")),
}


def with_little(name: str, _: Path) -> Any:
    """Answers after no row, after rows of weight 0, and after rows of one class; the loss where weights are 1 or 0."""
    learner, params, task, answers = problem(name, True)
    support, one, zero = task.support, np.ones(N, np.float32), np.zeros(N, np.float32)
    answer = jax.jit(answers)
    same = support._replace(y=np.zeros_like(support.y), weight=one)
    found = [
        answer(params, jax.tree.map(lambda leaf: leaf[:0], support), task.query.x),
        answer(params, support._replace(weight=zero), task.query.x),
        answer(params, same, task.query.x),
    ]
    loss = jax.jit(lambda p, task: learner.loss(p, task, KEY)[0])
    weighed = task._replace(query=task.query._replace(weight=one))
    return found, [float(loss(params, weighed._replace(support=support._replace(weight=w)))) for w in (one, zero)]


def sound(got: Any) -> bool:
    """Nothing seen is the prior, and no answer is other than probabilities."""
    (none, silent, same), losses = got
    sums = np.stack([none, silent, same]).sum(-1)
    return bool(np.allclose(sums, 1, atol=1e-4) and np.allclose(none, silent, atol=1e-5) and np.isfinite(losses).all())


def traced(name: str, classes: bool, change: Callable[[Task], Task], _: Path) -> Any:
    """The types of answer and loss for a task that is written otherwise."""
    learner, params, task, answers = problem(name, classes)
    task = change(task)
    loss = jax.eval_shape(lambda p: learner.loss(p, task, KEY)[0], params)
    return jax.eval_shape(answers, params, task.support, task.query.x), loss


def alike(name: str, classes: bool, change: Callable[[Task], Task], _: Path) -> Any:
    """Answers and losses for a task, and for the same one written otherwise."""
    learner, params, task, answers = problem(name, classes)
    if classes:
        task = Task(*(batch._replace(y=batch.y % 2) for batch in task))
    run = jax.jit(lambda p, t: (answers(p, t.support, t.query.x), learner.loss(p, t, KEY)[0]))
    return run(params, task), run(params, change(task))


def shaped(got: Any) -> bool:
    answer, loss = got
    return answer.shape[0] == N and loss.shape == ()


def double(got: Any) -> bool:
    return shaped(got) and {leaf.dtype for leaf in got} == {np.dtype(float)}


def both(change: Callable[[Batch], Batch]) -> Callable[[Task], Task]:
    return lambda task: Task(change(task.support), change(task.query))


def whole(batch: Batch) -> Batch:
    return batch._replace(x=jax.tree.map(lambda leaf: np.round(3 * leaf).astype(np.int32), batch.x))


def weighed(task: Task, support: bool, query: bool) -> Task:
    parts = zip(task, (support, query), strict=True)
    return Task(*(part._replace(weight=np.ones(N, np.float32)) if asked else part for part, asked in parts))


def without_rows(task: Task) -> Task:
    return task._replace(support=jax.tree.map(lambda leaf: leaf[:0], task.support))


UNUSUAL: dict[str, Callable[[Task], Task]] = {
    "labels as floats": both(becomes("y", lambda y: y.astype(np.float32))),
    "labels as truth values": both(becomes("y", lambda y: (y % 2).astype(bool))),
    "labels of 8 bits": both(becomes("y", lambda y: y.astype(np.uint8))),
    "weights on the support": lambda task: weighed(task, True, False),
    "weights on the query": lambda task: weighed(task, False, True),
    "weights as truth values": both(becomes("weight", lambda w: w > 0)),
    "whole x": both(whole),
}


def in_float64(name: str, classes: bool, _: Path) -> Any:
    """The types of answer and loss in float64."""
    with jax.enable_x64(True):

        def wide(tree: Any) -> Any:
            return jax.tree.map(lambda v: jnp.asarray(np.asarray(v, float)) if v.dtype.kind == "f" else v, tree)

        learner, params, task, answers = problem(name, classes)
        params, task = wide(params), wide(task)
        loss = jax.eval_shape(lambda p: learner.loss(p, task, KEY)[0], params)
        return jax.eval_shape(answers, params, task.support, task.query.x), loss


def same_answers(got: Any) -> bool:
    return all(np.allclose(a, b, atol=1e-5) for a, b in zip(*map(jax.tree.leaves, got), strict=True))


def cases() -> list[Case]:
    found = []
    for name in LEARNERS:
        for classes in (True, False):
            if not classes and name in CLASSES_ONLY:
                continue
            title = f"{name} {'classes' if classes else 'numbers'}"
            for what, (change, says) in (WEIGHTS | LABELS if classes else TARGETS).items():
                found.append(Case(f"{title} {what}", partial(refused, name, classes, change), says))
            for what, write in UNUSUAL.items():
                if classes or what == "weights on the support":
                    run, good = (alike, same_answers) if name in VALUES and what != "whole x" else (traced, shaped)
                    found.append(Case(f"{title} {what}", partial(run, name, classes, write), right=good))
            if not classes:
                found.append(Case(f"{title} no row", partial(traced, name, False, without_rows), right=shaped))
            found.append(Case(f"{title} x64", partial(in_float64, name, classes), right=double))
        found.append(Case(f"{name} shown little", partial(with_little, name), right=sound))
    for name in CLASSES_ONLY:
        if name != "zero_shot":
            run = partial(lambda name, _: make_learner(name, mlp(1), Gaussian()), name)
            found.append(Case(f"{name} numbers", run, ("likelihood", "Gaussian")))
    return found
