"""Is a classifier less certain about novel images than about queries of the task's classes?

There are three kinds of novel images: images of classes that are not in the task, the task's own queries rotated by a
quarter turn, and noise. The uncertainty is the entropy of the predictive. If the predictive is a mixture of several
draws, a second score is the mutual information of the class and the draw: the entropy of the mean minus the mean of the
entropies.

References:
    Smith & Gal 2018, for the mutual information.
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
    """How well uncertainty detects novel images, over tasks.

    Attributes:
        accuracy: The accuracy on the task's own queries.
        auroc: The AUROC by score and kind of novel image: 1/2 if the score distinguishes nothing, 1 if it distinguishes
            all.
        means: The mean of each score by kind; "known" stands for the task's own queries.
    """

    accuracy: Figure
    auroc: dict[str, dict[str, Figure]]
    means: dict[str, dict[str, Figure]]


def entropy(p: Float[Array, "... c"]) -> Float[Array, "..."]:
    """Computes the entropy -sum p log p over the last axis in nats, with 0 log 0 = 0."""
    return jax.scipy.special.entr(p).sum(-1)


def uncertainty(predictive: Categories) -> dict[str, Float[Array, " n"]]:
    """Computes the uncertainty scores of each example.

    Args:
        predictive: The predictive of n examples.

    Returns:
        The entropy and, if there are at least two draws, the mutual information, each [n].
    """
    scores = {"entropy": entropy(predictive.mean())}
    if predictive.log_probs.shape[0] > 1:
        scores["mutual information"] = scores["entropy"] - entropy(jnp.exp(predictive.log_probs)).mean(0)
    return scores


def novel_images(source: ClassPool, key: PRNGKeyArray) -> tuple[Task, dict[str, Float[Array, "n h w c"]]]:
    """Draws a task, and as many novel images of each kind as it has queries.

    The images of other classes come from as many other classes as the task has. The pixels of noise are uniform between
    the smallest and the largest value of the task's own queries.

    Args:
        source: A pool with at least twice as many classes as a task.
        key: Random key.

    Returns:
        The task, and the novel images by kind.
    """
    key_task, key_noise = jax.random.split(key)
    double = replace(source, way=2 * source.way)
    both = jax.tree.map(lambda leaf: leaf[0], double.sample(key_task, 1))
    known, other = (_half(both, part) for part in (0, 1))
    x = known.query.x
    noise = jax.random.uniform(key_noise, x.shape, x.dtype, x.min(), x.max())
    return known, dict(zip(KINDS, (other.query.x, jnp.rot90(x, axes=(1, 2)), noise), strict=True))


strangers = novel_images  # its former name


def _half(task: Task, part: int) -> Task:
    """Returns the first or the second half of the classes of a task, which is sorted by class."""

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
    """Computes the AUROC of the task's own queries against each kind of novel image, task by task.

    Each kind is predicted as a separate batch. A learner that normalises over that batch would see novel images only
    beside other novel images. Use one that predicts each query alone (transductive=False), as a single image would
    come.

    Args:
        learner: A classification learner.
        params: Its parameters.
        source: A pool of square images with at least twice as many classes as a task.
        key: Random key.
        tasks: The number of tasks.
        chunk: The number of tasks in memory at once.

    Returns:
        Accuracy, AUROC and mean scores.

    Raises:
        ValueError: Another source, or no tasks.
    """
    if not isinstance(source, ClassPool):
        raise ValueError(f"source must be a pool of images by class, such as omniglot, got {type(source).__name__}.")
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, got {tasks}.")
    if source.images.shape[1] != source.images.shape[2]:
        raise ValueError(f"source must have square images, because they are rotated, got {source.images.shape[1:3]}.")
    classes = source.starts.shape[0] * source.rotations
    if classes < 2 * source.way:
        raise ValueError(f"source must have at least twice the {source.way} classes of a task, got {classes}.")

    @jax.jit
    def run(params: PyTree, source: ClassPool, keys: PRNGKeyArray) -> Any:
        def one(key: PRNGKeyArray) -> tuple[Array, dict[str, Float[Array, "kinds n"]]]:
            key_task, key_adapt, key_predict = jax.random.split(key, 3)
            task, novel = novel_images(source, key_task)
            posterior = learner.adapt(params, task.support, key_adapt)
            predictives = [learner.predict(params, posterior, x, key_predict) for x in (task.query.x, *novel.values())]
            hit = (predictives[0].mean().argmax(-1) == task.query.y).mean()
            # All kinds are in one array, so that the same arithmetic keeps equal scores equal.
            return hit, jax.vmap(uncertainty)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *predictives))

        return jax.lax.map(one, keys, batch_size=min(chunk, tasks))

    hit, scores = run(params, source, jax.random.split(key, tasks))
    against = jax.jit(jax.vmap(lambda values: jax.vmap(auroc, (0, None))(values[1:], values[0])))
    found = {name: _by_kind(KINDS, against(values)) for name, values in scores.items()}
    means = {name: _by_kind(("known", *KINDS), values.mean(-1)) for name, values in scores.items()}
    return Novelty(figure_of(np.asarray(hit)), found, means)


def _by_kind(kinds: tuple[str, ...], values: Float[Array, "tasks kinds"]) -> dict[str, Figure]:
    return {kind: figure_of(column) for kind, column in zip(kinds, np.asarray(values).T, strict=True)}
