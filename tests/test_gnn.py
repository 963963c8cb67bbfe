"""Few-shot graph networks: the forward pass in plain numpy, and what a graph promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Model, Task
from metaprior.learners import gnn
from metaprior.learners.gnn import EDGES

KEY = jax.random.key(0)
SMALL = {"layers": 3, "filters": 4}
BARE = Model(lambda key, x: {}, lambda params, x: jnp.zeros((x.shape[0], 3)), lambda params, x: x)
GNN = gnn(BARE, Categorical(), **SMALL)


def batch(n, seed=1):
    kx, ky = jax.random.split(jax.random.key(seed))
    return Batch(jax.random.normal(kx, (n, 2)), jax.random.randint(ky, (n,), 0, 3))


@jax.jit
def answer(params, support, x):
    return GNN.predict(params, GNN.adapt(params, support, KEY), x, KEY).mean()


def start(support):
    return jax.jit(GNN.init)(KEY, Task(support, support))


def leaky(a):
    return np.where(a > 0, a, 0.01 * a)


def affine(layer, z):
    return z @ layer["w"] + layer["b"]


def by_hand(theta, z):
    for i, (edges, nodes) in enumerate(zip(theta.edges, theta.nodes, strict=True)):
        scores = np.full((len(z), len(z)), -np.inf)
        for a, b in np.ndindex(scores.shape):
            if a != b:
                e = np.abs(z[a] - z[b])
                for name in ("layer1", "layer2", "layer3", "layer4"):
                    e = leaky(affine(edges[name], e))
                scores[a, b] = affine(edges["head"], e)[0]
        adjacency = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        new = affine(nodes, np.concatenate([z, adjacency @ z], -1))
        z = new if i == len(theta.nodes) - 1 else np.concatenate([z, leaky(new)], -1)
    return np.exp(z[-1]) / np.exp(z[-1]).sum()


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_each_query_has_a_graph_of_its_own_with_labels_where_known():
    support, x = batch(4)._replace(y=jnp.array([2, -1, 0, 1])), batch(3, 2).x
    params = start(support)
    theta = jax.tree.map(np.asarray, params)
    labels = np.array([[0, 0, 1], [1 / 3] * 3, [1, 0, 0], [0, 1, 0], [1 / 3] * 3])
    for xi, got in zip(x, answer(params, support, x), strict=True):
        nodes = np.concatenate([np.concatenate([support.x, xi[None]]), labels], -1)
        np.testing.assert_allclose(got, by_hand(theta, nodes), rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_weight_of_two_is_the_example_twice_to_the_other_nodes():
    """In one layer; in more, the two also see each other, which one alone does not."""
    shallow = gnn(BARE, Categorical(), layers=1, filters=4)
    support, x = batch(4), batch(3, 2).x
    params = shallow.init(KEY, Task(support, support))
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), support)
    heavy = support._replace(weight=jnp.array([2.0, 1, 1, 1]))
    read = jax.jit(lambda s: shallow.predict(params, shallow.adapt(params, s, KEY), x, KEY).mean())
    np.testing.assert_allclose(read(heavy), read(twice), rtol=1e-9)
    assert abs(read(heavy) - read(support)).max() > 1e-5


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_many_queries_go_by_chunks_with_the_same_answers_and_gradients():
    support, many = batch(120), batch(9, 2)
    assert 1 < EDGES // 121**2 < 9
    params = start(support)
    one_by_one = jnp.concatenate([answer(params, support, many.x[i : i + 1]) for i in range(9)])
    np.testing.assert_allclose(answer(params, support, many.x), one_by_one, rtol=1e-9)
    gradient = jax.jit(jax.grad(lambda p, q: GNN.loss(p, Task(support, q), KEY)[0]))
    whole = gradient(params, many)
    parts = [gradient(params, jax.tree.map(lambda leaf, i=i: leaf[i : i + 3], many)) for i in (0, 3, 6)]
    mean = jax.tree.map(lambda *g: sum(g) / 3, *parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.slow
def test_without_a_support_the_query_is_a_graph_of_one():
    support, x = batch(4), batch(2, 2).x
    params = start(support)
    none = answer(params, jax.tree.map(lambda leaf: leaf[:0], support), x)
    np.testing.assert_allclose(none, answer(params, support._replace(weight=jnp.zeros(4)), x), rtol=1e-5)
    assert jnp.isfinite(none).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"likelihood must be Categorical.* got Gaussian"):
        gnn(BARE, Gaussian())
    with pytest.raises(ValueError, match="layers must be an integer of at least 1, got 0"):
        gnn(BARE, Categorical(), layers=0)
