"""SIB (Hu et al. 2020): empirical Bayes with synthetic gradients, for queries that come together.

A task's parameters are the weights theta of its classifier, one vector per class. Features z are of unit length, and
the logits are s (cos(z, theta_k) + b).

1. theta_0 = diag(w) c_k, where c_k is the mean of z over the support of class k.
2. For t = 1..K: theta <- theta - rate * sum_i (d logits_i / d theta)' xi(logits_i), a sum over the queries. xi is a
   small network, the synthetic gradient: it takes the place of softmax(logits_i) - onehot(y_i), the gradient of the
   query's cross entropy, whose labels are not known.
3. Training minimises the cross entropy of the queries at theta_K in w, s, b and xi. Weight decay takes the place of the
   KL divergence to the prior.

xi is N-8N-8N-N for N classes, with ReLU and then batch norm over the queries of the task, in training and afterwards.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import NonNegative, Way
from metaprior.core.types import Batch, Learner, Model, Task, weights
from metaprior.inference.descent import half_square
from metaprior.inference.inner_loop import InnerLoop
from metaprior.learners.builders.amortised import embedding
from metaprior.learners.builders.metric import (
    check_classification,
    class_means,
    memberships,
    number_of_classes,
    present,
    scored_by_query,
    unit,
)
from metaprior.learners.traits import traits
from metaprior.networks.layers import dense, dense_init
from metaprior.networks.norm import norm_init, normalise

HIDDEN = ("hidden1", "hidden2")  # the hidden layers of xi


class Synthetic(NamedTuple):
    """theta, all that is meta-learned.

    Attributes:
        embedding: Parameters of the model, whose features are compared.
        diagonal: w, the weights of the map from a class's mean feature to theta_0.
        scale: s, the factor of the cosines.
        bias: b.
        gradient: Parameters of xi.
    """

    embedding: PyTree
    diagonal: Float[Array, " d"]
    scale: Scalar
    bias: Scalar
    gradient: dict[str, dict[str, Array]]


class Classifier(NamedTuple):
    """The posterior.

    Attributes:
        theta: The weight vector of each class.
        shots: Weight of each class's support examples; 0 marks a class without examples.
    """

    theta: Float[Array, "way d"]
    shots: Float[Array, " way"]


def synthetic_gradient(
    params: dict[str, dict[str, Array]], logits: Float[Array, "n way"], weight: Float[Array, " n"]
) -> Float[Array, "n way"]:
    """Computes xi of each query's logits, with the weighted batch statistics of all of them.

    Args:
        params: Parameters of xi.
        logits: The queries' logits.
        weight: The queries' weights.
    """
    for name in HIDDEN:
        logits = normalise("batch", name, params[name], jax.nn.relu(dense(name, params[name], logits)), weight)
    return dense("out", params["out"], logits)


@traits(of_classes=True, reads_names=True, reads_unlabelled=True, rules_out_unseen=True)
@passes_options_to(InnerLoop, without=("optimizer", "first_order", "remat", "transductive"), steps=3, rate=1e-3)
def sib(
    model: Model, likelihood: Likelihood, *, decay: NonNegative = 5e-4, way: Way | None = None, **inner: Any
) -> Learner:
    """Meta-learns a synthetic gradient by which the inputs of all queries improve a task's cosine classifier.

    The paper pretrains the features by plain classification and freezes them: train `fine_tune`, then this learner with
    `start.run` and `start.freeze` (on the command line --start-from RUN --freeze). Otherwise the features are learned
    together with the rest. `adapt`, which sees no query, returns theta_0. Class names matter, except as far as training
    with random names teaches xi to ignore them.

    Args:
        model: The network; its features are compared (its outputs where it has none).
        likelihood: Must be `Categorical`.
        decay: Weight of decay / 2 |params|^2, without the model's parameters, in the loss.
        way: The number of classes N, which fixes the size of xi. None: the number of the model's outputs.
        inner: Options of the steps, see `InnerLoop`. They sum over the queries, of which each task needs at least two.
            `test_steps=0` makes the learner inductive.

    Raises:
        ValueError: The likelihood is not categorical, or (when adapting) there is only one query, for which batch norm
            is not defined. Compiled code returns NaN where the weights leave only one.

    References:
        Hu et al. (2020), "Empirical Bayes transductive meta-learning with synthetic gradients", Algorithm 1.
    """
    check_classification("sib", likelihood, way)
    features, loop = embedding(model), InnerLoop(**inner)

    def embed(params: PyTree, x: PyTree) -> Float[Array, "n d"]:
        return unit(features(params, x))

    def init(key: PRNGKeyArray, task: Task) -> Synthetic:
        key, *keys = jax.random.split(key, 4)
        start, x = model.init(key, task.support.x), task.support.x
        n, d = number_of_classes(model, way, start, x), jax.eval_shape(embed, start, x).shape[-1]
        first, second = (
            dense_init(k, i, 8 * n) | norm_init(8 * n, True) for k, i in zip(keys, (n, 8 * n), strict=False)
        )
        gradient = dict(zip(HIDDEN, (first, second), strict=True)) | {"out": dense_init(keys[2], 8 * n, n)}
        return Synthetic(start, jnp.ones(d), jnp.asarray(10.0), jnp.asarray(0.0), gradient)

    def adapt(params: Synthetic, support: Batch, key: PRNGKeyArray) -> Classifier:
        shares = memberships(support, params.gradient["out"]["b"].shape[0])
        theta = params.diagonal * class_means(shares, embed(params.embedding, support.x))
        return Classifier(theta, shares.sum(0))

    def cosines(params: Synthetic, theta: Float[Array, "way d"], z: Float[Array, "n d"]) -> Float[Array, "n way"]:
        return params.scale * (jnp.matmul(z, unit(theta).T, precision="highest") + params.bias)

    def transduced(k: int, params: Synthetic, support: Batch, query: Batch, key: PRNGKeyArray) -> Classifier:
        start, weight = adapt(params, support, key), enough(weights(query), k)
        there, z = start.shots > 0, embed(params.embedding, query.x)

        def step(theta: Float[Array, "way d"], _: None) -> tuple[Float[Array, "way d"], None]:
            logits, pull = jax.vjp(lambda theta: cosines(params, theta, z), theta)
            xi = synthetic_gradient(params.gradient, jnp.where(there, logits, 0), weight)
            return theta - loop.rate * pull(jnp.where(there, xi, 0) * weight[:, None])[0], None

        return start._replace(theta=jax.lax.scan(step, start.theta, length=k)[0])

    def logits(params: Synthetic, classifier: Classifier, x: PyTree) -> Float[Array, "n way"]:
        return present(cosines(params, classifier.theta, embed(params.embedding, x)), classifier.shots)

    def stepping(k: int) -> Learner:
        def transduce(params: Synthetic, support: Batch, query: Batch, key: PRNGKeyArray) -> Classifier:
            return transduced(k, params, support, query, key)

        return scored_by_query(init, adapt, logits, transduce if k else None)

    trained, judged = stepping(loop.steps), stepping(loop.on_new_task)

    def loss(params: Synthetic, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        score, metrics = trained.loss(params, task, key)
        own = params._replace(embedding=None)
        return score + decay * half_square(own, jax.tree.map(jnp.zeros_like, own)), metrics

    return judged._replace(loss=loss)


def enough(weight: Float[Array, " n"], steps: int) -> Float[Array, " n"]:
    """Checks that batch norm over the queries is defined: at least two have a weight above 0, or none has.

    Args:
        weight: The queries' weights.
        steps: The number of steps; without any there is no batch norm.

    Raises:
        ValueError: Only one query counts. Traced weights are all NaN instead.
    """
    number = (weight > 0).sum()
    alone = weight.shape[0] == 1 or (not isinstance(number, Tracer) and int(number) == 1)
    if steps and alone:
        raise ValueError(
            "query must have at least 2 examples for sib, whose batch norm is over the queries of a task, got 1. "
            "Predict several queries together, or set test_steps=0, which uses no query."
        )
    return jnp.where(number == 1, jnp.nan, weight) if steps else weight
