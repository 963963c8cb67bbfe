"""Siamese networks (Koch, Zemel & Salakhutdinov 2015): learn to verify whether two examples are of the same class.

Two twin networks with shared weights see x1 and x2, and p(same) = sigmoid(sum_j alpha_j |h_j(x1) - h_j(x2)| + b) (sec.
3.1). We add the bias b: without it two equal examples would be `same` with probability 1/2.

Training minimises the cross-entropy of pairs (sec. 3.2). Here these are all pairs of a task's examples, and the pairs
of one class weigh as much as all other pairs together. The odds of `same` are then a likelihood ratio. Exactly one
class is the query's, so by Bayes' rule p(class | x) is proportional to the odds. With several shots, a class's log odds
are the mean over its examples. The class of the largest odds is the paper's choice (sec. 4.3).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Likelihood
from metaprior.core.options import Way, checked
from metaprior.core.types import Batch, Learner, Model, Task, joined, labelled, weights
from metaprior.learners.builders.amortised import embedding
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.metric import (
    check_classification,
    embed_query,
    memberships,
    number_of_classes,
    present,
    scored_by_query,
)
from metaprior.learners.traits import traits


class Twins(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of the twin network, the model.
        alpha: Weights of the L1 distance.
        bias: b, the log odds of two equal examples.
    """

    embedding: PyTree
    alpha: Float[Array, " d"]
    bias: Scalar


class Seen(NamedTuple):
    """The posterior.

    Attributes:
        embeddings: Embeddings of the support examples.
        shares: Each example's weight, in the column of its class.
        beside: As in `protonet.Prototypes`.
    """

    embeddings: Float[Array, "n d"]
    shares: Float[Array, "n way"]
    beside: PyTree


def log_odds(params: Twins, a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Computes log p(same) / p(different) of each pair."""
    # A sum of products instead of a matrix product: it fuses with the differences, which are then never stored.
    return (jnp.abs(a[:, None] - b[None]) * params.alpha).sum(-1) + params.bias


def by_class(odds: Float[Array, "q n"], shares: Float[Array, "n way"]) -> Float[Array, "q way"]:
    """Returns the log odds of the classes: for each, the weighted mean over its examples."""
    count = shares.sum(0)
    return present(odds @ shares / jnp.where(count > 0, count, 1), count)


def verification(odds: Float[Array, "n n"], y: Array, weight: Float[Array, " n"]) -> tuple[Scalar, Scalar]:
    """Returns the cross-entropy and the accuracy of all pairs i < j.

    Pairs of one class and pairs of two classes count one half each. Examples without a label (below 0) form no pairs.
    """
    w = weight * (y >= 0)
    w = w / jnp.where((most := w.max()) == 0, 1, most)
    pairs = jnp.triu(w[:, None] * w[None], 1)
    alike = y[:, None] == y[None]
    share = sum(part / jnp.maximum(part.sum(), 1e-12) for part in (pairs * alike, pairs * ~alike)) / 2
    cost = jax.nn.softplus(odds) - alike * odds
    return (share * cost).sum(), (share * ((odds > 0) == alike)).sum()


@traits(of_classes=True, reads_unlabelled=True, rules_out_unseen=True)
@checked
def siamese(model: Model, likelihood: Likelihood, *, way: Way | None = None, transductive: bool = True) -> Learner:
    """Meta-learns to verify whether two examples belong to one class; a query gets the class it most probably shares.

    The metric `verification` is the accuracy on pairs; pairs of one class and of two classes count one half each. The
    paper's affine distortions belong to the task source (`augmentation.warp = true`).

    Args:
        model: The twin network; its features are the twins' output h (its outputs where it has no features).
        likelihood: Must be `Categorical`.
        way: The largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: Whether queries are embedded as one batch. False embeds each query in a separate batch with
            the support. In training, support and query are always one batch.

    Raises:
        ValueError: The likelihood is not categorical.

    References:
        Koch, Zemel & Salakhutdinov (2015), sec. 3.1, 3.2 and 4.3.
    """
    check_classification("siamese", likelihood, way)
    embed = embedding(model)

    def init(key: PRNGKeyArray, task: Task) -> Twins:
        key_model, key_alpha = jax.random.split(key)
        start = model.init(key_model, task.support.x)
        d = jax.eval_shape(embed, start, task.support.x).shape[-1]
        # Every alpha starts negative, so that distance speaks against `same`; the scale is that of Glorot's uniform.
        return Twins(start, -jnp.sqrt(6 / d) * jax.random.uniform(key_alpha, (d,)), jnp.ones(()))

    def adapt(params: Twins, support: Batch, key: PRNGKeyArray) -> Seen:
        shares = memberships(support, number_of_classes(model, way, params.embedding, support.x))
        return Seen(embed(params.embedding, support.x), shares, None if transductive else support.x)

    def logits(params: Twins, seen: Seen, x: PyTree) -> Float[Array, "q way"]:
        f = embed_query(embed, params.embedding, x, seen.beside)
        return by_class(log_odds(params, f, seen.embeddings), seen.shares)

    def loss(params: Twins, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        data = joined(task._replace(support=labelled(task.support)))
        x, y = data.x, jnp.asarray(data.y).astype(int)
        f = embed(params.embedding, x)
        odds = log_odds(params, f, f)
        score, right = verification(odds, y, weights(data))
        shares = memberships(task.support, number_of_classes(model, way, params.embedding, x))
        n = shares.shape[0]
        metrics = fit_metrics(Categorical(), by_class(odds[n:, :n], shares), task.query)
        return score, metrics | {"verification": right}

    return scored_by_query(init, adapt, logits)._replace(loss=loss)
