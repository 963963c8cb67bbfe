"""The neural statistician (Edwards & Storkey 2017): a variational autoencoder of sets, one set per class.

A set of examples D has a context c, and each example a latent z:

    c ~ N(0, I),   z ~ p(z | c),   x ~ p(x | z, c).

The statistic network gives q(c | D) from the mean of the examples' features and their number; another network gives
q(z | x, c). The objective is the evidence lower bound of the sets,

    sum_x [E log p(x | z, c) - KL(q(z | x, c) || p(z | c))] - KL(q(c | D) || N(0, I)),

with one draw of c and z. Labels make the sets, nothing else. A query x is of the class whose posterior is nearest:
argmin_k KL(q(c | D_k) || q(c | x)).
"""

from math import log, pi
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Categories, Likelihood, one_hot
from metaprior.core.options import Count, Fraction, Positive, Way, checked
from metaprior.core.types import Batch, Learner, Model, Task, counted, joined, labelled, weighted_mean, weights
from metaprior.inference.gaussian import DiagonalGaussian, around, kl
from metaprior.learners.builders.amortised import embedding
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.metric import (
    check_classification,
    class_means,
    embed_query,
    memberships,
    number_of_classes,
    present,
)
from metaprior.learners.traits import traits
from metaprior.networks.layers import flat
from metaprior.networks.mlp import mlp

NETWORKS = ("statistic", "latent", "prior", "decoder")


