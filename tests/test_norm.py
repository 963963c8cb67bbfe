"""Batch norm and its derivatives against the formula differentiated as it stands, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.networks.norm import EPSILON, batch_norm


def by_formula(x: jax.Array, shift: jax.Array, gain: jax.Array) -> jax.Array:
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + EPSILON) * gain + shift


def inputs(*shape: int, lead: tuple[int, ...] = ()) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (*lead, *shape, 3)) * jnp.array([1.0, 5.0, 0.1]) + 2
    return x, jax.random.normal(keys[1], (*lead, 3)), jax.random.normal(keys[2], (*lead, 3))


def derivatives(norm, *arguments: jax.Array) -> tuple:
    def loss(*a: jax.Array) -> jax.Array:
        return jnp.sin(norm(*a)).sum()

    def gradient(*a: jax.Array) -> tuple:
        return jax.grad(loss, (0, 1, 2))(*a)

    def norm_of_gradient(*a: jax.Array) -> jax.Array:
        return sum((g**2).sum() for g in gradient(*a))

    tangents = tuple(jnp.cos(a) for a in arguments)
    second = jax.grad(norm_of_gradient, (0, 1, 2))(*arguments)
    return norm(*arguments), gradient(*arguments), jax.jvp(gradient, arguments, tangents), second


def close(ours: tuple, theirs: tuple, rtol: float) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * (1 + float(jnp.abs(b).max())))


@pytest.mark.parametrize("shape", [(6,), (3, 4, 2)])
def test_every_derivative(x64, shape):
    ours, theirs = (jax.jit(lambda *a, n=n: derivatives(n, *a))(*inputs(*shape)) for n in (batch_norm, by_formula))
    close(ours, theirs, 1e-9)


@pytest.mark.slow
def test_every_derivative_under_vmap(x64):
    arguments = inputs(3, 2, 2, lead=(2,))
    ours, theirs = (jax.jit(jax.vmap(lambda *a, n=n: derivatives(n, *a)))(*arguments) for n in (batch_norm, by_formula))
    close(ours, theirs, 1e-9)


def test_without_gain_it_is_one(x64):
    x, shift, gain = inputs(5)
    close(batch_norm(x, shift), by_formula(x, shift, jnp.ones_like(gain)), 1e-12)


def test_a_large_mean_costs_no_more_than_its_digits():
    x, shift, gain = inputs(50, 8, 8)
    x = x + 1000
    with jax.enable_x64(True):
        exact = by_formula(*(jnp.asarray(np.asarray(a, np.float64)) for a in (x, shift, gain)))
    np.testing.assert_allclose(batch_norm(x, shift, gain), exact, atol=3e-3)


def test_a_constant_channel_is_its_shift():
    y = batch_norm(jnp.full((4, 2), 7.0), jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(y, jnp.array([[1.0, -1.0]] * 4))
