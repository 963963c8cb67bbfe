"""Conditional neural processes: what is kept of a support set, and what training makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Task
from metaprior.learners import anp, cnp
from metaprior.networks import conv4, mlp
from metaprior.networks.attention import attend
from metaprior.referees.conjugate import exact_predictive
from metaprior.tasks import linear_gaussian
from scenarios import BARE, KEY, answer, batch, start

SMALL = {"width": 8, "encoder": (6,), "decoder": (6,)}


def by_hand(layers, x):
    x = np.maximum(x @ layers["layer1"]["w"] + layers["layer1"]["b"], 0)
    return x @ layers["head"]["w"] + layers["head"]["b"]


@pytest.mark.usefixtures("x64")
def test_the_outputs_are_the_decoder_at_the_mean_of_what_was_encoded():
    learner, support, x = cnp(BARE, Categorical(), **SMALL), batch(5), batch(4, 2).x
    params = start(learner, support)
    theta = jax.tree.map(np.asarray, params)
    codes = [by_hand(theta.encoder, np.concatenate([xi, np.eye(3)[yi]])) for xi, yi in zip(*support[:2], strict=True)]
    logits = np.stack([by_hand(theta.decoder, np.concatenate([xi, np.mean(codes, 0)])) for xi in x])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(answer(learner, params, support, x), p, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_by_class_keeps_one_mean_a_class_side_by_side():
    support = batch(7)._replace(y=jnp.array([0, 0, 1, 1, 1, 0, 1]))
    both, one = cnp(BARE, Categorical(), by_class=True, **SMALL), cnp(BARE, Categorical(), **SMALL)
    params = start(both, support)
    read = both.adapt(params, support, KEY).reshape(3, 8)
    for c in (0, 1):
        alone = jax.tree.map(lambda leaf, c=c: leaf[support.y == c], support)
        np.testing.assert_allclose(read[c], one.adapt(params, alone, KEY), rtol=1e-9)
    assert (read[2] == 0).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("factory", [cnp, anp])
def test_a_weight_of_two_is_the_example_twice(factory):
    learner, support, x = factory(BARE, Categorical(), **SMALL), batch(4), batch(3, 2).x
    params = start(learner, support)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), support)
    heavy = support._replace(weight=jnp.array([2.0, 1, 1, 1]))
    heavy, twice, once = (answer(learner, params, s, x) for s in (heavy, twice, support))
    np.testing.assert_allclose(heavy, twice, rtol=1e-9)
    assert abs(heavy - once).max() > 1e-4


@pytest.mark.parametrize("factory", [cnp, anp])
@pytest.mark.parametrize("model", [mlp(3, (6,)), conv4(3, filters=4, blocks=2)])
@pytest.mark.slow
def test_an_empty_support_gives_the_prior(factory, model):
    learner = factory(model, Categorical(), **SMALL)
    support = Batch(jax.random.normal(KEY, (4, 8, 8, 1)), jnp.array([0, 1, 2, 0]))
    params, x = start(learner, support), jax.random.normal(jax.random.key(2), (3, 8, 8, 1))
    none = jax.tree.map(lambda leaf: leaf[:0], support)
    padding = support._replace(weight=jnp.zeros(4))
    prior = answer(learner, params, none, x)
    np.testing.assert_allclose(prior, answer(learner, params, padding, x), rtol=1e-5)
    assert jnp.isfinite(prior).all()
    gradient = jax.grad(lambda p: learner.loss(p, Task(padding, support), KEY)[0])(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.usefixtures("x64")
def test_attention_over_a_set_by_hand():
    keys = jnp.array([[1.0, 0], [0, 1], [3, 3]])[:, None]
    values = jnp.array([[1.0], [2], [9]])[:, None]
    weight = jnp.array([1.0, 3, 0])
    even = attend(jnp.zeros((1, 1, 2)), keys, values, weight)
    np.testing.assert_allclose(even[0, 0, 0], (1 + 3 * 2) / 4, rtol=1e-12)
    tilted = attend(jnp.array([[[2.0, 0]]]), keys, values, weight)
    pull = np.exp(2 / np.sqrt(2))
    np.testing.assert_allclose(tilted[0, 0, 0], (pull + 3 * 2) / (pull + 3), rtol=1e-12)
    sharp = attend(jnp.array([[[5000.0, 0]]]), keys, values, weight)
    np.testing.assert_allclose(sharp[0, 0, 0], 1, rtol=1e-12)
    assert attend(jnp.ones((1, 1, 2)), keys, values, jnp.zeros(3)) == 0


def train(learner, source, steps, rate=3e-3):
    task = jax.tree.map(lambda leaf: leaf[0], source.sample(KEY, 1))
    optimizer = optax.adam(optax.linear_schedule(rate, 0, steps))

    def step(carry, key):
        params, state = carry
        tasks = source.sample(key, 16)

        def mean_loss(p):
            return jax.vmap(lambda t: learner.loss(p, t, key)[0])(tasks).mean()

        update, state = optimizer.update(jax.grad(mean_loss)(params), state, params)
        return (optax.apply_updates(params, update), state), None

    params = learner.init(KEY, task)
    run = jax.jit(lambda c: jax.lax.scan(step, c, jax.random.split(jax.random.key(3), steps))[0][0])
    return run((params, optimizer.init(params)))


def test_trained_on_a_conjugate_hierarchy_it_approaches_the_exact_predictive():
    """y = phi + e: the posterior is a function of the support's mean, which is all that a CNP keeps."""
    splits = linear_gaussian(features=1, bias=True, shot=3, noise=0.7, mean=0.5, covariance=2.0)
    learner = cnp(mlp(2, (16,)), Gaussian(scale=None), width=16, encoder=(32,), decoder=(32,))
    params = train(learner, splits.train, 1500)

    @jax.jit
    def surprise(task):
        exact = exact_predictive(splits.test.theta, task.support, task.query.x)
        sd = jnp.sqrt(jnp.diagonal(exact.covariance))
        best = -jax.scipy.stats.norm.logpdf(task.query.y[:, 0], exact.mean, sd).mean()
        guess = learner.predict(params, learner.adapt(params, task.support, KEY), task.query.x, KEY)
        return -guess.log_prob(task.query.y).mean(), best, guess.variance().mean(), sd[0] ** 2

    reached, best, variance, exact = (a.mean() for a in jax.vmap(surprise)(splits.test.sample(KEY, 200)))
    assert reached - best < 0.02
    np.testing.assert_allclose(variance, exact, rtol=0.1)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 10 and 4"):
        anp(BARE, Categorical(), width=10, heads=4)
    with pytest.raises(ValueError, match="by_class"):
        cnp(BARE, Gaussian(), by_class=True)
    with pytest.raises(ValueError, match="by_class"):
        anp(BARE, Categorical(), by_class=True)
