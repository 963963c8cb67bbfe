"""mAP-DLM (Triantafillou, Zemel & Urtasun 2017): embeddings in which every example ranks its own class first.

All examples of a task, support and query, are queries that rank all others. phi_ij is the cosine of two embeddings. For
query i with positives P (the examples of its class) and negatives N, the score of a ranking y is
    F(y) = 1/(|P||N|) sum_{p,n} y_pn (phi_ip - phi_in),   y_pn = +1 if p stands before n, else -1.

1. y_w = argmax F(y) sorts by cosine.
2. y_d = argmax F(y) - epsilon AP(y), where AP is the average precision, by a dynamic programme over the number of
   negatives before each positive. Both kinds are sorted by cosine. The a-th positive after j negatives contributes
       g(a, j) = -epsilon/|P| a/(a + j) + [sum_{n > j} - sum_{n <= j}] (phi_a - phi_n) / (|P||N|),
   and H(a, j) = max_{j' <= j} H(a - 1, j') + g(a, j).
3. Direct loss minimisation: the loss is the mean over queries of [kappa F(y_d) - F(y_w)] / epsilon, with both rankings
   held constant. With kappa = 1 its gradient is that of the expected AP loss, as epsilon goes to 0.

With one example per class, a query takes the class of its nearest support example. With more it takes the class whose
examples have the highest average precision in the ranking of the whole support.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Likelihood
from metaprior.core.options import Positive, Way, checked
from metaprior.core.types import Batch, Learner, Model, Task, joined, labelled, weighted_mean, weights
from metaprior.learners.builders.amortised import embedding
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.metric import (
    check_classification,
    class_means,
    embed_query,
    memberships,
    number_of_classes,
    present,
    scored_by_query,
    unit,
)
from metaprior.learners.traits import traits


class Ranking(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of the model.
    """

    embedding: PyTree


class Ranked(NamedTuple):
    """The posterior.

    Attributes:
        keys: Embeddings of the support, of unit length.
        shares: Each example's weight, in the column of its class.
        beside: As in `protonet.Prototypes`.
    """

    keys: Float[Array, "n d"]
    shares: Float[Array, "n way"]
    beside: PyTree


def sorted_cosines(cosine: Float[Array, " n"], among: Bool[Array, " n"]) -> tuple[Float[Array, " n"], Int[Array, ""]]:
    """Returns the cosines of some examples in descending order, then zeros, and how many they are."""
    order = jnp.argsort(jnp.where(among, -cosine, jnp.inf), stable=True)
    number = among.sum()
    return jnp.where(jnp.arange(cosine.shape[0]) < number, cosine[order], 0), number


class Lists(NamedTuple):
    """What a query ranks. Both lists are sorted by cosine, and zeros follow.

    Attributes:
        p: Cosines of the positives.
        positives: Their number.
        n: Cosines of the negatives.
        negatives: Their number.
    """

    p: Float[Array, " n"]
    positives: Int[Array, ""]
    n: Float[Array, " n"]
    negatives: Int[Array, ""]


def margin(lists: Lists, p: Float[Array, "*a"], before: Int[Array, "*a"]) -> Float[Array, "*a"]:
    """Computes the part of F of a positive with cosine p after j = `before` negatives.

    It is [sum_{n > j} - sum_{n <= j}] (p - phi_n) / (|P||N|).
    """
    above = jnp.concatenate([jnp.zeros(1, lists.n.dtype), jnp.cumsum(lists.n)])
    each = (lists.negatives - 2 * before) * p - (above[-1] - 2 * above[before])
    return each / jnp.maximum(lists.positives * lists.negatives, 1)


def score(lists: Lists, before: Int[Array, " n"]) -> Scalar:
    """Computes F of the ranking in which `before` negatives stand before each positive."""
    there = jnp.arange(lists.p.shape[0]) < lists.positives
    return jnp.where(there, margin(lists, lists.p, before), 0).sum()


def precision(lists: Lists, before: Int[Array, " n"]) -> Scalar:
    """Computes the average precision of that ranking; 0 without positives."""
    a = jnp.arange(before.shape[0]) + 1
    return jnp.where(a <= lists.positives, a / (a + before), 0).sum() / jnp.maximum(lists.positives, 1)


def by_cosine(lists: Lists) -> Int[Array, " n"]:
    """Returns the number of negatives before each positive in y_w. A negative wins a tie, so AP is not flattered."""
    there = jnp.arange(lists.n.shape[0]) < lists.negatives
    return (there & (lists.n >= lists.p[:, None])).sum(-1)


