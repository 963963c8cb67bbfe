"""If the support fits two explanations, does the posterior cover both?

The tasks have explanations that are known exactly. The exact predictive, with mass 1/2 on each explanation, is judged
beside the learners.

References:
    Finn, Xu & Levine 2018, sec. 5, figs. 2 and 3, and the coverage of table 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Categories, Normals
from metaprior.core.types import Learner
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.tasks.synthetic.explained import Explained, ExplainedTasks

NEAR = 1 / 3


class Coverage(NamedTuple):
    """How well the draws of a posterior cover the explanations, over tasks.

    Attributes:
        covered: The fraction of explanations that at least one draw is close to.
        explaining: The fraction of draws that are close to an explanation.
        nll: The mean negative log likelihood of each query point alone.
        joint_nll: The negative log likelihood of all query points of a task together, per point. It is larger for draws
            that lie between the explanations, or switch between them from point to point.
        draws: The number of components of the predictive.
    """

    covered: Figure
    explaining: Figure
    nll: Figure
    joint_nll: Figure
    draws: int


def curves(predictive: Any) -> Float[Array, "s n d"] | Int[Array, "s n"]:
    """Returns the prediction of each draw at n inputs: its mean, or its most likely class.

    Args:
        predictive: A mixture of draws.

    Raises:
        ValueError: A predictive that is neither `Normals` nor `Categories`.
    """
    if isinstance(predictive, Normals):
        return predictive.means
    if isinstance(predictive, Categories):
        return predictive.log_probs.argmax(-1)
    raise ValueError(f"predictive must be a mixture of draws, Normals or Categories, got {type(predictive).__name__}.")


def closeness(draws: Array, explanations: Array, near: float) -> Float[Array, "s e"]:
    """Returns which draws are close to which explanations.

    A draw is close to an explanation if their distance is at most `near` times the distance from that explanation to
    the nearest other one. The distance of curves is the root mean square over the inputs, that of labels is the
    fraction that differs. Both satisfy the triangle inequality, so for `near` below 1/2 no draw is close to two
    explanations. Explanations that are equal everywhere are never close.

    Args:
        draws: Curves [s, n, d] or labels [s, n].
        explanations: Curves [e, n, d] or labels [e, n].
        near: The largest distance as a fraction.

    Returns:
        1 or 0, [s, e].
    """

    def distance(a: Array, b: Array) -> Array:
        if jnp.issubdtype(b.dtype, jnp.integer):
            return (a[:, None] != b).mean(-1)
        return jnp.sqrt(((a[:, None] - b) ** 2).sum(-1).mean(-1))

    between = distance(explanations, explanations) + jnp.diag(jnp.full(explanations.shape[0], jnp.inf))
    gap = between.min(0)
    return ((distance(draws, explanations) <= near * gap) & (gap > 0)).astype(float)


def joint_log_prob(predictive: Any, y: Array) -> Array:
    """Computes log p(y_1, ..., y_n), the log of the mean over draws of the product over points."""
    singly = jax.vmap(lambda one: one.log_prob(y))(jax.tree.map(lambda leaf: leaf[:, None], predictive))
    return logsumexp(singly.sum(-1)) - jnp.log(singly.shape[0])


def judge(predictive: Any, y: Array, explanations: Array, near: float) -> tuple[Array, Array, Array, Array]:
    """Computes the metrics of one task, in the order of `Coverage`."""
    close = closeness(curves(predictive), explanations, near)
    nll, joint = -predictive.log_prob(y).mean(), -joint_log_prob(predictive, y) / y.shape[0]
    return close.max(0).mean(), close.max(1).mean(), nll, joint


def ambiguity(
    learner: Learner,
    params: PyTree,
    source: ExplainedTasks,
    key: PRNGKeyArray,
    *,
    tasks: int = 600,
    near: float = NEAR,
    chunk: int = 20,
) -> Coverage:
    """Measures how well the draws of a learner's posterior cover the explanations of new supports.

    Args:
        learner: The learner.
        params: Its parameters.
        source: The source of the tasks.
        key: Random key.
        tasks: The number of tasks.
        near: See `closeness`, inside (0, 1/2).
        chunk: The number of tasks in memory at once.

    Returns:
        The coverage.

    Raises:
        ValueError: A source whose explanations are unknown, or numbers out of range.
    """

    def one(params: PyTree, explained: Explained, key: PRNGKeyArray) -> Any:
        key_adapt, key_predict = jax.random.split(key)
        support, query = explained.task
        posterior = learner.adapt(params, support, key_adapt)
        return learner.predict(params, posterior, query.x, key_predict)

    return _over_tasks(one, params, source, key, tasks, near, chunk)


def referee(source: ExplainedTasks, key: PRNGKeyArray, *, tasks: int = 600, near: float = NEAR) -> Coverage:
    """Measures the exact predictive on the tasks that `ambiguity` draws from the same key.

    Args:
        source: The source of the tasks.
        key: Random key.
        tasks: The number of tasks.
        near: See `closeness`, inside (0, 1/2).

    Returns:
        The coverage.

    Raises:
        ValueError: As in `ambiguity`.
    """

    def one(params: PyTree, explained: Explained, key: PRNGKeyArray) -> Any:
        return exact(explained.targets, source.noise)

    return _over_tasks(one, None, source, key, tasks, near, tasks)


def exact(targets: Float[Array, "e m 1"] | Int[Array, "e m"], noise: float) -> Normals | Categories:
    """Returns the predictive with equal mass on each explanation.

    Args:
        targets: The targets under each explanation.
        noise: The standard deviation of the observations, for curves.
    """
    if jnp.issubdtype(targets.dtype, jnp.integer):
        return Categories(jnp.log(jax.nn.one_hot(targets, 2)))
    return Normals(targets, jnp.full_like(targets, noise**2))


def _over_tasks(
    one: Any, params: PyTree, source: ExplainedTasks, key: PRNGKeyArray, tasks: int, near: float, chunk: int
) -> Coverage:
    if not isinstance(source, ExplainedTasks):
        raise ValueError(
            "source must be of tasks whose explanations are known, such as 'wave_or_line' or 'two_circles' (recipes "
            f"ambiguous, ambiguous-2d), got {type(source).__name__}."
        )
    if tasks < 1:
        raise ValueError(f"tasks must be at least 1, got {tasks}.")
    if not 0 < near < 0.5:
        raise ValueError(f"near must be inside (0, 1/2), got {near}.")
    key_tasks, key_draws = jax.random.split(key)

    @jax.jit
    def run(params: PyTree, source: ExplainedTasks) -> tuple[Array, ...]:
        def per_task(at: tuple[Explained, PRNGKeyArray]) -> tuple[Array, ...]:
            explained, key = at
            predictive = one(params, explained, key)
            figures = judge(predictive, explained.task.query.y, explained.targets, near)
            return *figures, jnp.asarray(curves(predictive).shape[0])

        over = source.explained(key_tasks, tasks), jax.random.split(key_draws, tasks)
        return jax.lax.map(per_task, over, batch_size=min(chunk, tasks))

    covered, explaining, nll, joint, draws = (np.asarray(found) for found in run(params, source))
    return Coverage(figure_of(covered), figure_of(explaining), figure_of(nll), figure_of(joint), int(draws[0]))
