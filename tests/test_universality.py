"""The study of universality: its theory on small cases, its tasks, and figures that are right where they are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaprior.core.likelihoods import Gaussian, Normals
from metaprior.core.types import Batch
from metaprior.inference.descent import descend
from metaprior.learners import make_learner
from metaprior.networks import mlp
from metaprior.studies import universality
from metaprior.studies.universality import size_of
from metaprior.tasks import polynomial, sinusoid

KEY = jax.random.key(0)


# -- the theory --------------------------------------------------------------------------------------------------------


class Absolute:
    """The absolute error."""

    def nll(self, outputs, y):
        return jnp.abs(outputs - y).sum(-1)

    def hessian_root(self, outputs):
        return jnp.ones_like(outputs)[..., None]

    def predictive(self, outputs):
        return Normals(outputs, jnp.ones_like(outputs))


class SoftBernoulli(Absolute):
    """The cross-entropy of targets between 0 and 1."""

    def nll(self, outputs, y):
        return optax.sigmoid_binary_cross_entropy(outputs, y).sum(-1)


@pytest.mark.parametrize(
    ("likelihood", "told_apart"), [(Absolute(), False), (Gaussian(), True), (SoftBernoulli(), True)]
)
def test_one_step_on_the_absolute_error_cannot_tell_labels_apart(likelihood, told_apart):
    """Finn & Levine 2018: the loss's gradient at the output must determine the label. That of L1 is its sign."""
    learner = make_learner("maml", mlp(1, (8,)), likelihood, rate=0.1)
    x, y = jax.random.normal(KEY, (5, 2)), jnp.full((5, 1), 0.4)
    params = mlp(1, (8,)).init(KEY, x)
    params["head"]["b"] = params["head"]["b"] - 5.0  # predictions below both labels
    phi = [learner.adapt(params, Batch(x, factor * y), KEY).posterior.mean for factor in (1, 2)]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), *phi)
    assert all(jax.tree.leaves(same)) != told_apart


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_rank_of_one_step_grows_with_depth(depth):
    """One step on one point changes the product of N linear layers by a matrix of rank N."""
    with jax.enable_x64(True):
        keys = jax.random.split(KEY, depth + 1)
        layers = [jax.random.normal(key, (8, 8)) / 8**0.5 for key in keys[:depth]]
        x, y = jax.random.normal(keys[-1], (2, 8))

        def product(layers):
            return layers[0] if len(layers) == 1 else jnp.linalg.multi_dot(layers)

        after = descend(lambda w: ((x @ product(w) - y) ** 2).sum(), layers, optax.sgd(0.1), 1).phi
        values = np.linalg.svd(product(after) - product(layers), compute_uv=False)
    assert (values > 1e-9 * values[0]).sum() == depth


# -- its tasks and network ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_polynomials_are_of_their_degree_and_range():
    task = polynomial(shot=6, query=50, given=True).train.sample(KEY, 20)
    x, y = np.asarray(task.query.x, float), np.asarray(task.query.y[..., 0], float)
    assert x.shape == (20, 50, 5)
    for xi, yi in zip(x, y, strict=True):
        coefficients = np.polyfit(xi[:, 0], yi, 3)
        np.testing.assert_allclose(np.broadcast_to(coefficients, (50, 4)), xi[:, 1:], atol=1e-3)
        assert np.abs(coefficients).max() < 1.01
    assert 2.5 < np.abs(x[..., 0]).max() <= 3
    plain = polynomial(shot=6, query=50).train.sample(KEY, 20)
    np.testing.assert_array_equal(plain.query.x[..., 0], task.query.x[..., 0])
    np.testing.assert_array_equal(plain.query.y, task.query.y)
    quadratic = polynomial(degree=2, coefficients=(2.0, 3.0), noise=0.5).test.sample(KEY, 4)
    x, y = (np.asarray(rows[0, :, 0], float) for rows in (quadratic.query.x, quadratic.query.y))
    cubic, square, *_ = np.polyfit(x, y, 3)
    assert abs(cubic) < 0.3
    assert 1.5 < square < 3.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"degree": 0}, "degree must be"),
        ({"coefficients": (1.0, -1.0)}, "coefficients must be"),
        ({"noise": -1.0}, "noise must be"),
    ],
)
def test_bad_polynomials(options, words):
    with pytest.raises(ValueError, match=words):
        polynomial(**options)


