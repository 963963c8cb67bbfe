"""TADAM against prototypes, the limits of metric scaling, modulation by hand, and co-training part by part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical
from metaprior.core.types import Batch, Model, Task, joined
from metaprior.learners import make_learner, protonet, tadam
from metaprior.networks import conv4, mlp, resnet12
from metaprior.tasks import class_pool
from metaprior.training.loop import Training, init_state, meta_step
from scenarios import same_bits

KEY = jax.random.key(0)
WAY, D = 3, 4
NET = mlp(WAY, (5, 6), "tanh")
LABELS = jnp.array([0, 0, 1, 2, 2, 2])


def task_of(labels=LABELS, query=(0, 1, 2, 1)):
    keys = jax.random.split(jax.random.key(1))
    x = [jax.random.normal(k, (n, D)) for k, n in zip(keys, (6, 4), strict=True)]
    return Task(Batch(x[0], jnp.asarray(labels)), Batch(x[1], jnp.asarray(query)))


def log_probs(learner, params, task):
    return learner.predict(params, learner.adapt(params, task.support, KEY), task.query.x, KEY).log_probs[0]


def log_softmax(scores):
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def prototypes(f, y):
    return np.stack([np.asarray(f)[np.asarray(y) == k].mean(0) for k in range(WAY)])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [lambda: NET, lambda: conv4(3, filters=4, blocks=2), lambda: resnet12(3, (4, 4))])
def test_before_training_it_is_a_prototypical_network(make):
    """gamma = beta = 0: a softmax of -alpha d; squared, exactly `protonet` with temperature 1 / alpha."""
    model, task = make(), task_of()
    if model is not NET:
        grow = jax.random.normal(jax.random.key(2), (D, 16 * 16))
        task = jax.tree.map(lambda leaf: (leaf @ grow).reshape(-1, 16, 16, 1) if leaf.ndim == 2 else leaf, task)
    for squared in (False, True):
        learner = tadam(model, Categorical(), scale=2.0, squared=squared)
        params = learner.init(KEY, task)
        assert len(params.scalars) == (8 if "block1_skip" in params.embedding else 2)
        means = prototypes(model.features(params.embedding, task.support.x), task.support.y)
        f = np.asarray(model.features(params.embedding, task.query.x))
        apart = ((f[:, None] - means) ** 2).sum(-1)
        expected = log_softmax(-2 * (apart if squared else np.sqrt(apart)))
        np.testing.assert_allclose(log_probs(learner, params, task), expected, rtol=1e-10, atol=1e-12)
    plain = protonet(model, Categorical(), temperature=0.5)
    theirs = log_probs(plain, plain.init(KEY, task)._replace(embedding=params.embedding), task)
    np.testing.assert_allclose(log_probs(learner, params, task), theirs, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("label", [0, 1, 2])
def test_limits_of_metric_scaling(label):
    """The gradient of one query's loss over alpha, as alpha goes to 0 and to infinity."""
    linear = Model(lambda key, x: jnp.eye(D), lambda w, x: x @ w)
    task = task_of()
    one = Task(task.support, Batch(task.query.x[:1], jnp.array([label])))

    def distances(w):
        f = one.support.x @ w
        means = jnp.stack([f[k == LABELS].mean(0) for k in range(WAY)])
        return jnp.linalg.norm(one.query.x @ w - means, axis=-1)

    w = jax.random.normal(jax.random.key(3), (D, D))
    slopes, nearest = jax.jacobian(distances)(w), int(distances(w).argmin())
    others = sum(slopes[k] for k in range(WAY) if k != label)
    limits = {
        1e-6: (WAY - 1) / WAY * slopes[label] - others / WAY,
        1e4: slopes[label] - slopes[nearest],
    }
    for scale, limit in limits.items():
        learner = tadam(linear, Categorical(), scale=scale, conditioned=False, way=WAY)
        params = learner.init(KEY, task)._replace(embedding=w)
        slope = jax.grad(lambda p, learner=learner: learner.loss(p, one, KEY)[0])(params).embedding / scale
        np.testing.assert_allclose(slope, limit, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_the_code_of_the_task_modulates_every_hidden_layer():
    task, learner = task_of(), tadam(NET, Categorical(), shrink=0.3)
    params = learner.init(KEY, task)
    scalars = {"layer1": jnp.array([0.7, -1.1]), "layer2": jnp.array([0.4, 0.9])}
    params = params._replace(scalars=scalars)

    def forward(x, code=None):
        x = np.asarray(x)
        for name in ("layer1", "layer2"):
            x = x @ np.asarray(params.embedding[name]["w"]) + np.asarray(params.embedding[name]["b"])
            if code is not None:
                gain, shift = (float(c) * dense_net(g, code) for c, g in
                               zip(scalars[name], params.generators[name], strict=True))  # fmt: skip
                x = (1 + gain) * x + shift
            x = np.tanh(x)
        return x

    def dense_net(network, z):
        def layer(name, z):
            return z @ np.asarray(network[name]["w"]) + np.asarray(network[name]["b"])

        def swish(z):
            return z / (1 + np.exp(-z))

        z = swish(layer("first", z))
        z = swish(z + layer("second", z))
        return z + layer("third", z)

    code = prototypes(forward(task.support.x), task.support.y).mean(0)
    means, f = prototypes(forward(task.support.x, code), task.support.y), forward(task.query.x, code)
    expected = log_softmax(-7.5 * np.sqrt(((f[:, None] - means) ** 2).sum(-1)))
    np.testing.assert_allclose(log_probs(learner, params, task), expected, rtol=1e-10)
    penalty = 0.15 * (0.7**2 + 1.1**2 + 0.4**2 + 0.9**2)
    np.testing.assert_allclose(
        learner.loss(params, task, KEY)[0],
        penalty - expected[np.arange(4), np.asarray(task.query.y)].mean(),
        rtol=1e-10,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_co_training_mixes_the_episode_with_all_classes():
    """Class numbers 3, 7, 11 are places 0, 1, 2; the classifier of all classes sees the numbers."""
    numbers = jnp.array([3, 7, 11])
    episode = task_of()
    task = Task(*(batch._replace(y=numbers[batch.y]) for batch in episode))
    learner, alone = tadam(NET, Categorical(), auxiliary=40), tadam(NET, Categorical())
    params = learner.init(KEY, task)
    assert params.head["w"].shape == (6, 40)
    without = params._replace(head=None)
    data = joined(task)
    assert NET.features is not None
    logits = NET.features(params.embedding, data.x) @ params.head["w"] + params.head["b"]
    of_all = Categorical().nll(logits, data.y).mean()
    of_episode = alone.loss(without, episode, KEY)[0]
    assert learner.schedule is not None
    for progress, p in ((None, 0.9), (0.0, 0.9), (0.049, 0.9), (0.05, 0.9**2), (0.5, 0.9**11), (0.999, 0.9**20)):
        at = learner if progress is None else learner.schedule(jnp.asarray(progress))
        found = at.loss(params, task, KEY)
        np.testing.assert_allclose(found[0], (1 - p) * of_episode + p * of_all, rtol=1e-10)
        np.testing.assert_allclose(found[1]["auxiliary"], of_all, rtol=1e-10)
    np.testing.assert_allclose(log_probs(learner, params, episode), log_probs(alone, without, episode), rtol=1e-12)
    # A query of a class that the support does not have is no small loss.
    stray = task._replace(query=task.query._replace(y=task.query.y.at[0].set(5)))
    assert jnp.isnan(jax.jit(learner.loss)(params, stray, KEY)[0])


def test_places_are_no_labels_for_co_training():
    learner = tadam(NET, Categorical(), auxiliary=200)
    with pytest.raises(
        ValueError, match=r"auxiliary must be None .* places of their classes, 0..2, got 200: .*train_lab"
    ):
        learner.init(KEY, task_of())
    learner.init(KEY, task_of(LABELS + 1, (1, 2, 3, 2)))  # class numbers
    tadam(NET, Categorical(), auxiliary=4).init(KEY, task_of())  # few classes: 0, 1 and 2 may be their numbers
    with pytest.raises(ValueError, match="model must have layers that a `Call` can modulate"):
        tadam(Model(lambda key, x: jnp.eye(D), lambda w, x: x @ w), Categorical(), way=WAY).init(KEY, task_of())


def pool(labels):
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)
    return class_pool(images, [3] * 20, way=5, shot=1, query=2, labels=labels)


@pytest.mark.parametrize("norm", ["batch", "task"])
@pytest.mark.slow
def test_a_meta_step_knows_how_much_of_the_training_is_done(norm):
    """The update at step 5 of 10 is that of the scheduled learner at one half, not of the learner at the start."""
    source, training = pool("class"), Training(steps=10, meta_batch=2, optimizer="sgd", rate=1.0)
    model = conv4(5, filters=4, blocks=2, norm=norm)
    learner = make_learner("tadam", model, Categorical(), auxiliary=20)
    state = init_state(learner, source, training)._replace(step=jnp.asarray(5))
    keys = jax.random.split(KEY, 2)
    tasks = source.sample(KEY, 2)
    after, metrics = jax.jit(meta_step(learner, training))(state, (tasks, keys))

    def loss(learner):
        return jax.jit(lambda p: jax.vmap(learner.loss, (None, 0, 0))(p, tasks, keys)[0].mean())(state.params)

    assert learner.schedule is not None
    np.testing.assert_allclose(metrics["loss"], loss(learner.schedule(jnp.asarray(0.5))), rtol=1e-5)
    assert abs(metrics["loss"] - loss(learner)) > 0.01
    assert not same_bits(after.params, state.params)
