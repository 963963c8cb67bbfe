"""Prototypical networks (Snell, Swersky & Zemel 2017): a class is the mean of its support examples' embeddings.

Algorithm 1: the prototype c_k is the mean of f(x) over the support of class k (eq. 1, divided by that class's number of
examples), and p(y = k | x) is a softmax of -d(f(x), c_k) (eq. 2).

`bayes=True` treats the class means as unknown. Embeddings of class k are N(mu_k, diag v) with a learned shared variance
v, and mu_k ~ N(m, diag u). The posterior p(mu_k | support) is N(c_k, s_k) with 1/s_k = 1/u + n_k/v and
c_k = s_k (m/u + sum f(x)/v). A query of class k is N(c_k, v + s_k), so a class with fewer examples is wider. A flat
prior, equal n_k and an isotropic v recover eq. 2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import lookup
from metaprior.core.options import Positive, Way, Whole, checked
from metaprior.core.types import Batch, Learner, Model, Task, weights
from metaprior.learners.builders.amortised import embedding
from metaprior.learners.builders.metric import (
    DISTANCES,
    check_classification,
    class_means,
    embed_query,
    memberships,
    number_of_classes,
    present,
    scored_by_query,
)
from metaprior.learners.traits import traits


class Metric(NamedTuple):
    """theta of the published learner.

    Attributes:
        embedding: Parameters of the model.
        log_temperature: Logarithm of the learned temperature. None: the temperature is fixed.
    """

    embedding: PyTree
    log_temperature: Scalar | None


class Gaussians(NamedTuple):
    """theta with `bayes=True`.

    Attributes:
        embedding: Parameters of the model.
        log_variance: log v, the variance of embeddings within a class.
        prior_mean: m, the prior mean of the class means.
        log_prior_variance: log u, the prior variance of the class means.
    """

    embedding: PyTree
    log_variance: Float[Array, " d"]
    prior_mean: Float[Array, " d"]
    log_prior_variance: Float[Array, " d"]


class Prototypes(NamedTuple):
    """The posterior: each class's mean is N(mean, diag variance) given the support.

    Attributes:
        mean: Prototypes c_k.
        variance: s_k; zeros for the published learner.
        shots: Weight of each class's support examples; 0 marks a class without examples.
        beside: The support inputs, where each query is embedded in a batch with them alone. None: one batch.
    """

    mean: Float[Array, "way d"]
    variance: Float[Array, "way d"]
    shots: Float[Array, " way"]
    beside: PyTree


def class_posteriors(params: Gaussians, shares: Float[Array, "n way"], f: Float[Array, "n d"]) -> tuple[Array, Array]:
    """Returns the mean and variance of p(mu_k | support), each [way, d]; the prior is conjugate in each coordinate."""
    v, u = jnp.exp(params.log_variance), jnp.exp(params.log_prior_variance)
    variance = 1 / (1 / u + shares.sum(0)[:, None] / v)
    return variance * (params.prior_mean / u + shares.T @ f / v), variance


def class_densities(params: Gaussians, classes: Prototypes, f: Float[Array, "n d"]) -> Float[Array, "n way"]:
    """Computes log N(f; c_k, v + s_k) up to a constant.

    It uses matrix products, and subtracts the mean prototype first to avoid cancellation.
    """
    centre = classes.mean.mean(0)
    f, c = f - centre, classes.mean - centre
    spread = jnp.exp(params.log_variance) + classes.variance
    cross = jnp.matmul(f, (c / spread).T, precision="highest")
    square = jnp.matmul(f**2, (1 / spread).T, precision="highest") - 2 * cross + (c**2 / spread).sum(-1)
    return -0.5 * (square + jnp.log(spread).sum(-1))


@traits(of_classes=True, reads_unlabelled=True, rules_out_unseen=True)
@checked
def protonet(
    model: Model,
    likelihood: Likelihood,
    *,
    distance: str = "euclidean",
    temperature: Positive = 1.0,
    learn_temperature: bool = False,
    bayes: bool = False,
    refine: Whole = 0,
    way: Way | None = None,
    transductive: bool = True,
) -> Learner:
    """Meta-learns an embedding in which the classes of a task lie around their prototypes, the means of their examples.

    Args:
        model: The network; its features are the embedding f (its outputs where it has no features).
        likelihood: Must be `Categorical`.
        distance: "euclidean" (squared) or "cosine".
        temperature: Divides the distances. A learned temperature starts from this value.
        learn_temperature: Whether the temperature is meta-learned.
        bayes: Whether prototypes carry their uncertainty. The learned v starts at 1/2 (with a flat prior this is the
            squared distance), m at 0 and u at 1. Cannot be combined with the three options above.
        refine: Number of steps of soft k-means in which the queries refine the prototypes: a query counts in each class
            by its probability. The learner is then transductive. It needs no training of its own, so that a trained
            learner can be evaluated with it. Cannot be combined with `bayes`.
        way: The largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: Whether queries are embedded as one batch. False embeds each query in a separate batch with
            the support, which matters under batch norm.

    Raises:
        ValueError: The likelihood is not categorical, or `bayes` is combined with a distance, a temperature or
            `refine`.

    References:
        Snell, Swersky & Zemel (2017), Algorithm 1. `refine`: Ren et al. (2018), soft k-means, with the queries as
        unlabelled examples.
    """
    check_classification("protonet", likelihood, way)
    if bayes and (distance != "euclidean" or learn_temperature or temperature != 1):
        raise ValueError(
            "bayes must be False with a distance or a temperature, got True: its learned variances replace them. Leave "
            "them out."
        )
    if bayes and refine:
        raise ValueError(f"refine must be 0 with bayes, got {refine}. Leave one out.")
    measure: Callable = lookup("distance", distance, DISTANCES)
    embed = embedding(model)

    def init(key: PRNGKeyArray, task: Task) -> Metric | Gaussians:
        start = model.init(key, task.support.x)
        if bayes:
            d = jax.eval_shape(embed, start, task.support.x).shape[-1]
            return Gaussians(start, jnp.full(d, jnp.log(0.5)), jnp.zeros(d), jnp.zeros(d))
        return Metric(start, jnp.log(jnp.asarray(temperature, float)) if learn_temperature else None)

    def adapt(params: Metric | Gaussians, support: Batch, key: PRNGKeyArray) -> Prototypes:
        shares = memberships(support, number_of_classes(model, way, params.embedding, support.x))
        f = embed(params.embedding, support.x)
        beside = None if transductive else support.x
        if isinstance(params, Gaussians):
            return Prototypes(*class_posteriors(params, shares, f), shares.sum(0), beside)
        mean = class_means(shares, f)  # eq. 1
        return Prototypes(mean, jnp.zeros_like(mean), shares.sum(0), beside)

    def refined(params: Metric, support: Batch, query: Batch, key: PRNGKeyArray) -> Prototypes:
        """Returns the prototypes after `refine` steps of soft k-means on support and queries."""
        classes = adapt(params, support, key)
        shares, f = memberships(support, classes.shots.shape[0]), embed(params.embedding, support.x)
        both = jnp.concatenate([f, embed_query(embed, params.embedding, query.x, classes.beside)])
        for _ in range(refine):
            soft = jax.nn.softmax(logits(params, classes, query.x)) * weights(query)[:, None]
            classes = classes._replace(mean=class_means(jnp.concatenate([shares, soft]), both))
        return classes

    def logits(params: Metric | Gaussians, classes: Prototypes, x: PyTree) -> Float[Array, "n way"]:
        f = embed_query(embed, params.embedding, x, classes.beside)
        if isinstance(params, Gaussians):
            return present(class_densities(params, classes, f), classes.shots)
        scale = temperature if params.log_temperature is None else jnp.exp(params.log_temperature)
        return present(-measure(f, classes.mean) / scale, classes.shots)

    return scored_by_query(init, adapt, logits, refined if refine else None)
