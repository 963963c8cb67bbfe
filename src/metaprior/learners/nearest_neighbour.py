"""Nearest neighbours and nearest centroids, in the features of a pretrained network or in fixed features.

The baseline of Vinyals et al. (2016) and of Ravi & Larochelle (2017, sec. 5.1). Pretraining is plain classification
without tasks, as in `fine_tune`. Fixed features need no training at all (`core/drawings.py`). What a learner of
drawings adds is the difference from them.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.drawings import (
    FEATURES,
    POINTS,
    check_images,
    fixed_features,
    ink_of,
    ink_points,
    modified_hausdorff,
)
from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import lookup
from metaprior.core.options import Count, NonNegative, Positive, Way, checked
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
        network: Parameters of the pretrained model. None where fixed features are compared.
        log_temperature: Logarithm of the temperature, learned where fixed features are compared. None otherwise.
    """

    network: PyTree | None
    log_temperature: Scalar | None


class Neighbours(NamedTuple):
    """The posterior.

    Attributes:
        embeddings: Features of the support examples, flat.
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
    rule: Literal["example", "centroid"] = "example",
    distance: str = "cosine",
    temperature: Positive = 0.1,
    ink: Literal["light", "dark"] = "light",
    blur: NonNegative = 1.5,
    points: Count = 200,
    way: Way | None = None,
    transductive: bool = True,
) -> Learner:
    """Gives a query the class of its nearest support example, by pretrained features or by fixed ones.

    Args:
        model: The network; its features are compared (its outputs where it has no features).
        likelihood: Must be `Categorical`.
        on: "features" of the network, or fixed features, with which only the temperature is learned. They are "pixels"
            (the raw inputs), "blurred" and "orientation", and "normalised_pixels", "normalised_blurred" and
            "normalised_orientation", for which position and size of the ink are normalised first (see
            `core.drawings.fixed_features`). "hausdorff" is the modified Hausdorff distance between the centred points
            of ink, and "normalised_hausdorff" divides each axis by its standard deviation. Except for "features",
            "pixels" and "blurred", the channels of colour images are averaged.
        rule: "example": the nearest example of each class counts; or "centroid": the mean of its examples.
        distance: "cosine" or "euclidean" (squared); "hausdorff" replaces it.
        temperature: Divides the distances. A class's logit is minus the distance to its nearest example or its centroid
            over the temperature. The chosen class does not depend on it; calibration does.
        ink: Whether drawings are light on dark or dark on light, for "normalised" features and "hausdorff". Omniglot's
            ink is light. An offset and a scale of the pixels change nothing.
        blur: Standard deviation of the Gaussian of "blurred", in 28ths of the side.
        points: The largest number of points for "hausdorff"; drawings with more ink are thinned evenly.
        way: The largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: Whether queries are embedded as one batch. False embeds each query in a separate batch with
            the support, which matters under batch norm.

    Raises:
        ValueError: The likelihood is not categorical, `on` or `distance` is unknown, or points have no centroid.

    References:
        Vinyals et al. (2016), sec. 4; Ravi & Larochelle (2017), sec. 5.1; Lake, Salakhutdinov & Tenenbaum (2015).
    """
    check_classification("nearest_neighbour", likelihood, way)
    lookup("on", on, {"features": None} | FEATURES | POINTS)
    if on in POINTS and rule == "centroid":
        raise ValueError(
            f"rule must be 'example' for on={on!r}, since sets of points have no centroid, got 'centroid'."
        )
    measure: Callable = lookup("distance", distance, DISTANCES)
    pretrain, features, fixed = pretraining_loss(model, likelihood), embedding(model), on != "features"

    def embed(network: PyTree, x: PyTree) -> Float[Array, "n d"]:
        if on in POINTS:
            check_images(x, on)
            return ink_points(ink_of(x, ink == "dark"), points, POINTS[on]).reshape(x.shape[0], -1)
        return fixed_features(on, x, dark=ink == "dark", blur=blur) if fixed else features(network, x)

    def apart(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
        if on in POINTS:
            return modified_hausdorff(*(side.reshape(side.shape[0], -1, 3) for side in (a, b)))
        return measure(a, b)

    def init(key: PRNGKeyArray, task: Task) -> Comparison:
        if fixed:
            return Comparison(None, jnp.log(jnp.asarray(temperature, float)))
        return Comparison(model.init(key, task.support.x), None)

    def adapt(params: Comparison, support: Batch, key: PRNGKeyArray) -> Neighbours:
        network = jax.eval_shape(model.init, key, support.x) if params.network is None else params.network
        shares = memberships(support, number_of_classes(model, way, network, support.x))
        return Neighbours(embed(params.network, support.x), shares, None if transductive else support.x)

    def logits(params: Comparison, support: Neighbours, x: PyTree) -> Float[Array, "m way"]:
        query, shares = embed_query(embed, params.network, x, support.beside), support.shares
        scale = temperature if params.log_temperature is None else jnp.exp(params.log_temperature)
        if rule == "centroid":
            centroids = shares.T @ support.embeddings / jnp.maximum(shares.sum(0)[:, None], 1e-12)
            return present(-apart(query, centroids) / scale, shares.sum(0))
        each = -apart(query, support.embeddings)[:, :, None] / scale
        return present(jnp.where(shares > 0, each, ABSENT).max(1, initial=ABSENT), shares.sum(0))

    def loss(params: Comparison, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        return pretrain(params.network, task._replace(support=labelled(task.support)), key)

    learner = scored_by_query(init, adapt, logits)
    return learner if fixed else learner._replace(loss=loss)