def loss_augmented(lists: Lists, epsilon: float) -> Int[Array, " n"]:
    """Returns the number of negatives before each positive in y_d = argmax F(y) - epsilon AP(y)."""
    a, j = jnp.arange(lists.p.shape[0]) + 1, jnp.arange(lists.n.shape[0] + 1)
    possible = j <= lists.negatives

    def place(value: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        a, p = row
        gain = margin(lists, jnp.broadcast_to(p, j.shape), j) - epsilon / jnp.maximum(lists.positives, 1) * a / (a + j)
        value = jnp.where(a <= lists.positives, jnp.where(possible, jax.lax.cummax(value) + gain, -jnp.inf), value)
        return value, value

    def back(limit: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        a, value = row
        best = jnp.where(j <= limit, value, -jnp.inf).argmax()
        limit = jnp.where(a <= lists.positives, best, limit)
        return limit, limit

    start = jnp.where(possible, 0, -jnp.inf).astype(lists.p.dtype)
    values = jax.lax.scan(place, start, (a, lists.p))[1]
    return jax.lax.scan(back, lists.negatives, (a, values), reverse=True)[1]


def direct_loss(lists: Lists, epsilon: float, kappa: float) -> tuple[Scalar, Scalar]:
    """Returns [kappa F(y_d) - F(y_w)] / epsilon of one query, and the average precision of y_w."""
    held = jax.lax.stop_gradient(lists)
    right, worse = by_cosine(held), loss_augmented(held, epsilon)
    return (kappa * score(lists, worse) - score(lists, right)) / epsilon, precision(lists, right)


def lists_of(cosine: Float[Array, " n"], alike: Bool[Array, " n"], other: Bool[Array, " n"]) -> Lists:
    """Returns what a query ranks, from its cosines with all examples, its positives and its negatives."""
    return Lists(*sorted_cosines(cosine, alike), *sorted_cosines(cosine, other))


@traits(of_classes=True, reads_unlabelled=True, rules_out_unseen=True, distance="cosine")
@checked
def map_dlm(
    model: Model,
    likelihood: Likelihood,
    *,
    epsilon: Positive = 1.0,
    kappa: Positive = 1.0,
    rule: Literal["precision", "cosine"] = "precision",
    temperature: Positive = 0.1,
    way: Way | None = None,
    transductive: bool = True,
) -> Learner:
    """Meta-learns an embedding by the average precision with which each example of a task ranks the others.

    The metric `average_precision` is the mean over these rankings. A weight above 0 counts as 1 in rankings. An example
    whose class has no other example, or that has no example of another class, is not a query.

    Args:
        model: The network; its features are the embedding (its outputs where it has no features).
        likelihood: Must be `Categorical`.
        epsilon: Weight of the average precision in the loss-augmented ranking.
        kappa: Weight of the loss-augmented ranking's score. 1 is the theory's; the published code has 10.
        rule: The score of a class with several support examples: "precision", the average precision of its examples,
            or "cosine", their mean cosine, which is smoother. Both are the cosine where all classes have one example.
        temperature: Divides the scores. The most probable class does not depend on it.
        way: The largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: Whether queries are embedded as one batch. False embeds each query in a separate batch with
            the support, which matters under batch norm. In training, support and query are always one batch.

    Raises:
        ValueError: The likelihood is not categorical.

    References:
        Triantafillou, Zemel & Urtasun (2017). The rules of classification are those of the published code.
    """
    check_classification("map_dlm", likelihood, way)
    embed = embedding(model)

    def init(key: PRNGKeyArray, task: Task) -> Ranking:
        return Ranking(model.init(key, task.support.x))

    def adapt(params: Ranking, support: Batch, key: PRNGKeyArray) -> Ranked:
        shares = memberships(support, number_of_classes(model, way, params.embedding, support.x))
        return Ranked(unit(embed(params.embedding, support.x)), shares, None if transductive else support.x)

    def logits(params: Ranking, ranked: Ranked, x: PyTree) -> Float[Array, "q way"]:
        f = unit(embed_query(embed, params.embedding, x, ranked.beside))
        return classed(jnp.matmul(f, ranked.keys.T, precision="highest"), ranked.shares)

    def classed(cosine: Float[Array, "q n"], shares: Float[Array, "n way"]) -> Float[Array, "q way"]:
        """Returns the logits of the classes from the cosines with the support."""
        near = class_means(shares, cosine.T).T
        mine = shares > 0
        some = mine.any(-1)

        def of_class(cosine: Array, mine: Array) -> Scalar:
            lists = lists_of(cosine, mine, some & ~mine)
            return precision(lists, by_cosine(lists))

        if rule == "precision":
            ranked = jax.vmap(jax.vmap(of_class, (None, 1)), (0, None))(cosine, mine)
            near = jnp.where((mine.sum(0) > 1).any(), ranked, near)
        return present(near / temperature, shares.sum(0))

    def loss(params: Ranking, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        shares = memberships(task.support, number_of_classes(model, way, params.embedding, task.support.x))
        asked = memberships(task.query, shares.shape[1])  # NaN if a label is impossible
        data = joined(task._replace(support=labelled(task.support)))
        f = unit(embed(params.embedding, data.x))
        cosine = jnp.matmul(f, f.T, precision="highest")
        y, w = jnp.asarray(data.y).astype(int), weights(data)
        there = (w > 0) & (y >= 0)
        pairs = there[:, None] & there & ~jnp.eye(y.shape[0], dtype=bool)
        alike, other = pairs & (y[:, None] == y), pairs & (y[:, None] != y)

        def of_query(row: tuple[Array, Array, Array]) -> tuple[Scalar, Scalar]:
            return direct_loss(lists_of(*row), epsilon, kappa)

        # Some queries at a time: each has a table of positives and negatives.
        values, precisions = jax.lax.map(of_query, (cosine, alike, other), batch_size=32)
        queries = Batch(data.x, y, w * (alike.any(-1) & other.any(-1)))
        value = weighted_mean(values, queries) + 0 * (shares.sum() + asked.sum())
        n = shares.shape[0]
        metrics = fit_metrics(Categorical(), classed(cosine[n:, :n], shares), task.query)
        return value, metrics | {"average_precision": weighted_mean(precisions, queries)}

    return scored_by_query(init, adapt, logits)._replace(loss=loss)
