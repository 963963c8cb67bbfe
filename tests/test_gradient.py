"""The inner loop: closed forms on quadratics, where the meta-gradient flows, and what it costs to remember."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaprior.core.likelihoods import Gaussian
from metaprior.core.types import Batch
from metaprior.inference.descent import count, descend, half_square, inner_rates, make_optimizer, mean_nll, trajectory


def support(phi):
    return (phi - 1.0) ** 2


def query(phi):
    return 1.5 * (phi - 2.0) ** 2


def meta_gradient(steps, **options):
    def loss(theta):
        return query(descend(support, theta, optax.sgd(0.1), steps, **options).phi)

    return jax.grad(loss)(0.0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("steps", "second", "first"), [(1, -4.32, -5.4), (2, -3.1488, -4.92)])
def test_quadratic_meta_gradients_by_hand(steps, second, first):
    assert meta_gradient(steps) == pytest.approx(second, abs=1e-12)
    assert meta_gradient(steps, remat=True) == pytest.approx(second, abs=1e-12)
    assert meta_gradient(steps, first_order=True) == pytest.approx(first, abs=1e-12)


@pytest.mark.usefixtures("x64")
@settings(max_examples=20)
@given(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 23, 64, 67]), st.sampled_from(["sgd", "adam", "adagrad"]))
@pytest.mark.slow
def test_rematerialised_and_plain_descents_agree(steps, name):
    def rosenbrock(phi):
        return (1 - phi["a"]) ** 2 + 2 * (phi["b"] - phi["a"] ** 2) ** 2

    start = {"a": jnp.asarray(0.3), "b": jnp.asarray(-0.2)}
    optimizer = make_optimizer(name, 0.05)

    def end(theta, remat):
        return sum(jax.tree.leaves(descend(rosenbrock, theta, optimizer, steps, remat=remat).phi))

    plain, kept = (jax.value_and_grad(end)(start, remat) for remat in (False, True))
    np.testing.assert_allclose(jax.tree.leaves(plain), jax.tree.leaves(kept), rtol=1e-12)
    course = trajectory(rosenbrock, start, optimizer, steps).phi
    assert course["a"].shape == (steps + 1,)
    np.testing.assert_allclose(course["a"][-1] + course["b"][-1], plain[0], rtol=1e-12)


def test_data_of_each_step_is_used_in_order():
    targets = jnp.arange(12.0)
    for steps in (3, 12):
        end = descend(lambda phi, t: 0.5 * (phi - t) ** 2, 0.0, optax.sgd(1.0), steps, data=targets[:steps]).phi
        assert end == steps - 1


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_inner_rates_are_the_optimizers_sensitivity(name):
    optimizer = make_optimizer(name, 0.1, **({"b1": 0.0} if name == "adam" else {}))
    at = descend(lambda phi: (phi**4).sum(), jnp.array([1.0, -2.0, 0.5]), optimizer, 3)
    rates = inner_rates(lambda phi: (phi**4).sum(), at, optimizer)
    g = jax.grad(lambda phi: (phi**4).sum())(at.phi)
    expected = -jax.vmap(jax.grad(lambda v, i: optimizer.update(g.at[i].set(v), at.state)[0][i]))(g, jnp.arange(3))
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    if name == "sgd":
        np.testing.assert_allclose(rates, 0.1, rtol=1e-6)


@pytest.mark.slow
def test_padding_and_empty_supports_teach_nothing():
    x = jnp.array([[1.0], [2.0], [99.0]])
    padded = Batch(x, x, jnp.array([1.0, 1.0, 0.0]))
    plain = Batch(x[:2], x[:2])
    assert mean_nll(Gaussian(), 2 * x, padded) == mean_nll(Gaussian(), 2 * x[:2], plain)
    assert count(padded) == count(plain) == 2
    empty = Batch(x[:0], x[:0])
    assert jax.grad(lambda w: mean_nll(Gaussian(), w * empty.x, empty))(1.0) == 0.0


def test_half_square_counts_every_leaf():
    assert half_square({"a": jnp.ones(3), "b": jnp.zeros(2)}, {"a": jnp.zeros(3), "b": jnp.full(2, 2.0)}) == 5.5


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="'sgdd'"):
        make_optimizer("sgdd", 0.1)
