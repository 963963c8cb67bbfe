"""SIB against its identities: no gradient, an oracle's gradient, and queries in another order, padded or alone."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaprior as mp
from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Splits, Task
from metaprior.learners import protonet, sib
from metaprior.networks import mlp
from metaprior.tasks.fixed import FixedTasks
from metaprior.training.loop import NonFiniteLoss, fit
from scenarios import BARE, KEY, TINY, start

WAY, D, N = 3, 2, 8
SUPPORT = Batch(jax.random.normal(jax.random.key(1), (6, D)), jnp.array([0, 0, 0, 1, 1, 2]))
QUERY = Batch(jax.random.normal(jax.random.key(2), (N, D)), jnp.arange(N) % WAY)
MODULE = sys.modules["metaprior.learners.sib"]  # whose name in the package is the learner


def made(**options):
    return sib(BARE, Categorical(), **{"rate": 0.05} | options)


# Other numbers than the initial ones: a diagonal, a scale and a bias that matter.
PARAMS = start(made(), SUPPORT)._replace(diagonal=jnp.array([0.5, 2.0]), scale=jnp.array(4.0), bias=jnp.array(0.3))


def answers(learner, support=SUPPORT, query=QUERY, params=PARAMS):
    """The probabilities of all queries together."""

    @jax.jit
    def both(params, support, query):
        return learner.predict(params, learner.posterior(params, support, query, KEY), query.x, KEY).mean()

    return both(params, support, query)


def unit(a):
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def first_theta():
    z, y = unit(np.asarray(SUPPORT.x)), np.asarray(SUPPORT.y)
    return np.asarray(PARAMS.diagonal) * np.stack([z[y == k].mean(0) for k in range(WAY)])


def classify(theta, x=QUERY.x):
    logits = 4.0 * (unit(np.asarray(x)) @ unit(np.asarray(theta)).T + 0.3)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def test_without_a_gradient_it_is_the_classifier_of_cosine_prototypes():
    silent = PARAMS.gradient | {"out": jax.tree.map(jnp.zeros_like, PARAMS.gradient["out"])}
    expected = classify(first_theta())
    np.testing.assert_allclose(answers(made(), params=PARAMS._replace(gradient=silent)), expected, rtol=2e-5)
    np.testing.assert_allclose(answers(made(test_steps=0)), expected, rtol=2e-5)
    posterior = made().adapt(PARAMS, SUPPORT, KEY)  # which sees no query
    np.testing.assert_allclose(posterior.theta, first_theta(), rtol=1e-5)
    assert abs(answers(made()) - expected).max() > 1e-3


def test_untrained_and_without_steps_it_is_protonet_by_cosine():
    """With w = 1, s = 10 and b = 0 the classes are those of protonet on unit features at temperature 0.1."""
    features = BARE._replace(features=lambda params, x: x / jnp.linalg.norm(x, axis=-1, keepdims=True))
    other = protonet(features, Categorical(), distance="cosine", temperature=0.1)
    params = start(made(), SUPPORT)
    posterior = other.adapt(start(other, SUPPORT), SUPPORT, KEY)
    expected = other.predict(start(other, SUPPORT), posterior, QUERY.x, KEY).mean()
    np.testing.assert_allclose(answers(made(test_steps=0), params=params), expected, rtol=1e-4, atol=1e-6)


def test_with_the_true_gradient_each_step_descends_the_queries_cross_entropy(monkeypatch):
    weight = jnp.array([1.0, 1, 2, 1, 0, 1, 1, 0.5])
    query = QUERY._replace(weight=weight)

    def oracle(params, logits, weight):
        return jax.nn.softmax(logits) - jax.nn.one_hot(query.y, WAY)

    def cross_entropy(theta):
        cosine = QUERY.x / jnp.linalg.norm(QUERY.x, axis=-1, keepdims=True)
        logits = 4 * (cosine @ (theta / jnp.linalg.norm(theta, axis=-1, keepdims=True)).T + 0.3)
        return (weight * -jax.nn.log_softmax(logits)[jnp.arange(N), query.y]).sum()

    monkeypatch.setattr(MODULE, "synthetic_gradient", oracle)
    theta = jnp.asarray(first_theta())
    for _ in range(3):
        theta = theta - 0.05 * jax.grad(cross_entropy)(theta)
    found = made(steps=1, test_steps=3).posterior(PARAMS, SUPPORT, query, KEY).theta
    np.testing.assert_allclose(found, theta, rtol=1e-4, atol=1e-5)


def test_the_synthetic_gradient_is_an_mlp_with_batch_norm_over_the_queries_that_count():
    weight = np.array([1.0, 1, 2, 1, 0, 1, 1, 0.5])
    logits = jax.random.normal(KEY, (N, WAY))
    h = np.asarray(logits)
    net = jax.tree.map(np.asarray, PARAMS.gradient)
    for name in ("hidden1", "hidden2"):
        h = np.maximum(h @ net[name]["w"] + net[name]["b"], 0)
        mean = np.average(h, axis=0, weights=weight)
        h = (h - mean) / np.sqrt(np.average((h - mean) ** 2, axis=0, weights=weight) + 1e-5)
        h = h * net[name]["gain"] + net[name]["shift"]
    assert net["hidden1"]["w"].shape == (WAY, 8 * WAY)
    found = MODULE.synthetic_gradient(PARAMS.gradient, logits, jnp.asarray(weight))
    np.testing.assert_allclose(found, h @ net["out"]["w"] + net["out"]["b"], rtol=1e-4, atol=1e-4)


def test_queries_in_another_order_or_with_padding_have_the_same_answers():
    plain, turn = answers(made()), jax.random.permutation(KEY, N)
    np.testing.assert_allclose(answers(made(), query=Batch(QUERY.x[turn], None)), plain[turn], rtol=1e-4)
    x, weight = jnp.concatenate([QUERY.x, jnp.full((3, D), 9.0)]), (jnp.arange(N + 3) < N) * 1.0
    np.testing.assert_allclose(answers(made(), query=Batch(x, None, weight))[:N], plain, rtol=1e-4)
    # Company matters: half of the queries have other answers than among all of them.
    assert abs(answers(made(), query=Batch(QUERY.x[:4], None)) - plain[:4]).max() > 1e-4


def test_a_class_without_examples_has_probability_0_and_moves_nothing():
    seen = SUPPORT._replace(y=jnp.array([0, 0, 0, 1, 1, 1]))
    found = answers(made(), seen)
    assert (found[:, 2] == 0).all()
    assert jnp.isfinite(found).all()


def test_one_query_is_refused():
    one = Batch(QUERY.x[:1], QUERY.y[:1])
    with pytest.raises(ValueError, match=r"query must have at least 2 examples for sib.*got 1.*test_steps=0"):
        answers(made(), query=one)
    with pytest.raises(ValueError, match="at least 2 examples"):
        made().loss(PARAMS, Task(SUPPORT, one), KEY)
    alone = QUERY._replace(weight=(jnp.arange(N) < 1) * 1.0)
    with pytest.raises(ValueError, match="at least 2 examples"):
        made().posterior(PARAMS, SUPPORT, alone, KEY)
    assert jnp.isnan(answers(made(), query=alone)).all()  # compiled code cannot raise
    np.testing.assert_allclose(answers(made(test_steps=0), query=one), classify(first_theta(), one.x), rtol=1e-5)
    with pytest.raises(ValueError, match="likelihood must be Categorical"):
        sib(mlp(), Gaussian())


@pytest.mark.slow
def test_a_padded_task_of_one_query_is_named_as_the_cause_of_nan():
    padded = Task(SUPPORT, QUERY._replace(weight=jnp.zeros(QUERY.y.shape[0]).at[2].set(1)))
    source = FixedTasks(jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), padded))
    with pytest.raises(NonFiniteLoss, match=r"cause: query must have at least 2 examples for sib.*got 1"):
        fit(made(), Splits(source, source, source), TINY)
    report = mp.evaluate(made(), PARAMS, source, KEY, tasks=4, memorisation=False)
    assert "4 of the tasks with predictions of NaN have one query, beside which there is no other" in report.notes


def test_the_loss_is_the_cross_entropy_after_the_steps_and_the_decay_of_all_but_the_network():
    learner = made(decay=0.2)
    p = np.asarray(answers(learner))[np.arange(N), np.asarray(QUERY.y)]
    own = sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(PARAMS._replace(embedding=None)))
    np.testing.assert_allclose(
        learner.loss(PARAMS, Task(SUPPORT, QUERY), KEY)[0], -np.log(p).mean() + 0.1 * own, rtol=1e-5
    )
    assert jnp.isfinite(
        jax.grad(lambda p: learner.loss(p, Task(SUPPORT, QUERY), KEY)[0])(PARAMS).gradient["out"]["w"]
    ).all()


@jax.tree_util.register_static
class Blobs:
    """Three directions, whose only example is further from the middle than the queries are."""

    def sample(self, key, n):
        sizes = zip(jax.random.split(key, 3), (3, 30, 3), strict=True)
        middle, x, shown = (jax.random.normal(k, (n, m, 4)) for k, m in sizes)
        y = jnp.tile(jnp.arange(30) % 3, (n, 1))
        x = jnp.take_along_axis(middle, y[..., None], 1) + 0.5 * x
        return Task(Batch(middle + shown, jnp.tile(jnp.arange(3), (n, 1))), Batch(x, y))


@pytest.mark.slow
def test_training_makes_the_queries_help():
    training = mp.Training(steps=240, meta_batch=8, rate=5e-3, chunk=240, validation_tasks=20)
    trained = mp.fit(sib(BARE, Categorical()), mp.Splits(Blobs(), Blobs(), Blobs()), training)
    together, alone = (
        mp.evaluate(sib(BARE, Categorical(), test_steps=k), trained.params, Blobs(), KEY) for k in (3, 0)
    )
    assert together.figures["accuracy"].mean > alone.figures["accuracy"].mean + 0.01
    assert together.figures["nll"].mean < alone.figures["nll"].mean
