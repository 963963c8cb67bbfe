"""Fine-tuning: pretraining without tasks, then a new head fitted to the support.

The baseline of Vinyals et al. (2016) and of Ravi & Larochelle (2017, sec. 5.1). Pretraining fits all training examples
together, so labels must mean the same in every task (`train_labels = "class"` of the image sources), and the model
needs an output for each training class. With Gaussian targets this is the joint training that Finn et al. (2017, sec.
5.1) compare with.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import NonNegative, Way
from metaprior.core.types import Batch, Call, Learner, Model, Task
from metaprior.inference.descent import half_square
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.learners.builders.amortised import embedding
from metaprior.learners.builders.gradient import Adaptation, Adapted, gradient_learner, pretraining_loss
from metaprior.learners.builders.metric import embed_query, number_of_classes
from metaprior.learners.traits import traits
from metaprior.networks.layers import dense


class Tuned(NamedTuple):
    """phi.

    Attributes:
        head: The new linear head.
        features: Parameters of the model, where these are tuned too; None where the features are frozen.
    """

    head: dict[str, Array]
    features: PyTree | None


@traits(pretrained=True)
@passes_options_to(InnerLoop, without=("first_order", "remat"), steps=100, rate=0.1)
def fine_tune(
    model: Model,
    likelihood: Likelihood,
    *,
    way: Way | None = None,
    frozen: bool = True,
    l2: NonNegative = 0.0,
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Pretrains the model without tasks, then fits a new linear head to each support.

    Its params are the model's own. The head starts at zero. With frozen features, `l2` and many steps this is logistic
    regression.

    Args:
        model: The network.
        likelihood: Likelihood of the support and the query.
        way: Number of outputs of the new head. None: the model's own number.
        frozen: Whether the features stay as they are. False tunes all parameters.
        l2: Weight of l2 / 2 |head|^2, which is added to the mean nll.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the fit of the head, see `InnerLoop`.

    References:
        Vinyals et al. (2016), sec. 4; Ravi & Larochelle (2017), sec. 5.1.
    """
    loop = InnerLoop(**inner)
    # Frozen features are computed once, in one batch with the support, before the head.
    head_loop = replace(loop, transductive=loop.transductive or frozen)
    optimizer = loop.transformation(differentiated=False)
    embed, loss = embedding(model), pretraining_loss(model, likelihood)
    untold = model._replace(support=None)  # `embed` already normalises by the support

    def init(key: PRNGKeyArray, task: Task) -> PyTree:
        return model.init(key, task.support.x)

    def network(params: PyTree, phi: Tuned, x: PyTree, call: Call) -> Array:
        return dense("head", phi.head, x if frozen else embed(phi.features, x), call)

    def penalty(params: PyTree, phi: Tuned, support: Batch) -> Scalar:
        return l2 * half_square(phi.head, jax.tree.map(jnp.zeros_like, phi.head))

    def tuner(params: PyTree, x: PyTree) -> Learner:
        """Builds the learner of a head for inputs shaped as x; with frozen features its inputs are embeddings."""
        width = jax.eval_shape(embed, params, x).shape[-1]
        classes = number_of_classes(model, way, params, x)

        def start(params: PyTree) -> Tuned:
            return Tuned({"w": jnp.zeros((width, classes)), "b": jnp.zeros(classes)}, None if frozen else params)

        return gradient_learner(
            Adaptation(untold, init, start, network, lambda params: optimizer, penalty if l2 else None),
            likelihood,
            loss,
            head_loop,
            posterior=posterior,
        )

    def seen(params: PyTree, support: Batch) -> Batch:
        # Frozen features are computed once, not at every step.
        return support._replace(x=embed(params, support.x)) if frozen else support

    def beside(adapted: Adapted, support: Batch) -> Adapted:
        return adapted._replace(context=support.x) if frozen and not loop.transductive else adapted

    def adapt(params: PyTree, support: Batch, key: PRNGKeyArray) -> Adapted:
        return beside(tuner(params, support.x).adapt(params, seen(params, support), key), support)

    def path(params: PyTree, support: Batch, key: PRNGKeyArray) -> Adapted:
        course = tuner(params, support.x).path
        assert course is not None
        return jax.vmap(lambda adapted: beside(adapted, support))(course(params, seen(params, support), key))

    def predict(params: PyTree, adapted: Adapted, x: PyTree, key: PRNGKeyArray) -> Any:
        tuned = tuner(params, x)
        if frozen:
            adapted, x = adapted._replace(context=None), embed_query(embed, params, x, adapted.context)
        return tuned.predict(params, adapted, x, key)

    def turned(knobs: Mapping[str, Any]) -> Learner:
        rule = posterior.turned(knobs)
        return fine_tune(model, likelihood, way=way, frozen=frozen, l2=l2, posterior=rule, **inner)

    knobs = posterior.scalars(likelihood)
    return Learner(init, adapt, predict, loss, path, knobs=knobs, turn=turned if knobs else None)
