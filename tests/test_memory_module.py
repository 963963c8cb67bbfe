"""The memory module by hand: writes and ages step by step, the loss as a loop, and what a memory must never do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical
from metaprior.core.types import Batch, Model, Task
from metaprior.learners import memory_module
from metaprior.learners.memory_module import EMPTY, Memory, Queries, blank, margin_loss, nearest, write

KEY = jax.random.key(0)
D = 4
PLAIN = Model(lambda key, x: jnp.zeros(0), lambda params, x: x)  # the inputs are the embedding

pytestmark = pytest.mark.usefixtures("x64")


def unit(v):
    v = np.asarray(v, float)
    return v / np.linalg.norm(v)


def still(memory, q, y):
    """A write without noise."""
    return write(memory, jnp.asarray(q), jnp.asarray(y), jnp.zeros(memory.ages.shape))


def test_five_writes_by_hand():
    """Three slots: two new classes, a match, a confusion, and a new class that finds no empty slot."""
    a, b, c, zero = unit([1, 0]), unit([0, 1]), unit([1, 0.2]), np.zeros(2)
    memory = blank(3, 2, jnp.float64)
    memory = still(memory, a, 5)
    np.testing.assert_array_equal(memory.values, [5, EMPTY, EMPTY])
    memory = still(memory, b, 7)  # its nearest is of class 5: a new slot
    np.testing.assert_allclose(memory.keys, [a, b, zero])
    np.testing.assert_array_equal(memory.values, [5, 7, EMPTY])
    np.testing.assert_array_equal(memory.ages, [1, 0, 0])
    memory = still(memory, c, 5)  # its nearest is right: the keys are averaged
    np.testing.assert_allclose(memory.keys, [unit(a + c), b, zero], atol=1e-9)
    np.testing.assert_array_equal(memory.values, [5, 7, EMPTY])
    np.testing.assert_array_equal(memory.ages, [0, 1, 0])
    memory = still(memory, c, 7)  # its nearest is of class 5, although class 7 has a slot
    np.testing.assert_allclose(memory.keys, [unit(a + c), b, c], atol=1e-9)
    np.testing.assert_array_equal(memory.values, [5, 7, 7])
    np.testing.assert_array_equal(memory.ages, [1, 2, 0])
    memory = still(memory, -b, 9)  # no slot is empty: the oldest is overwritten
    np.testing.assert_allclose(memory.keys, [unit(a + c), -b, c], atol=1e-9)
    np.testing.assert_array_equal(memory.values, [5, 9, 7])
    np.testing.assert_array_equal(memory.ages, [2, 0, 1])


def test_noise_changes_which_old_slot_is_lost():
    memory = Memory(jnp.eye(3), jnp.array([0, 1, 2]), jnp.array([3.0, 2, 0]))
    for noise, slot in (([0, 0, 0], 0), ([0, 2, 0], 1), ([-1, 0, 9], 2)):
        after = write(memory, -jnp.ones(3) / 3**0.5, jnp.asarray(5), jnp.array(noise, float))
        assert int(jnp.argmax(after.values == 5)) == slot


@pytest.mark.slow
def test_a_write_changes_one_slot_and_a_repeated_image_returns_its_label():
    rng, memory = np.random.default_rng(0), blank(12, D, jnp.float64)
    step = jax.jit(still)
    for _ in range(40):
        q, y = unit(rng.normal(size=D)), rng.integers(0, 5)
        before, memory = memory, step(memory, q, y)
        changed = (np.asarray(before.keys) != np.asarray(memory.keys)).any(-1) | (before.values != memory.values)
        assert changed.sum() == 1
        np.testing.assert_allclose(np.linalg.norm(memory.keys, axis=1)[memory.values != EMPTY], 1, rtol=1e-9)
        if np.abs(memory.keys - q).max(-1).min() < 1e-12:  # written as it is, not merged into a key
            assert nearest(memory, jnp.asarray(q)[None], 5)[0].argmax() == y
        older = (np.asarray(before.values) != EMPTY) & ~np.asarray(changed)
        np.testing.assert_array_equal(np.asarray(memory.ages)[older], np.asarray(before.ages)[older] + 1)


def test_the_margin_is_between_the_nearest_wrong_and_the_nearest_right_slot():
    memory = Memory(jnp.eye(3), jnp.array([0, 1, 1]), jnp.zeros(3))
    q = jnp.array([0.6, 0.5, 0.1])
    np.testing.assert_allclose(margin_loss(memory, q, jnp.asarray(0), 0.3), 0.5 - 0.6 + 0.3)
    np.testing.assert_allclose(margin_loss(memory, q, jnp.asarray(1), 0.3), 0.6 - 0.5 + 0.3)
    assert margin_loss(memory, q, jnp.asarray(0), 0.05) == 0
    np.testing.assert_allclose(margin_loss(memory, q, jnp.asarray(2), 0.3), 0.6 + 0.3)  # no slot has the label
    np.testing.assert_allclose(margin_loss(blank(3, 3, jnp.float64), q, jnp.asarray(2), 0.3), 0.3)


def problem(way=3, shots=2, queries=2):
    keys = jax.random.split(jax.random.key(1))
    y = [jnp.tile(jnp.arange(way), n) for n in (shots, queries)]
    return Task(*(Batch(jax.random.normal(k, (v.size, D)), v) for k, v in zip(keys, y, strict=True)))


@pytest.mark.parametrize("slots", [None, 4])
@pytest.mark.slow
def test_the_loss_is_the_mean_over_an_episode_read_in_rounds(slots):
    task, margin = problem(), 0.2
    learner = memory_module(PLAIN, Categorical(), way=3, width=3, margin=margin, slots=slots, noise=0.0)
    params = learner.init(KEY, task)
    x, y = (np.concatenate([np.asarray(getattr(b, part)) for b in task]) for part in ("x", "y"))
    q = np.stack([unit(v) for v in x @ np.asarray(params.projection)])
    order = np.asarray(jax.random.permutation(jax.random.split(KEY, 3)[1], len(y)))
    rounds = [[], [], [], []]
    for i in order:
        next(r for r in rounds if y[i] not in [y[k] for k in r]).append(i)
    keys, values, ages, losses, right = [], [], [], [], []
    for i in np.concatenate(rounds):
        near = [float(k @ q[i]) for k in keys]
        wrong = max([s for s, v in zip(near, values, strict=True) if v != y[i]], default=0)
        mine = max([s for s, v in zip(near, values, strict=True) if v == y[i]], default=0)
        losses.append(max(0, wrong - mine + margin))
        best = int(np.argmax(near)) if near else -1
        right.append(bool(near) and values[best] == y[i])
        ages = [age + 1 for age in ages]
        if right[-1]:
            keys[best], ages[best] = unit(keys[best] + q[i]), 0
        elif len(keys) < (slots or len(y)):
            keys, values, ages = [*keys, q[i]], [*values, y[i]], [*ages, 0]
        else:
            old = int(np.argmax(ages))
            keys[old], values[old], ages[old] = q[i], y[i], 0
    found, metrics = jax.jit(learner.loss)(params, task, KEY)
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-7)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right[3:]))
    for k in (1, 2, 3):  # the first answer of all is a guess
        np.testing.assert_allclose(metrics[f"instance_{k + 1}"], np.mean(right[3 * k : 3 * k + 3]))


@pytest.mark.slow
def test_gradients_flow_through_queries_and_not_through_keys():
    """Two examples: the second is compared with the constant key of the first."""
    x = jax.random.normal(KEY, (2, D))
    task = Task(Batch(x[:1], jnp.array([0])), Batch(x[1:], jnp.array([1])))
    learner = memory_module(PLAIN, Categorical(), way=2, width=3, margin=1.5)
    params = learner.init(KEY, task)
    order = jax.random.permutation(jax.random.split(KEY, 3)[1], 2)

    def query(a, i):
        q = x[i] @ a
        return q / jnp.linalg.norm(q)

    held = query(params.projection, order[0])
    expected = jax.grad(lambda a: (query(a, order[1]) @ held + 1.5 + 1.5) / 2)(params.projection)
    found = jax.grad(lambda p: learner.loss(p, task, KEY)[0])(params).projection
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_predictions_are_of_the_nearest_key_and_dropout_is_of_training_only():
    task = problem()
    learner = memory_module(PLAIN, Categorical(), way=3, keep=0.3, temperature=0.2)
    params = learner.init(KEY, task)
    posterior = learner.adapt(params, task.support, KEY)
    found = learner.predict(params, posterior, task.query.x, KEY)
    memory = posterior.memory
    q = np.stack([unit(v) for v in np.asarray(task.query.x @ params.projection)])
    there = np.asarray(memory.values) != EMPTY
    near = (q @ np.asarray(memory.keys)[there].T).argmax(-1)
    np.testing.assert_array_equal(found.mean().argmax(-1), np.asarray(memory.values)[there][near])
    again = learner.predict(params, learner.adapt(params, task.support, jax.random.key(5)), task.query.x, KEY)
    np.testing.assert_array_equal(found.mean(), again.mean())
    losses = [learner.loss(params, task, jax.random.key(s))[0] for s in (1, 2)]
    assert losses[0] != losses[1]
    # A repeated support image returns its label.
    one = jax.tree.map(lambda leaf: leaf[:3], task.support)
    repeated = learner.predict(params, learner.adapt(params, one, KEY), one.x, KEY).mean()
    np.testing.assert_array_equal(repeated.argmax(-1), one.y)


def test_a_class_whose_slot_was_overwritten_is_forgotten():
    learner = memory_module(PLAIN, Categorical(), way=3, slots=2, noise=0.0, width=D)
    params = Queries(jnp.zeros(0), jnp.eye(D))
    support = Batch(jnp.eye(3, D), jnp.arange(3))
    p = learner.predict(params, learner.adapt(params, support, KEY), support.x, KEY).mean()
    assert (p[:, 0] == 0).all()
    np.testing.assert_array_equal(p[1:].argmax(-1), [1, 2])
