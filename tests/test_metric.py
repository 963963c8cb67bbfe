"""Metric learners against what their formulas say: class means, dense Gaussian algebra, attention by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Model, Task
from metaprior.inference.posteriors import laplace
from metaprior.learners import (
    amortized_bml,
    bmaml,
    fine_tune,
    gem_mixture,
    make_learner,
    matching,
    nearest_neighbour,
    platipus,
    protonet,
)
from metaprior.learners.builders.metric import cosine_distance, squared_distance, unit
from metaprior.learners.protonet import Gaussians
from metaprior.networks import conv4, mlp
from metaprior.networks.lstm import lstm, lstm_init, lstm_start, run_lstm

KEY = jax.random.key(0)
PLAIN = Model(lambda key, x: jnp.zeros(0), lambda params, x: x)  # the inputs are the embedding
WAY, D = 4, 3
LABELS = jnp.array([0, 0, 0, 1, 1, 3])  # class 2 is not shown


def support(weight=None):
    return Batch(jax.random.normal(jax.random.key(1), (6, D)), LABELS, weight)


QUERY = jax.random.normal(jax.random.key(2), (5, D))
TASK = Task(support(), Batch(QUERY, jnp.array([0, 1, 3, 0, 1])))


def answer(learner, params, batch, x=QUERY):
    return jax.jit(lambda p, b, x: learner.predict(p, learner.adapt(p, b, KEY), x, KEY))(params, batch, x)


def log_softmax(scores):
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.slow
def test_prototypes_are_class_means_and_absent_classes_have_no_probability(distance, learned):
    learner = protonet(PLAIN, Categorical(), distance=distance, temperature=0.7, learn_temperature=learned, way=WAY)
    params = learner.init(KEY, TASK)
    x, q = np.asarray(TASK.support.x), np.asarray(QUERY)
    means = np.stack([x[:3].mean(0), x[3:5].mean(0), x[5]])
    if distance == "euclidean":
        apart = ((q[:, None] - means) ** 2).sum(-1)
    else:
        apart = 1 - (q @ means.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(means, axis=1)
    expected = log_softmax(-apart / 0.7)
    predictive = answer(learner, params, TASK.support)
    np.testing.assert_allclose(predictive.log_probs[0][:, [0, 1, 3]], expected, rtol=1e-4, atol=1e-5)
    assert (predictive.mean()[:, 2] == 0).all()
    y = np.array([0, 1, 2, 0, 1])
    np.testing.assert_allclose(learner.loss(params, TASK, KEY)[0], -expected[np.arange(5), y].mean(), rtol=1e-4)
    gradient = jax.grad(lambda p: learner.loss(p, TASK, KEY)[0])(params)
    assert (gradient.log_temperature is None) == (not learned)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_weight_counts_as_so_many_examples():
    learner = protonet(PLAIN, Categorical(), way=WAY)
    params = learner.init(KEY, TASK)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), TASK.support)
    for weight in (jnp.array([2.0, 1, 1, 1, 1, 1]), jnp.array([1.0, 0.5, 0.5, 0.2, 0.2, 0.1])):
        np.testing.assert_allclose(
            answer(learner, params, support(weight)).mean(), answer(learner, params, twice).mean(), rtol=1e-5
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_bayesian_prototypes_are_the_posterior_of_the_joint_gaussian():
    """All of (mu_k, embeddings of class k, a query) as one dense Gaussian, conditioned on the support."""
    learner = protonet(PLAIN, Categorical(), bayes=True, way=WAY)
    keys = jax.random.split(jax.random.key(3), 3)
    log_v, m, log_u = (jax.random.normal(k, (D,)) for k in keys)
    params = Gaussians(jnp.zeros(0), log_v, m, log_u)
    task = jax.tree.map(lambda leaf: leaf.astype(float) if leaf.dtype.kind == "f" else leaf, TASK)
    classes = learner.adapt(params, task.support, KEY)
    v, u = np.diag(np.exp(log_v)), np.diag(np.exp(log_u))
    logs = []
    for k in (0, 1, 3):
        rows = np.asarray(task.support.x[np.asarray(LABELS) == k])
        n = len(rows)
        # The variables: mu_k, n embeddings, the query's embedding; all share mu_k.
        joint = np.kron(np.ones((n + 2, n + 2)), u) + np.kron(np.diag([0.0] + [1.0] * (n + 1)), v)
        seen = slice(D, D * (n + 1))
        mean, gain = np.tile(m, n + 2), joint[:, seen] @ np.linalg.inv(joint[seen, seen])
        mean = mean + gain @ (rows.ravel() - mean[seen])
        covariance = joint - gain @ joint[seen]
        np.testing.assert_allclose(classes.mean[k], mean[:D], rtol=1e-9)
        np.testing.assert_allclose(np.diag(classes.variance[k]), covariance[:D, :D], rtol=1e-9, atol=1e-12)
        logs.append(multivariate_normal.logpdf(task.query.x, mean[-D:], covariance[-D:, -D:]))
    predictive = answer(learner, params, task.support, task.query.x)
    np.testing.assert_allclose(predictive.log_probs[0][:, [0, 1, 3]], log_softmax(np.stack(logs, -1)), rtol=1e-8)
    assert (predictive.mean()[:, 2] == 0).all()


def test_a_flat_prior_and_many_equal_shots_give_the_published_prototypes():
    many = Batch(jnp.tile(TASK.support.x[3:], (400, 1)), jnp.tile(jnp.array([0, 0, 1]), 400))
    many = many._replace(weight=jnp.tile(jnp.array([0.5, 0.5, 1.0]), 400))
    published, bayesian = (protonet(PLAIN, Categorical(), bayes=b, way=2) for b in (False, True))
    flat = bayesian.init(KEY, TASK)._replace(log_prior_variance=jnp.full(D, 12.0))
    np.testing.assert_allclose(
        answer(bayesian, flat, many).log_probs, answer(published, published.init(KEY, TASK), many).log_probs,
        rtol=2e-2, atol=1e-3,
    )  # fmt: skip


def test_fewer_shots_make_a_wider_class():
    """Far from both of two prototypes, the class known by one example is the likelier one."""
    learner = protonet(PLAIN, Categorical(), bayes=True, way=2)
    params = learner.init(KEY, TASK)._replace(log_prior_variance=jnp.full(D, 4.0))
    up = jnp.array([[1.0, 0, 0]])
    one_and_nine = Batch(jnp.concatenate([up, -jnp.tile(up, (9, 1))]), jnp.array([0] + [1] * 9))
    p = answer(learner, params, one_and_nine, jnp.array([[0.0, 6.0, 0.0], [-1.0, 0, 0]])).mean()
    assert p[0, 0] > 0.9
    assert p[1, 1] > 0.5


@pytest.mark.parametrize("make", [protonet, matching, nearest_neighbour])
@pytest.mark.slow
def test_more_ways_than_are_there_change_nothing(make):
    """Trained with 60 ways, judged on 4: the same probabilities."""
    few, many = (make(PLAIN, Categorical(), way=way, **{"on": "pixels"} if make is nearest_neighbour else {})
                 for way in (WAY, 60))  # fmt: skip
    params = few.init(KEY, TASK)
    np.testing.assert_allclose(
        answer(many, params, TASK.support).mean()[:, :WAY], answer(few, params, TASK.support).mean(), rtol=2e-5
    )
    assert (answer(many, params, TASK.support).mean()[:, WAY:] == 0).all()
    np.testing.assert_allclose(many.loss(params, TASK, KEY)[0], few.loss(params, TASK, KEY)[0], rtol=2e-5)


def test_matching_is_cosine_attention_over_the_labels():
    learner = matching(PLAIN, Categorical(), temperature=0.5, way=WAY)
    params = learner.init(KEY, TASK)
    x, q = np.asarray(TASK.support.x), np.asarray(QUERY)
    cosine = (q / np.linalg.norm(q, axis=1)[:, None]) @ (x / np.linalg.norm(x, axis=1)[:, None]).T
    attention = np.exp(log_softmax(cosine / 0.5))
    expected = attention @ np.eye(WAY)[np.asarray(LABELS)]
    np.testing.assert_allclose(answer(learner, params, TASK.support).mean(), expected, rtol=1e-5, atol=1e-7)
    # A weight of 2 is the example twice.
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), TASK.support)
    heavy = answer(learner, params, support(jnp.array([2.0, 1, 1, 1, 1, 1])))
    np.testing.assert_allclose(heavy.mean(), answer(learner, params, twice).mean(), rtol=1e-5)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def cell(layer, x, h, c):
    """The textbook's LSTM in numpy."""
    i, f, g, o = np.split(np.concatenate([x, h]) @ np.asarray(layer["w"]) + np.asarray(layer["b"]), 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def test_full_context_embeddings_by_hand():
    """Appendix A, written as loops over examples and reads."""
    reads = 3
    learner = matching(PLAIN, Categorical(), context=True, reads=reads, way=WAY)
    params = learner.init(KEY, TASK)
    x, q = np.asarray(TASK.support.x), np.asarray(QUERY)
    g = x.copy()
    for layer, order in ((params.context.forward, range(6)), (params.context.backward, range(5, -1, -1))):
        h, c = np.zeros(D), np.zeros(D)
        for i in order:
            h, c = cell(layer, x[i], h, c)
            g[i] += h
    expected = []
    for f in q:
        h, c = np.zeros(D), np.zeros(D)
        for _ in range(reads):
            a = np.exp(g @ h)
            h, c = cell(params.context.reader, np.concatenate([f, a @ g / a.sum()]), h, c)
            h = h + f
        attention = np.exp(g @ h / np.linalg.norm(g, axis=1) / np.linalg.norm(h))
        expected.append(attention / attention.sum() @ np.eye(WAY)[np.asarray(LABELS)])
    np.testing.assert_allclose(answer(learner, params, TASK.support).mean(), expected, rtol=1e-4, atol=1e-6)


def test_only_full_context_reads_the_support_in_order():
    turned = jax.tree.map(lambda leaf: leaf[::-1], TASK.support)
    for context in (False, True):
        learner = matching(PLAIN, Categorical(), context=context, way=WAY)
        params = learner.init(KEY, TASK)
        same = jnp.allclose(
            answer(learner, params, turned).mean(), answer(learner, params, TASK.support).mean(), atol=1e-6
        )
        assert same != context


def test_padding_changes_nothing_in_full_context():
    learner = matching(PLAIN, Categorical(), context=True, way=WAY)
    params = learner.init(KEY, TASK)
    # Padding in front and in the middle too: the LSTMs must step over it.
    place = jnp.array([0, 0, 1, 2, 2, 3, 4, 5, 5])
    weight = jnp.array([0, 1.0, 1, 1, 0, 1, 1, 1, 0])
    padded = Batch(TASK.support.x[place] + 7 * (weight == 0)[:, None], LABELS[place], weight)
    np.testing.assert_allclose(
        answer(learner, params, padded).mean(), answer(learner, params, TASK.support).mean(), rtol=1e-5
    )


def test_lstm_sequences_are_their_steps():
    layer = lstm_init(KEY, D, 2)
    x = jax.random.normal(jax.random.key(4), (4, D))
    outputs = run_lstm(layer, x, jnp.array([True, True, False, True]))
    state = lstm_start(layer)
    for i in (0, 1, 3):
        state = lstm(layer, state, x[i])
        np.testing.assert_allclose(outputs[i], state.h, rtol=1e-5)
    np.testing.assert_array_equal(outputs[2], outputs[1])
    backwards = run_lstm(layer, x, jnp.ones(4, bool), reverse=True)
    np.testing.assert_allclose(backwards[3], lstm(layer, lstm_start(layer), x[3]).h, rtol=1e-5)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_nearest_neighbours_take_the_nearest_label(distance):
    learner = nearest_neighbour(PLAIN, Categorical(), on="pixels", distance=distance, way=WAY)
    x, q = np.asarray(TASK.support.x), np.asarray(QUERY)
    if distance == "cosine":
        x, q = (a / np.linalg.norm(a, axis=1)[:, None] for a in (x, q))
    nearest = ((q[:, None] - x) ** 2).sum(-1).argmin(1)
    choice = answer(learner, learner.init(KEY, TASK), TASK.support).mean().argmax(-1)
    np.testing.assert_array_equal(choice, LABELS[nearest])


def test_fine_tuning_a_frozen_network_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    model, l2 = mlp(7, (5,), "tanh"), 0.05
    learner = fine_tune(model, Categorical(), way=3, steps=3000, rate=1.0, l2=l2)
    params = learner.init(KEY, TASK)
    batch = Batch(TASK.support.x, jnp.array([0, 0, 1, 1, 2, 2]))
    ours = answer(learner, params, batch).mean()
    # A column of ones under the same penalty is our bias, which sklearn would leave unpenalised.
    with_one = [np.c_[np.asarray(model.features(params, x)), np.ones(len(x))] for x in (batch.x, QUERY)]
    theirs = LogisticRegression(C=1 / (6 * l2), fit_intercept=False, tol=1e-8, max_iter=1000)
    theirs.fit(with_one[0], np.asarray(batch.y))
    np.testing.assert_allclose(ours, theirs.predict_proba(with_one[1]), atol=2e-4)


@pytest.mark.slow
def test_pretraining_and_tuning_move_what_they_should():
    model = mlp(WAY, (5,), "tanh")
    for frozen in (True, False):
        learner = fine_tune(model, Categorical(), steps=4, frozen=frozen)
        params = learner.init(KEY, TASK)
        together = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), TASK.support, TASK.query)
        expected = Categorical().nll(model.apply(params, together.x), together.y).mean()
        np.testing.assert_allclose(learner.loss(params, TASK, KEY)[0], expected, rtol=1e-6)
        phi = jax.jit(learner.adapt)(params, TASK.support, KEY).posterior.mean
        assert (phi.features is None) == frozen
        course = jax.jit(learner.path)(params, TASK.support, KEY)
        first = learner.predict(params, jax.tree.map(lambda leaf: leaf[0], course), QUERY, KEY)
        np.testing.assert_allclose(first.mean(), 1 / WAY, rtol=1e-6)  # the new head starts at zero


