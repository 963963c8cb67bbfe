"""The seams for learners to come: query inputs in adapt, data that depend on phi, sources that grow."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metaprior as mp
from metaprior.core.likelihoods import Categories
from metaprior.core.types import (
    EncodingSource,
    GroupedSource,
    NumericPredictive,
    OutsideSource,
    WrappedSource,
    innermost,
)
from metaprior.estimators.programs import Setting
from metaprior.inference.descent import descend, trajectory
from metaprior.learners.builders.metric import with_unseen
from metaprior.tasks import array_tasks, hide_labels
from scenarios import KEY, TINY, tiny_learner, tiny_splits


class Means(NamedTuple):
    """A prototype for each class."""

    centres: jax.Array


def soft_k_means(model, likelihood, *, way=3):
    """Prototypes that the queries refine by one step of soft k-means: each prediction depends on the other queries."""

    def embed(params, x):
        return model.apply(params, x)

    def hard(support):
        weight = jnp.ones(len(support.y)) if support.weight is None else support.weight
        return jax.nn.one_hot(support.y, way) * weight[:, None]

    def centres(features, share):
        return share.T @ features / jnp.maximum(share.sum(0), 1e-6)[:, None]

    def adapt(params, support, key):
        return Means(centres(embed(params, support.x), hard(support)))

    def transduce(params, support, query, key):
        assert query.y is None  # no learner sees what it has to predict
        first = adapt(params, support, key).centres
        seen = embed(params, query.x)
        weight = jnp.ones(len(seen)) if query.weight is None else query.weight
        share = jax.nn.softmax(-((seen[:, None] - first) ** 2).sum(-1)) * weight[:, None]
        both = jnp.concatenate([embed(params, support.x), seen])
        return Means(centres(both, jnp.concatenate([hard(support), share])))

    def predict(params, means, x, key):
        return Categories(jax.nn.log_softmax(-((embed(params, x)[:, None] - means.centres) ** 2).sum(-1))[None])

    def loss(params, task, key):
        told = predict(params, transduce(params, task.support, task.query._replace(y=None), key), task.query.x, key)
        nll = -told.log_prob(task.query.y).mean()
        return nll, {"nll": nll}

    return mp.Learner(lambda key, task: model.init(key, task.support.x), adapt, predict, loss, transduce=transduce)


@jax.tree_util.register_static
class Blobs:
    """Three classes, each a blob of two features whose support example is far from its middle."""

    def sample(self, key, n):
        key_centre, key_x, key_y = jax.random.split(key, 3)
        middle = 4 * jax.random.normal(key_centre, (n, 3, 2))
        y = jax.random.randint(key_y, (n, 30), 0, 3)
        x = jnp.take_along_axis(middle, y[..., None], 1) + jax.random.normal(key_x, (n, 30, 2))
        shown = jnp.tile(jnp.arange(3), (n, 1))
        return mp.Task(mp.Batch(middle + 1.5, shown), mp.Batch(x, y))


MODEL = mp.Model(lambda key, x: {"scale": jnp.ones(())}, lambda params, x, call=None: params["scale"] * x, calls=True)
TASK = jax.tree.map(lambda leaf: leaf[0], Blobs().sample(KEY, 1))


def test_queries_that_help_are_seen_wherever_a_learner_is_judged():
    learner = soft_k_means(MODEL, mp.Categorical())
    inductive = learner._replace(transduce=None)
    params = learner.init(KEY, TASK)
    seen, alone = (mp.evaluate(each, params, Blobs(), KEY, tasks=200) for each in (learner, inductive))
    assert seen.figures["accuracy"].mean > alone.figures["accuracy"].mean + 0.02
    assert [note for note in seen.notes if note.startswith("transductive")]
    assert not [note for note in alone.notes if note.startswith("transductive")]
    one, two = (mp.calibrate(each, params, Blobs(), KEY, tasks=100) for each in (learner, inductive))
    assert dict(one.knobs) != dict(two.knobs)
    splits = mp.Splits(Blobs(), Blobs(), Blobs())
    nll = [mp.fit(each, splits, TINY).history[-1]["validation/nll"] for each in (learner, inductive)]
    assert nll[0] < nll[1]


@pytest.mark.slow
def test_a_padded_query_does_not_count():
    learner = soft_k_means(MODEL, mp.Categorical())
    params, (support, query) = learner.init(KEY, TASK), TASK
    x, weight = jnp.concatenate([query.x, jnp.full((4, 2), 99.0)]), (jnp.arange(34) < 30) * 1.0
    padded = mp.Batch(x, jnp.zeros(34, int), weight)
    plain, more = (learner.posterior(params, support, batch, KEY).centres for batch in (query, padded))
    np.testing.assert_allclose(plain, more, rtol=1e-5)


def test_what_wraps_a_learner_keeps_its_queries():
    learner = soft_k_means(MODEL, mp.Categorical())
    params, (support, query) = learner.init(KEY, TASK), TASK
    expected = learner.posterior(params, support, query, KEY).centres
    warm = mp.temperature_scaled(learner, 2.0)
    np.testing.assert_array_equal(warm.posterior(params, support, query, KEY).centres, expected)
    whole = with_unseen(learner, 3).posterior(params, support, query, KEY).posterior
    np.testing.assert_array_equal(whole.centres, expected)
    mp.register("learner", "soft_k_means", soft_k_means)
    try:
        told = mp.make_learner("soft_k_means", MODEL._replace(statistics="task"), mp.Categorical())
        np.testing.assert_array_equal(told.posterior(params, support, query, KEY).posterior.centres, expected)
        with pytest.raises(ValueError, match="must predict each row by itself, but soft_k_means is transductive"):
            Setting("soft_k_means", (4,), (), 3, True).made()
    finally:
        del mp.LEARNERS["soft_k_means"]


def test_collected_data_follow_phi_and_carry_the_meta_gradient():
    """Data y = c phi_t of the present phi, loss (phi - y)^2 / 2 with y held: phi <- phi - a (1 - c) phi, k times."""
    a, c, k = 0.1, 0.3, 4

    def run(theta, walk, **options):
        return walk(lambda phi, y: 0.5 * (phi - y) ** 2, theta, optax.sgd(a), k, collect=lambda phi: c * phi, **options)

    factor = (1 - a * (1 - c)) ** k
    for remat in (False, True):
        value, slope = jax.value_and_grad(lambda theta, remat=remat: run(theta, descend, remat=remat).phi)(2.0)
        np.testing.assert_allclose([value, slope], [2 * factor, factor], rtol=1e-6)
    course = run(jnp.asarray(2.0), trajectory).phi
    np.testing.assert_allclose(course, 2 * (1 - a * (1 - c)) ** np.arange(k + 1), rtol=1e-6)

    def held(theta):
        collect = lambda phi: jax.lax.stop_gradient(c * phi)  # noqa: E731
        return descend(lambda phi, y: 0.5 * (phi - y) ** 2, theta, optax.sgd(a), k, collect=collect).phi

    np.testing.assert_allclose(jax.grad(held)(2.0), (1 - a) ** k, rtol=1e-6)


def test_collected_data_are_drawn_by_each_steps_key():
    keys = jax.random.split(KEY, 3)
    seen = descend(
        lambda phi, y: -(y * phi), jnp.zeros(()), optax.sgd(1.0), 3, data=keys,
        collect=lambda phi, key: jax.random.normal(key),
    ).phi  # fmt: skip
    np.testing.assert_allclose(seen, sum(jax.random.normal(key) for key in keys), rtol=1e-6)


@jax.tree_util.register_pytree_node_class
class Replay:
    """Tasks from a buffer, of which `count` are filled."""

    def __init__(self, values, count):
        self.values, self.count = values, count

    def tree_flatten(self):
        return (self.values, self.count), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)

    def sample(self, key, n):
        place = jax.random.randint(key, (n, 1, 1), 0, self.count)
        level = self.values[place]
        x = jnp.zeros((n, 4, 1))
        return mp.Task(mp.Batch(x, level + x), mp.Batch(x, level + x))


def test_a_source_grows_between_chunks():
    seen = []

    def refresh(source, params, step):
        seen.append((step, int(source.count), float(params["head"]["b"][0])))
        return Replay(source.values, source.count + 1)

    start = Replay(jnp.array([0.0, 5.0, 5.0, 5.0, 5.0]), jnp.asarray(1))
    splits = mp.Splits(start, start, start)
    learner = mp.learners.maml(mp.mlp(1, ()), mp.Gaussian(), rate=0.0)
    grown = mp.fit(learner, splits, TINY, refresh=refresh)
    assert [(step, count) for step, count, _ in seen] == [(0, 1), (4, 2), (8, 3)]
    assert seen[2][2] != seen[1][2] != seen[0][2]  # the params of the moment
    plain = mp.fit(learner, splits, TINY)
    assert grown.params["head"]["b"][0] > plain.params["head"]["b"][0] + 0.01  # it saw the fives
    same = mp.fit(learner, splits, TINY, refresh=lambda source, params, step: source)
    assert same.history[-1]["train/loss"] == plain.history[-1]["train/loss"]
    with pytest.raises(ValueError, match="resume must be False with refresh"):
        mp.fit(learner, splits, TINY, refresh=refresh, resume=True)
    bad = mp.Task(*2 * [mp.Batch(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)), jnp.full((1, 2), -1.0))])
    with pytest.raises(ValueError, match="weight must be finite and at least 0"):
        mp.fit(learner, splits, TINY, refresh=lambda *given: mp.tasks.FixedTasks(bad))


def test_sources_and_predictives_declare_what_they_have():
    x = np.arange(40.0)[:, None]
    table = array_tasks(x, x[:, 0], np.repeat(np.arange(10), 4), shot=2, query=2).train
    assert isinstance(table, GroupedSource)
    assert innermost(table) is table
    pool = mp.tasks.class_pool(np.zeros((40, 4, 4, 1), np.uint8), [10] * 4, way=2, shot=2, query=2)
    hidden = hide_labels(mp.Splits(pool, pool, pool), 0.5).train
    assert isinstance(hidden, WrappedSource)
    assert innermost(hidden) is pool
    assert not isinstance(pool, EncodingSource | OutsideSource | WrappedSource)
    normals = mp.Gaussian(0.1).predictive(jnp.zeros((1, 3, 1)))
    counts = mp.Poisson().predictive(jnp.zeros((1, 3, 1)))
    assert isinstance(normals, NumericPredictive)
    assert isinstance(counts, NumericPredictive)
    classes = mp.Categorical().predictive(jnp.zeros((1, 3, 2)))
    assert not isinstance(classes, NumericPredictive)


def test_a_predictive_without_a_spread_is_named():
    class Bare(NamedTuple):
        value: jax.Array

        def mean(self):
            return self.value

        def log_prob(self, y):
            return -((self.value - y) ** 2).sum(-1)

    learner, splits = tiny_learner(), tiny_splits()
    params = learner.init(KEY, jax.tree.map(lambda leaf: leaf[0], splits.train.sample(KEY, 1)))
    bare = learner._replace(predict=lambda params, posterior, x, key: Bare(jnp.zeros((len(x), 1))), path=None)
    with pytest.raises(ValueError, match=r"predictive must have variance, cdf and quantile .* got Bare"):
        mp.evaluate(bare, params, splits.test, KEY, tasks=3)
