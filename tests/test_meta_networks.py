"""Meta networks coordinate by coordinate in numpy, without fast weights, and what attention must and must not see."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Task
from metaprior.learners import make_learner, meta_networks
from metaprior.networks import conv4, mlp
from metaprior.networks.augmented import augmented, last_layers, weights_of
from scenarios import KEY, start

pytestmark = pytest.mark.slow

MODULE = import_module("metaprior.learners.meta_networks")
WAY = 3
SUPPORT = Batch(jax.random.normal(jax.random.key(1), (6, 2)), jnp.array([2, 0, 1, 1, 0, 2]))
QUERY = Batch(jax.random.normal(jax.random.key(2), (4, 2)), jnp.array([0, 1, 2, 0]))
MODEL = mlp(WAY, (2,))
IMAGES = Batch(jax.random.normal(jax.random.key(3), (6, 8, 8, 1)), SUPPORT.y)


def logits(learner, params, support, x):
    """Centred, since a softmax forgets a common constant."""
    found = jax.jit(lambda p, s, x: learner.predict(p, learner.adapt(p, s, KEY), x, KEY).log_probs[0])
    f = found(params, support, x)
    return f - f.mean(-1, keepdims=True)


def centred(f):
    return f - f.mean(-1, keepdims=True)


def adapted(learner, params, support):
    return jax.jit(lambda p, s: learner.adapt(p, s, KEY))(params, support)


def loud(params, by=30.0):
    """Generators whose fast weights are as large as slow weights, and not nearly 0."""

    def louder(path, leaf):
        text = jax.tree_util.keystr(path)
        return by * leaf if "['out']['w']" in text or "writer['head']['w']" in text else leaf

    return jax.tree_util.tree_map_with_path(louder, params)


# ---- in numpy ----


def encoded(g):
    """Facts: (max(log|g|/7, -1), clip(e^7 g, -1, 1))."""
    return np.array([max(np.log(max(abs(g), 1e-300)) / 7, -1), np.clip(np.exp(7) * g, -1, 1)])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_by_hand(reader, sequence):
    w, b = np.asarray(reader["cell"]["w"]), np.asarray(reader["cell"]["b"])
    h = c = np.zeros(w.shape[1] // 4)
    for g in sequence:
        take, keep, candidate, show = np.split(np.concatenate([encoded(g), h]) @ w + b, 4)
        c = sigmoid(keep) * c + sigmoid(take) * np.tanh(candidate)
        h = sigmoid(show) * np.tanh(c)
    return (h @ np.asarray(reader["out"]["w"]) + np.asarray(reader["out"]["b"]))[0]


def written_by_hand(writer, g):
    z = encoded(g)
    for name in ("layer1", "layer2", "head"):
        z = z @ np.asarray(writer[name]["w"]) + np.asarray(writer[name]["b"])
        z = z if name == "head" else np.maximum(z, 0)
    return z[0]


def gradient_by_hand(net, x, y):
    """Of the mean cross-entropy of a network 2-2-3 with ReLU."""
    w1, b1, w2, b2 = net
    s = x @ w1 + b1
    h = np.maximum(s, 0)
    p = np.exp(h @ w2 + b2)
    p /= p.sum(1, keepdims=True)
    e = (p - np.eye(WAY)[y]) / len(y)
    back = e @ w2.T * (s > 0)
    return [x.T @ back, back.sum(0), h.T @ e, e.sum(0)]


def both(slow, fast, x):
    h = sum(np.maximum(x @ w[0] + w[1], 0) for w in (slow, fast))
    return sum(h @ w[2] + w[3] for w in (slow, fast))


def of(net):
    return [np.asarray(net[layer][part], float) for layer in ("layer1", "head") for part in ("w", "b")]


def test_logits_are_those_of_the_algorithm_coordinate_by_coordinate(x64):
    learner = meta_networks(MODEL, Categorical(), augment=None, units=4, temperature=0.2)
    params = loud(start(learner, SUPPORT))
    x, y, q = np.asarray(SUPPORT.x), np.asarray(SUPPORT.y), np.asarray(QUERY.x)
    u, b = of(params.keys), of(params.base)
    groups = [gradient_by_hand(u, x[y == k], y[y == k]) for k in range(WAY)]  # a group of each class, in their order
    reader = params.readers["dense"]
    reading = [np.vectorize(lambda *g: lstm_by_hand(reader, g))(*parts) for parts in zip(*groups, strict=True)]
    r, r_q = both(u, reading, x), both(u, reading, q)
    cosine = (r_q @ r.T) / np.linalg.norm(r_q, axis=1)[:, None] / np.linalg.norm(r, axis=1)
    a = np.exp(cosine / 0.2)
    a /= a.sum(1, keepdims=True)
    fast = [
        [
            np.vectorize(partial(written_by_hand, params.writer))(g)
            for g in gradient_by_hand(b, x[i : i + 1], y[i : i + 1])
        ]
        for i in range(len(y))
    ]
    expected = np.stack(
        [
            both(b, [sum(a[j, i] * fast[i][part] for i in range(len(y))) for part in range(4)], q[j : j + 1])[0]
            for j in range(len(q))
        ]
    )
    plain = np.maximum(q @ b[0] + b[1], 0) @ b[2] + b[3]
    assert abs(centred(expected) - centred(plain)).max() > 0.1  # the fast weights matter
    np.testing.assert_allclose(logits(learner, params, SUPPORT, QUERY.x), centred(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "augment", "support"),
    [
        (mlp(WAY, (4, 4)), None, SUPPORT),
        (conv4(WAY, 4, 2, norm="none"), 2, IMAGES),
        (conv4(WAY, 4, 2), 1, IMAGES),  # batch norm below the head
    ],
)
def test_generators_that_make_zeros_leave_the_slow_network(model, augment, support):
    learner = meta_networks(model, Categorical(), augment=augment)
    params = start(learner, support)
    silent = loud(params, 0.0)
    plain = centred(model.apply(params.base, support.x))
    np.testing.assert_allclose(logits(learner, silent, support, support.x), plain, atol=1e-5)
    assert abs(logits(learner, loud(params), support, support.x) - plain).max() > 1e-2


def test_the_head_alone_adds_the_mixed_weights_to_its_own():
    """And batch norm below sees all queries in one batch."""
    model = conv4(WAY, 4, 2)
    learner = meta_networks(model, Categorical())
    params = loud(start(learner, IMAGES))
    fast = adapted(learner, params, IMAGES)
    x = IMAGES.x[:4] + 0.1
    w, b = fast.weights["['head']['w']"], fast.weights["['head']['b']"]
    r = model.apply(params.keys | {"head": jax.tree.map(jnp.add, params.keys["head"], {
        "w": fast.reading["['head']['w']"], "b": fast.reading["['head']['b']"]})}, x)  # fmt: skip
    a = MODULE.attention(fast, r, 1.0)
    head = params.base["head"]
    f = model.features(params.base, x)
    expected = jnp.einsum("qd,qdc->qc", f, head["w"] + jnp.einsum("qn,ndc->qdc", a, w)) + head["b"] + a @ b
    np.testing.assert_allclose(logits(learner, params, IMAGES, x), centred(expected), atol=1e-4)


def test_the_order_of_the_support_permutes_attention_alone():
    learner = meta_networks(MODEL, Categorical(), augment=2)
    params = loud(start(learner, SUPPORT))
    turn = jnp.array([3, 5, 0, 1, 4, 2])
    shuffled = Batch(SUPPORT.x[turn], SUPPORT.y[turn])
    plain, turned = (adapted(learner, params, s) for s in (SUPPORT, shuffled))
    layers = last_layers(partial(MODEL.outputs, params.keys), QUERY.x, 2)
    r = augmented(MODEL.outputs, params.keys, plain.reading, layers, QUERY.x)
    a, b = (MODULE.attention(fast, r, 1.0) for fast in (plain, turned))
    np.testing.assert_allclose(b, a[:, turn], atol=1e-6)
    np.testing.assert_allclose(
        logits(learner, params, shuffled, QUERY.x), logits(learner, params, SUPPORT, QUERY.x), atol=1e-5
    )


def test_a_query_attends_most_to_itself_and_never_to_padding():
    model = mlp(WAY, (16,))
    learner = meta_networks(model, Categorical(), augment=2, on="features")
    support = SUPPORT._replace(weight=jnp.array([1.0, 1, 1, 1, 1, 0]))
    fast = adapted(learner, start(learner, SUPPORT), support)
    a = MODULE.attention(fast, fast.keys, 0.5)
    np.testing.assert_array_equal(a.argmax(1)[:5], jnp.arange(5))
    np.testing.assert_array_equal(a[:, 5], 0)
    np.testing.assert_allclose(a.sum(1), 1, rtol=1e-6)


def test_padding_changes_no_fast_weight_of_another_example():
    learner = meta_networks(MODEL, Categorical(), augment=None)
    params = loud(start(learner, SUPPORT))
    padded = Batch(jnp.concatenate([SUPPORT.x, 9 + SUPPORT.x[:2]]), jnp.append(SUPPORT.y, jnp.array([1, 7])))
    padded = padded._replace(weight=jnp.append(jnp.ones(6), jnp.zeros(2)))
    plain, with_padding = (adapted(learner, params, s) for s in (SUPPORT, padded))
    for path, reading in plain.reading.items():
        np.testing.assert_allclose(with_padding.reading[path], reading, atol=1e-6)
        np.testing.assert_allclose(with_padding.weights[path][:6], plain.weights[path], atol=1e-6)
    # An empty support: the slow network.
    empty = SUPPORT._replace(weight=jnp.zeros(6))
    slow = centred(MODEL.apply(params.base, QUERY.x))
    np.testing.assert_allclose(logits(learner, params, empty, QUERY.x), slow, atol=1e-6)


def test_groups_split_the_classes_evenly():
    """Four classes, of which the third is absent, in two groups; a group's loss is the mean over its examples."""
    model = mlp(4, (2,))
    learner = meta_networks(model, Categorical(), groups=2)
    batch = Batch(SUPPORT.x, jnp.array([0, 1, 1, 3, 3, 3]))
    params = start(learner, batch)
    layers = last_layers(partial(model.outputs, params.base), batch.x, 1)

    @jax.jit
    def gradients(support):
        return MODULE.gradients(model, Categorical(), params, support, layers, 2)

    found = gradients(batch)
    for g, rows in enumerate((slice(0, 3), slice(3, 6))):

        def loss(head, rows=rows):
            outputs = model.apply(params.keys | {"head": head}, batch.x[rows])
            return Categorical().nll(outputs, batch.y[rows]).mean()

        expected = jax.grad(loss)(params.keys["head"])
        for part in ("w", "b"):
            np.testing.assert_allclose(found.groups[f"['head']['{part}']"][g], expected[part], atol=1e-6)
    one = gradients(batch._replace(y=jnp.zeros(6, int)))
    np.testing.assert_array_equal(one.there, [True, False])


