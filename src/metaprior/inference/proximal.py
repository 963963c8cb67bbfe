"""The proximal inner problem of iMAML and its derivative by the implicit function theorem (Rajeswaran et al. 2019).

phi* = argmin L(phi) + s/2 |phi - theta|^2 (eq. 3). At phi*, s (theta - phi*) = grad L(phi*), so d phi*/d theta =
(I + H/s)^-1 (Lemma 1), applied to a vector by conjugate gradients (Algorithm 2): no inner step is ever kept.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, Scalar

from metaprior.inference.descent import half_square


def conjugate_gradients(matvec: Callable[[PyTree], PyTree], b: PyTree, steps: int) -> PyTree:
    """x with A x = b for positive definite A, after at most `steps` products with A, from x = 0.

    It stops where it met a direction p with p'Ap <= 0 (A is not positive definite there) or where it has converged, and
    keeps what it had, or b itself if it had nothing.
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
    """argmin over phi of loss(phi) + strength/2 |phi - theta|^2, by `steps` gradient steps of `rate` from theta.

    Its reverse-mode derivative is the implicit one, (I + H/strength) g = v solved by `cg_steps` conjugate-gradient
    steps; memory does not grow with `steps`. It reaches theta, strength, and whatever traced floats `loss` closes over
    (a likelihood's noise, a shared body). It is biased as far as phi is from the minimum, and the descent diverges
    from rate = 2 / (largest curvature + strength) on. It needs I + H/strength > 0: where a solve meets negative
    curvature it stops there. damping is added to the operator's identity (0 in the paper;
    the public code has 1). optimizer: any optax transformation in the place of gradient descent.
    """
    if steps < 0 or cg_steps < 1:
        raise ValueError(f"steps, cg_steps: came {steps} and {cg_steps}, need at least 0 and 1")
    solver = optax.with_extra_args_support(optax.sgd(rate) if optimizer is None else optimizer)
    s = jnp.asarray(strength, jax.tree.leaves(theta)[0].dtype)

    def stationary(phi: PyTree) -> PyTree:
        """phi - theta + grad L(phi)/s, 0 at phi*, whose derivative is I + H/s."""
        return jax.tree.map(lambda p, t, g: p - t + g / s, phi, theta, jax.grad(loss)(phi))

    def objective(phi: PyTree) -> Scalar:
        return loss(phi) + s * half_square(phi, theta)

    def solve(_: Callable, phi: PyTree) -> PyTree:
        def step(_: Array, at: tuple) -> tuple:
            phi, state = at
            value, pull = jax.value_and_grad(objective)(phi)
            # What a line search asks for, and others do not.
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
