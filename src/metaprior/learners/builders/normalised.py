"""Learners whose batch norm does not depend on the other queries.

Its statistics are those of the support (`of_support`), of training tasks (`of_training`), or of the support and one
query at a time (`predicts_alone`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree, Scalar

from metaprior.core.types import PLAIN, AtMean, Batch, Call, Learner, Model, Task, TaskSource, joined, weights
from metaprior.learners.builders.gradient import one_by_one
from metaprior.learners.builders.metric import ABSENT
from metaprior.networks.norm import AT_HAND, Statistics
from metaprior.networks.statistics import beside, given, statistics_of


class Supported(NamedTuple):
    """A posterior together with the support.

    Attributes:
        posterior: The posterior of the learner itself.
        support: The support, by which queries are normalised.
    """

    posterior: PyTree
    support: Batch


def of_support(
    make: Callable[[Model], Learner], model: Model, within: Callable[[Model, Batch], Model] = beside
) -> Learner:
    """Builds a learner that normalises every batch of a task by its support, in training and afterwards.

    No prediction then depends on another query.

    Args:
        make: (model) -> learner.
        model: The network.
        within: (model, support) -> the network in a task with this support. `shown_alone` is another one.

    References:
        Bronskill, Gordon, Requeima, Nowozin & Turner (2020), sec. 3.2 (MetaBN).
    """

    def at(support: Batch) -> Learner:
        return make(within(model, support))

    def init(key: PRNGKeyArray, task: Task) -> PyTree:
        return at(task.support).init(key, task)

    def adapt(params: PyTree, support: Batch, key: PRNGKeyArray) -> Supported:
        return Supported(at(support).adapt(params, support, key), support)

    def transduce(params: PyTree, support: Batch, query: Batch, key: PRNGKeyArray) -> Supported:
        return Supported(at(support).posterior(params, support, query, key), support)

    def predict(params: PyTree, posterior: Supported, x: PyTree, key: PRNGKeyArray) -> PyTree:
        return at(posterior.support).predict(params, posterior.posterior, x, key)

    def loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        return at(task.support).loss(params, task, key)

    def score(params: PyTree, task: Task, key: PRNGKeyArray) -> Scalar:
        joint = at(task.support).joint
        assert joint is not None
        return joint.score(params, task, key)

    def path(params: PyTree, support: Batch, key: PRNGKeyArray) -> Supported:
        course = at(support).path
        assert course is not None
        steps = course(params, support, key)
        return _every_step(steps, support)

    def at_mean(params: PyTree, posterior: Supported) -> AtMean:
        inside = at(posterior.support).at_mean
        assert inside is not None
        return inside(params, posterior.posterior)

    def kinds(params: PyTree, support: Batch, key: PRNGKeyArray) -> PyTree:
        of_task = at(support).kinds
        assert of_task is not None
        return of_task(params, support, key)

    plain = make(model)

    def turned(knobs: Mapping[str, Any]) -> Learner:
        return of_support(lambda network: _turned(make(network), knobs), model, within)

    def scheduled(progress: Scalar) -> Learner:
        return of_support(lambda network: _scheduled(make(network), progress), model, within)

    return Learner(
        init,
        adapt,
        predict,
        loss,
        None if plain.path is None else path,
        knobs=plain.knobs,
        turn=None if plain.turn is None else turned,
        transduce=None if plain.transduce is None else transduce,
        joint=None if plain.joint is None else plain.joint._replace(score=score),
        schedule=None if plain.schedule is None else scheduled,
        at_mean=None if plain.at_mean is None else at_mean,
        kinds=None if plain.kinds is None else kinds,
    )


def shown_alone(model: Model, support: Batch) -> Model:
    """Returns the network with the outputs of the classes that a support does not show ruled out.

    A network with 20 outputs then solves a task of 5 classes with 5 of them (Hsu, Levine & Finn 2019).

    Args:
        model: The network; its outputs are the logits of classes.
        support: The support.
    """
    there = weights(support) > 0

    def apply(params: PyTree, x: PyTree, call: Call = PLAIN) -> PyTree:
        logits = model.outputs(params, x, call)
        classes = jnp.arange(logits.shape[-1])
        shown = ((support.y[:, None] == classes) & there[:, None]).any(0)
        return jnp.where(shown, logits, ABSENT)

    return model._replace(apply=apply)


def _turned(learner: Learner, knobs: Mapping[str, Any]) -> Learner:
    assert learner.turn is not None
    return learner.turn(knobs)


def _scheduled(learner: Learner, progress: Scalar) -> Learner:
    assert learner.schedule is not None
    return learner.schedule(progress)


def _every_step(steps: PyTree, support: Batch) -> Supported:
    length = jax.tree.leaves(steps)[0].shape[0]
    return Supported(steps, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (length, *leaf.shape)), support))


def predicts_alone(learner: Learner, predict: Callable[[Model], Callable[..., PyTree]], model: Model) -> Learner:
    """Returns a learner that predicts each query in a separate batch with the support (`transductive=False`).

    Args:
        learner: The learner, whose predictions see all queries together.
        predict: (model) -> the learner's function `predict` with that model.
        model: The learner's model.
    """

    def alone(params: PyTree, posterior: Supported, x: PyTree, key: PRNGKeyArray) -> PyTree:
        beside = model._replace(apply=one_by_one(model.outputs, posterior.support.x))
        return predict(beside)(params, posterior.posterior, x, key)

    def adapt(params: PyTree, support: Batch, key: PRNGKeyArray) -> Supported:
        return Supported(learner.adapt(params, support, key), support)

    def path(params: PyTree, support: Batch, key: PRNGKeyArray) -> Supported:
        assert learner.path is not None
        return _every_step(learner.path(params, support, key), support)

    def at_mean(params: PyTree, posterior: Supported) -> AtMean:
        assert learner.at_mean is not None
        return learner.at_mean(params, posterior.posterior)

    return learner._replace(
        adapt=adapt,
        predict=alone,
        path=None if learner.path is None else path,
        at_mean=None if learner.at_mean is None else at_mean,
    )


def of_training(make: Callable[[Model], Learner], model: Model) -> Learner:
    """Builds a learner that normalises by the current batch in training, and by training tasks' statistics afterwards.

    `Learner.settle` gathers these statistics from trained params.

    Args:
        make: (model) -> learner.
        model: The network.
    """
    learner = make(given(model, AT_HAND))

    def settle(params: PyTree, source: TaskSource, key: PRNGKeyArray) -> Learner:
        return make(given(model, jax.jit(partial(gathered, learner, model))(params, source, key)))

    def turned(knobs: Mapping[str, Any]) -> Learner:
        return of_training(lambda network: _turned(make(network), knobs), model)

    return learner._replace(settle=settle, turn=None if learner.turn is None else turned)


def gathered(
    learner: Learner, model: Model, params: PyTree, source: TaskSource, key: PRNGKeyArray, tasks: int = 100
) -> dict[str, Statistics]:
    """Computes the batch norm statistics of training tasks, for each layer of the network before adaptation.

    They are computed once after training, instead of a moving average during training. Each task is normalised by its
    own statistics, as in training. The variance is the sum of the variance within tasks and that between task means.

    Args:
        learner: The learner.
        model: The network.
        params: Trained parameters of the learner.
        source: The training tasks.
        key: Random key.
        tasks: Number of tasks.

    Returns:
        Statistics by the layer's name.

    Raises:
        ValueError: The learner's params contain no parameters of this network.

    References:
        Ioffe & Szegedy (2015), Algorithm 2.
    """

    def one(key: PRNGKeyArray) -> dict[str, Statistics]:
        task = jax.tree.map(lambda leaf: leaf[0], source.sample(key, 1))
        data = joined(task._replace(support=task.support._replace(known=None)))  # inputs count, labelled or not
        if learner.network is not None:
            network = learner.network(params, task.support, key)
        else:
            network = partial(model.apply, part_like(model, params, data.x))
        return statistics_of(network, data.x, data.weight)

    each = jax.lax.map(one, jax.random.split(key, tasks))
    return {name: Statistics(s.mean.mean(0), s.variance.mean(0) + s.mean.var(0)) for name, s in each.items()}


def like(model: Model, x: PyTree) -> Callable[[PyTree], bool]:
    """Returns whether a pytree has the structure and shapes of the model's parameters, as a function of it.

    Args:
        model: The network.
        x: Inputs of the model.
    """
    form = jax.eval_shape(model.init, jax.random.key(0), x)
    structure, shapes = jax.tree.structure(form), [leaf.shape for leaf in jax.tree.leaves(form)]

    def same(node: PyTree) -> bool:
        return jax.tree.structure(node) == structure and [jnp.shape(leaf) for leaf in jax.tree.leaves(node)] == shapes

    return same


def part_like(model: Model, params: PyTree, x: PyTree) -> PyTree:
    """Returns the first part of a learner's params with the structure and shapes of the model's parameters.

    Args:
        model: The network.
        params: Parameters of the learner.
        x: Inputs of the model.

    Raises:
        ValueError: No part has this structure.
    """
    same = like(model, x)
    for node in jax.tree.leaves(params, is_leaf=same):
        if same(node):
            return node
    raise ValueError(
        "norm must be 'task', 'layer' or 'group' for this learner, got 'running': its parameters do not hold one "
        "network whose statistics could be gathered (they hold several particles, for instance)."
    )
