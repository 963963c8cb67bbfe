"""phi as a set of particles: draws, or points moved together by Stein variational gradient descent.

SVGD (Liu & Wang 2016, eq. 8) is written as an optax transformation of the particles' gradients, so that any optimiser
may follow it and the inner loops of `gradient` run it.
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
    """Equally weighted values of phi, stacked along a leading axis."""

    phi: PyTree

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """One of them."""
        m = jax.tree.leaves(self.phi)[0].shape[0]
        which = jax.random.randint(key, (), 0, m)
        return jax.tree.map(lambda leaf: leaf[which], self.phi)


def predict_with(apply: Callable[..., Array], likelihood: Likelihood, particles: Particles, x: PyTree) -> Any:
    """The equally weighted mixture of the particles' predictions at x."""
    return likelihood.predictive(jax.vmap(lambda phi: apply(phi, x))(particles.phi))


def systematic(key: PRNGKeyArray, weights: Float[Array, " n"], draws: int) -> Int[Array, " draws"]:
    """Rows drawn in proportion to their weights, by one uniform number and equal steps (Kitagawa 1996)."""
    edges = weights.sum() * (jax.random.uniform(key) + jnp.arange(draws)) / draws
    return jnp.minimum(jnp.searchsorted(jnp.cumsum(weights), edges), weights.size - 1)


def bandwidth(squared: Float[Array, "m m"]) -> Scalar:
    """h of the kernel exp(-d^2 / h): the median of the pairs' d^2 over log m; held still by the gradient.

    1 where the particles are the same to rounding: nothing tells in which direction to push them apart.
    """
    m = squared.shape[0]
    middle = jnp.median(squared[jnp.triu_indices(m, 1)])
    same = middle <= 1e-6 * jnp.finfo(squared.dtype).eps
    return jax.lax.stop_gradient(jnp.where(same, 1.0, middle / log(m)))


def stein_direction(particles: PyTree, gradients: PyTree, repulsion: float | Array = 1.0) -> PyTree:
    """The ascent (1/m) sum_j k(j, i) grad_j log p + grad_j k(j, i), with k the RBF kernel of median bandwidth.

    particles: m of them along the leading axis of each leaf. gradients: of log p at each. repulsion: the weight of the
    second term; 1/n where log p is a mean over n examples. One particle follows its own gradient.
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
    # sum_j k_ij g_j + 2 repulsion / h k_ij (phi_i - phi_j). Two products: at the first step tasks share the second.
    push = 2 * repulsion / h * (jnp.diag(kernel.sum(1)) - kernel) / m
    pull = kernel / m

    def leaf(g: Array, phi: Array) -> Array:
        return (product(pull, g.reshape(m, -1)) + product(push, phi.reshape(m, -1))).reshape(g.shape)

    return jax.tree.map(leaf, gradients, particles)


def stein(data: Batch) -> optax.GradientTransformation:
    """Gradients of the particles' mean nlls of `data` -> their Stein direction per example, as something to descend.

    Without data nothing moves: the particles are the prior, and so the posterior.
    """

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        # Uphill in the nll: the direction is linear, so both of its terms change sign without a copy of either.
        along = stein_direction(params, updates, -1 / count(data))
        some = examples(data) > 0 if data.weight is None else weights(data).sum() > 0
        return jax.tree.map(lambda leaf: jnp.where(some, leaf, 0), along), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)  # pyright: ignore[reportArgumentType]
