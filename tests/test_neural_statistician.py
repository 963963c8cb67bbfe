"""The neural statistician: its bound against the exact evidence of a linear-Gaussian model, and posteriors of sets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from metaprior.core.likelihoods import Categorical
from metaprior.core.types import Batch, Task
from metaprior.learners import make_learner
from metaprior.learners.neural_statistician import some
from metaprior.networks import linear, mlp

RANDOM = np.random.default_rng(0)
NOISE = 0.5


def exact(x):
    """The log evidence of a set of numbers x_i = c + e_i with c ~ N(0, 1) and e_i ~ N(0, NOISE^2)."""
    return multivariate_normal(np.zeros(len(x)), np.ones((len(x), len(x))) + NOISE**2 * np.eye(len(x))).logpdf(x)


def one_number():
    """A learner whose networks are linear, with parameters of the model above, and a task of two sets."""
    learner = make_learner(
        "neural_statistician",
        linear(),
        Categorical(),
        context=1,
        latent=1,
        hidden=(),
        observed="normal",
        kept=1.0,
        way=2,
    )
    x = RANDOM.normal(size=(6, 1)) + np.repeat([[0.8], [-0.4]], 3, 0)
    y = jnp.repeat(jnp.arange(2), 3)
    order = np.array([0, 1, 3, 4, 2, 5])
    x, y = jnp.asarray(x)[order], y[order]
    task = Task(Batch(x[:4], y[:4]), Batch(x[4:], y[4:]))
    params = jax.tree.map(jnp.zeros_like, learner.init(jax.random.key(0), task))
    networks = {name: {"head": dict(layer["head"])} for name, layer in params.networks.items()}
    # q(c | D) = N(n xbar / (n + s^2), s^2 / (n + s^2)) for n = 3; the last input is log(1 + n).
    precise = 3 / (3 + NOISE**2)
    log_sd = 0.5 * np.log(NOISE**2 / (3 + NOISE**2))
    networks["statistic"]["head"]["w"] = jnp.array([[precise, 0.0], [0.0, 0.0]])
    networks["statistic"]["head"]["b"] = jnp.array([0.0, 6 * np.arctanh(log_sd / 6)])
    networks["decoder"]["head"]["w"] = jnp.array([[0.0], [1.0]])  # of z and c
    return learner, params._replace(networks=networks, log_sd=jnp.log(NOISE)), task, (x, y)


@pytest.mark.usefixtures("x64")
def test_the_bound_is_the_exact_evidence_where_the_posterior_is_exact():
    learner, params, task, (x, y) = one_number()
    bound = jax.jit(jax.vmap(lambda key: learner.loss(params, task, key)[1]["elbo"]))
    found = np.asarray(bound(jax.random.split(jax.random.key(1), 4_000)))
    wanted = sum(exact(np.asarray(x)[np.asarray(y) == k, 0]) for k in (0, 1)) / 6
    assert found.mean() == pytest.approx(wanted, abs=4 * found.std() / np.sqrt(len(found)))
    assert found.std() / np.sqrt(len(found)) < 0.03

    worse = dict(params.networks)
    worse["statistic"] = jax.tree.map(lambda leaf: 0.7 * leaf, worse["statistic"])
    less = np.asarray(
        jax.jit(jax.vmap(lambda key: learner.loss(params._replace(networks=worse), task, key)[1]["elbo"]))(
            jax.random.split(jax.random.key(1), 4_000)
        )
    )
    assert less.mean() < wanted - 0.01


def made(**options):
    learner = make_learner("neural_statistician", mlp(3, (8,)), Categorical(), hidden=(16,), **options)
    x = jnp.asarray(RANDOM.normal(size=(9, 4)), jnp.float32)
    y = jnp.tile(jnp.arange(3), 3)
    params = learner.init(jax.random.key(0), Task(Batch(x, y), Batch(x, y)))
    return learner, params, x, y


def test_a_context_does_not_depend_on_the_order_of_the_set():
    learner, params, x, y = made()
    order = RANDOM.permutation(9)
    a, b = (learner.adapt(params, Batch(*part), jax.random.key(0)) for part in ((x, y), (x[order], y[order])))
    np.testing.assert_allclose(a.context.mean, b.context.mean, rtol=1e-5, atol=1e-6)


def test_the_nearest_posterior_is_that_of_the_own_example():
    for direction in ("to_query", "to_class"):
        learner, params, x, _ = made(direction=direction)
        support = Batch(x[:3], jnp.arange(3))
        predictive = learner.predict(
            params, learner.adapt(params, support, jax.random.key(0)), x[:3], jax.random.key(1)
        )
        assert predictive.mean().argmax(-1).tolist() == [0, 1, 2]  # the divergence from itself is 0


def test_a_class_always_shows_its_first_example():
    shares = jnp.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    chosen = np.stack([np.asarray(some(jax.random.key(i), shares, 0.5)) for i in range(200)])
    assert chosen[:, 1, 0].all()
    assert chosen[:, 3, 1].all()
    assert 0.4 < chosen[:, 2, 0].mean() < 0.6
    assert np.asarray(some(jax.random.key(0), shares, 0.0)).sum() == 2
    assert np.asarray(some(jax.random.key(0), shares, 1.0)).all()


def test_the_temperature_is_learned_from_the_queries_alone():
    learner, params, x, y = made()
    task = Task(Batch(x, y), Batch(x, y))
    gradient = jax.grad(lambda p: learner.loss(p, task, jax.random.key(0))[0])(params)
    without = jax.grad(lambda p: -learner.loss(p, task, jax.random.key(0))[1]["elbo"])(params)
    assert float(jnp.abs(gradient.log_temperature)) > 0
    assert float(without.log_temperature) == 0
    for a, b in zip(jax.tree.leaves(gradient.networks), jax.tree.leaves(without.networks), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_ink_must_be_from_0_to_1():
    learner = make_learner("neural_statistician", mlp(3, (8,)), Categorical(), hidden=(4,), observed="ink")
    x, y = jnp.full((3, 2), 0.5), jnp.arange(3)
    params = learner.init(jax.random.key(0), Task(Batch(x, y), Batch(x, y)))
    assert np.isfinite(learner.loss(params, Task(Batch(x, y), Batch(x, y)), jax.random.key(0))[0])
    assert np.isnan(learner.loss(params, Task(Batch(x, y), Batch(x + 1, y)), jax.random.key(0))[0])
