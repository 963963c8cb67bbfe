"""The proximal solve's implicit gradient against closed forms, finite differences, and its promises on memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metaprior.inference.descent import line_search
from metaprior.inference.proximal import conjugate_gradients, proximal


def quadratic(seed=0, size=6):
    """0.5 (phi - c)' H (phi - c) with its H and c."""
    root = jax.random.normal(jax.random.key(seed), (size, size))
    h, c = root @ root.T / size, jax.random.normal(jax.random.key(seed + 1), (size,))
    return h, c


@pytest.mark.usefixtures("x64")
def test_golden():
    # L_S = (phi - 1)^2, L_Q = 1.5 (phi - 2)^2, theta = 0, strength 2: phi* = 0.5, implicit gradient -2.25.
    def loss(theta):
        phi = proximal(lambda p: (p - 1) ** 2, theta, strength=2.0, steps=200, rate=0.1, cg_steps=2)
        return 1.5 * (phi - 2) ** 2, phi

    (_, phi), slope = jax.value_and_grad(loss, has_aux=True)(0.0)
    np.testing.assert_allclose(phi, 0.5, rtol=1e-12)
    np.testing.assert_allclose(slope, -2.25, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_line_search_converges_where_the_rate_is_far_too_great():
    # Curvature 100 and strength 2: a fixed rate diverges from 2 / 102 on.
    def loss(theta, optimizer):
        fit = lambda p: 50 * (p - 1) ** 2  # noqa: E731
        return 1.5 * (proximal(fit, theta, strength=2.0, steps=60, cg_steps=2, optimizer=optimizer) - 2) ** 2

    assert not abs(loss(jnp.zeros(()), optax.sgd(0.5))) < 1e9
    value, slope = jax.value_and_grad(loss)(jnp.zeros(()), line_search(0.5))
    phi = 100 / 102
    np.testing.assert_allclose(value, 1.5 * (phi - 2) ** 2, rtol=1e-3)
    np.testing.assert_allclose(slope, 3 * (phi - 2) * 2 / 102, rtol=1e-3)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_gradient_converges_to_the_exact_one_as_cg_steps_grow():
    h, c = quadratic()
    theta, v, strength = jnp.arange(6.0), jnp.ones(6), 0.3
    exact = jnp.linalg.solve(jnp.eye(6) + h / strength, v)

    def gradient(cg_steps, damping=0.0):
        def loss(theta):
            return v @ proximal(
                lambda p: 0.5 * (p - c) @ h @ (p - c),
                theta,
                strength=strength,
                steps=10,
                cg_steps=cg_steps,
                damping=damping,
            )

        return jax.grad(loss)(theta)

    errors = [float(jnp.linalg.norm(gradient(steps) - exact)) for steps in range(1, 7)]
    assert np.all(np.diff(errors) < 0)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-9
    damped = jnp.linalg.solve(2 * jnp.eye(6) + h / strength, v)
    np.testing.assert_allclose(gradient(6, 1.0), damped, atol=1e-9)
    assert jnp.linalg.norm(damped - exact) > 0.1


def mlp_loss(phi, x, y):
    return ((jnp.tanh(x @ phi["a"]) @ phi["b"])[:, 0] - y).var() + 0.1 * (
        (jnp.tanh(x @ phi["a"]) @ phi["b"]) ** 2
    ).mean()


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_converged_network_against_finite_differences_of_its_minimum():
    """The derivative of phi*(theta), in theta, in the strength and in a value that the loss closes over."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, y = jax.random.normal(keys[0], (5, 2)), jax.random.normal(keys[1], (5,))
    theta = {"a": jax.random.normal(keys[2], (2, 3)), "b": jax.random.normal(keys[3], (3, 1))}
    flat, build = ravel_pytree(theta)

    @jax.jit
    def query(theta, strength, scale):
        phi = proximal(
            lambda p: scale * mlp_loss(p, x, y), build(theta), strength=strength, steps=4000, rate=0.05, cg_steps=12
        )
        return jnp.sin(ravel_pytree(phi)[0]).sum()

    slopes = jax.grad(query, (0, 1, 2))(flat, 0.8, 1.5)
    e, direction = 1e-5, jax.random.normal(jax.random.key(7), flat.shape)
    along = (query(flat + e * direction, 0.8, 1.5) - query(flat - e * direction, 0.8, 1.5)) / (2 * e)
    np.testing.assert_allclose(slopes[0] @ direction, along, rtol=1e-6)
    strength = (query(flat, 0.8 + e, 1.5) - query(flat, 0.8 - e, 1.5)) / (2 * e)
    np.testing.assert_allclose(slopes[1], strength, rtol=1e-6)
    closed_over = (query(flat, 0.8, 1.5 + e) - query(flat, 0.8, 1.5 - e)) / (2 * e)
    np.testing.assert_allclose(slopes[2], closed_over, rtol=1e-6)


@pytest.mark.slow
def test_tasks_side_by_side_with_integer_labels():
    """Compiled grad of vmap: a task's traced data, integers among them, do not leak into the custom derivative."""
    x, y = jax.random.normal(jax.random.key(0), (3, 4, 2)), jnp.array([[0, 1, 2, 0], [1, 1, 2, 0], [2, 0, 1, 1]])
    theta = jax.random.normal(jax.random.key(1), (2, 3))

    def loss(theta, x, y):
        def fit(phi):
            return -jnp.take_along_axis(jax.nn.log_softmax(x @ phi), y[:, None], 1).mean()

        return fit(proximal(fit, theta, strength=0.5, steps=5, rate=0.5, cg_steps=4))

    together = jax.jit(jax.grad(lambda t: jax.vmap(loss, (None, 0, 0))(t, x, y).sum()))(theta)
    apart = sum(jax.grad(loss)(theta, x[i], y[i]) for i in range(3))
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_the_steps():
    h, c = quadratic(size=200)

    def peak(steps):
        def loss(theta):
            return proximal(
                lambda p: 0.5 * (jnp.tanh(p) - c) @ h @ (jnp.tanh(p) - c), theta, strength=1.0, steps=steps, cg_steps=3
            ).sum()

        return jax.jit(jax.grad(loss)).lower(c).compile().memory_analysis().temp_size_in_bytes

    few, many = peak(2), peak(64)
    assert many <= 1.05 * few


@pytest.mark.usefixtures("x64")
def test_conjugate_gradients_stop_at_negative_curvature():
    a = jnp.diag(jnp.array([3.0, 1.0, -2.0]))
    b = jnp.array([1.0, 1.0, 0.2])
    first = conjugate_gradients(lambda p: a @ p, b, 1)
    later = conjugate_gradients(lambda p: a @ p, b, 10)
    assert jnp.all(jnp.isfinite(later))
    np.testing.assert_allclose(first, b * (b @ b) / (b @ a @ b), rtol=1e-12)
    # Where the very first direction has negative curvature, the right-hand side itself is what is left.
    np.testing.assert_allclose(conjugate_gradients(lambda p: -p, b, 5), b)
    # Converged: more steps change nothing, and a zero right-hand side stays zero.
    psd = jnp.diag(jnp.array([3.0, 1.0, 2.0]))
    np.testing.assert_allclose(conjugate_gradients(lambda p: psd @ p, b, 50), b / jnp.diag(psd), rtol=1e-12)
    assert not jnp.any(conjugate_gradients(lambda p: psd @ p, jnp.zeros(3), 5))


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="cg_steps"):
        proximal(lambda p: p**2, 1.0, strength=1.0, steps=1, cg_steps=0)
