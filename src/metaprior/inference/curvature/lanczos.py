"""Matrix-free Gauss-Newton curvature: only products with R R' (R the whitened rows), by the Lanczos process of matfree.

log det(I + R R') by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017); draws and variances by Rayleigh-Ritz on
one Krylov space.
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

LEADING = 8  # of the quadratic forms of the log determinant's derivative; their weights fall geometrically
Operator = Callable[[Float[Array, " d"]], Float[Array, " d"]]


class Lanczos(NamedTuple):
    """The log determinant, and the rows R' q of a Krylov basis q: what `Dual` holds, for a subspace."""

    krylov: Dual
    log_determinant: Scalar

    def log_det(self) -> Scalar:
        """The estimate of log det(I + S H S); differentiable, see `log_det_estimate`."""
        return self.log_determinant

    def gaussian(self, mean: PyTree, spectrum: Spectrum, temperature: float | Array = 1.0) -> SpectralGaussian:
        """N(mean, temperature S s(S H S) S); directions outside the Krylov space keep their prior variance."""
        return self.krylov.gaussian(mean, spectrum, temperature)

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """A draw from N(0, S (I + S H S)^-1 S)."""
        return self.krylov.sample(key)

    def quadratic(self, row: PyTree) -> Scalar:
        """row S (I + S H S)^-1 S row'; never below it, and equal from a large enough order on."""
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
    """The Gauss-Newton curvature of the batch's summed nll at phi through products with it, each a jvp and a vjp.

    order: the Krylov spaces' dimension (at most n r), exact from the number of distinct eigenvalues on. probes: random
    signs whose quadratures the log determinant averages; its error falls as 1/sqrt(probes). `key` draws them (a fixed
    one if None). Memory order P for the posterior, n r order for the log determinant.
    """
    if order < 1 or probes < 1:
        raise ValueError(f"order, probes: came {order} and {probes}, need at least 1")
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
    """Orthonormal rows that span the Krylov space of a symmetric operator; no gradient flows through them."""
    # Where the space is exhausted (fewer distinct eigenvalues than its order) Lanczos goes on with rounding noise,
    # which is not orthogonal to what was found: orthonormalise once more.
    return jnp.linalg.qr(_tridiagonal(matvec, start, order)[0].T)[0].T


def log_det_estimate(matvec: Operator, probes: Float[Array, "m d"], order: int) -> Scalar:
    """The mean over probes z of z' log(I + A) z, by Lanczos quadrature; A is positive semi-definite.

    Its derivative is that of z' log(I + A) z by the Daleckii-Krein formula in the same Krylov space: a weighted sum of
    forms x' dA x, of which those with the LEADING largest weights are taken. Unlike the derivative of the Lanczos
    recurrence it stays finite where the Krylov space is exhausted.
    """

    def quadrature(z: Float[Array, " d"]) -> tuple[Scalar, Float[Array, "leading d"]]:
        krylov, small = _tridiagonal(lambda u: u + matvec(u), z, order)
        values, vectors = jnp.linalg.eigh(small)
        # No eigenvalue of I + A is below 1, whatever rounding says once the space is exhausted.
        values, first = jnp.maximum(values, 1), jnp.linalg.norm(z) * vectors[0]
        weights, turns = jnp.linalg.eigh(jnp.outer(first, first) * _log_differences(values))
        weights, turns = jnp.maximum(weights, 0)[-LEADING:], turns[:, -LEADING:]
        return (first**2 * jnp.log(values)).sum(), (jnp.sqrt(weights) * (vectors @ turns)).T @ krylov

    values, forms = jax.vmap(quadrature)(probes)
    first_order = jax.vmap(jax.vmap(lambda x: x @ matvec(x)))(forms).sum(1)
    return (values + first_order - jax.lax.stop_gradient(first_order)).mean()


def _log_differences(values: Float[Array, " k"]) -> Float[Array, "k k"]:
    """(log a - log b) / (a - b) for all pairs of positive values, 1/a where they are equal."""
    a, b = values[:, None], values[None, :]
    gap = (a - b) / b
    return jnp.where(gap == 0, 1, jnp.log1p(gap) / jnp.where(gap == 0, 1, gap)) / b


def _tridiagonal(
    matvec: Operator, start: Float[Array, " d"], order: int
) -> tuple[Float[Array, "order d"], Float[Array, "order order"]]:
    """Lanczos vectors and the tridiagonal matrix, as constants; an exactly exhausted space goes on with zeros."""
    with extra("lanczos", "Lanczos curvature"):
        from matfree.decomp import tridiag_sym
    decomposed = tridiag_sym(order, custom_vjp=False)(matvec, start)
    krylov, small = jax.lax.stop_gradient((decomposed.Q_tall, decomposed.J_small))
    return jnp.nan_to_num(jnp.asarray(krylov)), jnp.nan_to_num(jnp.asarray(small))
