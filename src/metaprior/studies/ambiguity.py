"""Where the support fits two explanations, does the posterior hold both?

After Finn, Xu & Levine 2018 (sec. 5, figs. 2 and 3, and the coverage of table 1), on tasks whose explanations are known
exactly. The truth itself is judged beside the learners: half of its mass on each explanation.
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
    """Over tasks: the share of explanations covered, the share of draws that explain, and the queries' nll.

    covered: explanations that at least one draw lies close to. explaining: draws that lie close to an explanation.
    nll: of each query point alone, mean. joint_nll: of a task's query points together, per point: draws that mix the
    explanations from point to point, or lie between them, lose by it. draws: components of the predictive.
    """

    covered: Figure
    explaining: Figure
    nll: Figure
    joint_nll: Figure
    draws: int


def curves(predictive: Any) -> Float[Array, "s n d"] | Int[Array, "s n"]:
    """What each draw says at n inputs: its mean, or its likeliest class.

    Raises ValueError for a predictive whose draws say neither.
    """
    if isinstance(predictive, Normals):
        return predictive.means
    if isinstance(predictive, Categories):
        return predictive.log_probs.argmax(-1)
    raise ValueError(f"predictive: came {type(predictive).__name__}, needs Normals or Categories, a mixture of draws")


def closeness(draws: Array, explanations: Array, near: float) -> Float[Array, "s e"]:
    """1 where a draw lies close to an explanation: within `near` of its distance to the nearest other explanation.

    draws [s, n, d] and explanations [e, n, d], whose distance is the root mean square over the inputs; or labels [s, n]
    and [e, n], whose distance is the share that differs. Both obey the triangle inequality, so below 1/2 no draw is
    close to two explanations. Explanations that are the same everywhere are never close.
    """

    def distance(a: Array, b: Array) -> Array:
        if jnp.issubdtype(b.dtype, jnp.integer):
            return (a[:, None] != b).mean(-1)
        return jnp.sqrt(((a[:, None] - b) ** 2).sum(-1).mean(-1))

    between = distance(explanations, explanations) + jnp.diag(jnp.full(explanations.shape[0], jnp.inf))
    gap = between.min(0)
    return ((distance(draws, explanations) <= near * gap) & (gap > 0)).astype(float)


def joint_log_prob(predictive: Any, y: Array) -> Array:
    """log p(y_1, ..., y_n): the log of the mean over draws of the product over points."""
    singly = jax.vmap(lambda one: one.log_prob(y))(jax.tree.map(lambda leaf: leaf[:, None], predictive))
    return logsumexp(singly.sum(-1)) - jnp.log(singly.shape[0])


def judge(predictive: Any, y: Array, explanations: Array, near: float) -> tuple[Array, Array, Array, Array]:
    """One task's figures, in the order of `Coverage`."""
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
    """How well the posterior's draws cover the explanations of `tasks` new supports.

    near: see `closeness`, inside (0, 1/2). chunk: tasks in memory at once.
    """

    def one(params: PyTree, explained: Explained, key: PRNGKeyArray) -> Any:
        key_adapt, key_predict = jax.random.split(key)
        support, query = explained.task
        posterior = learner.adapt(params, support, key_adapt)
        return learner.predict(params, posterior, query.x, key_predict)

    return _over_tasks(one, params, source, key, tasks, near, chunk)


def referee(source: ExplainedTasks, key: PRNGKeyArray, *, tasks: int = 600, near: float = NEAR) -> Coverage:
    """The exact predictive, judged on the tasks that `ambiguity` draws from the same key."""

    def one(params: PyTree, explained: Explained, key: PRNGKeyArray) -> Any:
        return exact(explained.targets, source.noise)

    return _over_tasks(one, None, source, key, tasks, near, tasks)


def exact(targets: Float[Array, "e m 1"] | Int[Array, "e m"], noise: float) -> Normals | Categories:
    """The predictive with equal mass on each explanation."""
    if jnp.issubdtype(targets.dtype, jnp.integer):
        return Categories(jnp.log(jax.nn.one_hot(targets, 2)))
    return Normals(targets, jnp.full_like(targets, noise**2))


def _over_tasks(
    one: Any, params: PyTree, source: ExplainedTasks, key: PRNGKeyArray, tasks: int, near: float, chunk: int
) -> Coverage:
    if not isinstance(source, ExplainedTasks):
        raise ValueError(
            f"source: came {type(source).__name__}, whose explanations are not known; needs tasks such as "
            "'wave_or_line' or 'two_circles' (recipes ambiguous, ambiguous-2d)"
        )
    if tasks < 1:
        raise ValueError(f"tasks: came {tasks}, needs at least 1")
    if not 0 < near < 0.5:
        raise ValueError(f"near: came {near}, needs a share inside (0, 1/2)")
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
