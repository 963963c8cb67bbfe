"""mAP-DLM against all rankings: the programme, the scores, the loss, and the rules of classification."""

from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical
from metaprior.core.types import Batch, Model, Task
from metaprior.learners import map_dlm
from metaprior.learners.map_dlm import by_cosine, direct_loss, lists_of, loss_augmented, precision, score

KEY = jax.random.key(0)
D = 3
PLAIN = Model(lambda key, x: jnp.zeros(0), lambda params, x: x)  # the inputs are the embedding
LINEAR = Model(lambda key, x: jnp.eye(D), lambda w, x: x @ w)

pytestmark = pytest.mark.usefixtures("x64")


def average_precision(ranking):
    """Of a sequence of relevances."""
    hits = np.cumsum(ranking)
    return sum(hits[i] / (i + 1) for i in range(len(ranking)) if ranking[i]) / sum(ranking)


def brute_force(p, n, epsilon):
    """(F, AP) of the ranking that maximises F - epsilon AP, over all orders of positives among negatives."""
    p, n = sorted(p, reverse=True), sorted(n, reverse=True)
    best = (-np.inf, 0.0, 0.0)
    for places in combinations(range(len(p) + len(n)), len(p)):
        ranking = [int(i in places) for i in range(len(p) + len(n))]
        f, a, b = 0.0, 0, 0
        for relevant in ranking:
            if relevant:
                f += sum(p[a] - x for x in n[b:]) - sum(p[a] - x for x in n[:b])
                a += 1
            else:
                b += 1
        f /= len(p) * len(n)
        found = (f - epsilon * average_precision(ranking), f, average_precision(ranking))
        best = max(best, found, key=lambda one: one[0])
    return best


@pytest.mark.slow
def test_the_loss_augmented_ranking_is_the_best_of_all_rankings():
    rng, find = np.random.default_rng(0), jax.jit(loss_augmented)
    seen = set()
    for _ in range(60):
        positives, negatives, epsilon = *rng.integers(1, 5, 2), rng.choice([0.1, 0.5, 1, 3])
        cosine = rng.uniform(-1, 1, 10)
        kind = np.repeat([1, 0, 2], [positives, negatives, 10 - positives - negatives])
        rng.shuffle(kind)
        lists = lists_of(jnp.asarray(cosine), jnp.asarray(kind == 1), jnp.asarray(kind == 0))
        value, f, ap = brute_force(cosine[kind == 1], cosine[kind == 0], epsilon)
        before = find(lists, epsilon)
        np.testing.assert_allclose(score(lists, before) - epsilon * precision(lists, before), value, atol=1e-14)
        np.testing.assert_allclose([score(lists, before), precision(lists, before)], [f, ap], atol=1e-14)
        right = brute_force(cosine[kind == 1], cosine[kind == 0], 0.0)
        np.testing.assert_allclose(score(lists, by_cosine(lists)), right[1], atol=1e-14)
        np.testing.assert_allclose(precision(lists, by_cosine(lists)), right[2], atol=1e-14)
        loss = direct_loss(lists, epsilon, 10.0)[0]
        np.testing.assert_allclose(loss, (10 * f - right[1]) / epsilon, atol=1e-12)
        seen.add(bool(jnp.all(before[:positives] == by_cosine(lists)[:positives])))
    assert seen == {True, False}


def test_average_precision_of_a_known_ranking():
    relevant = jnp.array([True, False, True, False])
    lists = lists_of(jnp.array([0.9, 0.8, 0.7, 0.6]), relevant, ~relevant)
    np.testing.assert_allclose(precision(lists, by_cosine(lists)), 0.8333, atol=5e-5)
    tied = lists_of(jnp.zeros(4), relevant, ~relevant)  # embeddings that collapsed are no perfect ranking
    np.testing.assert_allclose(precision(tied, by_cosine(tied)), (1 / 3 + 2 / 4) / 2)


def problem(labels, way):
    keys = jax.random.split(jax.random.key(1))
    y, asked = jnp.array(labels), jnp.arange(5) % way
    return Task(
        Batch(jax.random.normal(keys[0], (y.size, D)), y), Batch(jax.random.normal(keys[1], (asked.size, D)), asked)
    )


