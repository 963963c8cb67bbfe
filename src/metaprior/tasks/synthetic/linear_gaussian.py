"""Tasks of the conjugate linear-Gaussian hierarchy, for which `referees.conjugate` computes exact answers.

phi_j ~ N(mu, Sigma),   y_j = X_j phi_j + e_j,   e_j ~ N(0, s^2 I)
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from metaprior.core.options import Count, NonNegative, checked
from metaprior.core.types import Batch, Splits, Task
from metaprior.tasks.checks import DataError


class Hierarchy(NamedTuple):
    """The parameters theta of the hierarchy: the prior N(mean, covariance) of phi, and the noise.

    Attributes:
        mean: The mean of phi.
        covariance: The covariance of phi.
        noise: The standard deviation of the observations' noise.
    """

    mean: Float[Array, " d"]
    covariance: Float[Array, "d d"]
    noise: Scalar


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearGaussianTasks:
    """Tasks of the hierarchy with standard normal inputs: x [n, d], y [n, 1].

    Attributes:
        theta: The true parameters.
        shot: Observations of the support.
        query: Observations of the query.
        bias: Whether the first input is the constant 1.
        stream: A number that is folded into every key, so that the splits differ.
    """

    theta: Hierarchy
    shot: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    bias: bool = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks.

        Returns:
            Support x [n, shot, d] and y [n, shot, 1], query x [n, query, d] and y [n, query, 1].
        """
        key_phi, key_x, key_noise = jax.random.split(jax.random.fold_in(key, self.stream), 3)
        mean, covariance, noise = self.theta
        # The root by eigenvalues also works for a singular covariance, such as that of a shared slope.
        values, vectors = jnp.linalg.eigh(covariance)
        root = vectors * jnp.sqrt(jnp.maximum(values, 0))
        phi = mean + jax.random.normal(key_phi, (n, mean.shape[0]), mean.dtype) @ root.T
        points = self.shot + self.query
        x = jax.random.normal(key_x, (n, points, mean.shape[0]), mean.dtype)
        if self.bias:
            x = x.at[..., 0].set(1)
        y = jnp.einsum("npd,nd->np", x, phi) + noise * jax.random.normal(key_noise, (n, points), mean.dtype)
        y = y[..., None]
        k = self.shot
        return Task(Batch(x[:, :k], y[:, :k]), Batch(x[:, k:], y[:, k:]))


@checked
def linear_gaussian(
    *,
    features: Count = 2,
    shot: Count = 5,
    query: Count = 10,
    test_query: Count = 100,
    mean: Any = 1.0,
    covariance: Any = 1.0,
    noise: NonNegative = 0.5,
    bias: bool = False,
) -> Splits:
    """Makes tasks of the conjugate linear-Gaussian hierarchy with standard normal inputs; x is [n, d], y is [n, 1].

    Args:
        features: D, the length of phi.
        shot: Observations of the support.
        query: Observations of the query in training.
        test_query: Observations of the query in validation and test.
        mean: The mean of phi, a number or [d].
        covariance: The covariance of phi: a number, variances [d], or a matrix [d, d].
        noise: The standard deviation of the observations' noise, above 0.
        bias: Whether the first input is the constant 1.

    Returns:
        Three sources of the same distribution, with disjoint random keys.

    Raises:
        ValueError: Shapes that do not fit, a covariance that is not positive semidefinite, or a noise that is not above
            0.
    """
    d = features
    if not (np.isfinite(noise) and noise > 0):
        raise ValueError(f"noise must be a finite number above 0, got {noise!r}.")
    theta = Hierarchy(
        jnp.asarray(_broadcast("mean", mean, (d,)), float), jnp.asarray(_matrix(covariance, d), float),
        jnp.asarray(noise, float),
    )  # fmt: skip
    sizes = [query] + 2 * [test_query]
    return Splits(*(LinearGaussianTasks(theta, shot, size, bias, stream) for stream, size in enumerate(sizes)))


def _broadcast(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(value, float)
    if array.shape not in ((), shape) or not np.isfinite(array).all():
        raise DataError(f"{name} must be a finite number or a finite array of shape {shape}, got shape {array.shape}.")
    return np.broadcast_to(array, shape)


def _matrix(covariance: Any, d: int) -> np.ndarray:
    array = np.asarray(covariance, float)
    if array.ndim < 2:
        return np.diag(_nonnegative(_broadcast("covariance", array, (d,))))
    array = _broadcast("covariance", array, (d, d))
    if not np.allclose(array, array.T):
        raise DataError("covariance must be symmetric, got a matrix that is not.")
    _nonnegative(np.linalg.eigvalsh(array))
    return array


def _nonnegative(variances: np.ndarray) -> np.ndarray:
    if variances.min() < -1e-10:
        raise DataError(f"covariance must have no negative eigenvalue, got {variances.min():.3g}.")
    return variances
