"""TapNet against dense linear algebra: the null space of the errors, its invariances, and references taken greedily."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical
from metaprior.core.types import Batch, Model, Task
from metaprior.learners import tapnet
from metaprior.learners.tapnet import Referenced, assign, errors, projected, spanned
from metaprior.networks import mlp

KEY = jax.random.key(0)
WAY, D = 4, 9
PLAIN = Model(lambda key, x: jnp.zeros(0), lambda params, x: x)  # the inputs are the embedding
LINEAR = Model(lambda key, x: jnp.eye(D), lambda w, x: x @ w)

pytestmark = pytest.mark.usefixtures("x64")


def problem(labels=(0, 1, 2, 3, 0, 1, 2, 3), way=WAY):
    keys = jax.random.split(jax.random.key(1), 3)
    y = jnp.array(labels)
    support = Batch(jax.random.normal(keys[0], (y.size, D)), y)
    query = Batch(jax.random.normal(keys[1], (5, D)), y[jnp.arange(5) % y.size])
    return Task(support, query), Referenced(jnp.zeros(0), jax.random.normal(keys[2], (way, D)))


def null_space(references, means):
    """(E, M) of the classes' references and means, in numpy."""
    references, means = np.asarray(references), np.asarray(means)
    others = (references.sum(0) - references) / (len(references) - 1)
    e = [a / np.linalg.norm(a) - c / np.linalg.norm(c) for a, c in zip(references - others, means, strict=True)]
    return np.stack(e), np.linalg.svd(np.stack(e))[2][len(e) :].T


def log_probs(learner, params, task):
    return learner.predict(params, learner.adapt(params, task.support, KEY), task.query.x, KEY).log_probs[0]


def log_softmax(scores):
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def test_distances_are_taken_in_the_null_space_of_the_errors_under_any_basis():
    task, params = problem()
    means = np.stack([np.asarray(task.support.x)[np.asarray(task.support.y) == k].mean(0) for k in range(WAY)])
    e, m = null_space(params.references, means)
    assert m.shape == (D, D - WAY)
    span = tapnet(PLAIN, Categorical(), way=WAY).adapt(params, task.support, KEY).span
    assert abs(e @ projected(span, jnp.eye(D))).max() < 1e-12
    np.testing.assert_allclose(projected(span, jnp.eye(D)), m @ m.T, atol=1e-14)
    found = log_probs(tapnet(PLAIN, Categorical(), way=WAY), params, task)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(D - WAY, D - WAY)))[0]
    z, phi = np.asarray(task.query.x), np.asarray(params.references)
    for basis in (m, m @ rotation):
        distance = ((z @ basis)[:, None] - phi @ basis) ** 2
        np.testing.assert_allclose(found, log_softmax(-distance.sum(-1)), rtol=1e-13, atol=1e-13)
        # The form of the published code, without its bias.
        code = 2 * z @ basis @ basis.T @ phi.T - ((phi @ basis) ** 2).sum(-1) - ((z @ basis) ** 2).sum(-1)[:, None]
        np.testing.assert_allclose(found, log_softmax(code), rtol=1e-12, atol=1e-12)


def test_dependent_errors_span_fewer_directions():
    _, params = problem()
    phi = params.references
    tilde = phi - (phi.sum(0) - phi) / (WAY - 1)
    shown = jnp.ones(WAY, bool)
    everywhere = spanned(errors(phi, 3 * tilde, shown))  # class means that are lined up already
    np.testing.assert_array_equal(projected(everywhere, phi), phi)
    one_off = tilde.at[1].set(jnp.roll(tilde[1], 1))  # one class is not
    assert (spanned(errors(phi, one_off, shown)) != 0).any(-1).sum() == 1
    np.testing.assert_allclose(projected(spanned(errors(phi, one_off, shown)), phi) @ errors(phi, one_off, shown).T, 0,
                               atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("labels", [(0, 2, 5, 5), (1, 0), (0, 1, 2, 3, 4, 5)])
def test_fewer_classes_take_the_best_free_reference_in_turn(labels):
    task, params = problem(labels, way=6)
    learner = tapnet(PLAIN, Categorical(), way=6)
    x, y, phi = np.asarray(task.support.x), np.asarray(labels), np.asarray(params.references)
    shown, taken = sorted(set(labels)), []
    means = np.stack([x[y == k].mean(0) for k in shown])
    for k, c in zip(shown, means, strict=True):
        score = 2 * phi @ c - (phi**2).sum(-1) - (c**2).sum()
        free = [i for i in range(6) if i not in taken]
        taken.append(k if len(shown) == 6 else max(free, key=lambda i: score[i]))
    found = learner.adapt(params, task.support, KEY).assigned
    np.testing.assert_array_equal(found[jnp.array(shown)], taken)
    _, m = null_space(phi[taken], means)
    distance = (((np.asarray(task.query.x) @ m)[:, None] - phi[taken] @ m) ** 2).sum(-1)
    found = log_probs(learner, params, task)
    np.testing.assert_allclose(found[:, jnp.array(shown)], log_softmax(-distance), rtol=1e-12, atol=1e-12)
    absent = [k for k in range(6) if k not in shown]
    assert (jnp.exp(found[:, absent]) == 0).all()


def test_two_classes_never_share_a_reference():
    """Both means are nearest to the same reference."""
    phi, means = jnp.array([[0.0, 0], [1, 0], [9, 9]]), jnp.array([[1.0, 0], [1, 0.1], [0, 0]])
    np.testing.assert_array_equal(assign(phi, means, jnp.array([True, True, False]))[:2], [1, 0])


def test_the_meta_gradient_holds_the_projection_constant():
    task, start = problem()
    params = start._replace(embedding=jax.random.normal(KEY, (D, D)))
    learner = tapnet(LINEAR, Categorical(), way=WAY)
    posterior = learner.adapt(params, task.support, KEY)

    def held(p):
        return -learner.predict(p, posterior, task.query.x, KEY).log_prob(task.query.y).mean()

    found, expected = jax.grad(lambda p: learner.loss(p, task, KEY)[0])(params), jax.grad(held)(params)
    np.testing.assert_allclose(found.embedding, expected.embedding, rtol=1e-10)
    np.testing.assert_allclose(found.references, expected.references, rtol=1e-10)
    assert abs(expected.references).max() > 0.01


@pytest.mark.parametrize("width", [3, 4])
def test_an_embedding_needs_more_numbers_than_there_are_ways(width):
    task, _ = problem()
    learner = tapnet(mlp(WAY, (width,)), Categorical(), way=4)
    with pytest.raises(ValueError, match=f"way must be less than the number of features of the embedding, {width}"):
        learner.init(KEY, task)
