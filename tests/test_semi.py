"""Unlabelled support examples: how labels are hidden, who reads them, who ignores them, and asking for one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical
from metaprior.core.named import option_names
from metaprior.core.types import Batch, Model, Splits, Task, labelled
from metaprior.experiments.recipe import build, load_recipe, with_overrides
from metaprior.learners import LEARNERS, gnn, make_learner
from metaprior.learners.registry import learners_having, traits_of
from metaprior.networks import mlp
from metaprior.tasks import FixedTasks, ask_for, hide_labels, with_hidden_labels
from metaprior.tasks.hidden import known
from metaprior.training.loop import Training, fit

KEY = jax.random.key(0)
BARE = Model(lambda key, x: {}, lambda params, x: jnp.zeros((x.shape[0], 3)), lambda params, x: x)
Y = jnp.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
X = jax.random.normal(jax.random.key(1), (12, 2))
QUERY = jax.random.normal(jax.random.key(2), (4, 2))
TASK = Task(Batch(X, Y), Batch(QUERY, jnp.array([0, 1, 2, 0])))


def hidden(**options):
    source = FixedTasks(jax.tree.map(lambda leaf: leaf[None], TASK))
    return hide_labels(Splits(source, source, source), **options).train


def graph(**options):
    learner = gnn(BARE, Categorical(), **{"layers": 2, "filters": 4} | options)

    @jax.jit
    def answer(params, support, key):
        return learner.predict(params, learner.adapt(params, support, key), QUERY, key).mean()

    return learner, learner.init(KEY, TASK), answer


@pytest.mark.slow
def test_of_each_class_a_share_keeps_its_label_at_least_one():
    keep = known(KEY, Y, jnp.ones(12), 0.4)
    assert [int(keep[c == Y].sum()) for c in range(3)] == [2, 2, 1]
    assert [int(known(KEY, Y, jnp.ones(12), 0.01)[c == Y].sum()) for c in range(3)] == [1, 1, 1]
    # Padding is no example: of four there, half are two, and what is padding stays as it is.
    weight = jnp.ones(12).at[4].set(0)
    assert [int(known(KEY, Y, weight, 0.5)[:4].sum()), bool(known(KEY, Y, weight, 0.5)[4])] == [2, True]
    draws = jax.vmap(lambda k: known(k, Y, jnp.ones(12), 0.4))(jax.random.split(KEY, 500))
    np.testing.assert_allclose(draws[:, :10].mean(0), 0.4, atol=0.1)


@pytest.mark.slow
def test_hidden_labels_are_unknown_or_askable_or_left_out():
    shown, askable, left_out = (
        hidden(labelled=0.4, unlabelled=kind).sample(KEY, 1).support for kind in ("shown", "askable", "left_out")
    )
    keep = np.asarray(shown.y[0]) >= 0
    assert keep.sum() == 5
    np.testing.assert_array_equal(shown.y[0], np.where(keep, Y, -1))
    np.testing.assert_array_equal(askable.y[0], np.where(keep, Y, -2 - Y))
    np.testing.assert_array_equal(ask_for(askable.y[0])[~keep], Y[~keep])
    np.testing.assert_array_equal(left_out.y[0], Y)
    np.testing.assert_array_equal(left_out.weight[0], keep)
    assert hidden(labelled=0.4).sample(KEY, 1).query.y.min() == 0


@pytest.mark.slow
def test_unlabelled_examples_are_news_to_the_graph_and_left_out_ones_are_not():
    _, params, answer = graph()
    keep = np.array([0, 1, 5, 6, 10])
    alone = answer(params, Batch(X[keep], Y[keep]), KEY)
    y = jnp.full(12, -1).at[keep].set(Y[keep])
    left_out = Batch(X, Y, jnp.zeros(12).at[keep].set(1))
    np.testing.assert_allclose(answer(params, left_out, KEY), alone, rtol=1e-5)
    assert abs(answer(params, Batch(X, y), KEY) - alone).max() > 1e-5


@pytest.mark.parametrize("name", learners_having("rules_out_unseen"))
@pytest.mark.slow
def test_learners_that_compare_embeddings_ignore_unlabelled_examples(name):
    on = {"on": "pixels"} if name == "nearest_neighbour" else {}
    learner = make_learner(name, mlp(3, (8,), "tanh"), Categorical(), way=3, **on)
    params = learner.init(KEY, TASK)
    keep = np.array([0, 1, 5, 6, 10])

    def answer(support):
        return learner.predict(params, learner.adapt(params, support, KEY), QUERY, KEY).mean()

    y = jnp.full(12, -1).at[keep].set(Y[keep])
    np.testing.assert_allclose(answer(Batch(X, y)), answer(Batch(X[keep], Y[keep])), rtol=1e-5)


@pytest.mark.slow
def test_more_unlabelled_than_allowed_is_an_error_and_nan_where_compiled():
    learner, params, answer = graph(unlabelled=0.5)
    half = Batch(X, Y.at[:6].set(-1))
    assert jnp.isfinite(answer(params, half, KEY)).all()
    more = Batch(X, Y.at[:7].set(-1))
    with pytest.raises(
        ValueError, match=r"support.y must have at most 50 % of examples without a label \(below 0\), got 58 %"
    ):
        learner.adapt(params, more, KEY)
    assert jnp.isnan(answer(params, more, KEY)).all()
    padded = more._replace(weight=jnp.ones(12).at[0].set(0))  # 6 of 11 are more than half, too
    with pytest.raises(ValueError, match="got 55 %"):
        learner.adapt(params, padded, KEY)


@pytest.mark.slow
def test_each_query_learns_the_one_label_of_most_attention_in_its_share():
    _, params, answer = graph(ask="attention")
    support = Batch(X, jnp.where(jnp.arange(12) % 5 == 0, Y, ask_for(Y)))
    plain = answer(params, support, KEY)
    np.testing.assert_array_equal(plain, answer(params, support, jax.random.key(9)))  # no chance in it
    asked = np.zeros((12, 4), bool)
    for i in range(12):
        if i % 5:
            other = support._replace(y=support.y.at[i].set(ask_for((Y[i] + 1) % 3)))
            asked[i] = abs(answer(params, other, KEY) - plain).max(-1) > 1e-7
    np.testing.assert_array_equal(asked.sum(0), 1)
    # With the same attention to all, its share is one in nine: what is not askable gets none.
    even = params._replace(asks=jax.tree.map(jnp.zeros_like, params.asks))
    first = support._replace(y=jnp.where(jnp.arange(12) == 1, support.y, jnp.where(jnp.arange(12) % 5, -1, Y)))
    none = first._replace(y=first.y.at[1].set(-1))
    whole = graph(ask="random")[2]
    np.testing.assert_allclose(
        answer(even, first, KEY), whole(even._replace(asks=None), first, KEY), rtol=1e-5
    )  # one alone has attention 1
    assert abs(answer(even, first, KEY) - answer(even, none, KEY)).max() > 1e-6
    assert jnp.isfinite(answer(even, none, KEY)).all()


@pytest.mark.slow
def test_what_to_ask_is_learned_end_to_end_from_drawn_choices():
    learner, params, _ = graph(ask="attention")
    task = TASK._replace(support=Batch(X, jnp.where(jnp.arange(12) % 5 == 0, Y, ask_for(Y))))
    gradient = jax.jit(jax.grad(lambda p, key: learner.loss(p, task, key)[0]))
    one, two = gradient(params, KEY), gradient(params, jax.random.key(5))
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(one.asks)) > 0
    assert max(abs(a - b).max() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)) > 0


def test_random_asking_depends_on_the_key_alone():
    _, params, answer = graph(ask="random")
    support = Batch(X, jnp.where(jnp.arange(12) % 5 == 0, Y, ask_for(Y)))
    answers = np.stack([answer(params, support, jax.random.key(i)) for i in range(6)])
    assert np.ptp(answers, axis=0).max() > 1e-6
    np.testing.assert_array_equal(answers[0], answer(params, support, jax.random.key(0)))


@pytest.mark.parametrize("name", [n for n in LEARNERS if not traits_of(n).reads_attributes])
@pytest.mark.slow
def test_hidden_labels_are_read_or_refused_before_anything_is_compiled(name):
    told = traits_of(name)
    options = {"unlabelled": 0.8} if "unlabelled" in option_names(LEARNERS[name]) else told.small
    learner = make_learner(name, mlp(3, (4,)), Categorical(), **options)
    source = hidden(labelled=0.5)
    task = jax.tree.map(lambda leaf: leaf[0], source.sample(KEY, 1))
    params = learner.init(KEY, Task(labelled(task.support), task.query))
    if told.reads_unlabelled:
        shown = learner.predict(params, learner.adapt(params, task.support, KEY), task.query.x, KEY).mean()
        assert jnp.isfinite(shown).all()
        assert jnp.isfinite(learner.loss(params, task, KEY)[0])
        return
    for use in (lambda: learner.adapt(params, task.support, KEY), lambda: learner.loss(params, task, KEY)):
        with pytest.raises(ValueError, match="support must have a known class"):
            use()


def test_training_on_hidden_labels_is_refused_in_python_too():
    splits = hide_labels(Splits(*[FixedTasks(jax.tree.map(lambda leaf: leaf[None], TASK))] * 3), 0.5)
    learner = make_learner("maml", mlp(3, (4,)), Categorical())
    with pytest.raises(ValueError, match="leave them out"):
        fit(learner, splits, Training(steps=2, chunk=2, meta_batch=1))


@pytest.mark.slow
def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"labelled must be a fraction above 0 .*, got 0\.0"):
        hidden(labelled=0)
    with pytest.raises(ValueError, match="unlabelled must be one of 'shown', 'askable', 'left_out', got 'gone'"):
        with_hidden_labels(Splits(None, None, None), unlabelled="gone")
    with pytest.raises(ValueError, match=r"ask must be .* got 'attention' with 1 layers"):
        graph(layers=1, ask="attention")
    with pytest.raises(ValueError, match=r"ask must be .* got 'attentoin'"):
        graph(ask="attentoin")
    with pytest.raises(ValueError, match=r"unlabelled must be a share .* got 1\.0"):
        graph(unlabelled=1)
    recipe = load_recipe("omniglot-5way-5shot-semi")
    with pytest.raises(ValueError, match="must be 1 for maml, which cannot read unlabelled examples"):
        build(with_overrides(recipe, "maml"))
    with pytest.raises(
        ValueError, match=r"learner must be .* supports of omniglot_strokes hold class attributes .* got protonet"
    ):
        build(with_overrides(load_recipe("omniglot-zero-shot"), "protonet"))
