"""Particles: a posterior of phi as a set of draws, or of points that Stein variational gradient descent moves.

SVGD (Liu & Wang 2016, eq. 8) is an optax transformation of the particles' gradients. So any optimiser may follow it,
and the inner loops of `descent` run it.
"""

from collections.abc import Callable
from math import log
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.types import Batch, examples, weights
from metaprior.inference.descent import count
from metaprior.kernels.product import dots, product


class Particles(NamedTuple):
    """Equally weighted values of phi.

    Attributes:
        phi: The values, stacked along a leading axis.
    """

    phi: PyTree

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws one of the particles.

        Args:
            key: Random key.
        """
        m = jax.tree.leaves(self.phi)[0].shape[0]
        which = jax.random.randint(key, (), 0, m)
        return jax.tree.map(lambda leaf: leaf[which], self.phi)


def predict_with(apply: Callable[..., Array], likelihood: Likelihood, particles: Particles, x: PyTree) -> Any:
    """Returns the equally weighted mixture of the particles' predictions.

    Args:
        apply: Function (phi, x) -> outputs.
        likelihood: The likelihood.
        particles: The particles.
        x: Inputs.
    """
    return likelihood.predictive(jax.vmap(lambda phi: apply(phi, x))(particles.phi))


def systematic(key: PRNGKeyArray, weights: Float[Array, " n"], draws: int) -> Int[Array, " draws"]:
    """Draws rows in proportion to their weights by systematic resampling (Kitagawa 1996): one uniform number.

    Args:
        key: Random key.
        weights: Weights of at least 0 [n].
        draws: Number of draws.

    Returns:
        Indices of rows [draws].
    """
    edges = weights.sum() * (jax.random.uniform(key) + jnp.arange(draws)) / draws
    return jnp.minimum(jnp.searchsorted(jnp.cumsum(weights), edges), weights.size - 1)


def bandwidth(squared: Float[Array, "m m"]) -> Scalar:
    """Computes h of the kernel exp(-d^2 / h): the median of d^2 over the pairs, divided by log m.

    No gradient flows through it. It is 1 if the particles are equal up to rounding, because then no direction separates
    them.

    Args:
        squared: Squared distances of the m particles [m, m].
    """
    m = squared.shape[0]
    middle = jnp.median(squared[jnp.triu_indices(m, 1)])
    same = middle <= 1e-6 * jnp.finfo(squared.dtype).eps
    return jax.lax.stop_gradient(jnp.where(same, 1.0, middle / log(m)))


def stein_direction(particles: PyTree, gradients: PyTree, repulsion: float | Array = 1.0) -> PyTree:
    """Computes the ascent direction (1/m) sum_j k(j, i) grad_j log p + grad_j k(j, i) of each particle i.

    The kernel k is the RBF kernel with the median bandwidth. A single particle follows its own gradient.

    Args:
        particles: m particles along the leading axis of each leaf.
        gradients: Gradients of log p at each particle.
        repulsion: Weight of the second term: 1/n if log p is a mean over n examples.

    References:
        Liu & Wang 2016, Stein variational gradient descent, eq. 8.
    """
    rows = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(particles)]
    m = rows[0].shape[0]
    if m == 1:
        return gradients
    products = jnp.asarray(sum(dots(row, row) for row in rows))
    norms = jnp.diagonal(products)
    squared = jnp.maximum(norms[:, None] + norms[None] - 2 * products, 0)
    h = bandwidth(squared)
    kernel = jnp.exp(-squared / h)
    # sum_j k_ij g_j + 2 repulsion / h k_ij (phi_i - phi_j). Two products: tasks share the second at the first step.
    push = 2 * repulsion / h * (jnp.diag(kernel.sum(1)) - kernel) / m
    pull = kernel / m

    def leaf(g: Array, phi: Array) -> Array:
        return (product(pull, g.reshape(m, -1)) + product(push, phi.reshape(m, -1))).reshape(g.shape)

    return jax.tree.map(leaf, gradients, particles)


def stein(data: Batch) -> optax.GradientTransformation:
    """Returns a transformation from gradients of the particles' mean nll to their Stein direction per example.

    The direction is one to descend. Without data the particles do not move, because they are the prior and thus the
    posterior.

    Args:
        data: The examples of the mean nll.
    """

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        # These are gradients of the nll, not of log p. With the sign in the repulsion, both terms change their sign.
        along = stein_direction(params, updates, -1 / count(data))
        some = examples(data) > 0 if data.weight is None else weights(data).sum() > 0
        return jax.tree.map(lambda leaf: jnp.where(some, leaf, 0), along), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)  # pyright: ignore[reportArgumentType]
