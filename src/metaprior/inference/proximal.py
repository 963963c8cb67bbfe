"""The proximal inner problem of iMAML and its derivative by the implicit function theorem (Rajeswaran et al. 2019).

The problem is phi* = argmin L(phi) + s/2 |phi - theta|^2 (eq. 3). At phi*, s (theta - phi*) = grad L(phi*), so
d phi*/d theta = (I + H/s)^-1 (Lemma 1). Conjugate gradients apply it to a vector (Algorithm 2), so no inner step is
stored.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, Scalar

from metaprior.inference.descent import half_square


def conjugate_gradients(matvec: Callable[[PyTree], PyTree], b: PyTree, steps: int) -> PyTree:
    """Solves A x = b for a positive definite A by conjugate gradients from x = 0.

    It stops at convergence, or at a direction p with p'Ap <= 0 (A is not positive definite there). It then returns the
    solution so far, or b if there is none.

    Args:
        matvec: Function v -> A v.
        b: The right-hand side.
        steps: The largest number of products with A.
    """

    def dot(u: PyTree, v: PyTree) -> Scalar:
        return jnp.asarray(sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True)))

    def move(x: PyTree, step: Array, p: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: a + step * b, x, p)

    start = dot(b, b)
    floor = start * jnp.finfo(start.dtype).eps ** 2

    def iterate(t: Array, at: tuple) -> tuple:
        x, r, p, rr, alive = at
        ap = matvec(p)
        pap = dot(p, ap)
        alive = alive & (pap > 0) & (rr > floor)
        step = jnp.where(alive, rr / jnp.where(alive, pap, 1), 0)
        after = move(r, -step, ap)
        new = dot(after, after)
        turned = move(after, jnp.where(alive, new / jnp.where(alive, rr, 1), 0), p)
        first = (t == 0) & (pap <= 0)
        x = jax.tree.map(lambda a, c: jnp.where(first, c, a), move(x, step, p), b)
        return x, after, turned, new, alive

    zero = jax.tree.map(jnp.zeros_like, b)
    return jax.lax.fori_loop(0, steps, iterate, (zero, b, b, start, jnp.asarray(True)))[0]


def proximal(
    loss: Callable[[PyTree], Scalar],
    theta: PyTree,
    *,
    strength: float | Array,
    steps: int,
    rate: float = 0.1,
    cg_steps: int = 5,
    damping: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
) -> PyTree:
    """Minimises loss(phi) + strength/2 |phi - theta|^2 over phi by gradient steps from theta.

    The reverse-mode derivative is the implicit one: it solves (I + H/strength) g = v by conjugate gradients, with
    memory that does not grow with `steps`. It reaches theta, strength and all traced floats that `loss` closes over (a
    likelihood's noise, a shared body). Its bias grows with the distance of phi from the minimum. It needs
    I + H/strength > 0: a solve that meets negative curvature stops there.

    Args:
        loss: The loss L of phi.
        theta: The prior's mean and the starting point.
        strength: The strength s of the quadratic penalty.
        steps: Number of gradient steps.
        rate: Learning rate. Gradient descent diverges if it is 2 / (largest curvature + strength) or more.
        cg_steps: Number of conjugate-gradient steps.
        damping: Number that is added to the identity in I + H/strength: 0 in the paper, 1 in its public code.
        optimizer: An optax transformation instead of gradient descent.

    Returns:
        The minimiser, after `steps` steps.

    Raises:
        ValueError: steps is below 0, or cg_steps is below 1.

    References:
        Rajeswaran, Finn, Kakade & Levine 2019, Meta-learning with implicit gradients.
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}.")
    if cg_steps < 1:
        raise ValueError(f"cg_steps must be at least 1, got {cg_steps}.")
    solver = optax.with_extra_args_support(optax.sgd(rate) if optimizer is None else optimizer)
    s = jnp.asarray(strength, jax.tree.leaves(theta)[0].dtype)

    def stationary(phi: PyTree) -> PyTree:
        """Computes phi - theta + grad L(phi)/s, which is 0 at phi* and has the derivative I + H/s."""
        return jax.tree.map(lambda p, t, g: p - t + g / s, phi, theta, jax.grad(loss)(phi))

    def objective(phi: PyTree) -> Scalar:
        return loss(phi) + s * half_square(phi, theta)

    def solve(_: Callable, phi: PyTree) -> PyTree:
        def step(_: Array, at: tuple) -> tuple:
            phi, state = at
            value, pull = jax.value_and_grad(objective)(phi)
            # Arguments of a line search; other optimisers ignore them.
            update, state = solver.update(pull, state, phi, value=value, grad=pull, value_fn=objective)
            return optax.apply_updates(phi, update), state

        return jax.lax.fori_loop(0, steps, step, (phi, solver.init(phi)))[0]

    def tangent(matvec: Callable[[PyTree], PyTree], b: PyTree) -> PyTree:
        def damped(p: PyTree) -> PyTree:
            return jax.tree.map(lambda a, h: damping * a + h, p, matvec(p))

        def inner(matvec: Callable[[PyTree], PyTree], b: PyTree) -> PyTree:
            return conjugate_gradients(matvec, b, cg_steps)

        return jax.lax.custom_linear_solve(damped, b, inner, symmetric=True)

    return jax.lax.custom_root(stationary, theta, solve, tangent)
