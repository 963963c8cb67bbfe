"""MMAML: a task encoder modulates the network before MAML's inner steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior import Batch, Categorical, Gaussian, Task, conv4, make_learner, mlp
from metaprior.networks.lstm import LSTMState, lstm
from scenarios import KEY

X = jax.random.normal(jax.random.key(1), (8, 2))
TASK = Task(Batch(X[:5], jnp.sin(X[:5, :1])), Batch(X[5:], jnp.cos(X[5:, :1])))
INNER = {"steps": 2, "rate": 0.1}


def moved(params):
    """The learner with modulations that are not 0."""
    return params._replace(maps=jax.tree.map(lambda w: w + 0.3 * jax.random.normal(KEY, w.shape), params.maps))


def means(learner, params, support=TASK.support, x=X):
    return learner.predict(params, learner.adapt(params, support, KEY), x, KEY).mean()


@pytest.mark.parametrize("modulation", ["film", "sigmoid", "softmax"])
def test_without_modulation_it_is_maml(modulation):
    model = mlp(1, (6, 5), "tanh")
    maml, mmaml = (
        make_learner("maml", model, Gaussian(), **INNER),
        make_learner("mmaml", model, Gaussian(), units=4, modulation=modulation, **INNER),
    )
    params = mmaml.init(KEY, TASK)  # its maps are 0 at first
    expected, gradient = jax.value_and_grad(lambda p: maml.loss(p, TASK, KEY)[0])(params.theta)
    loss, found = jax.value_and_grad(lambda p: mmaml.loss(p, TASK, KEY)[0])(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found.theta, gradient)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found.maps))


def code_by_hand(params, support):
    """The bidirectional LSTM, one pair after another."""
    ends, sequence = jnp.zeros(8), [jnp.concatenate([x, y]) for x, y in zip(support.x, support.y, strict=True)]
    for cells in params.encoder.layers:
        outputs = []
        for cell, order in zip(cells, (sequence, sequence[::-1]), strict=True):
            state, seen = LSTMState(jnp.zeros(4), jnp.zeros(4)), []
            for pair in order:
                state = lstm(cell, state, pair)
                seen.append(state.h)
            outputs.append(seen)
        ends = jnp.concatenate([outputs[0][-1], outputs[1][-1]])
        sequence = [jnp.concatenate(pair) for pair in zip(outputs[0], outputs[1][::-1], strict=True)]
    return ends


def test_the_answer_is_that_of_film_and_gradient_steps_by_hand():
    """The modulation is the start's, in every inner step and for the queries."""
    model = mlp(1, (6, 5), "tanh")
    learner = make_learner("mmaml", model, Gaussian(), units=4, **INNER)
    params = moved(learner.init(KEY, TASK))
    code = code_by_hand(params, TASK.support)
    film = {name: jnp.split(code @ m["w"] + m["b"], 2) for name, m in params.maps.items()}

    def outputs(theta, x):
        for name in ("layer1", "layer2"):
            gamma, delta = film[name]
            x = jnp.tanh((1 + gamma) * (x @ theta[name]["w"] + theta[name]["b"]) + delta)
        return x @ theta["head"]["w"] + theta["head"]["b"]

    theta = params.theta
    for _ in range(2):
        gradient = jax.grad(lambda t: ((outputs(t, TASK.support.x) - TASK.support.y) ** 2).mean())(theta)
        theta = jax.tree.map(lambda t, g: t - 0.1 * g, theta, gradient)
    np.testing.assert_allclose(means(learner, params), outputs(theta, X), rtol=2e-4, atol=1e-5)
    # Only the network is adapted.
    adapted = learner.adapt(params, TASK.support, KEY)
    assert jax.tree.structure(adapted.posterior.mean) == jax.tree.structure(params.theta)


def test_gates_scale_each_layer():
    for modulation, gate in (
        ("sigmoid", lambda z: 2 / (1 + jnp.exp(-z))),
        ("softmax", lambda z: 3 * jax.nn.softmax(z)),
    ):
        learner = make_learner("mmaml", mlp(1, (3,), "tanh"), Gaussian(), units=4, modulation=modulation, steps=0)
        params = moved(learner.init(KEY, TASK))
        z = code_by_hand(params, TASK.support) @ params.maps["layer1"]["w"] + params.maps["layer1"]["b"]
        theta = params.theta
        hidden = jnp.tanh(gate(z) * (X @ theta["layer1"]["w"] + theta["layer1"]["b"]))
        expected = hidden @ theta["head"]["w"] + theta["head"]["b"]
        np.testing.assert_allclose(means(learner, params), expected, rtol=1e-5, atol=1e-6)


def test_sorted_pairs_have_no_order():
    turned = jax.tree.map(lambda leaf: leaf[::-1], TASK.support)
    for sort in (False, True):
        learner = make_learner("mmaml", mlp(1, (6,)), Gaussian(), units=4, sort=sort, **INNER)
        params = moved(learner.init(KEY, TASK))
        gap = jnp.abs(means(learner, params) - means(learner, params, turned)).max()
        assert (gap < 1e-5) == sort


@pytest.mark.slow
def test_images_are_read_by_a_copy_of_the_network_and_labels_are_not():
    """The encoder is normalised by the support, so padding and the queries do not change it."""
    images = jax.random.normal(KEY, (5, 8, 8, 1))
    support = Batch(images, jnp.array([0, 1, 2, 0, 1]))
    learner = make_learner("mmaml", conv4(3, filters=4, blocks=2, norm="task"), Categorical(), units=4, **INNER)
    params = moved(learner.init(KEY, Task(support, support)))
    modulation = learner.adapt(params, support, KEY).posterior.params.modulation
    renamed = learner.adapt(params, support._replace(y=(support.y + 1) % 3), KEY).posterior.params.modulation
    padded = Batch(
        jnp.concatenate([images, images[:1] + 1]), jnp.append(support.y, 0), jnp.append(jnp.ones(5), 0.0)
    )  # fmt: skip
    longer = learner.adapt(params, padded, KEY).posterior.params.modulation
    for name in ("block1", "block2"):
        np.testing.assert_array_equal(modulation[name], renamed[name])
        np.testing.assert_allclose(modulation[name], longer[name], rtol=1e-4, atol=1e-5)
        assert modulation[name].shape == (8,)
    gradient = jax.grad(lambda p: learner.loss(p, Task(support, support), KEY)[0])(params)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient.encoder)) > 0


def test_an_empty_support_is_the_maps_bias():
    learner = make_learner("mmaml", mlp(1, (6,)), Gaussian(), units=4, **INNER)
    params = moved(learner.init(KEY, TASK))
    empty = Batch(X[:0], TASK.support.y[:0])
    adapted = learner.adapt(params, empty, KEY)
    np.testing.assert_allclose(adapted.params.modulation["layer1"], params.maps["layer1"]["b"], rtol=1e-6)