class Statistician(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of the model, whose features of the examples both posteriors read.
        networks: Parameters of the networks of q(c | D) ("statistic"), q(z | x, c) ("latent"), p(z | c) ("prior") and
            p(x | z, c) ("decoder").
        log_sd: Logarithm of the standard deviation of x where it is normal.
        log_temperature: Logarithm of what divides the divergences.
    """

    embedding: PyTree
    networks: dict[str, PyTree]
    log_sd: Scalar
    log_temperature: Scalar


class Contexts(NamedTuple):
    """The posterior of a task.

    Attributes:
        context: q(c | D_k) of each class, [way, c].
        number: Weight of each class's support examples; 0 marks a class without examples.
        beside: The support inputs, where each query is embedded in a batch with them alone. None: one batch.
    """

    context: DiagonalGaussian
    number: Float[Array, " way"]
    beside: PyTree


@traits(
    of_classes=True,
    estimates=True,
    reads_unlabelled=True,
    rules_out_unseen=True,
    small={"context": 8, "latent": 2, "hidden": (16,)},
)
@checked
def neural_statistician(
    model: Model,
    likelihood: Likelihood,
    *,
    context: Count = 64,
    latent: Count = 16,
    hidden: tuple[Count, ...] = (256,),
    observed: Literal["ink", "normal"] = "normal",
    kept: Fraction = 0.5,
    direction: Literal["to_query", "to_class"] = "to_query",
    temperature: Positive = 1.0,
    way: Way | None = None,
    transductive: bool = True,
) -> Learner:
    """Meta-learns a generative model of sets, and classifies by the divergence between posteriors of their contexts.

    The published training weakens the KL terms at first, rotates and flips sets, and decodes by convolutions; this one
    does not. The class probabilities are those of a softmax of the divergences. Its temperature is learned from the
    queries' nll, which has no influence on the other parameters.

    Args:
        model: The network; its features are read (its outputs where it has no features).
        likelihood: Must be `Categorical`.
        context: Numbers in a set's context c.
        latent: Numbers in an example's latent z.
        hidden: Widths of the hidden layers of the four networks.
        observed: How x is distributed: "normal", with one learned deviation; or "ink" for Bernoulli, x from 0 to 1.
        kept: The probability with which each example of a set but one is shown to the statistic network in training, so
            that it learns posteriors of small sets. 1 shows all.
        direction: "to_query" compares by KL(q(c | D_k) || q(c | x)), "to_class" by KL(q(c | x) || q(c | D_k)).
        temperature: Divides the divergences at first. The chosen class does not depend on it.
        way: The largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: Whether queries are embedded as one batch. False embeds each query in a separate batch with the
            support, which matters under batch norm.

    Raises:
        ValueError: The likelihood is not categorical. The loss is NaN where "ink" is not from 0 to 1.

    References:
        Edwards & Storkey (2017), Towards a neural statistician, sec. 3 and 4.2. The published network
            has 512 and 16 numbers in c and z.
    """
    check_classification("neural_statistician", likelihood, way)
    embed = embedding(model)

    def layers(outputs: int) -> Model:
        return mlp(outputs, hidden, "elu")

    def normal(name: str, params: Statistician, *inputs: Array) -> DiagonalGaussian:
        """The distribution whose mean and log standard deviation a network computes."""
        size = 2 * (context if name == "statistic" else latent)
        mean, log_sd = jnp.split(layers(size).apply(params.networks[name], jnp.concatenate(inputs, -1)), 2, -1)
        return DiagonalGaussian(mean, 6 * jnp.tanh(log_sd / 6))  # bounded: a new network's exp would overflow

    def posterior(params: Statistician, shares: Float[Array, "n way"], h: Float[Array, "n d"]) -> DiagonalGaussian:
        return normal("statistic", params, class_means(shares, h), jnp.log1p(shares.sum(0))[:, None])

    def init(key: PRNGKeyArray, task: Task) -> Statistician:
        key, *keys = jax.random.split(key, 5)
        start = model.init(key, task.support.x)
        d, pixels = (jax.eval_shape(f, task.support.x).shape[-1] for f in (lambda x: embed(start, x), flat))
        widths = {"statistic": (d + 1, 2 * context), "latent": (d + context, 2 * latent)}
        widths |= {"prior": (context, 2 * latent), "decoder": (latent + context, pixels)}
        networks = {
            n: layers(widths[n][1]).init(k, jnp.zeros((1, widths[n][0]))) for n, k in zip(NETWORKS, keys, strict=True)
        }
        return Statistician(start, networks, jnp.zeros(()), jnp.log(jnp.asarray(temperature, float)))

    def adapt(params: Statistician, support: Batch, key: PRNGKeyArray) -> Contexts:
        shares = memberships(support, number_of_classes(model, way, params.embedding, support.x))
        q = posterior(params, shares, embed(params.embedding, support.x))
        return Contexts(q, shares.sum(0), None if transductive else support.x)

    def logits(params: Statistician, known: Contexts, x: PyTree) -> Float[Array, "n way"]:
        h = embed_query(embed, params.embedding, x, known.beside)
        own = normal("statistic", params, h, jnp.full((len(h), 1), jnp.log(2.0)))  # of sets with one example

        def apart(one: DiagonalGaussian, of_class: DiagonalGaussian) -> Scalar:
            return kl(of_class, one) if direction == "to_query" else kl(one, of_class)

        each = jax.vmap(lambda one: jax.vmap(lambda k: apart(one, k))(known.context))(own)
        return present(-each * jnp.exp(-params.log_temperature), known.number)

    def predict(params: Statistician, known: Contexts, x: PyTree, key: PRNGKeyArray) -> Categories:
        return Categories(jax.nn.log_softmax(logits(params, known, x))[None])

    def bound(params: Statistician, task: Task, key: PRNGKeyArray) -> Scalar:
        both = joined(task._replace(support=labelled(task.support)))
        shares = memberships(both, number_of_classes(model, way, params.embedding, both.x))
        key_kept, key_c, key_z = jax.random.split(key, 3)
        h, x = embed(params.embedding, both.x), flat(both.x)
        q_c = posterior(params, shares * some(key_kept, shares, kept), h)
        c = one_hot(both.y, shares.shape[1], shares.dtype) @ q_c.sample(key_c)  # of each example
        q_z, p_z = normal("latent", params, h, c), normal("prior", params, c)
        made = layers(x.shape[1]).apply(params.networks["decoder"], jnp.concatenate([q_z.sample(key_z), c], -1))
        each = log_density(observed, x, made, params.log_sd) - jax.vmap(kl)(q_z, p_z)
        of_sets = jax.vmap(kl)(q_c, around(jnp.zeros_like(q_c.mean), 0.0))
        total = jnp.where(weights(both) > 0, weights(both) * each, 0).sum()
        return total - jnp.where(shares.sum(0) > 0, of_sets, 0).sum()

    def loss(params: Statistician, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        number = sum(weights(batch).sum() for batch in (labelled(task.support), task.query))
        elbo = bound(params, task, key) / jnp.maximum(number, 1)
        fixed = jax.lax.stop_gradient(params)._replace(log_temperature=params.log_temperature)
        predictive = predict(fixed, adapt(fixed, task.support, key), task.query.x, key)
        nll = weighted_mean(-predictive.log_prob(counted(task.query).y), task.query)
        metrics = fit_metrics(Categorical(), predictive.log_probs[0], task.query)
        return nll - elbo, metrics | {"nll": nll, "elbo": elbo}

    return Learner(init, adapt, predict, loss)


def some(key: PRNGKeyArray, shares: Float[Array, "n way"], kept: float) -> Float[Array, "n way"]:
    """Chooses examples of each class at random: the first one, and each other one with a probability.

    Args:
        key: Random key.
        shares: Weights of the examples in each class.
        kept: The probability.

    Returns:
        1 for the chosen examples, 0 for the others.
    """
    there = shares > 0
    first = there & (there.cumsum(0) == 1)
    return jnp.where(first | jax.random.bernoulli(key, kept, (len(shares), 1)), 1.0, 0.0)


def log_density(observed: str, x: Float[Array, "n d"], made: Float[Array, "n d"], log_sd: Scalar) -> Float[Array, " n"]:
    """Computes log p(x | z, c), summed over the numbers of x.

    Args:
        observed: "ink" or "normal".
        x: The examples; for "ink" from 0 to 1, and NaN is returned for others.
        made: The decoder's outputs: log odds for "ink", means for "normal".
        log_sd: Logarithm of the standard deviation of "normal".
    """
    if observed == "normal":
        return (-((x - made) ** 2) * jnp.exp(-2 * log_sd) / 2 - log_sd - log(2 * pi) / 2).sum(-1)
    each = x * jax.nn.log_sigmoid(made) + (1 - x) * jax.nn.log_sigmoid(-made)
    return jnp.where((x >= 0) & (x <= 1), each, jnp.nan).sum(-1)
