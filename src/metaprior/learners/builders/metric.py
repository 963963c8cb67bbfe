"""Shared parts of learners that compare embeddings: embeddings, distances, and classes without support examples.

Classes are labels 0..way-1, where `way` is fixed when the code is compiled. A class without support examples has
probability 0. A learner trained on 60 ways can therefore be evaluated on 5 unchanged, and the tasks of one batch may
have different numbers of classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Categories, Likelihood, check_labels, one_hot
from metaprior.core.types import Batch, Learner, Model, Task, counted, known_labels, labelled, weighted_mean, weights
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.knobs import SOFTMAX, temperature_scaled, turned

ABSENT = -1e9  # logit of a class without examples: its probability is exactly 0, and gradients stay finite

Embed = Callable[[PyTree, PyTree], Float[Array, "n d"]]


def embed_query(embed: Embed, params: PyTree, x: PyTree, beside: PyTree | None) -> Float[Array, "n d"]:
    """Embeds the queries in one batch, or each in a separate batch with the support inputs.

    Separate batches keep batch norm from mixing queries (Nichol et al. 2018, sec. 6.1).

    Args:
        embed: (params, x) -> embeddings.
        params: Parameters of the embedding.
        x: The queries' inputs.
        beside: The support inputs. None embeds all queries in one batch.
    """
    if beside is None:
        return embed(params, x)

    def one(xi: PyTree) -> Float[Array, " d"]:
        return embed(params, jax.tree.map(lambda s, q: jnp.concatenate([s, q[None]]), beside, xi))[-1]

    return jax.lax.map(one, x)


def number_of_classes(model: Model, way: int | None, params: PyTree, x: PyTree) -> int:
    """Returns `way`, or where it is None the number of the model's outputs.

    Raises:
        ValueError: `way` is None and the model has no features, so that its outputs are the embedding.
    """
    if way is not None:
        return way
    if model.features is None:
        raise ValueError(
            "way must be the largest number of classes in a task where the model's outputs are its embedding, got None."
        )
    return jax.eval_shape(model.apply, params, x).shape[-1]


def check_classification(name: str, likelihood: Likelihood, way: int | None) -> None:
    """Checks the options of a learner that only classifies.

    Raises:
        ValueError: The likelihood is not categorical, or there are fewer than two classes.
    """
    if not isinstance(likelihood, Categorical):
        raise ValueError(
            f"likelihood must be Categorical() for {name}, which tells classes apart, got {type(likelihood).__name__}."
        )
    if way is not None and way < 2:
        raise ValueError(f"way must be at least 2, got {way}.")


def memberships(support: Batch, way: int) -> Float[Array, "n way"]:
    """Returns each example's weight in the column of its class; columns sum to the classes' numbers of examples.

    An example without a label is in no column. A label that is not a class, or a weight below 0, makes the whole matrix
    NaN: in one row alone the NaN could be lost, since a product of zeros and NaN may be compiled to zeros.
    """
    y, w = counted(support._replace(known=None)).y, weights(support)
    possible = check_labels(known_labels(y), way, w.shape[0])
    lost = jnp.isnan(w * possible).any()
    return jnp.where(lost, jnp.nan, one_hot(y, way, w.dtype) * w[:, None])


def places(task: Task, way: int) -> Task:
    """Returns a task whose labels are the places of its classes, 0..way-1, from one whose labels are class numbers.

    Places are in the order of the class numbers in the support. A label that is not there becomes `way`, which is no
    class. Labels below 0 (hidden) stay as they are.
    """
    support = labelled(task.support)
    none = jnp.iinfo(jnp.int32).max
    y = jnp.asarray(support.y).astype(jnp.int32)
    there = jnp.unique(jnp.where((weights(support) > 0) & (y >= 0), y, none), size=way, fill_value=none)

    def placed(y: Any) -> Array:
        y = jnp.asarray(y).astype(jnp.int32)
        place = jnp.clip(jnp.searchsorted(there, y), 0, way - 1)
        return jnp.where(y < 0, y, jnp.where(there[place] == y, place, way))

    return Task(*(batch._replace(y=placed(batch.y)) for batch in task))


def class_means(shares: Float[Array, "n way"], f: Float[Array, "n d"]) -> Float[Array, "way d"]:
    """Returns the weighted mean of each class's rows; zeros for a class without examples.

    Args:
        shares: Weights of the rows in each class, such as `memberships`.
        f: The rows, usually embeddings.
    """
    count = shares.sum(0)
    return shares.T @ f / jnp.where(count > 0, count, 1)[:, None]


def present(logits: Float[Array, "n way"], number: Float[Array, " way"]) -> Float[Array, "n way"]:
    """Returns the logits with classes of weight 0 in the support ruled out; NaN where the weight is NaN."""
    return jnp.where(number > 0, logits, jnp.where(jnp.isnan(number), jnp.nan, ABSENT))


def unit(f: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Scales rows to unit length; a row of zeros stays zero, with a finite derivative."""
    return f * jax.lax.rsqrt((f**2).sum(-1, keepdims=True) + 1e-12)


