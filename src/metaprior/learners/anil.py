"""ANIL and NIL (Raghu, Raghu, Bengio & Vinyals 2020): almost no inner loop, and no inner loop.

ANIL is MAML whose inner loop adapts only the head, in training and at test; the outer gradient updates all parameters.
NIL trains like ANIL, then drops the head: it classifies a query by cosine similarity to the support's features.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Categories, Likelihood, check_labels, one_hot
from metaprior.core.named import passes_options_to
from metaprior.core.options import Positive
from metaprior.core.types import Batch, Call, Learner, Model, Task, counted, weights
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.learners.builders.amortised import embedding, output_width
from metaprior.learners.builders.gradient import Adaptation, query_learner
from metaprior.learners.builders.metric import ABSENT, check_classification
from metaprior.learners.traits import traits


def _is_head(params: PyTree, head: str) -> PyTree:
    """Returns a mask over params: True where `head` is a component of the leaf's path."""

    def names(path: tuple) -> list[str]:
        return [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]

    mask = jax.tree_util.tree_map_with_path(lambda path, _: head in names(path), params)
    if not any(jax.tree.leaves(mask)):
        seen = sorted({name for path, _ in jax.tree_util.tree_leaves_with_path(params) for name in names(path)})
        raise ValueError(f"head must be a layer of the model, one of {', '.join(seen)}, got {head!r}.")
    return mask


@passes_options_to(InnerLoop)
def anil(
    model: Model, likelihood: Likelihood, *, head: str = "head", posterior: PosteriorRule = point(), **inner: Any
) -> Learner:
    """Meta-learns an initialisation of which only one layer, the head, is adapted.

    Args:
        model: The network.
        likelihood: Likelihood of the support and the query.
        head: Name of the layer that is adapted: a component of its parameters' path.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`.

    References:
        Raghu, Raghu, Bengio & Vinyals (2020), sec. 4.
    """
    import equinox as eqx  # here, since its import takes a sixth of a second

    def start(params: PyTree) -> PyTree:
        return eqx.filter(params, _is_head(params, head))

    def network(params: PyTree, phi: PyTree, x: PyTree, call: Call) -> Array:
        return model.outputs(eqx.combine(phi, params), x, call)

    def init(key: PRNGKeyArray, task: Task) -> PyTree:
        params = model.init(key, task.support.x)
        _is_head(params, head)
        return params

    loop = InnerLoop(**inner)
    optimizer = loop.transformation()
    adaptation = Adaptation(model, init, start, network, lambda params: optimizer)
    return query_learner(adaptation, likelihood, loop, posterior)


def unit(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Returns features of length 1, whose products are cosines.

    Args:
        features: The features.
    """
    return features / (jnp.linalg.norm(features, axis=-1, keepdims=True) + 1e-8)


def class_means(cosine: Float[Array, "q n"], hot: Float[Array, "n way"]) -> Float[Array, "q way"]:
    """Computes the mean cosine of each query to the support examples of each class; 0 for a class without examples.

    Args:
        cosine: Cosines of queries to support examples.
        hot: The labels of the support one-hot, times their weights.
    """
    return cosine @ hot / jnp.where((total := hot.sum(0)) == 0, 1, total)


class Memory(NamedTuple):
    """The posterior of NIL.

    Attributes:
        features: Features of the support examples, of unit length.
        labels: Their labels.
        weight: Their weights.
        way: Zeros; their number is the number of classes.
    """

    features: Float[Array, "n d"]
    labels: Int[Array, " n"]
    weight: Float[Array, " n"]
    way: Float[Array, " way"]


@traits(of_classes=True)
@passes_options_to(anil)
def nil(
    model: Model, likelihood: Likelihood, *, temperature: Positive = 10.0, softmax: bool = False, **options: Any
) -> Learner:
    """Trains as ANIL; at test the score of a class is the mean cosine similarity to its support examples.

    The paper sums the similarities. The mean gives the same ranking where all classes have the same number of shots.

    Args:
        model: The network; it needs `features`.
        likelihood: Must be `Categorical`.
        temperature: Multiplies the cosines. Without `softmax` accuracy does not depend on it; calibration does.
        softmax: Whether the similarities become attention weights by a softmax over the support first.
        options: Options of `anil`, for training.

    Raises:
        ValueError: The likelihood is not categorical, or the model has no features.

    References:
        Raghu, Raghu, Bengio & Vinyals (2020), sec. 5.
    """
    check_classification("nil", likelihood, None)
    trained = anil(model, likelihood, **options)
    if model.features is None:
        raise ValueError("model must have features, which NIL compares. Give Model(init, apply, features).")
    embed = embedding(model)

    def adapt(params: PyTree, support: Batch, key: PRNGKeyArray) -> Memory:
        way = output_width(model, params, support.x)
        features = unit(embed(params, support.x))
        labels = counted(support).y
        weight = weights(support) * check_labels(labels, way, features.shape[0])
        # NaN for all examples: a product of zeros and NaN may be compiled to zeros.
        return Memory(features, labels, jnp.where(jnp.isnan(weight).any(), jnp.nan, weight), jnp.zeros(way))

    def predict(params: PyTree, memory: Memory, x: PyTree, key: PRNGKeyArray) -> Categories:
        cosine = temperature * unit(embed(params, x)) @ memory.features.T
        hot = one_hot(memory.labels, memory.way.shape[0]) * memory.weight[:, None]
        if softmax:
            attention = jax.nn.softmax(jnp.where(memory.weight > 0, cosine, ABSENT))
            return Categories(jax.nn.log_softmax(jnp.log(attention @ hot + 1e-12))[None])
        return Categories(jax.nn.log_softmax(class_means(cosine, hot))[None])

    return Learner(trained.init, adapt, predict, trained.loss)