def test_a_fine_tuned_head_has_laplace_error_bars():
    x = jnp.linspace(-1, 1, 8)[:, None]
    learner = fine_tune(mlp(1, (8,), "tanh"), Gaussian(0.1), steps=20, posterior=laplace(precision=1.0))
    params = learner.init(KEY, Task(Batch(x, x), Batch(x, x)))
    variance = answer(learner, params, Batch(x, jnp.sin(x)), jnp.array([[0.0], [4.0]])).variance()
    assert 0.01 < variance[0, 0] < variance[1, 0]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (protonet, {}),
        (protonet, {"bayes": True}),
        (matching, {}),
        (nearest_neighbour, {}),
        (nearest_neighbour, {"on": "pixels"}),
        (fine_tune, {"steps": 3}),
        (fine_tune, {"steps": 3, "frozen": False}),
        (platipus, {"steps": 2, "draws": 2}),
        (bmaml, {"steps": 2, "particles": 2}),
        (amortized_bml, {"steps": 2, "draws": 0}),
        (gem_mixture, {"steps": 2, "draws": 2, "components": 2}),
    ],
)
@pytest.mark.slow
def test_a_query_alone_does_not_feel_the_others(make, options):
    """Under batch norm the transductive answer depends on the company; the other does not."""
    model = conv4(outputs=WAY, filters=4, blocks=2)
    images = jax.random.uniform(jax.random.key(5), (6, 8, 8, 1))
    batch, x = Batch(images, LABELS), jax.random.uniform(jax.random.key(6), (4, 8, 8, 1))
    crowd, changes = jnp.concatenate([x[:1], 5 * x[1:]]), {}
    for transductive in (False, True):
        learner = make(model, Categorical(), transductive=transductive, **options)
        params = learner.init(KEY, Task(batch, batch))
        one, other = (answer(learner, params, batch, images).mean()[0] for images in (x, crowd))
        changes[transductive] = float(jnp.abs(one - other).max())
        if not transductive and learner.path is not None:
            course = jax.jit(learner.path)(params, batch, KEY)
            last = learner.predict(params, jax.tree.map(lambda leaf: leaf[-1], course), x, KEY)
            np.testing.assert_allclose(last.mean(), answer(learner, params, batch, x).mean(), rtol=1e-4)
    assert changes[False] < 1e-6
    assert changes[True] > 1e-6 or options.get("on") == "pixels"


