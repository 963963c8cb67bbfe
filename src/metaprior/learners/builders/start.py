"""Learners whose network starts from parameters that were trained before, by another learner for instance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jaxtyping import PRNGKeyArray, PyTree, Scalar

from metaprior.core.types import Learner, Model, Task
from metaprior.learners.builders.normalised import like
from metaprior.networks.norm import AT_HAND
from metaprior.networks.statistics import given


def part_of(model: Model, params: PyTree, x: PyTree) -> PyTree:
    """Returns the parameters of the network in a learner's params: the first part with their structure and shapes.

    Args:
        model: The network.
        params: Parameters of the learner.
        x: Inputs of the network.

    Raises:
        ValueError: There is none: the learner holds several copies of the network, for instance, or widens its inputs.
    """
    same = like(model, x)
    found = [node for node in jax.tree.leaves(params, is_leaf=same) if same(node)]
    if not found:
        raise ValueError(
            "start must be left out with this learner: its parameters do not hold the network once, as it is (they "
            "hold several particles, or the learner widens the network's inputs)."
        )
    return found[0]


def with_part(model: Model, params: PyTree, x: PyTree, change: Callable[[PyTree], PyTree]) -> PyTree:
    """Returns a learner's params with a change of the network's parameters (`part_of`).

    Args:
        model: The network.
        params: Parameters of the learner.
        x: Inputs of the network.
        change: Function from the network's parameters to others of the same structure.
    """
    part_of(model, params, x)  # raises an error if there is none
    same, seen = like(model, x), []

    def changed(node: PyTree) -> PyTree:
        if not same(node) or seen:
            return node
        seen.append(node)
        return change(node)

    return jax.tree.map(changed, params, is_leaf=same)


def head_of(model: Model, params: PyTree, x: PyTree) -> list[bool]:
    """Returns for each leaf of a network's parameters whether it belongs to the head: the features do not use it.

    Args:
        model: The network; one without features has no head.
        params: Its parameters.
        x: Inputs.
    """
    features = (model if model.statistics == "batch" else given(model, AT_HAND)).features
    if features is None:
        return [False for _ in jax.tree.leaves(params)]
    program = jax.make_jaxpr(lambda params: features(params, x))(params).jaxpr
    used = {v for equation in program.eqns for v in equation.invars if isinstance(v, Var)} | set(program.outvars)
    return [v not in used for v in program.invars]


def taken_from(model: Model, fresh: PyTree, trained: PyTree, x: PyTree) -> PyTree:
    """Returns trained parameters of a network. Its head stays as it is if it has another number of outputs.

    Args:
        model: The network.
        fresh: Its initial parameters.
        trained: Parameters of the same network, except perhaps for its head.
        x: Inputs.

    Raises:
        ValueError: The networks differ below the head. The message says where.
    """
    head = head_of(model, fresh, x)
    own, other = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (fresh, trained))
    fits = {path: path in other and jnp.shape(other[path]) == jnp.shape(leaf) for path, leaf in own.items()}
    of_head = dict(zip(own, head, strict=True))
    wrong = [path for path in own if not (fits[path] or of_head[path])]
    wrong += [path for path in other if path not in own and not any(head)]
    if wrong:
        path, name = wrong[0], jax.tree_util.keystr(wrong[0])
        there, here = (f"shape {jnp.shape(tree[path])}" if path in tree else "no value" for tree in (other, own))
        raise ValueError(
            f"start must hold the parameters of this network, except for its head, got others: {name} has {there} "
            f"there and {here} here. Use the network that it was trained with."
        )
    whole = all(fits[path] for path in own if of_head[path])
    leaves = [
        jnp.asarray(other[path], leaf.dtype) if whole or not of_head[path] else leaf for path, leaf in own.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def started_from(learner: Learner, model: Model, trained: PyTree, *, freeze: bool = False) -> Learner:
    """Returns a learner whose network starts from trained parameters.

    Args:
        learner: The learner.
        model: Its network.
        trained: Parameters of the network, for instance `Fitted.best` of `fine_tune`. A head with another number of
            outputs is not taken.
        freeze: Whether training leaves the network as it is. This holds for outer optimisers that do not change
            parameters without a gradient (no weight decay).

    Raises:
        ValueError: `init` raises it if the networks differ below the head, or if the learner's params do not hold the
            network once.
    """

    def init(key: PRNGKeyArray, task: Task) -> PyTree:
        x = task.query.x  # a support may hold attributes
        return with_part(model, learner.init(key, task), x, lambda fresh: taken_from(model, fresh, trained, x))

    begun = learner.changed(lambda other: started_from(other, model, trained, freeze=freeze), init=init)
    return frozen(begun, model) if freeze else begun


def frozen(learner: Learner, model: Model) -> Learner:
    """Returns a learner whose meta-gradient is 0 for the parameters of its network.

    Args:
        learner: The learner.
        model: Its network.
    """

    def held(params: PyTree, task: Task) -> PyTree:
        return with_part(model, params, task.query.x, jax.lax.stop_gradient)

    def loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        return learner.loss(held(params, task), task, key)

    def score(params: PyTree, task: Task, key: PRNGKeyArray) -> Scalar:
        assert learner.joint is not None
        return learner.joint.score(held(params, task), task, key)

    joint = None if learner.joint is None else learner.joint._replace(score=score)
    return learner.changed(lambda other: frozen(other, model), loss=loss, joint=joint)
