"""Matrix-free Gauss-Newton curvature by the Lanczos process of matfree: it needs only products with R R'.

R are the whitened rows. log det(I + R R') is estimated by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).
Draws and variances use the Rayleigh-Ritz approximation on one Krylov space.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.extras import extra
from metaprior.core.likelihoods import Likelihood
from metaprior.core.types import Batch
from metaprior.inference.curvature.dual import Dual, gram_of
from metaprior.inference.curvature.rows import Outputs, as_scale, chunked, curvature_root, pulled, scaled
from metaprior.inference.curvature.spectral import SpectralGaussian, Spectrum

LEADING = 8  # terms of the log determinant's derivative that are used; their weights decrease geometrically
Operator = Callable[[Float[Array, " d"]], Float[Array, " d"]]


class Lanczos(NamedTuple):
    """The curvature in a Krylov space.

    Attributes:
        krylov: The rows R' q of a Krylov basis q, and their Gram matrix.
        log_determinant: The estimate of log det(I + S H S).
    """

    krylov: Dual
    log_determinant: Scalar

    def log_det(self) -> Scalar:
        """Returns the estimate of log det(I + S H S). It is differentiable, see `log_det_estimate`."""
        return self.log_determinant

    def gaussian(self, mean: PyTree, spectrum: Spectrum, temperature: float | Array = 1.0) -> SpectralGaussian:
        """Returns N(mean, temperature S s(S H S) S). Directions outside the Krylov space keep their prior variance.

        Args:
            mean: The mean of phi.
            spectrum: The function s.
            temperature: Factor of the covariance.
        """
        return self.krylov.gaussian(mean, spectrum, temperature)

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws from N(0, S (I + S H S)^-1 S).

        Args:
            key: Random key.
        """
        return self.krylov.sample(key)

    def quadratic(self, row: PyTree) -> Scalar:
        """Computes row S (I + S H S)^-1 S row'. It is never too small, and exact if the order is large enough.

        Args:
            row: A row, shaped as phi.
        """
        return self.krylov.quadratic(row)


def lanczos(
    outputs: Outputs,
    likelihood: Likelihood,
    phi: PyTree,
    batch: Batch,
    scale: PyTree,
    key: PRNGKeyArray | None = None,
    *,
    order: int = 32,
    probes: int = 16,
) -> Lanczos:
    """Computes the Gauss-Newton curvature of the batch's summed nll at phi in a Krylov space.

    A product with the curvature is a jvp and a vjp. Memory is order P for the posterior, and n r order for the log
    determinant.

    Args:
        outputs: Function (phi, x) -> outputs [n, c].
        likelihood: The likelihood.
        phi: The point of the curvature.
        batch: The n examples.
        scale: The prior's scale S, a scalar or shaped as phi.
        key: Random key for the start vector and the probes. None uses a fixed key.
        order: Dimension of the Krylov spaces, at most n r. The result is exact if it is at least the number of distinct
            eigenvalues.
        probes: Number of random sign vectors over which the log determinant is averaged. Its error decreases as
            1/sqrt(probes).

    Raises:
        ValueError: order or probes is below 1.
        MissingExtra: matfree is not installed.
    """
    if order < 1 or probes < 1:
        raise ValueError(f"order and probes must be at least 1, got {order} and {probes}.")
    whole = as_scale(scale, phi)
    f, pull = pulled(outputs, phi, batch.x)
    root = curvature_root(likelihood, f, batch)
    push = jax.linearize(lambda p: outputs(p, batch.x), phi)[1]
    n, _, r = root.shape
    order = min(order, n * r)

    def row(u: Float[Array, " nr"]) -> PyTree:
        return scaled(whole, pull(jnp.einsum("ncr,nr->nc", root, u.reshape(n, r))))

    def gram(u: Float[Array, " nr"]) -> Float[Array, " nr"]:
        return jnp.einsum("ncr,nc->nr", root, push(scaled(whole, row(u)))).reshape(-1)

    probe_key, start_key = jax.random.split(jax.random.key(0) if key is None else key)
    signs = jax.random.rademacher(probe_key, (probes, n * r), f.dtype)
    basis = krylov_basis(gram, jax.random.normal(start_key, (n * r,), f.dtype), order)
    rows = chunked(row, basis, pull)
    return Lanczos(Dual(whole, rows, gram_of(rows)), log_det_estimate(gram, signs, order))


