"""VERSA (Gordon, Bronskill, Bauer, Nowozin & Turner 2019): networks map a class's examples to its linear classifier.

nu_k is the mean of f(x) over the support of class k. The weights and the bias of class k have the posterior
N(mu_w(nu_k), exp l_w(nu_k)) N(mu_b(nu_k), exp l_b(nu_k)), diagonal. All classes share the four networks mu_w, l_w, mu_b
and l_b, and the posterior of a class depends on the examples of this class only.

The logit of class k at x is then normal with mean f(x).mu_w + mu_b and variance f(x)^2.exp l_w + exp l_b. With L
samples of the logits, the loss is the mean over queries of -[logsumexp_l log softmax(logits_l)_y - log L]. It has no KL
term: it is not an ELBO, but the log likelihood of the query under the predictive distribution (ML-PIP).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.integrals import log_softmax_mean
from metaprior.core.likelihoods import Categorical, Categories, Likelihood
from metaprior.core.options import Way, Whole, checked
from metaprior.core.types import Batch, Learner, Model, Task, counted, weighted_mean
from metaprior.inference.gaussian import DiagonalGaussian
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
from metaprior.networks.mlp import mlp


class Amortised(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of the model, whose features are f.
        mean: Parameters of the networks of the posterior's mean, mu_w ("w") and mu_b ("b").
        log_variance: Parameters of the networks of its log variance, l_w ("w") and l_b ("b").
    """

    embedding: PyTree
    mean: dict[str, PyTree]
    log_variance: dict[str, PyTree]


class Heads(NamedTuple):
    """The posterior of a task.

    Attributes:
        head: The Gaussian over the classifier: "w" [way, d] and "b" [way].
        shots: Weight of each class's support examples; 0 marks a class without examples.
        beside: The support inputs, where each query is embedded in a batch with them alone. None: one batch.
    """

    head: DiagonalGaussian
    shots: Float[Array, " way"]
    beside: PyTree


LAYERS = mlp(hidden=(1, 1), activation="elu")  # applies networks of any width


@traits(of_classes=True, reads_unlabelled=True, rules_out_unseen=True, silent={"draws": 0})
@checked
def versa(
    model: Model,
    likelihood: Likelihood,
    *,
    draws: Whole = 10,
    way: Way | None = None,
    transductive: bool = True,
) -> Learner:
    """Meta-learns networks that map the mean feature of a class to a Gaussian over the class's linear weights.

    The number of examples may differ from class to class, and in new tasks from that in training.

    Args:
        model: The network; its features are f (its outputs where it has no features).
        likelihood: Must be `Categorical`.
        draws: Number L of samples of the logits, in training and in predictions. A prediction is the mean of their
            class probabilities. 0: the mean probabilities by quadrature, in both.
        way: The largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: Whether queries are embedded as one batch, as in the authors' code. False embeds each query in a
            separate batch with the support, which matters under batch norm.

    Raises:
        ValueError: The likelihood is not categorical.

    References:
        Gordon, Bronskill, Bauer, Nowozin & Turner (2019), sec. 3.
    """
    check_classification("versa", likelihood, way)
    embed = embedding(model)

    def init(key: PRNGKeyArray, task: Task) -> Amortised:
        key, *keys = jax.random.split(key, 5)
        start = model.init(key, task.support.x)
        d = jax.eval_shape(embed, start, task.support.x).shape[-1]
        made = [mlp(n, (d, d), "elu").init(k, jnp.zeros((1, d))) for n, k in zip((d, 1, d, 1), keys, strict=True)]
        return Amortised(start, {"w": made[0], "b": made[1]}, {"w": made[2], "b": made[3]})

    def adapt(params: Amortised, support: Batch, key: PRNGKeyArray) -> Heads:
        shares = memberships(support, number_of_classes(model, way, params.embedding, support.x))
        nu = class_means(shares, embed(params.embedding, support.x))

        def of_class(networks: dict[str, PyTree]) -> dict[str, Array]:
            return {"w": LAYERS.apply(networks["w"], nu), "b": LAYERS.apply(networks["b"], nu)[:, 0]}

        log_sd = jax.tree.map(lambda log_variance: log_variance / 2, of_class(params.log_variance))
        head = DiagonalGaussian(of_class(params.mean), log_sd)
        return Heads(head, shares.sum(0), None if transductive else support.x)

    def log_probs(params: Amortised, heads: Heads, x: PyTree, noise: Array) -> Float[Array, "draws n way"]:
        f = embed_query(embed, params.embedding, x, heads.beside)
        mean, spread = heads.head.mean, jax.tree.map(lambda log_sd: jnp.exp(2 * log_sd), heads.head.log_sd)
        centre = present(f @ mean["w"].T + mean["b"], heads.shots)
        variance = jnp.where(heads.shots > 0, f**2 @ spread["w"].T + spread["b"], 0)
        if not draws:
            return log_softmax_mean(centre, variance)[None]
        # A variance that underflows to 0 has a finite derivative too.
        return jax.nn.log_softmax(centre + jnp.sqrt(variance + 1e-30) * noise)

    def predict(params: Amortised, heads: Heads, x: PyTree, key: PRNGKeyArray) -> Categories:
        # All queries share the noise, so that a prediction does not depend on a query's place among the others.
        return Categories(log_probs(params, heads, x, jax.random.normal(key, (draws, 1, heads.shots.shape[0]))))

    def loss(params: Amortised, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        heads, n = adapt(params, task.support, key), task.query.y.shape[0]
        noise = jax.random.normal(key, (draws, n, heads.shots.shape[0]))
        predictive = Categories(log_probs(params, heads, task.query.x, noise))
        score = weighted_mean(-predictive.log_prob(counted(task.query).y), task.query)
        mixed = jnp.log(jnp.maximum(predictive.mean(), 1e-30))
        return score, fit_metrics(Categorical(), mixed, task.query) | {"nll": score}

    return Learner(init, adapt, predict, loss)
