"""The mixture prior: its gradient against that of the exact marginal likelihood, and two modes told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Gaussian
from metaprior.core.types import Batch, Model, Task
from metaprior.inference.gaussian import DiagonalGaussian
from metaprior.learners import gem_bml, gem_mixture
from metaprior.learners.mixture import Mixture
from metaprior.networks import mlp
from metaprior.tasks import sinusoid, three_families

CONSTANT = Model(lambda key, x: jax.random.normal(key, (1,)), lambda phi, x: jnp.broadcast_to(phi, (x.shape[0], 1)))


def observations(*values):
    y = jnp.asarray(values, float)[:, None]
    return Batch(jnp.zeros_like(y), y)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_gradient_is_that_of_the_exact_marginal():
    """y = phi + noise with two components: log p(D) is a log of two normal densities."""
    task = Task(observations(0.4, 0.9), observations(0.6))
    learner = gem_mixture(
        CONSTANT, Gaussian(1.0), components=2, steps=3000, rate=2e-3, samples=64, optimizer="adam", draws=4
    )
    means, log_sds = jnp.asarray([[1.0], [-0.5]]), jnp.log(jnp.asarray([[0.5], [1.5]]))
    prior = Mixture(DiagonalGaussian(means, log_sds), jnp.asarray([0.2, -0.3]))
    y = jnp.asarray([0.4, 0.9, 0.6])

    def log_marginal(p):
        def one(mean, log_sd):
            covariance = jnp.eye(3) + jnp.exp(2 * log_sd)
            return jax.scipy.stats.multivariate_normal.logpdf(y, jnp.broadcast_to(mean, 3), covariance)

        parts = jax.vmap(one)(p.components.mean[:, 0], p.components.log_sd[:, 0])
        return jax.scipy.special.logsumexp(jax.nn.log_softmax(p.logits) + parts)

    exact = jax.grad(log_marginal)(prior)
    found = jax.jit(jax.grad(lambda p: learner.loss(p, task, jax.random.key(0))[0]))(prior)
    np.testing.assert_allclose(-found.logits, exact.logits, atol=0.03)
    # The learner's step is the natural gradient: times sigma^2 for the mean, a half for log sigma.
    np.testing.assert_allclose(-found.components.mean, exact.components.mean * jnp.exp(2 * log_sds), atol=0.03)
    np.testing.assert_allclose(-found.components.log_sd, exact.components.log_sd / 2, atol=0.03)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_one_component_is_gem_bml():
    task = jax.tree.map(lambda leaf: leaf[0], sinusoid(shot=6, query=6).train.sample(jax.random.key(0), 1))
    options = {"steps": 4, "rate": 0.02, "kl_weight": 0.0, "log_sd": -18.0, "optimizer": "sgd"}
    one, plain = (make(mlp(1, (5,), "tanh"), Gaussian(), **options) for make in (
        lambda *a, **o: gem_mixture(*a, components=1, **o), gem_bml))  # fmt: skip
    params = one.init(jax.random.key(1), task)
    alone = jax.tree.map(lambda leaf: leaf[0], params.components)
    mixed = jax.jit(jax.grad(lambda p: one.loss(p, task, jax.random.key(2))[0]))(params)
    single = jax.jit(jax.grad(lambda p: plain.loss(p, task, jax.random.key(2))[0]))(alone)
    for a, b in zip(jax.tree.leaves(mixed.components.mean), jax.tree.leaves(single.mean), strict=True):
        np.testing.assert_allclose(a[0], b, atol=1e-7)
    assert mixed.logits == pytest.approx([0.0])


def test_a_task_chooses_its_component():
    learner = gem_mixture(CONSTANT, Gaussian(0.2), components=2, steps=50, rate=0.01, samples=4)
    prior = Mixture(DiagonalGaussian(jnp.asarray([[3.0], [-3.0]]), jnp.full((2, 1), -1.0)), jnp.zeros(2))
    adapt = jax.jit(learner.adapt)
    for value, which in ((2.8, 0), (-3.1, 1)):
        assert adapt(prior, observations(value), jax.random.key(0)).logits.argmax() == which
    empty = jax.tree.map(lambda leaf: leaf[:0], observations(0.0))
    np.testing.assert_allclose(jnp.exp(adapt(prior, empty, jax.random.key(0)).logits), [0.5, 0.5], atol=1e-6)


def test_the_three_families_are_all_drawn():
    tasks = three_families(shot=40, noise=0.0).train.sample(jax.random.key(0), 200).support
    second = jax.vmap(lambda x, y: jnp.polyfit(x[:, 0], y[:, 0], 2, full=True)[1:2])(tasks.x, tasks.y)
    left = np.asarray(second[0]).reshape(-1)
    # Lines and parabolas are polynomials of degree two to rounding, sinusoids are not.
    assert 0.5 < (left < 1e-3).mean() < 0.85
