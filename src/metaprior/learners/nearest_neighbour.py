"""Nearest neighbours in the features of a pretrained network, or in the raw inputs.

The baseline of Vinyals et al. (2016) and of Ravi & Larochelle (2017, sec. 5.1). Pretraining is plain classification
without tasks, as in `fine_tune`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import lookup
from metaprior.core.options import Positive, Way, checked
from metaprior.core.types import Batch, Learner, Model, Task, labelled
from metaprior.learners.builders.amortised import embedding
from metaprior.learners.builders.gradient import pretraining_loss
from metaprior.learners.builders.metric import (
    ABSENT,
    DISTANCES,
    check_classification,
    embed_query,
    memberships,
    number_of_classes,
    present,
    scored_by_query,
)
from metaprior.learners.traits import traits


class Comparison(NamedTuple):
    """theta.

    Attributes:
        network: Parameters of the pretrained model. None where raw inputs are compared.
        log_temperature: Logarithm of the temperature, learned where raw inputs are compared. None otherwise.
    """

    network: PyTree | None
    log_temperature: Scalar | None


class Neighbours(NamedTuple):
    """The posterior.

    Attributes:
        embeddings: Features, or flat inputs, of the support examples.
        shares: Each example's weight, in the column of its class.
        beside: As in `protonet.Prototypes`.
    """

    embeddings: Float[Array, "n d"]
    shares: Float[Array, "n way"]
    beside: PyTree


@traits(of_classes=True, reads_unlabelled=True, rules_out_unseen=True, pretrained=True)
@checked
def nearest_neighbour(
    model: Model,
    likelihood: Likelihood,
    *,
    on: str = "features",
    distance: str = "cosine",
    temperature: Positive = 0.1,
    way: Way | None = None,
    transductive: bool = True,
) -> Learner:
    """Gives a query the class of its nearest support example, by pretrained features or by the raw inputs.

    Args:
        model: The network; its features are compared (its outputs where it has no features).
        likelihood: Must be `Categorical`.
        on: "features", or "pixels", the raw inputs; then only the temperature is learned.
        distance: "cosine" or "euclidean" (squared).
        temperature: Divides the distances. A class's logit is minus the distance to its nearest example over the
            temperature. The chosen class does not depend on it; calibration does.
        way: The largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: Whether queries are embedded as one batch. False embeds each query in a separate batch with
            the support, which matters under batch norm.

    Raises:
        ValueError: The likelihood is not categorical, or `on` or `distance` is unknown.

    References:
        Vinyals et al. (2016), sec. 4; Ravi & Larochelle (2017), sec. 5.1.
    """
    check_classification("nearest_neighbour", likelihood, way)
    if on not in ("features", "pixels"):
        raise ValueError(f"on must be 'features' or 'pixels', got {on!r}.")
    measure: Callable = lookup("distance", distance, DISTANCES)
    pretrain, features = pretraining_loss(model, likelihood), embedding(model)

    def embed(network: PyTree, x: PyTree) -> Float[Array, "n d"]:
        return x.reshape(x.shape[0], -1) if on == "pixels" else features(network, x)

    def init(key: PRNGKeyArray, task: Task) -> Comparison:
        if on == "pixels":
            return Comparison(None, jnp.log(jnp.asarray(temperature, float)))
        return Comparison(model.init(key, task.support.x), None)

    def adapt(params: Comparison, support: Batch, key: PRNGKeyArray) -> Neighbours:
        network = jax.eval_shape(model.init, key, support.x) if params.network is None else params.network
        shares = memberships(support, number_of_classes(model, way, network, support.x))
        return Neighbours(embed(params.network, support.x), shares, None if transductive else support.x)

    def logits(params: Comparison, support: Neighbours, x: PyTree) -> Float[Array, "m way"]:
        apart = measure(embed_query(embed, params.network, x, support.beside), support.embeddings)
        scale = temperature if params.log_temperature is None else jnp.exp(params.log_temperature)
        nearest = jnp.where(support.shares > 0, -apart[:, :, None] / scale, ABSENT).max(1, initial=ABSENT)
        return present(nearest, support.shares.sum(0))

    def loss(params: Comparison, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        return pretrain(params.network, task._replace(support=labelled(task.support)), key)

    learner = scored_by_query(init, adapt, logits)
    return learner if on == "pixels" else learner._replace(loss=loss)
