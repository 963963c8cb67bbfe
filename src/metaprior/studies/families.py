"""Do the kinds of tasks that a learner has found agree with the families that the tasks come from?

A learner with `Learner.kinds` assigns each task softly to k kinds: the leaves of `hsml`, the vertices of `arml`, the
components of `gem_mixture`. The study compares these weights with the true family of each new task.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from metaprior.core.extras import extra
from metaprior.core.types import Learner, families_of, group_order
from metaprior.evaluation.figures import Figure, figure_of


class Kinds(NamedTuple):
    """What the assigned weights say of a task's family.

    Attributes:
        weights: The mean weights [k] of the tasks of each family, by the family's name.
        information: The mutual information of family and kind, if a task's kind is drawn by its weights, as a share of
            the entropy of the family: 0 if the weights say nothing, 1 if they determine the family.
        by_chance: The same with shuffled families, a mean over 200 permutations.
        adjusted: The adjusted mutual information of the family and the likeliest kind: 0 by chance, 1 if they agree.
        recognised: The share of tasks whose family a logistic regression on the logarithms of the weights recognises,
            in five-fold cross-validation. By chance it is 1 / (number of families).
    """

    weights: dict[str, list[float]]
    information: float
    by_chance: float
    adjusted: float
    recognised: Figure


def families(learner: Learner, params: PyTree, source: Any, key: PRNGKeyArray, *, tasks: int = 600) -> Kinds:
    """Compares a learner's kinds of tasks with the families of new tasks, all drawn equally often.

    Args:
        learner: A learner with `kinds`.
        params: Its parameters.
        source: A source with at least two families.
        key: Random key.
        tasks: The number of tasks, at least ten per family.

    Raises:
        ValueError: The learner has no kinds, the source has fewer than two families, or there are too few tasks.
        MissingExtra: scikit-learn is not installed.
    """
    names = families_of(source)
    of_task = learner.kinds
    if of_task is None:
        raise ValueError("learner must distinguish kinds of tasks, as hsml, arml and gem_mixture do, got another one.")
    if len(names) < 2:
        raise ValueError(
            f"source must have at least two families of tasks, such as families_2d, got {type(source).__name__}."
        )
    if tasks < 10 * len(names):
        raise ValueError(f"tasks must be at least {10 * len(names)}, ten for each family, got {tasks}.")
    with extra("sklearn", "A study of families"):
        import sklearn.metrics  # noqa: F401

    @jax.jit
    def run(params: PyTree, source: Any, keys: PRNGKeyArray, place: Int[Array, " tasks"]) -> Float[Array, "tasks k"]:
        def one(drawn: tuple[PRNGKeyArray, Array]) -> Float[Array, " k"]:
            here, there = jax.random.split(drawn[0])
            return of_task(params, source.of_family(here, drawn[1]).support, there)

        return jax.lax.map(one, (keys, place))

    of_order, of_tasks = jax.random.split(key)
    family = group_order(source, of_order, tasks)
    weights = np.asarray(run(params, source, jax.random.split(of_tasks, tasks), family), float)
    return compared(weights, np.asarray(family), names)


def compared(weights: Float[np.ndarray, "tasks k"], family: Int[np.ndarray, " tasks"], names: tuple[str, ...]) -> Kinds:
    """Compares weights of tasks with their families.

    Args:
        weights: Weights of each task, with a sum of 1.
        family: The family of each task, 0..len(names)-1.
        names: The names of the families.

    Raises:
        ValueError: Weights are not finite.
    """
    with extra("sklearn", "A study of families"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import adjusted_mutual_info_score
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    if not np.isfinite(weights).all():
        raise ValueError("learner must assign finite weights, got NaN or infinite ones: it diverged on some tasks.")
    shuffled = np.random.default_rng(0)
    chance = [share_of_information(weights, shuffled.permutation(family)) for _ in range(200)]
    logs = np.log(np.maximum(weights, 1e-12))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    hit = np.equal(np.asarray(cross_val_predict(model, logs, family, cv=folds)), family)
    return Kinds(
        {name: weights[family == i].mean(0).tolist() for i, name in enumerate(names)},
        share_of_information(weights, family),
        float(np.mean(chance)),
        float(adjusted_mutual_info_score(family, weights.argmax(1))),
        figure_of(hit.astype(float), families=family),
    )


def share_of_information(weights: Float[np.ndarray, "tasks k"], family: Int[np.ndarray, " tasks"]) -> float:
    """Computes I(family; kind) / H(family), where a task's kind is drawn by its weights.

    Args:
        weights: Weights of each task, with a sum of 1.
        family: The family of each task.
    """
    joint = np.stack([weights[family == f].sum(0) for f in np.unique(family)]) / len(family)
    rows, columns = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    there = joint > 0
    information = (joint[there] * np.log(joint[there] / (rows * columns)[there])).sum()
    return float(information / -(rows * np.log(rows)).sum())