@pytest.mark.parametrize("kappa", [1.0, 10.0])
@pytest.mark.slow
def test_every_example_of_a_task_ranks_all_others(kappa):
    """Support and query; an example that is alone in its class is no query, and padding is not there."""
    task = problem((0, 1, 2, 3), 3)  # class 3 has one example
    learner = map_dlm(PLAIN, Categorical(), way=4, epsilon=0.5, kappa=kappa)
    params = learner.init(KEY, task)
    x = np.concatenate([task.support.x, task.query.x])
    y = np.concatenate([task.support.y, task.query.y])
    x = x / np.linalg.norm(x, axis=1)[:, None]
    losses, precisions = [], []
    for i in range(len(y)):
        rest = np.arange(len(y)) != i
        p, n = ((x @ x[i])[rest & (y == y[i])], (x @ x[i])[rest & (y != y[i])])
        if len(p):
            losses.append((kappa * brute_force(p, n, 0.5)[1] - brute_force(p, n, 0.0)[1]) / 0.5)
            precisions.append(brute_force(p, n, 0.0)[2])
    assert len(losses) == 8
    found, metrics = jax.jit(learner.loss)(params, task, KEY)
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-9)
    np.testing.assert_allclose(metrics["average_precision"], np.mean(precisions), rtol=1e-9)
    far = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:2]]), task.query)
    padded = task._replace(query=far._replace(weight=jnp.array([1.0] * 5 + [0, 0])))
    np.testing.assert_allclose(jax.jit(learner.loss)(params, padded, KEY)[0], found, rtol=1e-12)


@pytest.mark.slow
def test_the_gradient_holds_the_rankings_constant():
    task = problem((0, 1, 2), 3)
    learner = map_dlm(LINEAR, Categorical(), way=3)
    w = jax.random.normal(KEY, (D, D))
    params = learner.init(KEY, task)._replace(embedding=w)
    x, y = (jnp.concatenate([getattr(batch, part) for batch in task]) for part in ("x", "y"))
    same, own = y[:, None] == y, jnp.eye(y.size, dtype=bool)

    def cosines(w):
        f = x @ w
        f = f / jnp.linalg.norm(f, axis=1)[:, None]
        return f @ f.T

    rankings = [
        (by_cosine(lists), loss_augmented(lists, 1.0))
        for lists in (lists_of(cosines(w)[i], (same & ~own)[i], ~same[i]) for i in range(y.size))
    ]

    def held(w):
        total = 0
        for i, (right, worse) in enumerate(rankings):
            lists = lists_of(cosines(w)[i], (same & ~own)[i], ~same[i])
            total += score(lists, worse) - score(lists, right)
        return total / y.size

    found = jax.grad(lambda p: learner.loss(p, task, KEY)[0])(params).embedding
    np.testing.assert_allclose(found, jax.grad(held)(w), rtol=1e-6, atol=1e-9)
    assert abs(found).max() > 0.01


@pytest.mark.parametrize("labels", [(0, 1, 2), (0, 1, 2, 0, 1, 2, 2)])
def test_one_shot_takes_the_nearest_and_more_shots_the_best_average_precision(labels):
    task, way = problem(labels, 3), 3
    x, y, q = (np.asarray(a) for a in (task.support.x, task.support.y, task.query.x))
    cosine = (q / np.linalg.norm(q, axis=1)[:, None]) @ (x / np.linalg.norm(x, axis=1)[:, None]).T
    mean = np.stack([cosine[:, y == k].mean(1) for k in range(way)], -1)
    ranked = [[average_precision((y[np.argsort(-row)] == k).astype(int)) for k in range(way)] for row in cosine]
    for make, expected in (
        (map_dlm, mean if len(labels) == 3 else np.array(ranked)),
        (partial(map_dlm, rule="cosine"), mean),
    ):
        learner = make(PLAIN, Categorical(), way=way, temperature=0.2)
        params = learner.init(KEY, task)
        found = learner.predict(params, learner.adapt(params, task.support, KEY), task.query.x, KEY).log_probs[0]
        logits = expected / 0.2
        np.testing.assert_allclose(found, logits - np.log(np.exp(logits).sum(-1, keepdims=True)), rtol=1e-9)
