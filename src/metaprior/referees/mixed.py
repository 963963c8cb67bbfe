"""The classical mixed model of a grouped table, with varying intercept and slopes, by NUTS or restricted likelihood.

    phi_j ~ N(mu, Sigma),   y_j ~ N(X_j phi_j, s^2 I),   X_j = [1, x_j]

Coefficients that do not vary have variance 0 (Gelman & Hill 2007, ch. 12-13; Bates et al. 2015). Given (mu, Sigma, s),
the model of a new group is conjugate, so its predictive is exact: a mixture over the draws of NUTS, or one normal at
the estimate of statsmodels. Both need the extra `truth`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metaprior.core.extras import extra
from metaprior.core.likelihoods import Normals
from metaprior.core.types import Batch
from metaprior.inference.particles import systematic
from metaprior.referees.conjugate import exact_log_marginal, exact_predictive
from metaprior.tasks.synthetic.linear_gaussian import Hierarchy


class Rows(NamedTuple):
    """A grouped table.

    Attributes:
        x: Features.
        y: The target.
        group: The group of each row, 0..J-1.
    """

    x: Float[Array, "n d"]
    y: Float[Array, "n 1"]
    group: Int[Array, " n"]


def with_intercept(x: Float[Array, "n d"]) -> Float[Array, "n c"]:
    """Returns [1, x], the features after a column of ones.

    Args:
        x: Features.
    """
    return jnp.concatenate([jnp.ones((x.shape[0], 1), x.dtype), x], 1)


def mixed_by_nuts(
    rows: Rows, key: PRNGKeyArray, *, varying: Sequence[int] | None = None, draws: int = 1000, warmup: int = 1000
) -> Hierarchy:
    """Draws (mu, Sigma, s) from their posterior, by one chain of NUTS on the whole hierarchy, non-centred.

    The hyper-priors are weak for standardised columns: mu ~ N(0, 5^2), standard deviations and s ~ |N(0, 2^2)|,
    correlations ~ LKJ(2).

    Args:
        rows: The table.
        key: The random key.
        varying: The columns of [1, x] whose coefficients vary between groups. None means all.
        draws: The number of draws after the warm-up.
        warmup: The number of warm-up steps.

    Returns:
        The draws, along the leading axis of each field.

    Raises:
        MissingExtra: numpyro is not installed.
        ValueError: `varying` names no column, the same one twice, or one that does not exist.
    """
    with extra("truth", "mixed_by_nuts"):
        import numpyro
        import numpyro.distributions as given
        from numpyro import infer
    x, vary = with_intercept(rows.x), _columns(varying, rows)
    z_columns, groups = x[:, vary], int(rows.group.max()) + 1

    def model() -> None:
        mean = numpyro.sample("mean", given.Normal(0, 5).expand([x.shape[1]]).to_event(1))
        sd = jnp.asarray(numpyro.sample("sd", given.HalfNormal(2).expand([len(vary)]).to_event(1)))
        root = sd[:, None] * (
            numpyro.sample("correlation", given.LKJCholesky(len(vary), 2.0)) if len(vary) > 1 else jnp.ones((1, 1))
        )
        numpyro.deterministic("root", root)
        noise = numpyro.sample("noise", given.HalfNormal(2))
        z = numpyro.sample("z", given.Normal(0, 1).expand([groups, len(vary)]).to_event(2))
        centre = x @ mean + (z_columns * (z @ root.T)[rows.group]).sum(1)
        numpyro.sample("y", given.Normal(centre, noise), obs=rows.y[:, 0])

    chain = infer.MCMC(infer.NUTS(model), num_warmup=warmup, num_samples=draws, progress_bar=False)
    chain.run(key)
    found = chain.get_samples()
    covariance = jnp.zeros((draws, x.shape[1], x.shape[1]))
    covariance = covariance.at[:, vary[:, None], vary].set(found["root"] @ found["root"].swapaxes(1, 2))
    return Hierarchy(found["mean"], covariance, found["noise"])


def mixed_by_statsmodels(rows: Rows, *, varying: Sequence[int] | None = None) -> Hierarchy:
    """Estimates (mu, Sigma, s) by restricted maximum likelihood, with statsmodels' MixedLM.

    Args:
        rows: The table.
        varying: The columns of [1, x] whose coefficients vary between groups. None means all.

    Returns:
        The estimate, as a single draw.

    Raises:
        MissingExtra: statsmodels is not installed.
        ValueError: `varying` names no column, the same one twice, or one that does not exist.
    """
    with extra("truth", "mixed_by_statsmodels"):
        from statsmodels.regression.mixed_linear_model import MixedLM
    x, vary = np.asarray(with_intercept(rows.x), float), _columns(varying, rows)
    model = MixedLM(np.asarray(rows.y[:, 0], float), x, np.asarray(rows.group), exog_re=x[:, vary])
    found = model.fit(reml=True, method=["lbfgs", "bfgs", "cg"])
    covariance = np.zeros((x.shape[1], x.shape[1]))
    covariance[np.ix_(vary, vary)] = found.cov_re
    mean, noise = np.asarray(found.fe_params), np.sqrt(found.scale)
    return Hierarchy(*(jnp.asarray(value, float)[None] for value in (mean, covariance, noise)))


def new_group(
    draws: Hierarchy, support: Batch, x: Float[Array, "m d"], key: PRNGKeyArray, components: int = 200
) -> Normals:
    """Computes p(y at x | support of a new group, the data of the draws).

    The draws are weighted by the marginal likelihood of the support, as it is evidence on (mu, Sigma, s) too. The
    mixture consists of `components` draws, resampled by these weights. Examples of weight 0 are ignored; if all are,
    the result is the prior predictive.

    Args:
        draws: Draws of (mu, Sigma, s), along the leading axis of each field.
        support: The group's observations, x [n, d] and y [n, 1].
        x: The inputs of the queries, without the column of ones.
        key: The random key of the resampling.
        components: The number of components of the mixture. A single draw gives one component.

    Returns:
        A mixture of normals for each query.
    """
    w = jnp.ones(support.x.shape[0]) if support.weight is None else (support.weight > 0).astype(float)
    # A padded row becomes a row of zeros, an observation of the noise alone; its log density is subtracted again.
    shown = Batch(with_intercept(support.x) * w[:, None], support.y * w[:, None])

    def one(theta: Hierarchy) -> tuple[Array, Array, Array]:
        blank = -0.5 * jnp.log(2 * jnp.pi * theta.noise**2) * (1 - w).sum()
        predictive = exact_predictive(theta, shown, with_intercept(x))
        variance = jnp.diagonal(predictive.covariance)
        return exact_log_marginal(theta, shown) - blank, predictive.mean, variance

    log_weight, means, variances = jax.vmap(one)(draws)
    if log_weight.shape[0] > 1:
        pick = systematic(key, jax.nn.softmax(log_weight), components)
        means, variances = means[pick], variances[pick]
    return Normals(means[..., None], variances[..., None])


def within_sd(rows: Rows) -> float:
    """Estimates the standard deviation of the noise, by least squares within each group.

    The groups are pooled by their degrees of freedom. No prior is needed.

    Args:
        rows: The table.

    Raises:
        ValueError: No group has more rows than coefficients.
    """
    x, y, group = np.asarray(with_intercept(rows.x), float), np.asarray(rows.y, float), np.asarray(rows.group)
    squares, freedom = 0.0, 0
    for j in np.unique(group):
        own = group == j
        solution, _, rank, _ = np.linalg.lstsq(x[own], y[own], rcond=None)
        squares += float(((y[own] - x[own] @ solution) ** 2).sum())
        freedom += int(own.sum() - rank)
    if freedom < 1:
        raise ValueError(
            f"rows must have a group with more rows than coefficients ({x.shape[1]}), got none, so the noise cannot be "
            "estimated. State its scale."
        )
    return float(np.sqrt(squares / freedom))


def _columns(varying: Sequence[int] | None, rows: Rows) -> np.ndarray:
    width = rows.x.shape[1] + 1
    chosen = np.arange(width) if varying is None else np.asarray(varying, int)
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= width or len(set(chosen.tolist())) < len(chosen):
        raise ValueError(f"varying must be different columns of [1, x], 0 to {width - 1}, got {varying}.")
    return chosen
