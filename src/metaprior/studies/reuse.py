"""Does the inner loop learn new features, or does it reuse those of theta?

Each layer's outputs at a task's query inputs are compared before and after the inner loop. Then the inner loop runs
with the first n layers frozen. If features are reused, similarities are near 1, and freezing costs nothing.

References:
    Raghu, Raghu, Bengio & Vinyals 2020, Rapid learning or feature reuse?
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import one_hot
from metaprior.core.types import (
    AtMean,
    Batch,
    Call,
    Learner,
    Model,
    Task,
    TaskSource,
    counted,
    draw_task,
    examples,
    group_count,
    group_order,
    weighted_mean,
    weights,
)
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.evaluation.protocol import Units, brief_score
from metaprior.learners.anil import class_means, unit
from metaprior.networks.frozen import frozen, layer_names, layer_of
from metaprior.networks.layers import flat
from metaprior.studies.similarity import ENOUGH, LEAST, cca, cka

OTHER, SHUFFLED, UNTRAINED, UNRELATED = "other task", "shuffled labels", "untrained", "unrelated"
VARIANCE = 0.99  # the share of the variance that SVCCA keeps


class Subject(NamedTuple):
    """A trained learner, and how to make it for another network.

    Attributes:
        make: Function (model) -> learner.
        model: Its network.
        params: Its meta-learned parameters.
    """

    make: Callable[[Model], Learner]
    model: Model
    params: PyTree


class Similarity(NamedTuple):
    """How a layer differs before and after the inner loop, over tasks.

    For CKA the rows are the query examples, and the columns are all outputs of the layer. For CCA the rows of a
    convolution are examples x positions, and the columns are channels.

    Attributes:
        cka: The debiased linear CKA.
        plain_cka: The linear CKA, which is biased towards 1 for few examples.
        cca: The mean canonical correlation.
        svcca: The same for the directions with 99 % of the variance.
        rows: The number of rows for CCA.
        columns: The number of columns for CCA.
        change: |phi - theta| / |theta| of the layer's parameters. It is 0 for a layer that is not adapted.
        cosine: The cosine between phi and theta.
    """

    cka: Figure
    plain_cka: Figure
    cca: Figure
    svcca: Figure
    rows: int
    columns: int
    change: Figure
    cosine: Figure

    @property
    def enough(self) -> bool:
        """Whether CCA has at least ten rows per column. With fewer it is near 1 also for unrelated layers."""
        return self.rows >= ENOUGH * self.columns


class Reuse(NamedTuple):
    """The result of `reuse`.

    Attributes:
        layers: The similarity of each layer before and after the inner loop, by name.
        controls: The debiased CKA of each layer by control. "other task": before and after adaptation to the support of
            another task. "shuffled labels": the same for the own support with shuffled labels. "untrained": before and
            after for a network that is not trained. "unrelated": the trained against the untrained network, both before
            the inner loop, which is the floor of the measure.
        metric: "accuracy" or "mse".
        frozen: The metric with the first 0, 1, ..., all layers frozen in the inner loop. Only the first entry for a
            learner that adapts no layer's parameters.
        nil: The accuracy of the class with the largest mean cosine to the support's features, without a head: "theta"
            with the features before the inner loop (NIL), "phi" after it. Empty for regression.
    """

    layers: dict[str, Similarity]
    controls: dict[str, dict[str, Figure]]
    metric: str
    frozen: list[Figure]
    nil: dict[str, Figure]


class Outputs(NamedTuple):
    """What a network computes at some inputs.

    Attributes:
        layers: The outputs of each layer by name [n, ...].
        features: The inputs of its last linear map [n, d].
    """

    layers: dict[str, Array]
    features: Float[Array, "n d"]


def outputs_of(network: Callable[..., PyTree], x: PyTree) -> Outputs:
    """Computes the outputs of each layer of a network.

    Args:
        network: Function (x, call) -> outputs.
        x: Its inputs.
    """
    layers: dict[str, Array] = {}
    features: list[Array] = []

    def read(name: str, s: Array) -> Array:
        layers[name] = s
        return s

    def tap(name: str, inputs: Array, s: Array) -> Array:
        features.append(inputs)
        return s

    network(x, Call(tap=tap, layer=read))
    return Outputs(layers, flat(features[-1]))


def ends(learner: Learner, params: PyTree, support: Batch, key: PRNGKeyArray) -> tuple[AtMean, AtMean]:
    """Returns phi and the network before the first and after the last inner step.

    Args:
        learner: The learner.
        params: Its parameters.
        support: The support.
        key: Random key.

    Raises:
        ValueError: The learner has no inner steps, or no network whose layers could be read.
    """
    if learner.path is None or learner.at_mean is None:
        raise ValueError(
            "learner must fit the parameters of one network by inner steps, got one without `path` or `at_mean`. Use "
            "maml, anil, reptile, cavia, amortized_bml, gem_bml or another learner of that kind."
        )
    path = learner.path(params, support, key)
    before, after = (learner.at_mean(params, jax.tree.map(lambda leaf, i=i: leaf[i], path)) for i in (0, -1))
    return before, after


def movement(before: PyTree, after: PyTree, names: list[str]) -> dict[str, dict[str, Array]]:
    """Computes the relative change and the cosine of each layer's parameters.

    Args:
        before: phi before the inner loop.
        after: phi after it.
        names: The layers' names.
    """
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    named = [(layer_of(path, names), a.reshape(-1), b.reshape(-1)) for (path, a), b in pairs]
    found = {}
    for name in names:
        own = [(a, b) for layer, a, b in named if layer == name]
        if not own:
            found[name] = {"change": jnp.zeros(()), "cosine": jnp.ones(())}
            continue
        a, b = (jnp.concatenate(parts) for parts in zip(*own, strict=True))
        size, same = jnp.linalg.norm(a), (a == b).all()
        found[name] = {
            "change": jnp.where(same, 0, jnp.linalg.norm(b - a) / size),
            "cosine": jnp.where(same, 1, a @ b / (size * jnp.linalg.norm(b))),
        }
    return found


def nearest_by_cosine(network: Callable[..., PyTree], task: Task, way: int) -> Float[Array, ""]:
    """Computes the accuracy of the class with the largest mean cosine between features (NIL).

    Args:
        network: Function (x, call) -> outputs, whose last linear map is dropped.
        task: The task.
        way: The number of classes.
    """
    support, query = (unit(outputs_of(network, batch.x).features) for batch in task)
    scores = class_means(query @ support.T, one_hot(task.support.y, way) * weights(task.support)[:, None])
    return weighted_mean((scores.argmax(-1) == task.query.y).astype(scores.dtype), task.query)


def reuse(
    subject: Subject, source: TaskSource, key: PRNGKeyArray, *, tasks: int = 200, untrained: bool = True
) -> Reuse:
    """Compares each layer before and after the inner loop, and freezes layers in it.

    The queries of a task go through a network in one batch, the same before and after.

    Args:
        subject: The trained learner.
        source: The source of the tasks, whose queries have at least four examples.
        key: Random key.
        tasks: The number of tasks.
        untrained: Whether to compute the controls with a network that is not trained.

    Returns:
        Similarities, controls, and the metric with frozen layers.

    Raises:
        ValueError: The learner has no inner steps or no network to look into, its steps move frozen layers, a query has
            too few examples, or there are no tasks.
    """
    params, learner = subject.params, subject.make(subject.model)
    place = _places(source, key, tasks)
    members = None if group_count(source) is None else place
    form = _form(source)
    phi = jax.eval_shape(lambda task: ends(learner, params, task.support, key)[0].phi, form)
    form_of_layers = _layers(subject, source)
    names = list(form_of_layers)
    adapted = any(layer_of(path, names) for path, _ in jax.tree_util.tree_leaves_with_path(phi))
    of_classes, units = jnp.issubdtype(form.query.y.dtype, jnp.integer), Units.of(source)
    metric = "accuracy" if of_classes else "mse"

    def with_moving(moves: Bool[Array, " layers"], params: PyTree, task: Task, key: PRNGKeyArray) -> Any:
        part = subject.make(frozen(subject.model, dict(zip(names, moves, strict=True))))
        before, after = ends(part, params, task.support, key)
        change = movement(before.phi, after.phi, names)
        moved = jnp.stack([change[name]["change"] for name in names])
        posterior = part.adapt(params, task.support, key)
        scores = units.score(part.predict(params, posterior, task.query.x, key), counted(task.query).y, brief_score)
        return weighted_mean(scores[metric], task.query), (~moves & (moved != 0)).any()

    def one(params: PyTree, source: TaskSource, key: PRNGKeyArray, group: Array, next_group: Array) -> dict[str, Any]:
        key_task, key_other, key_adapt, key_shuffle, key_init = jax.random.split(key, 5)
        task, other = draw_task(source, key_task, group), draw_task(source, key_other, next_group)
        support, x = task.support, task.query.x
        shuffled = support._replace(y=jax.random.permutation(key_shuffle, support.y))
        before, after = ends(learner, params, support, key_adapt)
        networks = {"before": before, "after": after}
        networks[OTHER] = ends(learner, params, other.support, key_adapt)[1]
        networks[SHUFFLED] = ends(learner, params, shuffled, key_adapt)[1]
        if untrained:
            start = learner.init(key_init, task)
            networks[UNRELATED], networks[UNTRAINED] = ends(learner, start, support, key_adapt)
        n = len(names) if adapted else 0
        masks = jnp.arange(len(names))[None] >= jnp.arange(n + 1)[:, None]
        scores, leaks = jax.lax.map(lambda moves: with_moving(moves, params, task, key_adapt), masks)
        found = {"frozen": scores, "leaks": leaks.any(), "weight": weights(task.query)}
        if of_classes:
            predictive = jax.eval_shape(lambda p: learner.predict(p, learner.adapt(p, support, key), x, key), params)
            way = jax.eval_shape(lambda p: p.mean(), predictive).shape[-1]
            found["nil"] = {
                "theta": nearest_by_cosine(before.network, task, way),
                "phi": nearest_by_cosine(after.network, task, way),
            }
        layers = {name: outputs_of(at.network, x).layers for name, at in networks.items()}
        return found | {"layers": layers, "moved": movement(before.phi, after.phi, names)}

    run = jax.jit(one)
    each = []
    for at in zip(jax.random.split(key, tasks), place, np.roll(place, 1), strict=True):
        found = jax.device_get(run(params, source, *at))
        if found["leaks"]:
            raise ValueError(
                "learner must leave layers without a gradient where they are, so that they can be frozen, got one "
                "whose steps move them. Use a learner whose inner steps follow the gradient, such as maml."
            )
        each.append(found | {"layers": _compared(found, names)})
    if metric == "mse":
        for found in each:
            found["frozen"] = units.scaled({"mse": found["frozen"]})["mse"]

    def over_tasks(pick: Callable[[dict[str, Any]], Any]) -> Figure:
        return figure_of(np.array([pick(found) for found in each], float), members)

    layers, controls = {}, {name: {} for name in (OTHER, SHUFFLED, *([UNTRAINED, UNRELATED] if untrained else []))}
    for name in names:
        parts = {part: over_tasks(lambda f, n=name, p=part: f["layers"][n][p]) for part in each[0]["layers"][name]}
        moved = {part: over_tasks(lambda f, n=name, p=part: f["moved"][n][p]) for part in ("change", "cosine")}
        for control, row in controls.items():
            row[name] = parts.pop(control)
        *rows, columns = form_of_layers[name].shape
        layers[name] = Similarity(rows=prod(rows), columns=columns, **parts, **moved)
    frozen_too = [over_tasks(lambda f, n=n: f["frozen"][n]) for n in range(len(each[0]["frozen"]))]
    nil = {end: over_tasks(lambda f, e=end: f["nil"][e]) for end in (("theta", "phi") if of_classes else ())}
    return Reuse(layers, controls, metric, frozen_too, nil)


class Alike(NamedTuple):
    """The debiased CKA between two learners' networks, over tasks.

    Attributes:
        before: By layer, before the inner loops.
        after: By layer, after the inner loops.
    """

    before: dict[str, Figure]
    after: dict[str, Figure]


def alike(first: Subject, second: Subject, source: TaskSource, key: PRNGKeyArray, *, tasks: int = 200) -> Alike:
    """Compares the layers of two learners' networks, which have the same names, on the same queries.

    Args:
        first: A trained learner.
        second: Another one.
        source: The source of the tasks, whose queries have at least four examples.
        key: Random key.
        tasks: The number of tasks.

    Returns:
        The similarities of the layers that both networks have.

    Raises:
        ValueError: As in `reuse`, or the networks have no layer in common.
    """
    place = _places(source, key, tasks)
    members = None if group_count(source) is None else place
    second_has = _layers(second, source)
    names = [name for name in _layers(first, source) if name in second_has]
    if not names:
        raise ValueError(f"second must have a layer of the first network's names, got {', '.join(second_has)}.")
    learners = [subject.make(subject.model) for subject in (first, second)]

    @jax.jit
    def run(pair: list[PyTree], source: TaskSource, key: PRNGKeyArray, group: Array) -> Any:
        key_task, key_adapt = jax.random.split(key)
        task = draw_task(source, key_task, group)
        both = [ends(learner, params, task.support, key_adapt) for learner, params in zip(learners, pair, strict=True)]
        seen = [[outputs_of(at.network, task.query.x).layers for at in two] for two in both]
        return seen, weights(task.query)

    each = []
    for at in zip(jax.random.split(key, tasks), place, strict=True):
        ((a0, a1), (b0, b1)), weight = jax.device_get(run([first.params, second.params], source, *at))
        kept = weight > 0
        each.append([[cka(_rows(a[n][kept]), _rows(b[n][kept])) for n in names] for a, b in ((a0, b0), (a1, b1))])
    values = np.array(each)
    before, after = ({n: figure_of(side[:, i], members) for i, n in enumerate(names)} for side in values.swapaxes(0, 1))
    return Alike(before, after)


def _places(source: TaskSource, key: PRNGKeyArray, tasks: int) -> np.ndarray:
    """Returns the group of each task.

    Raises:
        ValueError: There are no tasks, or a query has too few examples.
    """
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, got {tasks}.")
    if (n := examples(_form(source).query)) < LEAST:
        raise ValueError(
            f"source must have tasks with at least {LEAST} query examples, which are compared, got {n}. Set "
            "tasks.test_query."
        )
    return np.asarray(group_order(source, jax.random.fold_in(key, 1), tasks))


def _form(source: TaskSource) -> Task:
    """Returns the shapes of a task."""
    return jax.eval_shape(lambda: draw_task(source, jax.random.key(0), jnp.zeros((), int)))


def _layers(subject: Subject, source: TaskSource) -> dict[str, Any]:
    """Returns the shapes of the layers' outputs on a query, by name and in order.

    Raises:
        ValueError: The network names no layers, or has no linear map.
    """
    learner, key = subject.make(subject.model), jax.random.key(0)

    def inside(task: Task) -> dict[str, Array]:
        at, _ = ends(learner, subject.params, task.support, key)
        order.extend(layer_names(at.network, task.query.x))
        return outputs_of(at.network, task.query.x).layers

    order: list[str] = []
    shapes = jax.eval_shape(inside, _form(source))
    return {name: shapes[name] for name in order}


def _compared(found: dict[str, Any], names: list[str]) -> dict[str, dict[str, float]]:
    """Computes the similarities of each layer of one task."""
    kept, seen = found["weight"] > 0, found["layers"]
    compared = {}
    for name in names:
        of = {network: layers[name][kept] for network, layers in seen.items()}
        before, after = _rows(of["before"]), _rows(of["after"])
        channels = _by_channel(of["before"]), _by_channel(of["after"])
        compared[name] = {
            "cka": cka(before, after),
            "plain_cka": cka(before, after, debiased=False),
            "cca": cca(channels[0], channels[1]),
            "svcca": cca(channels[0], channels[1], VARIANCE),
        } | {control: cka(before, _rows(of[control])) for control in (OTHER, SHUFFLED, UNRELATED) if control in of}
        if UNTRAINED in of:
            compared[name][UNTRAINED] = cka(_rows(of[UNRELATED]), _rows(of[UNTRAINED]))
    return compared


def _rows(outputs: Any) -> Any:
    return outputs.reshape(outputs.shape[0], -1)


def _by_channel(outputs: Any) -> Any:
    return outputs.reshape(-1, outputs.shape[-1])
