"""TADAM (Oreshkin, Rodriguez & Lacoste 2018): prototypes in an embedding that depends on the task.

1. Class means c_k of the unmodulated features give the task's code t = mean_k c_k.
2. Layer l of the network, after its norm and before its activation, becomes (1 + g_l) s + b_l, with
   g_l = gamma_l h_l(t) and b_l = beta_l r_l(t). gamma_l and beta_l are scalars that start at 0, with an L2 penalty;
   h_l and r_l are dense networks: z_1 = a(W_1 t), z_2 = a(z_1 + W_2 z_1), z_2 + W_3 z_2 (and biases), where a is swish.
3. With prototypes c_k in the modulated network, p(y = k | x) is a softmax of -alpha d(f(x), c_k), where d is the
   Euclidean distance, not squared.
4. Auxiliary co-training: after a share u of the meta-steps, a meta-step trains with probability
   p = 0.9^(1 + floor(20 u)) a linear classifier of all training classes on the unmodulated features instead. The loss
   here is the expectation, (1 - p) episode + p auxiliary, and its examples are those of the task.

Co-training needs labels that are the same in every task: training tasks have the numbers of their classes, from which
the places of the classes in the task follow. Tasks at test have places.
"""

from math import comb
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Likelihood
from metaprior.core.options import Count, Fraction, NonNegative, Positive, Way, checked
from metaprior.core.types import PLAIN, Batch, Call, Learner, Model, Task, joined, labelled, weights
from metaprior.inference.descent import mean_nll
from metaprior.learners.builders.amortised import embedding, modulated_layers
from metaprior.learners.builders.metric import (
    check_classification,
    class_means,
    embed_query,
    memberships,
    number_of_classes,
    places,
    present,
    scored_by_query,
    squared_distance,
)
from metaprior.learners.traits import traits
from metaprior.networks.layers import dense, dense_init

LAYERS = ("first", "second", "third")  # of h and r


