"""Laplace's approximation of a task's marginal likelihood (Grant et al. 2018, sec. 4; MacKay 1992).

For a prior N(theta, S^2),

    -log p(D | theta) ~ -log p(D | phi) - log p(phi | theta) + 1/2 log det((H + S^-2) / 2 pi).

The prior is part of the curvature and of the objective, and the nll is the sum over examples, not their mean.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.types import Batch
from metaprior.inference.curvature import CURVATURES, Curvature, as_scale


def negative_log_evidence(
    outputs: Callable[..., Array],
    likelihood: Likelihood,
    phi: PyTree,
    theta: PyTree,
    batch: Batch,
    scale: PyTree,
    *,
    curvature: str | Callable[..., Curvature] = "dual",
    weight: float | Array = 0.5,
    off_mode: bool = False,
    key: PRNGKeyArray | None = None,
) -> Scalar:
    """Approximates -log p(batch | theta) for phi ~ N(theta, scale^2) by an expansion around phi.

    It is exact, constants included, for Gaussian likelihoods of linear outputs if phi is the posterior mode and the
    curvature is "dual". It is differentiable in phi, theta and scale.

    Args:
        outputs: Function (phi, x) -> outputs [n, c].
        likelihood: The likelihood.
        phi: The expansion point.
        theta: The prior's mean, shaped as phi.
        batch: The n examples.
        scale: The prior's standard deviation above 0, a scalar or shaped as phi.
        curvature: A name in CURVATURES, or a function with their arguments.
        weight: Coefficient of the log determinant: 1/2 in the theory, LLAMA's eta.
        off_mode: Add the Newton step from phi to the mode, which makes the result exact at any phi.
        key: Random key for a stochastic curvature.

    References:
        Grant et al. 2018, Recasting gradient-based meta-learning as hierarchical Bayes, sec. 4; MacKay 1992.
    """
    whole = as_scale(scale, phi)
    fit = CURVATURES[curvature] if isinstance(curvature, str) else curvature

    def joint(phi: PyTree) -> Scalar:
        nll = likelihood.nll(outputs(phi, batch.x), batch.y)
        gaps = jax.tree.map(lambda p, t, s: 0.5 * (((p - t) / s) ** 2).sum(), phi, theta, whole)
        return (nll if batch.weight is None else nll * batch.weight).sum() + sum(jax.tree.leaves(gaps))

    fitted = fit(outputs, likelihood, phi, batch, whole, key)
    # The prior's normalising constant P/2 log 2 pi + log det S cancels with that of the Gaussian integral.
    total = joint(phi) + weight * fitted.log_det()
    return total - 0.5 * fitted.quadratic(jax.grad(joint)(phi)) if off_mode else jnp.asarray(total)