@pytest.mark.slow
def test_distances_do_not_cancel_and_have_gradients_at_zero():
    a, b = 1000 + jax.random.normal(KEY, (4, 8)), 1000 + jax.random.normal(jax.random.key(7), (3, 8))
    exact = ((np.asarray(a, float)[:, None] - np.asarray(b, float)) ** 2).sum(-1)
    np.testing.assert_allclose(squared_distance(a, b), exact, rtol=1e-4)
    assert jnp.isfinite(jax.grad(lambda f: unit(f).sum())(jnp.zeros((2, 3)))).all()
    np.testing.assert_allclose(jnp.diag(cosine_distance(b, 2 * b)), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (protonet, {"likelihood": Gaussian()}, "likelihood must be Categorical.* got Gaussian"),
        (matching, {"likelihood": Gaussian()}, "likelihood must be Categorical.* got Gaussian"),
        (nearest_neighbour, {"likelihood": Gaussian()}, "likelihood must be Categorical.* got Gaussian"),
        (protonet, {"distance": "euclid"}, "did you mean 'euclidean'"),
        (protonet, {"temperature": 0.0}, "temperature must be"),
        (protonet, {"bayes": True, "distance": "cosine"}, "bayes must be False"),
        (protonet, {"way": 1}, "way must be"),
        (matching, {"temperature": -1.0}, "temperature must be"),
        (matching, {"reads": 0}, "reads must be"),
        (nearest_neighbour, {"on": "pixel"}, "on must be .* got 'pixel'"),
        (nearest_neighbour, {"temperature": 0.0}, "temperature must be"),
        (fine_tune, {"l2": -1.0}, "l2 must be"),
        (fine_tune, {"optimizer": "sgdd"}, "optimizer must be"),
    ],
)
def test_bad_options_are_named(make, options, words):
    with pytest.raises(ValueError, match=words):
        make(PLAIN, **({"likelihood": Categorical()} | options))


