"""SNAIL: the network against a walk over one sequence in plain numpy, and what a sequence means for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Task
from metaprior.learners import snail
from scenarios import BARE, KEY, answer, batch, start

SMALL = {"filters": 3, "attention": ((4, 2), (3, 5))}


def affine(layer, z):
    return z @ layer["w"] + layer["b"]


def convolve(layer, z, dilation):
    out = []
    for t in range(len(z)):
        past = z[t - dilation] if t >= dilation else 0 * z[t]
        f, g = np.split(affine(layer, np.concatenate([past, z[t]])), 2)
        out.append(np.concatenate([z[t], np.tanh(f) / (1 + np.exp(-g))]))
    return np.stack(out)


def look(layer, z):
    out = []
    for t in range(len(z)):
        q, k, v = affine(layer["query"], z[t]), affine(layer["key"], z[: t + 1]), affine(layer["value"], z[: t + 1])
        share = np.exp(k @ q / np.sqrt(len(q)))
        out.append(np.concatenate([z[t], share @ v / share.sum()]))
    return np.stack(out)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [1, 4, 5])
@pytest.mark.slow
def test_each_query_is_the_end_of_a_sequence_of_its_own(n):
    learner, support, x = snail(BARE, Categorical(), **SMALL), batch(n), batch(3, 2).x
    params = start(learner, support)
    theta = jax.tree.map(np.asarray, params)
    assert len(theta.convolution[0]) == {1: 1, 4: 3, 5: 3}[n]
    for xi, got in zip(np.asarray(x), answer(learner, params, support, x), strict=True):
        seen = np.concatenate([support.x, np.eye(3)[support.y]], -1)
        z = look(theta.attention[0], np.concatenate([seen, np.pad(xi, (0, 3))[None]]))
        for d, layer in enumerate(theta.convolution[0]):
            z = convolve(layer, z, 2**d)
        logits = affine(theta.head, look(theta.attention[1], z)[-1])
        np.testing.assert_allclose(got, np.exp(logits) / np.exp(logits).sum(), rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_padding_is_like_nothing_wherever_it_stands():
    learner, support, x = snail(BARE, Categorical(), **SMALL), batch(5), batch(3, 2).x
    params = start(learner, support)
    real = jnp.array([1, 0, 1, 1, 0])
    plain = jax.tree.map(lambda leaf: leaf[real == 1], support)
    padded = answer(learner, params, support._replace(weight=real.astype(float)), x)
    np.testing.assert_allclose(padded, answer(learner, params, plain, x), rtol=1e-9)
    assert abs(padded - answer(learner, params, support, x)).max() > 1e-4


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_convolutions_reach_every_example_and_order_matters():
    learner, support, x = snail(BARE, Gaussian(), **SMALL), batch(6), batch(1, 2).x
    support = support._replace(y=support.x.sum(-1, keepdims=True).repeat(3, 1))
    params = start(learner, support)
    blind = params._replace(attention=jax.tree.map(jnp.zeros_like, params.attention))
    reach = jax.jit(jax.jacobian(lambda s: answer(learner, blind, support._replace(x=s), x)))(support.x)
    assert (abs(reach).sum((0, 1, 3)) > 0).all()
    turned = jax.tree.map(lambda leaf: leaf[::-1], support)
    assert abs(answer(learner, params, support, x) - answer(learner, params, turned, x)).max() > 1e-3


@pytest.mark.slow
def test_an_empty_support_is_a_sequence_of_the_query_alone():
    learner, support, x = snail(BARE, Categorical(), **SMALL), batch(4), batch(3, 2).x
    params = start(learner, support)
    none = answer(learner, params, jax.tree.map(lambda leaf: leaf[:0], support), x)
    np.testing.assert_allclose(none, answer(learner, params, support._replace(weight=jnp.zeros(4)), x), rtol=1e-5)


@pytest.mark.slow
def test_training_shuffles_the_support_by_its_key():
    mixed, plain = (snail(BARE, Categorical(), shuffle=shuffle, **SMALL) for shuffle in (True, False))
    task = Task(batch(5), batch(4, 2))
    params, order = start(plain, task.support), jax.random.permutation(KEY, 5)
    turned = task._replace(support=jax.tree.map(lambda leaf: leaf[order], task.support))
    assert mixed.loss(params, task, KEY)[0] == plain.loss(params, turned, KEY)[0] != plain.loss(params, task, KEY)[0]


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="filters must be"):
        snail(BARE, Categorical(), filters=0)
    with pytest.raises(ValueError, match=r"attention a list of pairs \(K, V\), got"):
        snail(BARE, Categorical(), attention=((3,),))