@pytest.mark.slow
def test_bias_inputs_are_inputs_that_are_adapted():
    plain, own, x = mlp(1, (6,)), mlp(1, (6,), bias_inputs=3), jax.random.normal(KEY, (4, 2))
    params = own.init(KEY, x)
    w = params["layer1"]["w"]
    assert w.shape == (5, 6)
    bare = {"layer1": {"w": w[:2], "b": params["layer1"]["b"]}, "head": params["head"]}
    np.testing.assert_allclose(own.apply(params, x), plain.apply(bare, x), atol=1e-6)
    params["layer1"]["inputs"] = jnp.array([1.0, -2.0, 0.5])
    shifted = bare | {"layer1": {"w": w[:2], "b": params["layer1"]["inputs"] @ w[2:]}}
    np.testing.assert_allclose(own.apply(params, x), plain.apply(shifted, x), atol=1e-5)
    assert jax.grad(lambda p: (own.apply(p, x) ** 2).sum())(params)["layer1"]["inputs"].any()
    assert mlp(1, (), bias_inputs=2).init(KEY, x)["head"]["w"].shape == (4, 1)


@pytest.mark.parametrize(
    ("hidden", "parameters"),
    [((384,), 5003), ((64, 64), 5003), ((46,) * 3, 4933), ((38,) * 4, 4951), ((33,) * 5, 4928)],
)
def test_networks_of_the_study_have_about_as_many_parameters(hidden, parameters):
    network, source = mlp(1, hidden, bias_inputs=10), polynomial().test
    assert size_of(network, network.init(KEY, jnp.ones((1, 1))), source) == (len(hidden), parameters)


# -- the study ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_course_is_that_of_learners_with_these_steps():
    source, network = sinusoid(test_query=9).test, mlp(1, (6,))

    def learner(steps):
        return make_learner("maml", network, Gaussian(), steps=1, test_steps=steps)

    params = network.init(KEY, jnp.ones((1, 1)))
    found = universality(learner(7), params, source, KEY, steps=(7, 0, 3), tasks=5)
    assert found.metric == "mse"
    assert found.trained.steps == [0, 3, 7]
    for i, k in ((1, 3), (2, 7)):
        alone = universality(learner(k), params, source, KEY, steps=(k,), tasks=5)
        for part in ("query", "support"):
            assert getattr(alone.trained, part)[0].mean == pytest.approx(getattr(found.trained, part)[i].mean, rel=1e-4)
        assert alone.trained.median[0] == pytest.approx(found.trained.median[i], rel=1e-4)
    supports = [figure.mean for figure in found.trained.support]
    assert supports == sorted(supports, reverse=True)
    assert found.random is not None
    assert found.random.query[0].mean != pytest.approx(found.trained.query[0].mean, rel=1e-3)


@pytest.mark.slow
def test_a_learner_without_steps_has_one_figure():
    source = sinusoid(test_query=4).test
    learner = make_learner("cnp", mlp(1, (6,)), Gaussian())
    task = jax.tree.map(lambda leaf: leaf[0], source.sample(KEY, 1))
    found = universality(learner, learner.init(KEY, task), source, KEY, tasks=3)
    assert (found.trained.steps, found.random) == ([None], None)


def test_universality_refuses():
    learner, source = make_learner("maml", mlp(1, (4,)), Gaussian(), steps=2), sinusoid().test
    params = mlp(1, (4,)).init(KEY, jnp.ones((1, 1)))
    for options, words in (
        ({"tasks": 0}, "tasks must be at least 1, got 0"),
        ({"steps": ()}, "steps must be numbers of at least 0"),
        ({"steps": (-1,)}, "steps must be numbers of at least 0"),
        ({"steps": (1, 3)}, "steps must be at most the learner's steps on a new task, 2, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            universality(learner, params, source, KEY, **options)