@pytest.mark.slow
def test_a_label_beyond_the_ways_is_no_small_loss():
    """Labels of the classes' own (plain classification) given to a learner of tasks: an error, NaN in compiled code."""
    learner = protonet(PLAIN, Categorical(), way=WAY)
    params = learner.init(KEY, TASK)
    beyond = TASK._replace(query=TASK.query._replace(y=TASK.query.y.at[0].set(WAY)))
    assert jnp.isnan(jax.jit(learner.loss)(params, beyond, KEY)[0])
    with pytest.raises(ValueError, match=f"labels of the {WAY} classes 0..{WAY - 1}, got {WAY}"):
        learner.loss(params, beyond, KEY)
    padding = beyond.query._replace(weight=jnp.array([0.0, 1, 1, 1, 1]))
    rest = jax.tree.map(lambda leaf: leaf[1:], TASK.query)
    np.testing.assert_allclose(
        learner.loss(params, beyond._replace(query=padding), KEY)[0],
        learner.loss(params, TASK._replace(query=rest), KEY)[0], rtol=1e-5,
    )  # fmt: skip


def test_an_embedding_without_a_head_needs_the_number_of_classes():
    learner = protonet(PLAIN, Categorical())
    with pytest.raises(ValueError, match=r"way must be .* got None"):
        learner.adapt(learner.init(KEY, TASK), TASK.support, KEY)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("context", [False, True])
