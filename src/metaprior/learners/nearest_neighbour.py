"""Nearest neighbours, by the features of a network that was pretrained without tasks, or by the raw inputs.

The baseline of Vinyals et al. (2016) and of Ravi & Larochelle (2017, sec. 5.1); pretraining as in `fine_tune`.
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
        network: the pretrained parameters; None for pixels.
        log_temperature: logarithm of the learned temperature for pixels; None for features.
    """

    network: PyTree | None
    log_temperature: Scalar | None


class Neighbours(NamedTuple):
    """The posterior.

    Attributes:
        embeddings: of the support.
        shares: each example's weight in the column of its class.
        beside: inputs of the support, where each query is embedded beside them; else None.
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

    The logit of a class is minus the distance of its nearest example over `temperature`. Accuracy does not depend on
    the temperature; calibration does.

    Args:
        model: the network that is pretrained.
        likelihood: `Categorical()`.
        on: "features", or "pixels", for which the temperature alone is learned.
        distance: "cosine" or "euclidean" (squared).
        temperature: what distances are divided by.
        way: the largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: whether all queries are embedded in one batch. False embeds each query beside the support alone,
            which matters under batch norm.

    References:
        Vinyals et al. 2016; Ravi & Larochelle 2017, section 5.1.
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