def test_the_meta_gradient_holds_the_support_gradients_constant(x64, monkeypatch):
    learner = meta_networks(MODEL, Categorical(), augment=None, units=4)
    task = Task(SUPPORT, QUERY)
    params = loud(start(learner, SUPPORT), 10.0)
    layers = last_layers(partial(MODEL.outputs, params.base), SUPPORT.x, None)
    constant = jax.jit(lambda p: MODULE.gradients(MODEL, Categorical(), p, SUPPORT, layers, 5))(params)
    vector, unravel = jax.flatten_util.ravel_pytree(params)

    def loss(v):
        return learner.loss(unravel(v), task, KEY)[0]

    gradient = jax.jit(jax.grad(loss))(vector)
    direction = jax.random.normal(jax.random.key(5), vector.shape)

    def derivative():
        at = jax.jit(lambda v: loss(v))  # another function: nothing is cached
        return (at(vector + 1e-5 * direction) - at(vector - 1e-5 * direction)) / 2e-5

    free = derivative()
    monkeypatch.setattr(MODULE, "gradients", lambda *_: constant)
    held = derivative()
    np.testing.assert_allclose(gradient @ direction, held, rtol=1e-6)
    assert abs(free - held) > 1e-3 * abs(held)


def test_layers_are_the_last_ones():
    model = mlp(WAY, (4, 4))
    params = model.init(KEY, QUERY.x)
    network = partial(model.outputs, params)
    assert last_layers(network, QUERY.x, 1) == (("head",), "layer2")
    assert last_layers(network, QUERY.x, 2) == (("layer2", "head"), "layer1")
    assert (
        last_layers(network, QUERY.x, None) == last_layers(network, QUERY.x, 9) == (("layer1", "layer2", "head"), None)
    )
    assert set(weights_of(params, last_layers(network, QUERY.x, 1))) == {"['head']['w']", "['head']['b']"}


def test_refusals():
    with pytest.raises(ValueError, match=r"likelihood must be Categorical\(\) for meta_networks"):
        meta_networks(mlp(), Gaussian())
    with pytest.raises(ValueError, match="augment must be"):
        meta_networks(MODEL, Categorical(), augment=0)
    with pytest.raises(ValueError, match="on must be 'outputs' for a model without features"):
        meta_networks(MODEL._replace(features=None), Categorical(), on="features")
    with pytest.raises(ValueError, match="model must take a `Call`"):
        start(meta_networks(MODEL._replace(apply=lambda p, x: x, calls=False), Categorical()), SUPPORT)
    for model, batch in (
        (mlp(WAY, (4,), norm=True), SUPPORT),
        (conv4(WAY, 4, 2), IMAGES),
        (conv4(WAY, 4, 2, norm="task"), IMAGES),
        (conv4(WAY, 4, 2, norm="running"), IMAGES),
    ):
        with pytest.raises(ValueError, match="norm must be 'none', 'layer' or 'group' where"):
            start(make_learner("meta_networks", model, Categorical(), augment=2), batch)
