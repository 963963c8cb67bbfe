"""A drawing as another drawing of the same concept, deformed: a hierarchy of types and tokens.

The type is a drawing's points u_i in its own frame. A token is the type under a smooth deformation with parameters phi,
and its pen points have noise:

    T_phi(u) = u + A u + t + sum_g w_g exp(-|u - c_g|^2 / 2 l^2),   phi = (t, A, w) ~ N(mu, Sigma)
    v_j ~ (1 - e)/n sum_i N(T_phi(u_i), r^2 I) + e U

T is linear in phi. If it is known which points correspond (pen drawings, stroke by stroke), the hierarchy is the
conjugate linear-Gaussian one, and mu, Sigma and r are fitted by its exact EM. If it is not known (images), EM over the
correspondences gives the mode of phi, and Laplace's approximation there the evidence log p(v | u).

References:
    Lake, Salakhutdinov & Tenenbaum (2015), for types, tokens and the score of both directions; Myronenko & Song (2010),
        Point set registration: coherent point drift, for EM over correspondences.
"""

from dataclasses import dataclass
from functools import partial
from math import log, pi
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from metaprior.core.options import Count, NonNegative, Positive, check_fields
from metaprior.core.types import Batch
from metaprior.referees.conjugate import empirical_bayes
from metaprior.tasks.images.pens import Pairs
from metaprior.tasks.synthetic.linear_gaussian import Hierarchy

EDGE = 1.8  # deviations; the kernels' centres are on a grid from -EDGE to EDGE in both directions
AREA = 16.0  # of the uniform density of stray points, in squared deviations
JITTER = 1e-6  # on the diagonal of Sigma, which is nearly singular: kernels overlap

Points = Float[Array, "n 2"]


class Deformation(NamedTuple):
    """A deformation of one drawing into another one, and its evidence.

    Attributes:
        phi: The mode.
        log_joint: log p(v, phi | u) at the mode, without the normalising constant of the prior.
        log_evidence: Laplace's approximation of log p(v | u).
    """

    phi: Float[Array, " d"]
    log_joint: Scalar
    log_evidence: Scalar


@dataclass(frozen=True)
class Matching:
    """How drawings without known correspondences are compared.

    Attributes:
        noise: The deviation r of points, in deviations of the drawing. It replaces that of the pens: points of ink are
            not points of the pen's path.
        weight: Each point counts as this many independent ones.
        stray: The probability e of a point that belongs to no point of the type.
        steps: EM steps. The noise falls from `start` to `noise` in the first 60 % of them.
        start: The noise of the first step.
    """

    noise: Positive = 0.12
    weight: Positive = 0.3
    stray: NonNegative = 0.02
    steps: Count = 20
    start: Positive = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "matching.")


def kernels(side: int) -> Float[np.ndarray, "g 2"]:
    """Returns the centres of the kernels: a grid of side x side points.

    Args:
        side: Their number per direction. 0 leaves affine deformations.
    """
    line = np.linspace(-EDGE, EDGE, side) if side > 1 else np.zeros(side)
    return np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)


def basis(points: Points, centres: Any, scale: float = 1.2) -> Float[Array, "n k"]:
    """Returns the functions whose combinations are the deformations: 1, the coordinates, and the kernels.

    Args:
        points: Points in a drawing's frame.
        centres: The centres c_g of the kernels, [g, 2].
        scale: Their scale l.
    """
    own: Any = np if isinstance(points, np.ndarray) else jnp  # NumPy compiles nothing for each number of points
    squared = ((points[:, None] - centres) ** 2).sum(-1)
    return own.concatenate([own.ones((len(points), 1)), points, own.exp(-squared / (2 * scale**2))], 1)


def design(functions: Float[Array, "n k"]) -> Float[Array, "m d"]:
    """Returns the matrix X with T_phi(u) - u = X phi: m = 2n coordinates, d = 2k parameters.

    Args:
        functions: The values of the basis at the points u.
    """
    return jnp.kron(functions, jnp.eye(2))