def test_matching_is_tuned_on_the_support_after_training_only(context):
    linear = Model(lambda key, x: jax.random.normal(key, (D, D)), lambda w, x: x @ w)
    task = jax.tree.map(lambda leaf: leaf.astype(float) if leaf.dtype.kind == "f" else leaf, TASK)
    plain, tuned = (
        matching(linear, Categorical(), temperature=0.3, context=context, way=WAY, tune_steps=n, tune_rate=0.1)
        for n in (0, 1)
    )
    params = plain.init(KEY, task)

    def nll(w):
        moved = params._replace(embedding=w)
        p = plain.predict(moved, plain.adapt(moved, task.support, KEY), task.support.x, KEY)
        return -p.log_prob(task.support.y).mean()

    value, slope = jax.value_and_grad(nll)(params.embedding)
    by_hand = params._replace(embedding=params.embedding - 0.1 * slope)
    assert nll(by_hand.embedding) < value
    expected = answer(plain, by_hand, task.support, task.query.x).mean()
    np.testing.assert_allclose(answer(tuned, params, task.support, task.query.x).mean(), expected, rtol=1e-8)
    assert tuned.loss(params, task, KEY)[0] == plain.loss(params, task, KEY)[0]
    with pytest.raises(ValueError, match="tune_steps must be an integer of at least 0, got -1"):
        matching(linear, Categorical(), way=WAY, tune_steps=-1)


@pytest.mark.parametrize("name", ["nil", "protonet", "matching", "siamese", "nearest_neighbour"])
@pytest.mark.parametrize("bad", [{"y": jnp.array([7, 1, 2, 0, 1, 2])}, {"weight": jnp.array([-1.0, 1, 1, 1, 1, 1])}])
def test_an_impossible_support_is_nan_in_compiled_code(name, bad):
    learner = make_learner(name, mlp(3, (4,)), Categorical())
    support = Batch(jax.random.normal(KEY, (6, 2)), jnp.array([0, 1, 2, 0, 1, 2]))
    params = learner.init(KEY, Task(support, support))
    found = jax.jit(lambda s: learner.predict(params, learner.adapt(params, s, KEY), s.x, KEY).mean())
    assert jnp.isfinite(found(support)).all()
    assert jnp.isnan(found(support._replace(**bad))).all()
    with pytest.raises(ValueError, match=r"got 7|weight must be"):
        learner.adapt(params, support._replace(**bad), KEY)
