"""The referee "truth": compares learners with the exact answers on the conjugate linear-Gaussian hierarchy.

The comparison uses only a learner's predictive, so it applies to every learner. At unit inputs the predictive is the
posterior of phi; without a support it is the prior; and the product of one-step-ahead predictives is the marginal
likelihood (Dawid 1984).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from metaprior.core.likelihoods import Gaussian
from metaprior.core.named import lookup
from metaprior.core.types import Batch, Learner, Model
from metaprior.learners.registry import learners_before, make_learner, traits_of
from metaprior.referees.conjugate import empirical_bayes_mean, exact_log_marginal, exact_posterior, exact_predictive
from metaprior.tasks.synthetic.linear_gaussian import Hierarchy, LinearGaussianTasks, linear_gaussian
from metaprior.training.loop import Training, fit


class Verdict(NamedTuple):
    """How far a learner is from the exact answers. For these, every number is 0, except that `sd_ratio` is 1.

    Attributes:
        prior_mean: Difference of the learned prior mean from the exact empirical-Bayes optimum, root mean square over
            weights.
        posterior_mean: Root mean square difference from the exact posterior mean, in exact posterior standard
            deviations.
        sd_ratio: Posterior standard deviations divided by the exact ones, geometric mean.
        log_marginal: log p(support) minus the exact one, in nats per task.
        nll: Of the queries, minus that of the exact predictive, in nats per query.
        ks: Largest difference of the distribution of the queries' PIT from the uniform one (simulation-based
            calibration).
        pit: The histogram of that distribution, with mean 1.
    """

    prior_mean: float
    posterior_mean: float
    sd_ratio: float
    log_marginal: float
    nll: float
    ks: float
    pit: list[float]


def linear_model(features: int) -> Model:
    """Returns the hierarchy's model, y = x phi.

    Args:
        features: The number of features, d.
    """

    def init(key: PRNGKeyArray, x: Array) -> PyTree:
        return {"head": 0.1 * jax.random.normal(key, (features, 1))}

    return Model(init, lambda phi, x: x @ phi["head"])


def judge(
    learner: Learner, params: PyTree, source: LinearGaussianTasks, seen: Batch, key: PRNGKeyArray, tasks: int
) -> Verdict:
    """Compares a trained learner with the exact answers on new tasks.

    Args:
        learner: The learner.
        params: Its meta-learned parameters.
        source: The tasks, of a known hierarchy.
        seen: The tasks that the exact empirical-Bayes optimum is computed from, x [tasks, n, d] and y [tasks, n, 1].
        key: The random key.
        tasks: The number of new tasks.
    """
    theta, units = source.theta, jnp.eye(source.theta.mean.shape[0])
    new = source.sample(key, tasks)
    keys = jax.random.split(key, tasks)

    def answer(support: Batch, x: Array, key: PRNGKeyArray) -> Any:
        return learner.predict(params, learner.posterior(params, support, Batch(x, None), key), x, key)

    def one(task: Any, key: PRNGKeyArray) -> dict[str, Array]:
        support, query = task
        posterior, exact = answer(support, units, key), exact_posterior(theta, support)
        sd = jnp.sqrt(jnp.diagonal(exact.covariance))
        variance = jnp.maximum(posterior.variance()[:, 0] - theta.noise**2, 1e-12)
        predictive, truth = answer(support, query.x, key), exact_predictive(theta, support, query.x)
        spread = jnp.sqrt(jnp.diagonal(truth.covariance))
        exact_log = jax.scipy.stats.norm.logpdf(query.y[:, 0], truth.mean, spread)

        def next_one(i: Array) -> Array:
            before = support._replace(weight=(jnp.arange(support.x.shape[0]) < i).astype(support.y.dtype))
            at = answer(before, support.x[i][None], key)
            return at.log_prob(support.y[i][None])[0]

        marginal = jax.vmap(next_one)(jnp.arange(support.x.shape[0])).sum()
        return {
            "posterior_mean": (((posterior.mean()[:, 0] - exact.mean) / sd) ** 2).mean(),
            "log_sd_ratio": (0.5 * jnp.log(variance) - jnp.log(sd)).mean(),
            "log_marginal": marginal - exact_log_marginal(theta, support),
            "nll": (exact_log - predictive.log_prob(query.y)).mean(),
            "pit": predictive.cdf(query.y)[:, 0],
        }

    found = jax.device_get(jax.jit(lambda t, k: jax.lax.map(lambda a: one(*a), (t, k), batch_size=20))(new, keys))
    nothing = jax.tree.map(lambda leaf: leaf[0][:0], new.support)
    prior_gap = answer(nothing, units, key).mean()[:, 0] - empirical_bayes_mean(theta, seen)
    pit = np.sort(found["pit"].reshape(-1))
    ks = float(np.abs(pit - (np.arange(pit.size) + 0.5) / pit.size).max())
    return Verdict(
        prior_mean=float(jnp.sqrt((prior_gap**2).mean())),
        posterior_mean=float(np.sqrt(found["posterior_mean"].mean())),
        sd_ratio=float(np.exp(found["log_sd_ratio"].mean())),
        log_marginal=float(found["log_marginal"].mean()),
        nll=float(found["nll"].mean()),
        ks=ks,
        pit=(np.histogram(pit, 20, (0, 1))[0] / pit.size * 20).tolist(),
    )


def referee(
    names: tuple[str, ...] | None = None,
    *,
    steps: int = 2000,
    tasks: int = 200,
    seed: int = 0,
    report: Callable[[str, Verdict], None] = lambda name, verdict: None,
    **hierarchy: Any,
) -> dict[str, Verdict]:
    """Trains learners on tasks of one hierarchy and compares them with the exact answers.

    Args:
        names: The learners. The default is every learner with options for this referee (`Traits.referees["truth"]`).
        steps: The meta-steps of each learner's training.
        tasks: The number of new tasks.
        seed: The seed of everything random.
        report: Is called with a learner's name and verdict as soon as the verdict is known.
        **hierarchy: Options of `linear_gaussian`.

    Returns:
        The verdicts by name.

    Raises:
        ValueError: A learner has no options for this referee.
    """
    sizes: dict[str, Any] = {"features": 2, "shot": 5, "query": 5, "test_query": 20}
    splits = linear_gaussian(**(sizes | hierarchy))
    source: Any = splits.train
    theta: Hierarchy = source.theta
    model, likelihood = linear_model(theta.mean.shape[0]), Gaussian(float(theta.noise))
    # The learners see new tasks at every meta-step. The exact optimum of very many tasks stands in for their optimum.
    many = source.sample(jax.random.key(seed + 7), 20_000).support
    verdicts, judged = {}, learners_before("truth")
    for name in tuple(judged) if names is None else names:
        learner = make_learner(name, model, likelihood, **lookup("learner", name, judged))
        common = Training(
            steps=steps, rate=1e-2, schedule="cosine", chunk=min(500, steps), seed=seed, validate_every=steps
        )
        training = replace(common, **traits_of(name).training)
        fitted = fit(learner, splits, training, name=name)
        verdicts[name] = judge(learner, fitted.params, splits.test, many, jax.random.key(seed + 8), tasks)  # pyright: ignore[reportArgumentType]
        report(name, verdicts[name])
    return verdicts
