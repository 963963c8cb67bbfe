"""VERSA against the moments of its logits, Jensen's inequality and a linear classifier by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Task
from metaprior.learners import versa
from metaprior.networks import mlp
from metaprior.networks.conv4 import conv4
from scenarios import BARE, KEY, start

WAY, D = 3, 2
SUPPORT = Batch(jax.random.normal(jax.random.key(1), (6, D)), jnp.array([0, 0, 0, 1, 1, 2]))
QUERY = Batch(jax.random.normal(jax.random.key(2), (5, D)), jnp.array([0, 1, 2, 0, 1]))


def made(**options):
    return versa(BARE, Categorical(), **options)


PARAMS = start(made(), SUPPORT)


def widened(params, by=0.0):
    """The same networks with another level of the log variances, by the bias of their last layer."""
    shift = {
        name: net | {"head": net["head"] | {"b": net["head"]["b"] + by}} for name, net in params.log_variance.items()
    }
    return params._replace(log_variance=shift)


def by_hand(net, x):
    """A network d-d-d-out with ELU, in numpy."""
    for name in ("layer1", "layer2"):
        x = x @ np.asarray(net[name]["w"]) + np.asarray(net[name]["b"])
        x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
    return x @ np.asarray(net["head"]["w"]) + np.asarray(net["head"]["b"])


def moments(params):
    """Mean and variance of the queries' logits (facts: step 3), in numpy."""
    x, y, q = np.asarray(SUPPORT.x), np.asarray(SUPPORT.y), np.asarray(QUERY.x)
    nu = np.stack([x[y == k].mean(0) for k in range(WAY)])
    mean = q @ by_hand(params.mean["w"], nu).T + by_hand(params.mean["b"], nu)[:, 0]
    variance = np.exp(by_hand(params.log_variance["w"], nu)), np.exp(by_hand(params.log_variance["b"], nu)[:, 0])
    return mean, q**2 @ variance[0].T + variance[1]


def log_probs(learner, params, support=SUPPORT, x=QUERY.x, key=KEY):
    return learner.predict(params, learner.adapt(params, support, key), x, key).log_probs


def test_sampled_logits_have_the_moments_of_the_gaussian_head():
    params = widened(PARAMS, 0.5)
    mean, variance = moments(params)
    samples = np.asarray(jax.jit(lambda p: log_probs(made(draws=20_000), p))(params))
    # A softmax forgets a common constant: differences of logits.
    apart = samples[..., 1:] - samples[..., :1]
    np.testing.assert_allclose(apart.mean(0), mean[:, 1:] - mean[:, :1], atol=0.06)
    np.testing.assert_allclose(apart.var(0), variance[:, 1:] + variance[:, :1], rtol=0.05)


def test_quadrature_is_the_limit_of_many_samples():
    params = widened(PARAMS, 0.5)
    many = jnp.exp(log_probs(made(draws=20_000), params)).mean(0)
    np.testing.assert_allclose(jnp.exp(log_probs(made(draws=0), params))[0], many, atol=0.01)


def test_without_variance_it_is_the_linear_classifier_of_the_means():
    params = widened(PARAMS, -60.0)
    mean, _ = moments(params)
    expected = mean - np.log(np.exp(mean).sum(-1, keepdims=True))
    for draws in (0, 3):
        for sample in log_probs(made(draws=draws), params):
            np.testing.assert_allclose(sample, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_falls_with_the_number_of_samples():
    """Jensen: the expected log of a mean of L likelihoods rises with L, up to the log of their expectation."""
    params, keys = widened(PARAMS, 1.0), jax.random.split(KEY, 1000)
    task = Task(SUPPORT, QUERY)

    def mean(draws):
        return jax.jit(jax.vmap(lambda key: made(draws=draws).loss(params, task, key)[0]))(keys).mean()

    one, ten, many, exact = mean(1), mean(10), mean(200), made(draws=0).loss(params, task, KEY)[0]
    assert one > ten + 0.01 > many + 0.02
    np.testing.assert_allclose(many, exact, atol=0.02)


def test_the_loss_is_that_of_the_mixture_and_not_of_an_average():
    params = widened(PARAMS, 1.0)
    task, draws = Task(SUPPORT, QUERY), 4
    noise = np.asarray(jax.random.normal(KEY, (draws, 5, WAY)))
    mean, variance = moments(params)
    logits = mean + np.sqrt(variance) * noise
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    of_label = p[:, np.arange(5), np.asarray(QUERY.y)]
    loss = made(draws=draws).loss(params, task, KEY)[0]
    np.testing.assert_allclose(loss, -np.log(of_label.mean(0)).mean(), rtol=1e-4)
    assert abs(loss + np.log(of_label).mean()) > 0.01


def test_a_class_without_examples_has_probability_0_and_repeats_change_nothing():
    seen = Batch(SUPPORT.x, jnp.array([0, 0, 0, 1, 1, 1]))
    for draws in (0, 3):
        learner = made(draws=draws)
        p = jnp.exp(log_probs(learner, PARAMS, seen))
        assert (p[..., 2] == 0).all()
        assert jnp.isfinite(p).all()
        twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), SUPPORT)  # nu is a mean, not a sum
        np.testing.assert_allclose(log_probs(learner, PARAMS, twice), log_probs(learner, PARAMS), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_images_and_other_numbers_of_shots_and_ways():
    learner = versa(conv4(4, 4, 2), Categorical(), draws=2, transductive=False)
    x = jax.random.normal(KEY, (7, 8, 8, 1))
    params = start(learner, Batch(x[:4], jnp.arange(4)))
    p = jnp.exp(log_probs(learner, params, Batch(x, jnp.array([0, 0, 0, 1, 1, 2, 2])), x)).mean(0)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
    assert (p[:, 3] == 0).all()


def test_it_only_classifies():
    with pytest.raises(ValueError, match=r"likelihood must be Categorical.* got Gaussian"):
        versa(mlp(), Gaussian())
    with pytest.raises(ValueError, match="draws must be an integer of at least 0"):
        made(draws=-1)
