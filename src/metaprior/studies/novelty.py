"""Does a classifier know what it has never seen? Uncertainty on queries of the task's classes against strange images.

Three kinds of strangers: images of classes that the task does not have, the task's own queries turned by a quarter, and
noise. Uncertainty is the entropy of the predictive and, where it is a mixture of several draws, the mutual information
of the class and the draw (Smith & Gal 2018): entropy of the mean less mean of the entropies.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Categories
from metaprior.core.types import Batch, Learner, Task
from metaprior.evaluation.calibration import auroc
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.tasks.pool import ClassPool

KINDS = ("other classes", "rotated", "noise")


class Novelty(NamedTuple):
    """Over tasks: accuracy on the known, and the AUROC of each score against each kind of stranger.

    `auroc` by score and kind: 1/2 tells nothing, 1 tells all apart. `means` of each score by kind, "known" among them.
    """

    accuracy: Figure
    auroc: dict[str, dict[str, Figure]]
    means: dict[str, dict[str, Figure]]


def entropy(p: Float[Array, "... c"]) -> Float[Array, "..."]:
    """-sum p log p in nats, 0 log 0 = 0."""
    return jax.scipy.special.entr(p).sum(-1)


def uncertainty(predictive: Categories) -> dict[str, Float[Array, " n"]]:
    """Each example's scores: its entropy, and its mutual information where there are two draws or more."""
    scores = {"entropy": entropy(predictive.mean())}
    if predictive.log_probs.shape[0] > 1:
        scores["mutual information"] = scores["entropy"] - entropy(jnp.exp(predictive.log_probs)).mean(0)
    return scores


def strangers(source: ClassPool, key: PRNGKeyArray) -> tuple[Task, dict[str, Float[Array, "n h w c"]]]:
    """A task of the source, and as many images of each kind as it has queries.

    Other classes: as many again as the task has, drawn with it and so different from its own. Noise: every pixel
    uniform between the least and the greatest of the task's own.
    """
    key_task, key_noise = jax.random.split(key)
    double = replace(source, way=2 * source.way)
    both = jax.tree.map(lambda leaf: leaf[0], double.sample(key_task, 1))
    known, other = (_half(both, part) for part in (0, 1))
    x = known.query.x
    noise = jax.random.uniform(key_noise, x.shape, x.dtype, x.min(), x.max())
    return known, dict(zip(KINDS, (other.query.x, jnp.rot90(x, axes=(1, 2)), noise), strict=True))


def _half(task: Task, part: int) -> Task:
    """Tasks lie class by class: the first or the second half of the classes."""

    def half(leaf: Array) -> Array:
        return jnp.split(leaf, 2)[part]

    return Task(*(Batch(half(batch.x), half(batch.y)) for batch in task))


def novelty(
    learner: Learner,
    params: PyTree,
    source: ClassPool,
    key: PRNGKeyArray,
    *,
    tasks: int = 200,
    chunk: int = 4,
) -> Novelty:
    """AUROC of known queries against each kind of stranger, task by task.

    Each kind is predicted as a batch of its own. A learner that normalises over that batch sees strangers beside
    strangers only: use one that judges each query alone (transductive=False), as one image would come.

    Raises:
        ValueError: a source that is no pool of square images, with fewer classes than two tasks have, or no tasks.
    """
    if not isinstance(source, ClassPool):
        raise ValueError(f"source: came {type(source).__name__}, needs a pool of images by class, as omniglot")
    if tasks < 1:
        raise ValueError(f"tasks: came {tasks}, needs at least 1")
    if source.images.shape[1] != source.images.shape[2]:
        raise ValueError(f"source: came images of {source.images.shape[1:3]}, needs square ones, to turn them")
    classes = source.starts.shape[0] * source.rotations
    if classes < 2 * source.way:
        raise ValueError(f"source: has {classes} classes, needs twice the tasks' {source.way}, to have others")

    @jax.jit
    def run(params: PyTree, source: ClassPool, keys: PRNGKeyArray) -> Any:
        def one(key: PRNGKeyArray) -> tuple[Array, dict[str, Float[Array, "kinds n"]]]:
            key_task, key_adapt, key_predict = jax.random.split(key, 3)
            task, odd = strangers(source, key_task)
            posterior = learner.adapt(params, task.support, key_adapt)
            predictives = [learner.predict(params, posterior, x, key_predict) for x in (task.query.x, *odd.values())]
            hit = (predictives[0].mean().argmax(-1) == task.query.y).mean()
            # All kinds in one array: the same arithmetic for all, so that what is tied stays tied.
            return hit, jax.vmap(uncertainty)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *predictives))

        return jax.lax.map(one, keys, batch_size=min(chunk, tasks))

    hit, scores = run(params, source, jax.random.split(key, tasks))
    against = jax.jit(jax.vmap(lambda values: jax.vmap(auroc, (0, None))(values[1:], values[0])))
    told = {name: _by_kind(KINDS, against(values)) for name, values in scores.items()}
    means = {name: _by_kind(("known", *KINDS), values.mean(-1)) for name, values in scores.items()}
    return Novelty(figure_of(np.asarray(hit)), told, means)


def _by_kind(kinds: tuple[str, ...], values: Float[Array, "tasks kinds"]) -> dict[str, Figure]:
    return {kind: figure_of(column) for kind, column in zip(kinds, np.asarray(values).T, strict=True)}
