"""The Gaussian posterior that the steps of an inner optimiser imply on a quadratic loss.

k steps of an optimiser that is linear in its gradients, on the loss 1/2 phi' H phi - b' phi, end at A theta + C b. C is
the posterior covariance of the Gaussian model that the steps solve exactly, with prior covariance (C^-1 - H)^-1. C b
is the end point of the optimiser from zero. So C can be computed by running the optimiser, if only it is linear:

* It treats all elements alike (SGD with any schedule, momentum, Nesterov, weight decay): C = s(H), and s(l) is the end
  point of the optimiser for one parameter with curvature l (`optimizer_spectrum`).
* It treats all elements of a tensor alike (`lslr`, optax.multi_transform): steps do not commute, so C is slightly
  asymmetric. It is stored in a basis for each tensor (`tensor_gaussian`).
* It has a constant matrix B = S S' of rates (`meta_sgd`, `preconditioned`): C = S s(S' H S) S', and S may be
  rectangular.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.inference.curvature.rows import inner, normal_like, safe_sqrt, scaled
from metaprior.inference.curvature.spectral import SpectralGaussian

Alike = Literal["all", "tensor"] | None


def alike(optimizer: optax.GradientTransformation, phi: PyTree, steps: int) -> Alike:
    """Finds out which elements a linear optimiser treats alike.

    The optimiser is run on random gradients and parameters w_i z_t, and on sums and multiples of them. All its updates
    must be w_i r_t with r linear in z. An optimiser with traced rates cannot be tested, and gets None.

    Args:
        optimizer: The optimiser.
        phi: The parameters; only their shapes matter.
        steps: Number of steps.

    Returns:
        "all", "tensor" for the elements of each tensor, or None if neither holds or the optimiser is not linear.
    """
    leaves, treedef = jax.tree.flatten(phi)
    shapes = tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)
    try:
        return _alike(optimizer, treedef, shapes, max(steps, 1))
    except (TypeError, ValueError):  # it needs the loss too (a line search), or its rates are traced
        return None


@lru_cache(maxsize=64)
def _alike(optimizer: optax.GradientTransformation, treedef: Any, shapes: tuple, steps: int) -> Alike:
    random = np.random.default_rng(0)
    weights = [random.uniform(0.5, 2, shape) * random.choice([-1, 1], shape) for shape, _ in shapes]
    one, two = random.normal(size=(2, steps, 2))
    inputs = np.stack([one, two, one + two, one * 2.0**20, one * 2.0**-20])
    with jax.ensure_compile_time_eval():
        w = treedef.unflatten([jnp.asarray(a, dtype) for a, (_, dtype) in zip(weights, shapes, strict=True)])

        def course(z: Float[Array, "t 2"]) -> Float[Array, "t leaves 2"]:
            def step(state: PyTree, z: Float[Array, " 2"]) -> tuple[PyTree, Array]:
                gradient, at = (jax.tree.map(lambda a, z=z: (a * z).astype(a.dtype), w) for z in z)
                update, state = optimizer.update(gradient, state, at)
                ratios = jax.tree.leaves(jax.tree.map(jnp.divide, update, w))
                return state, jnp.stack([jnp.stack([r.min(), r.max()]) for r in ratios if r.size])

            return jax.lax.scan(step, optimizer.init(jax.tree.map(jnp.zeros_like, w)), z)[1]

        seen = np.asarray(jax.jit(jax.vmap(course))(jnp.asarray(inputs, shapes[0][1])), float)
    if not np.isfinite(seen).all():
        return None
    scale = np.abs(seen[:3]).max() * 1e-4 + np.finfo(np.float32).tiny
    first, second, both, large, small = seen
    linear = [both - first - second, large * 2.0**-20 - first, small * 2.0**20 - first]
    if np.abs(linear).max() > scale or np.ptp(seen[:3], axis=-1).max() > scale:
        return None
    return "all" if np.ptp(seen[:3], axis=(-2, -1)).max() <= scale else "tensor"


def _run(
    optimizer: optax.GradientTransformation, gradient: Callable, start: PyTree, steps: int | Array, most: int
) -> tuple[PyTree, PyTree]:
    """Returns phi after `steps` <= `most` steps, and the `seen` of gradient(phi) -> (gradient, seen) at each step."""
    told = optax.with_extra_args_support(optimizer)

    def step(carry: tuple, t: Array) -> tuple[tuple, PyTree]:
        phi, state = carry
        g, seen = gradient(phi)
        update, after = told.update(g, state, phi)
        moved = (jax.tree.map(lambda p, u: (p + u).astype(p.dtype), phi, update), after)
        return jax.tree.map(lambda new, old: jnp.where(t < steps, new, old), moved, carry), seen

    (phi, _), seen = jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(most))
    return phi, seen


def optimizer_spectrum(
    values: Float[Array, " r"],
    optimizer: optax.GradientTransformation,
    like: PyTree,
    steps: int | Array,
    most: int,
) -> tuple[Scalar, Float[Array, " r"], Bool[Array, " r"]]:
    """Computes the spectrum s of C by running the optimiser on one parameter per curvature l, from 0, with b = 1.

    (s(l) - s(0)) / l comes from a separate run, whose gradients are s(l) at each step, so no digits cancel. If a step
    leaves s(l) outside 0..1/l (it overshoots), no prior explains the steps. There s = 1 / l, the likelihood alone.

    Args:
        values: Eigenvalues l of the mean loss's curvature [r].
        optimizer: A linear optimiser that treats all elements alike.
        like: A pytree of phi's structure.
        steps: Number of steps k, which may be traced.
        most: A static upper bound of steps.

    Returns:
        s(0), (s(l) - s(0)) / l [r], and whether the steps overshoot [r].
    """
    curve = jnp.append(values, 0)
    slack = jnp.sqrt(jnp.finfo(curve.dtype).eps)

    def beyond(s: Array) -> Array:
        return (curve * s > 1 + slack) | (curve * s < -slack)

    def gradient(phi: PyTree) -> tuple[PyTree, Array]:
        told = jax.tree.map(lambda leaf: jnp.stack([curve * leaf[0] - 1, leaf[0]]), phi)
        return told, beyond(jax.tree.leaves(phi)[0][0])

    start = jax.tree.map(lambda _: jnp.zeros((2, curve.size), curve.dtype), like)
    end, seen = _run(optimizer, gradient, start, steps, most)
    s, drop = jax.tree.leaves(end)[0]
    over = (seen.any(0) | beyond(s))[:-1]
    safe = jnp.where(over, values, 1)
    return s[-1], jnp.where(over, (1 / safe - s[-1]) / safe, drop[:-1]), over


class Root(NamedTuple):
    """S = [diag(diagonal), factor], a root of B = diag(diagonal^2) + factor factor'.

    Attributes:
        diagonal: The diagonal part, shaped as phi.
        factor: The low-rank part [p, r].
    """

    diagonal: PyTree
    factor: Float[Array, "p r"]

    def push(self, white: tuple[PyTree, Float[Array, " r"]]) -> PyTree:
        """Computes S z, shaped as phi.

        Args:
            white: The two parts of z: one shaped as phi, one [r].
        """
        unravel = ravel_pytree(self.diagonal)[1]
        return jax.tree.map(jnp.add, scaled(self.diagonal, white[0]), unravel(self.factor @ white[1]))

    def pull(self, row: PyTree) -> tuple[PyTree, Float[Array, " r"]]:
        """Computes S' row.

        Args:
            row: A row, shaped as phi.
        """
        return scaled(self.diagonal, row), self.factor.T @ ravel_pytree(row)[0]

    def origin(self) -> tuple[PyTree, Float[Array, " r"]]:
        """Returns z = 0."""
        return jax.tree.map(jnp.zeros_like, self.diagonal), jnp.zeros(self.factor.shape[1], self.factor.dtype)


class RootedGaussian(NamedTuple):
    """N(mean, S W S'), where W is the covariance of z in phi = mean + S z.

    Attributes:
        mean: The mean of phi.
        root: S.
        white: The Gaussian of z.
    """

    mean: PyTree
    root: Root
    white: SpectralGaussian

    @property
    def clipped(self) -> Scalar:
        """The fraction of directions in which the steps overshoot."""
        return self.white.clipped

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws one phi.

        Args:
            key: Random key.
        """
        return jax.tree.map(jnp.add, self.mean, self.root.push(self.white.sample(key)))

    def quadratic(self, row: PyTree) -> Scalar:
        """Computes row C row', where C is the covariance.

        Args:
            row: A row, shaped as phi.
        """
        return self.white.quadratic(self.root.pull(row))


class TensorGaussian(NamedTuple):
    """The Gaussian of an optimiser that treats the elements of each of T tensors alike.

    The variance is `flat` outside of r directions of each tensor.

    Attributes:
        mean: The mean of phi.
        basis: Orthonormal rows for each tensor (leaves [r, ...]).
        flat: The variance of each tensor outside of its basis.
        root: C^(1/2) in the T r coordinates of all bases.
        overshot: Whether no prior explains the steps [r].
        values: Eigenvalues of the curvature [r].
        asymmetry: |C - C'| / |C + C'| (Frobenius norms) before C was made symmetric; 0 if the steps commute.
    """

    mean: PyTree
    basis: PyTree
    flat: PyTree
    root: Float[Array, "tr tr"]
    overshot: Bool[Array, " r"]
    values: Float[Array, " r"]
    asymmetry: Scalar

    @property
    def clipped(self) -> Scalar:
        """The fraction of directions in which the steps end beyond the support's optimum."""
        floor = self.values.max(-1, keepdims=True) * 1e-6
        return self.overshot.sum(-1) / jnp.maximum((self.values > floor).sum(-1), 1)

    def push(self, noise: PyTree) -> PyTree:
        """Computes C^(1/2) noise, without the mean.

        Args:
            noise: A vector, shaped as phi.
        """
        told = jax.tree.map(lambda q, e: jnp.tensordot(q, e, axes=e.ndim), self.basis, noise)
        parts = jax.tree.leaves(told)
        turned = jax.tree.unflatten(jax.tree.structure(told), jnp.split(self.root @ jnp.concatenate(parts), len(parts)))
        return jax.tree.map(
            lambda e, q, c, m, b: safe_sqrt(b) * (e - jnp.tensordot(c, q, axes=1)) + jnp.tensordot(m, q, axes=1),
            noise,
            self.basis,
            told,
            turned,
            self.flat,
        )

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws one phi.

        Args:
            key: Random key.
        """
        return jax.tree.map(jnp.add, self.mean, self.push(normal_like(key, self.mean)))

    def quadratic(self, row: PyTree) -> Scalar:
        """Computes row C row', where C is the covariance.

        Args:
            row: A row, shaped as phi.
        """
        pushed = self.push(row)
        return inner(pushed, pushed)


def tensor_gaussian(
    mean: PyTree,
    rows: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int | Array,
    most: int,
    temperature: float | Array = 1.0,
) -> TensorGaussian:
    """Computes N(mean, temperature C) for k steps on a loss with curvature H = R' R.

    With orthonormal rows Q_j for each tensor, R_j = L_j Q_j. Within their span, C is a matrix N of T r coordinates
    whose gradient is L' L N - I. Outside of it, C is one number per tensor, whose gradient is -1. The optimiser runs on
    both. If the steps overshoot (an eigenvalue of R C R' is outside 0..1), C is reduced to the likelihood alone in that
    direction.

    Args:
        mean: The mean of phi.
        rows: R (leaves [r, ...]).
        optimizer: A linear optimiser that treats the elements of each tensor alike.
        steps: Number of steps k, which may be traced.
        most: A static upper bound of steps.
        temperature: Factor of the covariance.
    """
    leaves, treedef = jax.tree.flatten(rows)
    r, tensors = leaves[0].shape[0], len(leaves)
    tall, bases = zip(*[_orthonormal(leaf) for leaf in leaves], strict=True)
    turn = jnp.concatenate(tall, 1)
    eye = jnp.eye(r * tensors, dtype=turn.dtype)

    def read(state: PyTree) -> tuple[Array, Array]:
        parts = jnp.stack(jax.tree.leaves(state))
        return parts[:, 0], parts[:, 1:].reshape(r * tensors, r * tensors)

    def written(flat: Array, inside: Array) -> PyTree:
        parts = jnp.concatenate([flat[:, None], inside.reshape(tensors, -1)], 1)
        return jax.tree.unflatten(treedef, list(parts))

    def gradient(state: PyTree) -> tuple[PyTree, None]:
        return written(-jnp.ones(tensors, turn.dtype), turn.T @ (turn @ read(state)[1]) - eye), None

    end, _ = _run(optimizer, gradient, written(jnp.zeros(tensors, turn.dtype), 0 * eye), steps, most)
    flat, inside = read(end)
    outside = sum(b**2 * (leaf[0].size - r) for b, leaf in zip(flat, leaves, strict=True))
    size = jnp.sqrt(((inside + inside.T) ** 2).sum() + 4 * outside)
    asymmetry = jnp.linalg.norm(inside - inside.T) / jnp.where(size > 0, size, 1)
    inside = (inside + inside.T) / 2
    told, vectors = jnp.linalg.eigh(turn @ inside @ turn.T)
    slack = jnp.sqrt(jnp.finfo(told.dtype).eps)
    over = (told > 1 + slack) | (told < -slack)
    cut = jnp.where(over, (told - 1) / jnp.where(over, told, 1) ** 2, 0)
    along = inside @ turn.T @ vectors
    values, vectors = jnp.linalg.eigh(inside - (along * cut) @ along.T)
    root = (vectors * safe_sqrt(values)) @ vectors.T
    return TensorGaussian(
        mean,
        jax.tree.unflatten(treedef, bases),
        jax.tree.unflatten(treedef, list(temperature * flat)),
        jnp.sqrt(temperature) * root,
        over,
        jnp.linalg.eigvalsh(turn @ turn.T),
        asymmetry,
    )


def _orthonormal(rows: Float[Array, "r *shape"]) -> tuple[Float[Array, "r r"], Float[Array, "r *shape"]]:
    """Computes L and orthonormal rows Q with rows = L Q. Rows of Q beyond the rank are 0."""
    values, vectors = jnp.linalg.eigh(jnp.tensordot(rows, rows, (tuple(range(1, rows.ndim)),) * 2))
    kept = values > values[-1] * values.size * jnp.finfo(values.dtype).eps
    lengths = jnp.where(kept, jnp.sqrt(jnp.where(kept, values, 1)), 0)
    turned = (vectors * jnp.where(kept, 1 / jnp.where(kept, lengths, 1), 0)).T
    return vectors * lengths, jnp.tensordot(turned, rows, axes=1)
