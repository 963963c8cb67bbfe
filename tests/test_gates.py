"""HSML and ARML: MAML behind an open gate, the order of examples, and their forward passes computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaprior as mp
from metaprior.learners.arml import attached, edges
from metaprior.learners.builders.gates import gated, read_rows, summary, summary_init
from metaprior.learners.hsml import climb, tree_init
from metaprior.networks.gru import autoencode, autoencoder_init
from metaprior.networks.lrn import local_response
from scenarios import KEY, answer, batch

BOTH = ("hsml", "arml")
INNER = {"steps": 3, "rate": 0.1}
X = jnp.linspace(-1, 1, 12).reshape(6, 2)
NUMBERS = mp.Task(mp.Batch(X, jnp.sin(3 * X[:, :1])), mp.Batch(X[::2], jnp.cos(X[::2, :1])))
CLASSES = mp.Task(mp.Batch(X, jnp.array([0, 1, 2, 0, 1, 2])), mp.Batch(X[::2], jnp.array([2, 1, 0])))


def made(name, of_classes=False, **options):
    model = mp.mlp(3 if of_classes else 1, (8,), "tanh")
    return mp.make_learner(name, model, mp.Categorical() if of_classes else mp.Gaussian(), **INNER, **options)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("of_classes", [False, True])
@pytest.mark.slow
def test_a_gate_of_zero_weights_and_a_large_bias_is_maml(name, of_classes):
    task = CLASSES if of_classes else NUMBERS
    learner, plain = made(name, of_classes, hidden=6, reconstruction=0.0, gate_bias=40.0), made("maml", of_classes)
    params = learner.init(KEY, task)
    params = params._replace(gate=jax.tree.map(lambda w: w * (w == 40), params.gate))
    np.testing.assert_allclose(
        answer(learner, params, task.support, X), answer(plain, params.theta, task.support, X), rtol=1e-6
    )
    ours, theirs = (jax.grad(lambda p, it=it: it.loss(p, task, KEY)[0])(p) for it, p in
                    ((learner, params), (plain, params.theta)))  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours.theta, theirs)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.slow
def test_a_gate_without_weights_halves_the_start_and_the_reconstruction_enters_the_loss(name):
    learner = made(name, hidden=6, reconstruction=0.5)
    params = learner.init(KEY, NUMBERS)
    params = params._replace(gate=jax.tree.map(jnp.zeros_like, params.gate))
    half = jax.tree.map(lambda leaf: leaf / 2, params.theta)
    plain = made("maml")
    value, metrics = learner.loss(params, NUMBERS, KEY)
    assert metrics["reconstruction"] > 0.01
    np.testing.assert_allclose(value - 0.5 * metrics["reconstruction"], plain.loss(half, NUMBERS, KEY)[0], rtol=1e-5)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.slow
def test_the_order_of_examples_matters_for_numbers_and_not_for_classes(name):
    turn = jnp.array([3, 5, 0, 1, 4, 2])
    for task, of_classes, aggregator, same in (
        (CLASSES, True, "recurrent", True), (NUMBERS, False, "recurrent", False), (NUMBERS, False, "pooling", True),
    ):  # fmt: skip
        learner = made(name, of_classes, hidden=6, aggregator=aggregator)
        params = learner.init(KEY, task)
        kept, turned = (
            answer(learner, params, jax.tree.map(lambda leaf, at=at: leaf[at], task.support), X)
            for at in (jnp.arange(6), turn)
        )
        assert (jnp.abs(kept - turned).max() < 2e-6) == same


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("of_classes", [False, True])
def test_padding_within_the_support_is_skipped_and_an_empty_support_has_an_answer(name, of_classes):
    task = CLASSES if of_classes else NUMBERS
    learner = made(name, of_classes, hidden=6)
    params, (x, y, *_) = learner.init(KEY, task), task.support
    padded = mp.Batch(jnp.insert(x, 2, 7.0, 0), jnp.insert(y, 2, 1, 0), jnp.ones(7).at[2].set(0))
    for of in (lambda s: answer(learner, params, s, X), lambda s: learner.kinds(params, s, KEY)):
        np.testing.assert_allclose(of(padded), of(task.support), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(learner.kinds(params, task.support, KEY).sum(), 1, rtol=1e-6)
    empty = task.support._replace(weight=jnp.zeros(6))
    assert jnp.isfinite(answer(learner, params, empty, X)).all()
    none = jax.tree.map(lambda leaf: leaf[:0], task.support)
    np.testing.assert_allclose(
        answer(learner, params, none, X), answer(learner, params, empty, X), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(learner.kinds(params, empty, KEY).sum(), 1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_images_are_encoded_by_their_own_network(name):
    x = jax.random.normal(KEY, (6, 8, 8, 1))
    task = mp.Task(mp.Batch(x, CLASSES.support.y), mp.Batch(x[:3], CLASSES.support.y[:3]))
    model = mp.conv4(3, 2, blocks=2)
    learner = mp.make_learner(name, model, mp.Categorical(), hidden=6)
    params = learner.init(KEY, task)
    assert params.encoder["seer"]["conv1"]["w"].shape == (5, 5, 1, 32)
    flipped = jax.tree.map(lambda leaf: leaf[::-1], task.support)
    kept, turned = (answer(learner, params, s, x) for s in (task.support, flipped))
    np.testing.assert_allclose(kept, turned, atol=2e-5)


def test_rows_of_classes_are_their_weighted_means_and_label():
    init, read = read_rows(mp.mlp(3, (4,)), mp.Categorical(), 5)
    theta = mp.mlp(3, (4,)).init(KEY, X)
    support = mp.Batch(X, jnp.array([0, 1, 0, 1, 0, 1]), jnp.array([1.0, 2, 3, 0, 1, 1]))
    params = init(KEY, theta, support)
    rows = read(params, theta, support)
    e = np.asarray(X) @ params["last"]["w"]
    np.testing.assert_allclose(rows.values[0], (e[0] + 3 * e[2] + e[4]) / 5, rtol=1e-5)
    np.testing.assert_allclose(rows.values[1], (2 * e[1] + e[5]) / 3, rtol=1e-5)
    np.testing.assert_array_equal(rows.weight, [5, 3, 0])
    np.testing.assert_array_equal(rows.labelled[:, 5:], np.diag([1, 1, 0]))


def test_the_gate_is_a_sigmoid_per_parameter():
    theta = {"w": jnp.array([[2.0, -4.0]])}
    gate = {"w": {"w": jnp.array([[1.0, 0.0], [0.0, -1.0]]), "b": jnp.array([0.0, 0.5])}}
    code = np.array([0.3, 2.0])
    z = np.array([0.3, 0.5 - 2.0])
    np.testing.assert_allclose(gated(gate, theta, code)["w"], np.array([[2.0, -4.0]]) / (1 + np.exp(-z)), rtol=1e-6)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("shares", ["linear", "distance"])
def test_the_tree_is_what_numpy_computes_node_by_node(shares):
    tree = tree_init(KEY, 5, 4, 2)
    tree = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(3), leaf.shape), tree)
    g = np.asarray(jax.random.normal(jax.random.key(4), (5,)))
    t = jax.tree.map(np.asarray, tree)
    p = softmax(np.array([-((g - c) ** 2).sum() / 6 for c in t["centres"]]))
    nodes = np.zeros((2, 5))
    for a in range(4):
        u = p[a] * np.tanh(g @ t["leaf"]["w"][a] + t["leaf"]["b"][a])
        if shares == "linear":
            score = u @ t["share"]["w"] + t["share"]["b"]
        else:
            score = np.array([-(((u - t["share"]["w"][:, j]) ** 2).sum() + t["share"]["b"][j]) / 2 for j in range(2)])
        share = softmax(score)
        for j in range(2):
            nodes[j] += share[j] * np.tanh(u @ t["middle"]["w"][j] + t["middle"]["b"][j])
    root = sum(np.tanh(node @ t["root"]["w"] + t["root"]["b"]) for node in nodes)
    found, assigned = climb(tree, g, 3.0, shares)
    np.testing.assert_allclose(found, root, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(assigned, p, rtol=1e-5)
    np.testing.assert_allclose(assigned.sum(), 1, rtol=1e-6)


def test_a_tree_of_one_leaf_is_a_plain_network():
    tree, g = tree_init(KEY, 3, 1, 1), jnp.array([0.5, -1.0, 2.0])
    root, p = climb(tree, g, 2.0)
    expected = g
    for w in (tree["leaf"]["w"][0], tree["middle"]["w"][0], tree["root"]["w"]):
        expected = jnp.tanh(expected @ w)
    np.testing.assert_allclose(root, expected, rtol=1e-5)
    np.testing.assert_array_equal(p, [1.0])


def test_the_graph_is_symmetric_where_it_must_be_and_its_rows_sum_to_one():
    keys = jax.random.split(KEY, 4)
    graph = {"vertices": jax.random.normal(keys[0], (4, 5)),
             **{n: {"w": jax.random.normal(k, (5, 1)), "b": jnp.ones(1)} for n, k in zip(("task", "meta"), keys[1:3],
                                                                                       strict=True)}}  # fmt: skip
    c = jax.random.normal(keys[3], (3, 5))
    among = edges(graph["task"], c)
    np.testing.assert_allclose(among, among.T)
    np.testing.assert_array_equal(jnp.diag(among), 0)
    whole, cross = attached(graph, c, jnp.array([True, True, True]), 2.0)
    np.testing.assert_allclose(cross.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(whole.sum(1), 1, rtol=1e-6)
    # The diagonal of D^-1 (A + I) is 1 / D, which gives A back.
    a = whole / jnp.diag(whole)[:, None] - jnp.eye(7)
    np.testing.assert_allclose(a[:3, 3:], cross, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(a, a.T, rtol=1e-4, atol=1e-6)
    d = np.array([[-((ci - h) ** 2).sum() / 4 for h in graph["vertices"]] for ci in c])
    np.testing.assert_allclose(cross, softmax(d), rtol=1e-4, atol=1e-6)
    alone = attached(graph, c, jnp.array([True, False, True]), 2.0)[0]
    np.testing.assert_array_equal(alone[1], jnp.eye(7)[1])
    np.testing.assert_array_equal(alone[:, 1], jnp.eye(7)[1])


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def test_the_autoencoder_is_what_numpy_computes_without_the_missing_rows():
    params = autoencoder_init(KEY, 2, 3)
    x = np.asarray(batch(5).x)
    there = np.array([True, False, True, True, False])
    t = jax.tree.map(np.asarray, params)

    def unit(layer, h, xi):
        r, u = np.split(sigmoid(np.concatenate([xi, h]) @ layer["gates"]["w"] + layer["gates"]["b"]), 2)
        new = np.tanh(np.concatenate([xi, r * h]) @ layer["candidate"]["w"] + layer["candidate"]["b"])
        return u * h + (1 - u) * new

    h, outputs = np.zeros(3), []
    for xi in x[there]:
        outputs.append(h := unit(t["encoder"], h, xi))
    said, errors = np.zeros(2), []
    for xi in x[there][::-1]:
        h = unit(t["decoder"], h, said)
        said = h @ t["back"]["w"] + t["back"]["b"]
        errors.append((said - xi) ** 2)
    code, loss = autoencode(params, jnp.asarray(x), jnp.asarray(there))
    np.testing.assert_allclose(code, np.mean(outputs, 0), rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-5)


def test_a_pooled_code_is_a_weighted_mean():
    params, x, weight = summary_init(KEY, 2, 3, "pooling"), batch(4).x, jnp.array([1.0, 0, 2, 1])
    codes = np.tanh(np.asarray(x) @ params["encoder"]["w"])
    np.testing.assert_allclose(
        summary(params, x, weight, "pooling").code, np.average(codes, 0, weights=weight), rtol=1e-5
    )


def test_local_response_normalisation_divides_by_the_channels_around():
    x = np.asarray(jax.random.normal(KEY, (1, 1, 1, 12))) * 30
    expected = [x[..., i] / (1 + 0.001 / 9 * (x[..., max(i - 4, 0) : i + 5] ** 2).sum()) ** 0.75 for i in range(12)]
    np.testing.assert_allclose(local_response(jnp.asarray(x)), np.stack(expected, -1), rtol=1e-5)