def fit_prior(pairs: Pairs, centres: Float[np.ndarray, "g 2"], *, steps: int = 60) -> Hierarchy:
    """Fits the prior of deformations and the noise of points to pairs whose points correspond, by exact EM.

    Args:
        pairs: The pairs.
        centres: The centres of the kernels.
        steps: EM steps.
    """
    source, target = jnp.asarray(pairs.source), jnp.asarray(pairs.target)
    x = jax.vmap(lambda u: design(basis(u, centres)))(source)
    y = (target - source).reshape(len(source), -1, 1)
    d = x.shape[-1]
    start = Hierarchy(jnp.zeros(d), 0.05 * jnp.eye(d), jnp.asarray(0.2))
    return jax.jit(partial(empirical_bayes, steps=steps))(start, Batch(x, y))


def by_hand(prior: Hierarchy, variance: float = 0.02) -> Hierarchy:
    """Returns a prior that nothing was learned for: no mean deformation, and one variance for all parameters.

    Args:
        prior: The prior whose size and noise it has.
        variance: The variance.
    """
    d = len(prior.mean)
    return Hierarchy(jnp.zeros(d), variance * jnp.eye(d), prior.noise)


def deform(points: Any, phi: Any, centres: Float[np.ndarray, "g 2"]) -> Points:
    """Returns T_phi of points.

    Args:
        points: Points in a drawing's frame, [n, 2]. NumPy's stay NumPy's.
        phi: The parameters of the deformation, [d].
        centres: The centres of the kernels.
    """
    return points + basis(points, centres) @ phi.reshape(-1, 2)


def draw_deformations(key: PRNGKeyArray, prior: Hierarchy, n: int) -> Float[Array, "n d"]:
    """Draws deformations from the prior.

    Args:
        key: Random key.
        prior: The prior.
        n: Their number.
    """
    values, vectors = jnp.linalg.eigh(prior.covariance)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))
    return prior.mean + jax.random.normal(key, (n, len(values))) @ root.T


def register(u: Points, v: Points, prior: Hierarchy, centres: Any, matching: Matching = Matching()) -> Deformation:
    """Deforms a drawing into another one, by EM over the correspondences of their points.

    The curvature at the mode is that of EM's bound, in which correspondences are held fixed. It is positive definite,
    and exact if they are certain.

    Args:
        u: Points of the type, in its own frame.
        v: Points of the token, in its own frame.
        prior: The prior of phi. Its noise is not used.
        centres: The centres of the kernels, [g, 2].
        matching: How the points are compared.

    Returns:
        The deformation with its log evidence, in nats.
    """
    functions, n, d = basis(u, centres), len(u), len(prior.mean)
    precision = jnp.linalg.inv(prior.covariance + JITTER * jnp.eye(d))
    precision = (precision + precision.T) / 2

    def responsibilities(phi: Array, r: Scalar | float) -> tuple[Float[Array, "m n"], Float[Array, " m"]]:
        squared = ((v[:, None] - deform(u, phi, centres)) ** 2).sum(-1)
        each = jnp.log1p(-matching.stray) - log(n) - squared / (2 * r**2) - jnp.log(2 * pi * r**2)
        total = jax.nn.logsumexp(each, 1)
        if matching.stray > 0:
            total = jnp.logaddexp(total, log(matching.stray / AREA))
        return jnp.exp(each - total[:, None]), total

    def normal_equations(phi: Array, r: Scalar | float) -> tuple[Array, Array]:
        p, _ = responsibilities(phi, r)
        scale, mass = matching.weight / r**2, p.sum(0)
        curvature = jnp.kron((functions * (scale * mass)[:, None]).T @ functions, jnp.eye(2)) + precision
        moment = functions.T @ (scale * (p.T @ v - mass[:, None] * u))
        return curvature, moment.reshape(-1) + precision @ prior.mean

    fall = jnp.minimum(jnp.arange(matching.steps) / max(0.6 * matching.steps, 1), 1)
    noises = matching.start * (matching.noise / matching.start) ** fall if matching.steps > 1 else jnp.array([1.0])
    noises = noises.at[-1].set(matching.noise)

    def step(phi: Array, r: Scalar) -> tuple[Array, None]:
        return jnp.linalg.solve(*normal_equations(phi, r)), None

    phi = jax.lax.scan(step, prior.mean, noises)[0]
    fit = matching.weight * responsibilities(phi, matching.noise)[1].sum()
    gap = phi - prior.mean
    joint = fit - gap @ precision @ gap / 2
    curvature, _ = normal_equations(phi, matching.noise)
    volume = (jnp.linalg.slogdet(precision)[1] - jnp.linalg.slogdet(curvature)[1]) / 2
    return Deformation(phi, joint, joint + volume)