def krylov_basis(matvec: Operator, start: Float[Array, " d"], order: int) -> Float[Array, "order d"]:
    """Computes orthonormal rows that span the Krylov space of a symmetric operator. No gradient flows through them.

    Args:
        matvec: The operator.
        start: The first vector [d].
        order: Dimension of the space.
    """
    # If the space is exhausted (fewer distinct eigenvalues than its order), Lanczos continues with rounding errors,
    # which are not orthogonal to the earlier vectors. Therefore orthonormalise once more.
    return jnp.linalg.qr(_tridiagonal(matvec, start, order)[0].T)[0].T


def log_det_estimate(matvec: Operator, probes: Float[Array, "m d"], order: int) -> Scalar:
    """Computes the mean of z' log(I + A) z over probes z by Lanczos quadrature.

    Its derivative is that of z' log(I + A) z by the Daleckii-Krein formula in the same Krylov space: a weighted sum of
    forms x' dA x, of which the 8 with the largest weights are used. Unlike the derivative of the Lanczos recurrence, it
    is finite if the Krylov space is exhausted.

    Args:
        matvec: Function v -> A v, with A positive semi-definite.
        probes: Random sign vectors z [m, d].
        order: Dimension of the Krylov spaces.
    """

    def quadrature(z: Float[Array, " d"]) -> tuple[Scalar, Float[Array, "leading d"]]:
        krylov, small = _tridiagonal(lambda u: u + matvec(u), z, order)
        values, vectors = jnp.linalg.eigh(small)
        # No eigenvalue of I + A is below 1, but rounding can give smaller values if the space is exhausted.
        values, first = jnp.maximum(values, 1), jnp.linalg.norm(z) * vectors[0]
        weights, turns = jnp.linalg.eigh(jnp.outer(first, first) * _log_differences(values))
        weights, turns = jnp.maximum(weights, 0)[-LEADING:], turns[:, -LEADING:]
        return (first**2 * jnp.log(values)).sum(), (jnp.sqrt(weights) * (vectors @ turns)).T @ krylov

    values, forms = jax.vmap(quadrature)(probes)
    first_order = jax.vmap(jax.vmap(lambda x: x @ matvec(x)))(forms).sum(1)
    return (values + first_order - jax.lax.stop_gradient(first_order)).mean()


def _log_differences(values: Float[Array, " k"]) -> Float[Array, "k k"]:
    """Computes (log a - log b) / (a - b) for all pairs of positive values, which is 1/a if they are equal."""
    a, b = values[:, None], values[None, :]
    gap = (a - b) / b
    return jnp.where(gap == 0, 1, jnp.log1p(gap) / jnp.where(gap == 0, 1, gap)) / b


def _tridiagonal(
    matvec: Operator, start: Float[Array, " d"], order: int
) -> tuple[Float[Array, "order d"], Float[Array, "order order"]]:
    """Computes the Lanczos vectors and the tridiagonal matrix, as constants. An exhausted space has zeros."""
    with extra("lanczos", "Lanczos curvature"):
        from matfree.decomp import tridiag_sym
    decomposed = tridiag_sym(order, custom_vjp=False)(matvec, start)
    krylov, small = jax.lax.stop_gradient((decomposed.Q_tall, decomposed.J_small))
    return jnp.nan_to_num(jnp.asarray(krylov)), jnp.nan_to_num(jnp.asarray(small))
