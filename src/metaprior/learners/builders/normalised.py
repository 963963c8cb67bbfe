"""Learners whose batch norm uses statistics of other examples than those at hand.

Of the support (`of_support`), of training tasks (`of_training`), or of the support and one query at a time
(`predicts_alone`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree, Scalar

from metaprior.core.types import Batch, Learner, Model, Task, TaskSource, joined
from metaprior.learners.builders.gradient import one_by_one
from metaprior.networks.norm import AT_HAND, Statistics
from metaprior.networks.statistics import beside, given, statistics_of


class Supported(NamedTuple):
    """A learner's posterior, and the support beside which its queries are normalised."""

    posterior: PyTree
    support: Batch


def of_support(make: Callable[[Model], Learner], model: Model) -> Learner:
    """Returns the learner that `make` builds, with every batch of a task normalised by its support.

    This holds in training as well as later, so no prediction depends on another query (MetaBN).

    Args:
        make: model -> learner.
        model: the network.

    References:
        Bronskill, Gordon, Requeima, Nowozin & Turner 2020, section 3.2.
    """

    def at(support: Batch) -> Learner:
        return make(beside(model, support))

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

    def path(params: PyTree, support: Batch, key: PRNGKeyArray) -> Supported:
        course = at(support).path
        assert course is not None
        steps = course(params, support, key)
        return _every_step(steps, support)

    plain = make(model)

    def turned(knobs: Mapping[str, Any]) -> Learner:
        return of_support(lambda network: _turned(make(network), knobs), model)

    return Learner(
        init,
        adapt,
        predict,
        loss,
        None if plain.path is None else path,
        knobs=plain.knobs,
        turn=None if plain.turn is None else turned,
        transduce=None if plain.transduce is None else transduce,
    )


def _turned(learner: Learner, knobs: Mapping[str, Any]) -> Learner:
    assert learner.turn is not None
    return learner.turn(knobs)


def _every_step(steps: PyTree, support: Batch) -> Supported:
    length = jax.tree.leaves(steps)[0].shape[0]
    return Supported(steps, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (length, *leaf.shape)), support))


def predicts_alone(learner: Learner, predict: Callable[[Model], Callable[..., PyTree]], model: Model) -> Learner:
    """Returns a learner that predicts each query in a batch of its own beside the support (`transductive=False`).

    Args:
        learner: the learner, whose predictions see all queries together.
        predict: model -> the function `predict` of the learner with that model.
        model: the learner's model.
    """

    def alone(params: PyTree, posterior: Supported, x: PyTree, key: PRNGKeyArray) -> PyTree:
        beside = model._replace(apply=one_by_one(model.outputs, posterior.support.x))
        return predict(beside)(params, posterior.posterior, x, key)

    def adapt(params: PyTree, support: Batch, key: PRNGKeyArray) -> Supported:
        return Supported(learner.adapt(params, support, key), support)

    def path(params: PyTree, support: Batch, key: PRNGKeyArray) -> Supported:
        assert learner.path is not None
        return _every_step(learner.path(params, support, key), support)

    return learner._replace(adapt=adapt, predict=alone, path=None if learner.path is None else path)


def of_training(make: Callable[[Model], Learner], model: Model) -> Learner:
    """Returns the learner that `make` builds, normalised by training tasks once it is trained.

    During training, the batch at hand gives the statistics. `Learner.settle` gathers those of training tasks
    afterwards.

    Args:
        make: model -> learner.
        model: the network.
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
    """Returns the statistics of training tasks in each layer of the network that a task begins with.

    They are gathered once, after training, and not followed during it. Each task is normalised by itself as in
    training; the variance is that within tasks plus that between their means.

    Args:
        learner: the trained learner.
        model: its network.
        params: its meta-learned parameters.
        source: training tasks.
        key: random key.
        tasks: number of tasks.

    Raises:
        ValueError: the params do not hold the parameters of one such network.

    References:
        Ioffe & Szegedy 2015, Algorithm 2.
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


def part_like(model: Model, params: PyTree, x: PyTree) -> PyTree:
    """Returns the first part of a learner's params that has the form of the model's own."""
    form = jax.eval_shape(model.init, jax.random.key(0), x)
    structure, shapes = jax.tree.structure(form), [leaf.shape for leaf in jax.tree.leaves(form)]

    def same(node: PyTree) -> bool:
        return jax.tree.structure(node) == structure and [jnp.shape(leaf) for leaf in jax.tree.leaves(node)] == shapes

    for node in jax.tree.leaves(params, is_leaf=same):
        if same(node):
            return node
    raise ValueError(
        "norm must be 'task', 'layer' or 'group' for this learner, got 'running': its parameters do not hold one "
        "network whose statistics could be gathered (they hold several particles, for instance)."
    )
