"""The referee: is a learner's posterior true? Every learner on the conjugate hierarchy, where all answers are exact.

A learner is asked only what any learner answers, its predictive: at unit inputs that is the posterior of phi, with no
support it is the prior, and one observation after another it is the marginal likelihood (Dawid 1984).
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
    """How far a learner is from the exact answer; everything in it is 0 (sd_ratio: 1) for the truth.

    prior_mean: its learned prior mean against the exact empirical-Bayes optimum, rms over weights. posterior_mean: rms
    gap to the exact posterior mean, in exact posterior sds. sd_ratio: its posterior sds over the exact ones, geometric
    mean. log_marginal: its log p(support) less the exact one, nats a task. nll: of the queries, over that of the exact
    predictive, nats a point. ks: greatest gap of the queries' PIT distribution from uniform (simulation-based
    calibration). pit: that distribution's histogram, mean 1.
    """

    prior_mean: float
    posterior_mean: float
    sd_ratio: float
    log_marginal: float
    nll: float
    ks: float
    pit: list[float]


def linear_model(features: int) -> Model:
    """y = x phi, the hierarchy's own model."""

    def init(key: PRNGKeyArray, x: Array) -> PyTree:
        return {"head": 0.1 * jax.random.normal(key, (features, 1))}

    return Model(init, lambda phi, x: x @ phi["head"])


def judge(
    learner: Learner, params: PyTree, source: LinearGaussianTasks, seen: Batch, key: PRNGKeyArray, tasks: int
) -> Verdict:
    """The learner with meta-learned `params` against the exact answers on new tasks; seen: what it was fitted to."""
    theta, units = source.theta, jnp.eye(source.theta.mean.shape[0])
    new = source.sample(key, tasks)
    keys = jax.random.split(key, tasks)

    def answer(support: Batch, x: Array, key: PRNGKeyArray) -> Any:
        return learner.predict(params, learner.adapt(params, support, key), x, key)

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
    """Train each learner on tasks of one hierarchy and judge it; `hierarchy`: options of `linear_gaussian`.

    names: by default every learner that states options for it (`Traits.referees["truth"]`). report is told each verdict
    as it falls. Raises ValueError for a learner that states none.
    """
    sizes: dict[str, Any] = {"features": 2, "shot": 5, "query": 5, "test_query": 20}
    splits = linear_gaussian(**(sizes | hierarchy))
    source: Any = splits.train
    theta: Hierarchy = source.theta
    model, likelihood = linear_model(theta.mean.shape[0]), Gaussian(float(theta.noise))
    # The learners see fresh tasks without end; the exact optimum of very many stands for theirs.
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
