"""Zero-shot prototypical networks (Snell, Swersky & Zemel 2017, sec. 2.7): prototypes are embedded attributes.

Each class has a vector v_k of attributes in place of examples. Its prototype is c_k = g(v_k), of unit length as in
sec. 3.3, and p(y = k | x) is a softmax of -|f(x) - c_k|^2 / temperature. f and g are learned together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.options import Count, Positive, Way, checked
from metaprior.core.types import Attributes, Batch, Learner, Model, Task
from metaprior.learners.builders.amortised import embedding
from metaprior.learners.builders.metric import (
    check_classification,
    class_means,
    memberships,
    present,
    scored_by_query,
    squared_distance,
    unit,
)
from metaprior.learners.traits import traits
from metaprior.networks.mlp import mlp


class Described(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of f, the model.
        attributes: Parameters of g, the map of attributes.
        log_temperature: Logarithm of the learned temperature.
    """

    embedding: PyTree
    attributes: PyTree
    log_temperature: Scalar


class Prototypes(NamedTuple):
    """The posterior.

    Attributes:
        prototypes: One prototype per class.
        rows: Number of rows of attributes of each class; 0 marks a class that the task does not have.
    """

    prototypes: Float[Array, "way d"]
    rows: Float[Array, " way"]


def attributes_of(support: Batch) -> Float[Array, "n a"]:
    """Returns the rows of attributes of a support set.

    Raises:
        ValueError: The support holds examples instead of attributes.
    """
    if not isinstance(support.x, Attributes):
        shapes = ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(support.x))
        raise ValueError(
            f"support.x must be Attributes, one row per class, for zero_shot, got examples {shapes}. Give "
            "Attributes([n, a]), e.g. from the task source omniglot_strokes."
        )
    return support.x.values


@traits(of_classes=True, reads_attributes=True, small={"normalise": False})
@checked
def zero_shot(
    model: Model,
    likelihood: Likelihood,
    *,
    hidden: Sequence[Count] = (),
    normalise: bool = True,
    temperature: Positive = 1.0,
    way: Way | None = None,
) -> Learner:
    """Meta-learns embeddings of inputs and of class attributes, so that a class needs no example.

    The support's x is `Attributes`, one row per class; several rows of one class are averaged after g. Queries are
    embedded as one batch.

    Args:
        model: The network; its features are the embedding f (its outputs where it has no features).
        likelihood: Must be `Categorical`.
        hidden: Widths of g's hidden layers (ReLU). Empty: g is linear, as in the paper.
        normalise: Whether prototypes have unit length.
        temperature: Divides the distances. It is learned and starts from this value.
        way: The largest number of classes in a task. None: the number of rows of each support.

    Raises:
        ValueError: The likelihood is not categorical, the temperature is not above 0, or a support has no attributes.

    References:
        Snell, Swersky & Zemel (2017), sec. 2.7 and 3.3.
    """
    check_classification("zero_shot", likelihood, way)
    embed = embedding(model)

    def attribute_map(d: int) -> Model:
        return mlp(d, tuple(hidden))

    def init(key: PRNGKeyArray, task: Task) -> Described:
        key_model, key_map = jax.random.split(key)
        values, x = attributes_of(task.support), task.query.x
        start = model.init(key_model, x)
        d = jax.eval_shape(embed, start, x).shape[-1]
        log_temperature = jnp.log(jnp.asarray(temperature, float))
        return Described(start, attribute_map(d).init(key_map, values), log_temperature)

    def adapt(params: Described, support: Batch, key: PRNGKeyArray) -> Prototypes:
        values = attributes_of(support)
        d = params.attributes["head"]["b"].shape[0]
        g = attribute_map(d).apply(params.attributes, values)
        shares = memberships(support, values.shape[0] if way is None else way)
        prototypes = class_means(shares, unit(g) if normalise else g)
        return Prototypes(prototypes, shares.sum(0))

    def logits(params: Described, classes: Prototypes, x: PyTree) -> Float[Array, "q way"]:
        apart = squared_distance(embed(params.embedding, x), classes.prototypes)
        return present(-apart / jnp.exp(params.log_temperature), classes.rows)

    return scored_by_query(init, adapt, logits)
