"""Prototypical networks (Snell, Swersky & Zemel 2017): a class is the mean of its support examples' embeddings.

Algorithm 1: c_k = mean of f(x) over the support of class k (eq. 1, divided by the class's own number of examples);
p(y = k | x) is a softmax of -d(f(x), c_k) (eq. 2). The Bayesian reading says what the mean stands for: embeddings of
class k are N(mu_k, diag v) with a learned shared variance v, and mu_k ~ N(m, diag u). The prototype is then the mean of
p(mu_k | support) = N(c_k, s_k), 1/s_k = 1/u + n_k/v and c_k = s_k (m/u + sum f(x)/v), and a query of class k is
N(c_k, v + s_k): a class known by fewer examples is wider. A flat prior, equal n_k and an isotropic v give eq. 2 back.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import lookup
from metaprior.core.options import Positive, Way, checked
from metaprior.core.types import Batch, Learner, Model, Task
from metaprior.learners.builders.amortised import embedding
from metaprior.learners.builders.metric import (
    DISTANCES,
    check_classification,
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
        embedding: parameters of the embedding.
        log_temperature: logarithm of a learned temperature; None for a fixed one.
    """

    embedding: PyTree
    log_temperature: Scalar | None


class Gaussians(NamedTuple):
    """theta of the Bayesian reading.

    Attributes:
        embedding: parameters of the embedding.
        log_variance: log v.
        prior_mean: m.
        log_prior_variance: log u.
    """

    embedding: PyTree
    log_variance: Float[Array, " d"]
    prior_mean: Float[Array, " d"]
    log_prior_variance: Float[Array, " d"]


class Prototypes(NamedTuple):
    """The posterior: given the support, the mean of each class is N(mean, diag variance).

    Attributes:
        mean: prototypes.
        variance: their variances; 0 without `bayes`.
        shots: number of examples of each class; 0 marks a class without examples.
        beside: inputs of the support, where each query is embedded beside them; else None.
    """

    mean: Float[Array, "way d"]
    variance: Float[Array, "way d"]
    shots: Float[Array, " way"]
    beside: PyTree


def class_means(shares: Float[Array, "n way"], f: Float[Array, "n d"]) -> tuple[Array, Array]:
    """Returns prototypes as points (equation 1): the weighted means of the classes [way, d], and variances of 0."""
    count = shares.sum(0)
    mean = shares.T @ f / jnp.where(count > 0, count, 1)[:, None]
    return mean, jnp.zeros_like(mean)


def class_posteriors(params: Gaussians, shares: Float[Array, "n way"], f: Float[Array, "n d"]) -> tuple[Array, Array]:
    """Returns means and variances [way, d] of p(mu_k | support), which is conjugate in each coordinate."""
    v, u = jnp.exp(params.log_variance), jnp.exp(params.log_prior_variance)
    variance = 1 / (1 / u + shares.sum(0)[:, None] / v)
    return variance * (params.prior_mean / u + shares.T @ f / v), variance


def class_densities(params: Gaussians, classes: Prototypes, f: Float[Array, "n d"]) -> Float[Array, "n way"]:
    """Returns log N(f; c_k, v + s_k) up to a constant.

    It uses matrix products about the mean prototype, so that digits do not cancel.
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
    way: Way | None = None,
    transductive: bool = True,
) -> Learner:
    """Meta-learns an embedding in which the classes of a task lie around their prototypes, the means of their examples.

    Classification only.

    Args:
        model: the network, whose features are the embedding.
        likelihood: `Categorical()`.
        distance: "euclidean" (squared) or "cosine".
        temperature: what distances are divided by; a learned temperature starts there.
        learn_temperature: whether the temperature is meta-learned.
        bayes: whether prototypes carry their uncertainty. v starts at 1/2, where a flat prior gives the squared
            distance, m at 0 and u at 1.
        way: the largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: whether all queries are embedded in one batch. False embeds each query beside the support alone,
            which matters under batch norm.

    Raises:
        ValueError: another likelihood; `bayes` with a distance or a temperature.

    References:
        Snell, Swersky & Zemel 2017, Algorithm 1, equations 1 and 2.
    """
    check_classification("protonet", likelihood, way)
    if bayes and (distance != "euclidean" or learn_temperature or temperature != 1):
        raise ValueError(
            "bayes must be False with a distance or a temperature, got True: its learned variances replace them. Leave "
            "them out."
        )
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
        around = class_posteriors(params, shares, f) if isinstance(params, Gaussians) else class_means(shares, f)
        return Prototypes(*around, shares.sum(0), None if transductive else support.x)

    def logits(params: Metric | Gaussians, classes: Prototypes, x: PyTree) -> Float[Array, "n way"]:
        f = embed_query(embed, params.embedding, x, classes.beside)
        if isinstance(params, Gaussians):
            return present(class_densities(params, classes, f), classes.shots)
        scale = temperature if params.log_temperature is None else jnp.exp(params.log_temperature)
        return present(-measure(f, classes.mean) / scale, classes.shots)

    return scored_by_query(init, adapt, logits)