def squared_distance(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Computes |a_i - b_j|^2 by one matrix product, after subtracting the mean of b to avoid cancellation."""
    centre = b.mean(0)
    a, b = a - centre, b - centre
    cross = jnp.matmul(a, b.T, precision="highest")
    return jnp.maximum((a**2).sum(-1)[:, None] + (b**2).sum(-1) - 2 * cross, 0)


def cosine_distance(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Computes 1 - cos(a_i, b_j)."""
    return 1 - jnp.matmul(unit(a), unit(b).T, precision="highest")


DISTANCES = {"euclidean": squared_distance, "cosine": cosine_distance}


def scored_by_query(
    init: Callable[[PRNGKeyArray, Task], PyTree],
    adapt: Callable[[PyTree, Batch, PRNGKeyArray], PyTree],
    logits: Callable[[PyTree, PyTree, PyTree], Float[Array, "n way"]],
    transduce: Callable[[PyTree, Batch, Batch, PRNGKeyArray], PyTree] | None = None,
) -> Learner:
    """Builds a classifier whose loss is the query's mean nll under its own predictive distribution.

    A query label that is not a class (way or above) makes the loss NaN, which training reports.

    Args:
        init: (key, task) -> params.
        adapt: (params, support, key) -> posterior.
        logits: (params, posterior, x) -> [n, way], log class probabilities of each query up to a constant.
        transduce: (params, support, query, key) -> posterior, see `Learner.transduce`. The loss then uses it.
    """

    def predict(params: PyTree, posterior: PyTree, x: PyTree, key: PRNGKeyArray) -> Categories:
        return Categories(jax.nn.log_softmax(logits(params, posterior, x))[None])

    def loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        predictive = predict(params, learner.posterior(params, *task, key), task.query.x, key)
        score = weighted_mean(-predictive.log_prob(counted(task.query).y), task.query)
        return score, fit_metrics(Categorical(), predictive.log_probs[0], task.query) | {"nll": score}

    learner = Learner(init, adapt, predict, loss, transduce=transduce)  # whose posterior the loss is of
    return learner


class Shown(NamedTuple):
    """A posterior of a learner made by `with_unseen`.

    Attributes:
        posterior: The posterior of the learner itself.
        number: Weight of the support's examples in each class.
    """

    posterior: PyTree
    number: Float[Array, " way"]


def with_unseen(learner: Learner, way: int, concentration: float = 1.0) -> Learner:
    """Gives classes without support examples their prior probability, in a learner that rules them out.

    Among n examples with none of class c, the Dirichlet-multinomial probability of c is
    concentration / (n + way concentration). The learner's own probabilities share the rest. Nothing changes where every
    class has examples. Use this for problems with a fixed list of classes, not for episodes of fewer classes than
    `way`.

    Args:
        learner: A classifier of labels 0..way-1 that compares queries with the support.
        way: The number of classes.
        concentration: Concentration of the Dirichlet prior over the classes' shares, above 0. 1 is Laplace's rule of
            succession.
    """

    def adapt(params: PyTree, support: Batch, key: PRNGKeyArray) -> Shown:
        return Shown(learner.adapt(params, support, key), memberships(support, way).sum(0))

    def transduce(params: PyTree, support: Batch, query: Batch, key: PRNGKeyArray) -> Shown:
        return Shown(learner.posterior(params, support, query, key), memberships(support, way).sum(0))

    def predict(params: PyTree, shown: Shown, x: PyTree, key: PRNGKeyArray) -> Categories:
        unseen, n = shown.number == 0, shown.number.sum()
        each = concentration / (n + way * concentration)
        own = learner.predict(params, shown.posterior, x, key).log_probs
        left = jnp.where(unseen.any(), jnp.log(jnp.maximum(1 - each * unseen.sum(), 1e-30)), 0)
        return Categories(jnp.where(unseen, jnp.log(each), own + left))

    def loss(params: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        there = memberships(task.support, way).sum(0) > 0
        known = weights(task.query) * there[jnp.clip(task.query.y.astype(int), 0, way - 1)]
        return learner.loss(params, task._replace(query=task.query._replace(weight=known)), key)

    def again(other: Learner) -> Learner:
        return with_unseen(other, way, concentration)

    # A softmax's temperature is applied first: it must not distort the prior mass of classes without examples.
    scaled = learner if SOFTMAX in dict(learner.knobs) else temperature_scaled(learner, 1.0)
    return learner.changed(again, adapt=adapt, predict=predict, loss=loss,
                           transduce=None if learner.transduce is None else transduce, knobs=scaled.knobs,
                           turn=lambda knobs: again(turned(scaled, knobs)))  # fmt: skip
