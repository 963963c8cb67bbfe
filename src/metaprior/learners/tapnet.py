"""TapNet (Yoon, Seo & Moon 2019): distances are taken where class means and learned references line up.

1. Each class k has a learned reference phi_k, the same for all tasks, and the mean c_k of its support embeddings f(x).
   With tilde phi_k = phi_k - mean_{l != k} phi_l, its error is e_k = tilde phi_k / |tilde phi_k| - c_k / |c_k|.
2. M is an orthonormal basis of the null space of e_1 .. e_N, so that M' tilde phi_k and M' c_k are parallel. It is
   computed by a singular value decomposition, and no gradient flows through it.
3. p(y = k | x) is a softmax of -|M' f(x) - M' phi_k|^2.

Only M M' = I - V V' enters the distance, where V is a basis of the span of the errors; M itself is not formed. Where
errors are linearly dependent (or zero), V has as many columns as there are singular values above rounding error.

There are as many references as classes in a training task. A task with fewer classes gives each class, in the order of
labels, the reference with the largest 2 phi' c_k - |phi|^2 - |c_k|^2 that is not taken yet.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Likelihood
from metaprior.core.options import Way, checked
from metaprior.core.types import Batch, Learner, Model, Task
from metaprior.learners.builders.amortised import embedding
from metaprior.learners.builders.metric import (
    check_classification,
    class_means,
    embed_query,
    memberships,
    number_of_classes,
    present,
    scored_by_query,
    squared_distance,
)
from metaprior.learners.traits import traits


class Referenced(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of the model.
        references: phi, a reference for each class of a training task.
    """

    embedding: PyTree
    references: Float[Array, "way d"]


class Projection(NamedTuple):
    """The posterior.

    Attributes:
        span: The rows V', orthonormal or zero, that span the errors.
        assigned: The reference of each class.
        shots: Weight of each class's support examples; 0 marks a class without examples.
        beside: As in `protonet.Prototypes`.
    """

    span: Float[Array, "way d"]
    assigned: Int[Array, " way"]
    shots: Float[Array, " way"]
    beside: PyTree


def projected(span: Float[Array, "way d"], a: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Returns M M' a: the rows without their part in the span of the errors."""
    return a - jnp.matmul(jnp.matmul(a, span.T, precision="highest"), span, precision="highest")


def errors(
    references: Float[Array, "way d"], means: Float[Array, "way d"], shown: Bool[Array, " way"]
) -> Float[Array, "way d"]:
    """Returns e_k of each class that a support shows, and zeros for the others."""
    here = shown[:, None]
    others = (jnp.where(here, references, 0).sum(0) - references) / jnp.maximum(shown.sum() - 1, 1)
    directions = []
    for a in (references - others, means):
        length = jnp.linalg.norm(a, axis=-1, keepdims=True)
        directions.append(a / jnp.where(length == 0, 1, length))
    return jnp.where(here, directions[0] - directions[1], 0)


def spanned(e: Float[Array, "way d"]) -> Float[Array, "way d"]:
    """Returns an orthonormal basis of the span of e's rows, followed by zeros if the rows are dependent."""
    _, s, rows = jnp.linalg.svd(e, full_matrices=False)
    # Errors are differences of unit vectors, so that rounding is relative to 1 and not to the largest singular value.
    return jnp.where((s > 10 * max(e.shape) * jnp.finfo(e.dtype).eps)[:, None], rows, 0)


def assign(
    references: Float[Array, "way d"], means: Float[Array, "way d"], shown: Bool[Array, " way"]
) -> Int[Array, " way"]:
    """Returns the reference of each class: its own if a support shows all classes, else the best one that is free."""
    way = means.shape[0]
    score = -squared_distance(means, references)

    def take(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        assigned, taken = state
        best = jnp.where(taken, -jnp.inf, score[k]).argmax()
        return assigned.at[k].set(best), taken.at[best].set(taken[best] | shown[k])

    chosen, _ = jax.lax.fori_loop(0, way, take, (jnp.arange(way), jnp.zeros(way, bool)))
    return jnp.where(shown.all(), jnp.arange(way), chosen)


@traits(of_classes=True, reads_names=True, reads_unlabelled=True, rules_out_unseen=True, estimates=True)
@checked
def tapnet(model: Model, likelihood: Likelihood, *, way: Way | None = None, transductive: bool = True) -> Learner:
    """Meta-learns class references and an embedding; a projection for each task lines class means up with them.

    References start as normal draws with variance 1/d. The bias of the published code is left out, as it is in the
    paper.

    Args:
        model: The network; its features are the embedding f (its outputs where it has no features). They must be more
            numbers than `way`.
        likelihood: Must be `Categorical`.
        way: The number of references: the number of classes of training tasks. None: the number of the model's outputs.
        transductive: Whether queries are embedded as one batch. False embeds each query in a separate batch with
            the support, which matters under batch norm.

    Raises:
        ValueError: The likelihood is not categorical, or the embedding has too few numbers.

    References:
        Yoon, Seo & Moon (2019), sec. 2 and 3. The assignment of references is that of the published code.
    """
    check_classification("tapnet", likelihood, way)
    embed = embedding(model)

    def init(key: PRNGKeyArray, task: Task) -> Referenced:
        key_model, key_references = jax.random.split(key)
        start = model.init(key_model, task.support.x)
        d = jax.eval_shape(embed, start, task.support.x).shape[-1]
        classes = number_of_classes(model, way, start, task.support.x)
        if d <= classes:
            raise ValueError(
                f"way must be less than the number of features of the embedding, {d}, so that a projection can line up "
                f"all classes, got {classes}. Train with fewer ways or use a wider network."
            )
        return Referenced(start, d**-0.5 * jax.random.normal(key_references, (classes, d)))

    def adapt(params: Referenced, support: Batch, key: PRNGKeyArray) -> Projection:
        shares = memberships(support, params.references.shape[0])
        shots = shares.sum(0)
        fixed = jax.lax.stop_gradient(params)
        means = class_means(shares, embed(fixed.embedding, support.x))
        assigned = assign(fixed.references, means, shots > 0)
        span = spanned(errors(fixed.references[assigned], means, shots > 0))
        return Projection(span, assigned, shots, None if transductive else support.x)

    def logits(params: Referenced, task: Projection, x: PyTree) -> Float[Array, "n way"]:
        f = embed_query(embed, params.embedding, x, task.beside)
        references = params.references[task.assigned]
        return present(-squared_distance(projected(task.span, f), projected(task.span, references)), task.shots)

    return scored_by_query(init, adapt, logits)