class Tadam(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of the model.
        scalars: gamma_l and beta_l of each layer.
        generators: The networks h_l and r_l of each layer.
        log_scale: Logarithm of the learned alpha. None: alpha is fixed.
        head: The linear classifier of the training classes. None: no co-training.
    """

    embedding: PyTree
    scalars: dict[str, Float[Array, "2"]]
    generators: dict[str, tuple[PyTree, PyTree]]
    log_scale: Scalar | None
    head: dict[str, Array] | None


class Prototypes(NamedTuple):
    """The posterior.

    Attributes:
        code: t, the mean of the class means.
        mean: Prototypes c_k in the modulated network.
        shots: Weight of each class's support examples; 0 marks a class without examples.
        beside: As in `protonet.Prototypes`.
    """

    code: Float[Array, " d"]
    mean: Float[Array, "way d"]
    shots: Float[Array, " way"]
    beside: PyTree


def generated(network: PyTree, code: Float[Array, " d"]) -> Float[Array, " c"]:
    """Computes h_l(t) or r_l(t)."""
    z = jax.nn.swish(dense("first", network["first"], code[None]))
    z = jax.nn.swish(z + dense("second", network["second"], z))
    return (z + dense("third", network["third"], z))[0]


def modulation(params: Tadam, code: Float[Array, " d"]) -> Call:
    """Returns the call in which the task's code modulates the layers."""

    def modulate(name: str, s: Array) -> Array:
        gain, shift = (
            c * generated(g, code) for c, g in zip(params.scalars[name], params.generators[name], strict=True)
        )
        return (1 + gain) * s + shift

    return Call(modulate=modulate) if params.scalars else PLAIN


def check_class_numbers(task: Task, classes: int) -> None:
    """Checks that the labels of a training task can be the numbers of its classes.

    Raises:
        ValueError: They are places, 0, 1, ..., which numbers of classes would be once in a million tasks or less.
    """
    if isinstance(task.support.y, Tracer):
        return
    y = np.unique(np.asarray(task.support.y))
    if y.size and y[-1] == y.size - 1 and comb(classes, y.size) > 1_000_000:
        raise ValueError(
            f"auxiliary must be None for training tasks whose labels are the places of their classes, 0..{y[-1]}, got "
            f"{classes}: co-training needs labels that mean the same in every task. Use tasks.train_labels='class', or "
            "labels='class' of a pool of classes."
        )


@traits(of_classes=True, reads_unlabelled=True, rules_out_unseen=True)
@checked
def tadam(
    model: Model,
    likelihood: Likelihood,
    *,
    scale: Positive = 7.5,
    learn_scale: bool = False,
    squared: bool = False,
    conditioned: bool = True,
    shrink: NonNegative = 0.01,
    auxiliary: Count | None = None,
    decay: Fraction = 0.9,
    stages: Count = 20,
    way: Way | None = None,
    transductive: bool = True,
) -> Learner:
    """Meta-learns prototypes in an embedding that a code of the task modulates, with a scaled distance.

    Args:
        model: The network. Its features are the embedding f (its outputs where it has no features), and all layers that
            a `Call` can modulate depend on the task.
        likelihood: Must be `Categorical`.
        scale: alpha. A learned alpha starts from this value.
        learn_scale: Whether alpha is meta-learned.
        squared: Whether the distance is squared, as in `protonet`.
        conditioned: Whether the task modulates the network. False leaves metric scaling and co-training.
        shrink: The loss has shrink / 2 times the sum of squares of gamma_l and beta_l.
        auxiliary: The number of training classes, for co-training; with rotations four times the characters. The labels
            of training tasks must then be the numbers of their classes (`train_labels = "class"`). None: no
            co-training.
        decay: Base of the probability p of the auxiliary task, decay^(1 + floor(stages u)) after the share u of the
            meta-steps.
        stages: Number of stages of p.
        way: The largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: Whether queries are embedded as one batch. False embeds each query in a separate batch with
            the support, which matters under batch norm.

    Raises:
        ValueError: The likelihood is not categorical, the model has no layer that can be modulated, or `auxiliary` is
            given for tasks whose labels are places.

    References:
        Oreshkin, Rodriguez & Lacoste (2018), sec. 2. The distance, p and alpha are those of the published code.
    """
    check_classification("tadam", likelihood, way)
    embed = embedding(model)

    def init(key: PRNGKeyArray, task: Task) -> Tadam:
        if auxiliary is not None:
            check_class_numbers(task, auxiliary)
        key_model, key_head, key_generators = jax.random.split(key, 3)
        x = task.support.x
        start = model.init(key_model, x)
        widths = modulated_layers(model, start, x) if conditioned else {}
        if conditioned and not widths:
            raise ValueError(
                "model must have layers that a `Call` can modulate, got none. Use a network of metaprior.networks, or "
                "conditioned=False."
            )
        d = jax.eval_shape(embed, start, x).shape[-1]

        def generator(key: PRNGKeyArray, width: int) -> PyTree:
            sizes = ((d, width), (width, width), (width, width))
            return {n: dense_init(k, *s) for n, k, s in zip(LAYERS, jax.random.split(key, 3), sizes, strict=True)}

        keys = dict(zip(widths, jax.random.split(key_generators, (len(widths), 2)), strict=True))
        return Tadam(
            start,
            {name: jnp.zeros(2) for name in widths},
            {
                name: (generator(keys[name][0], width), generator(keys[name][1], width))
                for name, width in widths.items()
            },
            jnp.log(jnp.asarray(scale, float)) if learn_scale else None,
            None if auxiliary is None else dense_init(key_head, d, auxiliary),
        )

    def adapt(params: Tadam, support: Batch, key: PRNGKeyArray) -> Prototypes:
        shares = memberships(support, number_of_classes(model, way, params.embedding, support.x))
        shots = shares.sum(0)
        plain = class_means(shares, embed(params.embedding, support.x))
        code = plain.sum(0) / jnp.maximum((shots > 0).sum(), 1)
        mean = class_means(shares, embed(params.embedding, support.x, modulation(params, code)))
        return Prototypes(code, mean, shots, None if transductive else support.x)

    def logits(params: Tadam, classes: Prototypes, x: PyTree) -> Float[Array, "n way"]:
        call = modulation(params, classes.code)
        f = embed_query(lambda p, x: embed(p, x, call), params.embedding, x, classes.beside)
        apart = squared_distance(f, classes.mean)
        if not squared:
            apart = jnp.where(apart > 0, jnp.sqrt(jnp.where(apart > 0, apart, 1)), 0)
        alpha = scale if params.log_scale is None else jnp.exp(params.log_scale)
        return present(-alpha * apart, classes.shots)

    def penalty(params: Tadam) -> Scalar:
        return shrink / 2 * sum(((pair**2).sum() for pair in params.scalars.values()), jnp.zeros(()))

    def network(params: Tadam, support: Batch, key: PRNGKeyArray) -> Any:
        call = modulation(params, adapt(params, support, key).code)
        return lambda x, told: embed(params.embedding, x, told._replace(modulate=call.modulate))

    episodes = scored_by_query(init, adapt, logits)._replace(network=network)

    def at(probability: Scalar | float) -> Learner:
        """Returns the learner whose loss has this probability of the auxiliary task."""

        def loss(params: Tadam, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
            if params.head is None:
                score, metrics = episodes.loss(params, task, key)
                return score + penalty(params), metrics
            classes = number_of_classes(model, way, params.embedding, task.support.x)
            score, metrics = episodes.loss(params, places(task, classes), key)
            data = joined(task._replace(support=labelled(task.support)))
            y = jnp.asarray(data.y)
            data = Batch(data.x, jnp.maximum(y, 0), weights(data) * (y >= 0))
            f = jnp.concatenate([embed(params.embedding, batch.x) for batch in task])
            of_all = mean_nll(Categorical(), dense("head", params.head, f), data)
            mixed = (1 - probability) * score + probability * of_all
            return mixed + penalty(params), metrics | {"auxiliary": of_all}

        return episodes._replace(loss=loss)

    def scheduled(progress: Scalar) -> Learner:
        return at(decay ** (1 + jnp.floor(stages * progress)))

    return at(decay) if auxiliary is None else at(decay)._replace(schedule=scheduled)
