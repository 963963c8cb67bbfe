"""Convolutional networks, and what a prediction depends on under each norm."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from metaprior.core.likelihoods import Categorical
from metaprior.core.types import Attributes, Batch, Call, Model, Splits, Task, settled
from metaprior.evaluation.calibration import calibrate_softmax, temperature_scaled
from metaprior.evaluation.protocol import evaluate
from metaprior.inference.curvature import kfac
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import laplace, point
from metaprior.learners import make_learner, maml
from metaprior.learners.builders.gradient import Adaptation, query_learner
from metaprior.learners.builders.normalised import gathered, of_support, of_training
from metaprior.networks import conv4, conv6, resnet12
from metaprior.networks.norm import NORMS, group_norm, moments
from metaprior.networks.statistics import given, statistics_of
from metaprior.tasks import class_pool
from metaprior.training.loop import Training, fit

KEY = jax.random.key(0)
WAY = 3


def small(norm="batch", blocks=1):
    return conv4(WAY, filters=4, blocks=blocks, gain=True, norm=norm)


def images(n, seed=1):
    """Each image of a brightness and contrast of its own, so that it matters whom it is normalised with."""
    keys = jax.random.split(jax.random.key(seed), 3)
    scale, level = jnp.exp(jax.random.normal(keys[0], (n, 1, 1, 1))), jax.random.normal(keys[1], (n, 1, 1, 1))
    return scale * jax.random.normal(keys[2], (n, 8, 8, 1)) + level


def batch(n, seed=1):
    return Batch(images(n, seed), jnp.arange(n) % WAY)


TASK = Task(batch(6), batch(4, 2))


def answer(learner, params, support, x):
    return learner.predict(params, learner.adapt(params, support, KEY), x, KEY).mean()


def depends_on_other_queries(learner, params):
    together, alone = (answer(learner, params, TASK.support, TASK.query.x[:n])[0] for n in (4, 1))
    return abs(together - alone).max() > 1e-3


# ------------------------------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize(
    ("model", "width", "weights"),
    [
        (conv4(5, gain=True, head=False), 1600, 112_832),
        (conv6(5, gain=True, head=False), 1600, 112_832 + 2 * (9 * 64 * 64 + 2 * 64)),
        (resnet12(5, head=False), 640, 12_424_320),  # of Lee et al. 2019
    ],
)
def test_embeddings_have_the_papers_sizes(model, width, weights):
    x = jax.ShapeDtypeStruct((2, 84, 84, 3), jnp.float32)
    params = jax.eval_shape(model.init, KEY, x)
    assert jax.eval_shape(model.features, params, x).shape == (2, width)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == weights


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_residual_block_is_its_formula():
    model = resnet12(2, widths=(3,))
    x = images(5).astype(float)
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(KEY, p.shape), model.init(KEY, x))

    def norm(s, layer):
        return (s - s.mean((0, 1, 2))) / jnp.sqrt(s.var((0, 1, 2)) + 1e-5) * layer["gain"] + layer["shift"]

    def conv(name, x):
        layer = params[f"block1_{name}"]
        s = lax.conv_general_dilated(x, layer["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return norm(s, layer)

    leaky = lambda s: jnp.where(s > 0, s, 0.1 * s)  # noqa: E731
    y = leaky(conv("conv3", leaky(conv("conv2", leaky(conv("conv1", x))))) + conv("skip", x))
    y = y.reshape(5, 4, 2, 4, 2, 3).max((2, 4)).mean((1, 2))
    np.testing.assert_allclose(model.features(params, x), y, rtol=1e-9)
    np.testing.assert_allclose(model.apply(params, x), y @ params["head"]["w"] + params["head"]["b"], rtol=1e-9)


def test_the_last_blocks_of_conv6_keep_the_size():
    x = jnp.zeros((1, 28, 28, 1))
    assert jax.eval_shape(lambda: conv6(filters=2).features(conv6(filters=2).init(KEY, x), x)).shape == (1, 2)
    with pytest.raises(ValueError, match="at least the window"):
        conv4(blocks=6).init(KEY, x)


@pytest.mark.slow
def test_curvature_sees_every_layer_of_a_resnet():
    model = resnet12(WAY, widths=(2, 3))
    params = model.init(KEY, TASK.support.x)
    seen = kfac(model.apply, Categorical(), params, TASK.support, 1.0).blocks
    assert set(seen) == set(params)
    assert seen["block2_skip"].inputs.values.shape == (2,)
    assert seen["block2_conv3"].inputs.values.shape == (27,)


# ----------------------------------------------------------------------------------------------------------- the norms


@pytest.mark.parametrize(
    ("name", "norm"), [*(("protonet", norm) for norm in NORMS), ("maml", "batch"), ("maml", "task")]
)
@pytest.mark.slow
def test_whether_a_prediction_depends_on_the_other_queries(name, norm):
    learner = make_learner(name, small(norm), Categorical())
    params = learner.init(KEY, TASK)
    # While it is trained a network with running statistics goes by the batch.
    assert depends_on_other_queries(learner, params) == (norm in ("batch", "running"))


@pytest.mark.slow
def test_once_settled_running_statistics_make_queries_independent(pool):
    learner = make_learner("protonet", small("running", blocks=2), Categorical())
    params = learner.init(KEY, TASK)
    assert not depends_on_other_queries(settled(learner, params, pool, KEY), params)


def test_running_statistics_mean_the_same_in_training_evaluation_and_calibration(pool):
    """Validation judges the settled learner; one that is not settled is refused."""
    model = conv4(2, filters=3, blocks=1, norm="running", head=False)
    learner = make_learner("protonet", model, Categorical(), way=2)
    training = Training(steps=2, meta_batch=2, chunk=2, validate_every=2, validation_tasks=3)
    fitted = fit(learner, Splits(pool, pool, pool), training)
    judged = settled(learner, fitted.params, pool, jax.random.key(training.seed))

    def nll(key):
        key_task, key = jax.random.split(key)
        support, query = jax.tree.map(lambda leaf: leaf[0], pool.sample(key_task, 1))
        predictive = judged.predict(fitted.params, judged.adapt(fitted.params, support, key), query.x, key)
        return -predictive.log_prob(query.y).mean()

    by_hand = np.mean([nll(k) for k in jax.random.split(jax.random.key(training.seed + 1), 3)])
    np.testing.assert_allclose(fitted.history[-1]["validation/nll"], by_hand, rtol=1e-4)
    assert evaluate(judged, fitted.params, pool, KEY, tasks=3).figures["accuracy"].mean > 0
    warmer = settled(temperature_scaled(learner, 2.0), fitted.params, pool, jax.random.key(training.seed))
    one = jax.tree.map(lambda leaf: leaf[0], pool.sample(KEY, 1))
    plain, warm = (answer(at, fitted.params, one.support, one.query.x) for at in (judged, warmer))
    np.testing.assert_allclose(warm, jax.nn.softmax(jnp.log(plain) / 2), rtol=1e-4)
    for judge in (evaluate, calibrate_softmax):
        for unsettled in (learner, temperature_scaled(learner, 2.0)):
            with pytest.raises(ValueError, match=r"have not been computed. Use learner = mp.settled\("):
                judge(unsettled, fitted.params, pool, KEY, tasks=2)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_running_statistics_follow_what_a_learner_makes_of_the_network(pool):
    """The first layer's are those of its outputs after the warp."""
    model = conv4(2, filters=3, blocks=1, norm="running")
    learner = of_training(lambda model: adapting_on(warped(model)), model)
    params = learner.init(KEY, jax.tree.map(lambda leaf: leaf[0], pool.sample(KEY, 1)))
    found = gathered(learner, model, params, pool, KEY, tasks=2)["block1"]
    x = jnp.concatenate([b.x.reshape(-1, 8, 8, 1) for k in jax.random.split(KEY, 2) for b in pool.sample(k, 1)])
    w = params["theta"]["block1"]["w"]
    s = lax.conv_general_dilated(x.astype(float), w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    s = s @ params["warp"]["block1"]
    np.testing.assert_allclose(found.mean, s.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found.variance, s.var((0, 1, 2)), rtol=1e-6)


@pytest.fixture(scope="module")
def pool():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), np.uint8) // np.arange(1, 13)[:, None, None, None]
    return class_pool(pixels.astype(np.uint8), [4, 4, 4], way=2, shot=1, query=2)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_settled_statistics_are_those_of_all_examples_of_the_tasks(pool):
    model = conv4(2, filters=3, blocks=1, norm="running", head=False)
    tasks = jax.vmap(lambda k: pool.sample(k, 1))(jax.random.split(KEY, 5))
    x = jnp.concatenate([batch.x.reshape(-1, 8, 8, 1) for batch in tasks])
    params = model.init(KEY, x)
    w, x = params["block1"]["w"], x.astype(float)
    s = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).reshape(-1, 3)
    expected = jnp.maximum((s - s.mean(0)) / jnp.sqrt(s.var(0) + 1e-5), 0).reshape(-1, 4, 2, 4, 2, 3).max((2, 4))
    learner = make_learner("protonet", model, Categorical(), way=2)
    fixed = given(model, gathered(learner, model, params, pool, KEY, tasks=5))
    np.testing.assert_allclose(fixed.features(params, x), expected.reshape(len(x), -1), rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.slow
def test_task_norm_is_a_batch_in_which_the_support_alone_counts(padding):
    """Against one pass over support and queries together, the queries' weights in the statistics being 0."""
    model = small("task", blocks=2)
    learner = make_learner("maml", model, Categorical(), steps=0)
    support, x = TASK.support, TASK.query.x
    params = learner.init(KEY, TASK)
    both = jnp.concatenate([support.x, x])
    logits = model.apply(params, both, Call(by=jnp.array([1.0] * 6 + [0] * 4)))[6:]
    if padding:
        support = Batch(jnp.concatenate([support.x, 9 * x[:2]]), jnp.zeros(8, int), jnp.array([1.0] * 6 + [0] * 2))
    np.testing.assert_allclose(answer(learner, params, support, x), jax.nn.softmax(logits), rtol=1e-9)


def warped(model):
    """Each linear map is followed by a matrix that phi does not move, as in MT-nets (Lee & Choi 2018)."""

    def network(params, phi, x, call):
        def tap(name, inputs, s):
            s = s @ params["warp"][name]
            return s if call.tap is None else call.tap(name, inputs, s)

        return model.outputs(phi, x, call._replace(tap=tap))

    def init(key, task):
        theta = model.init(key, task.support.x)
        keys = jax.random.split(key, len(theta))
        widths = {name: layer["w"].shape[-1] for name, layer in theta.items()}
        warp = {n: jax.random.normal(k, (c, c)) for (n, c), k in zip(widths.items(), keys, strict=True)}
        return {"theta": theta, "warp": warp}

    return Adaptation(model, init, lambda params: params["theta"], network, lambda _: optax.sgd(0.1))


def widened(model):
    """phi is a context, seen by the network as one more channel of each image, as in CAVIA (Zintgraf et al. 2019)."""

    def wide(phi, x):
        return jnp.concatenate([x, x * phi], -1)

    return Adaptation(
        model,
        lambda key, task: model.init(key, wide(jnp.zeros(1), task.support.x)),
        lambda params: jnp.ones(1),
        lambda params, phi, x, call: model.outputs(params, wide(phi, x), call),
        lambda _: optax.sgd(0.1),
    )


def scaled(model):
    """phi is a gain and an offset of the images: a change of the inputs that leaves their shape."""
    return Adaptation(
        model,
        lambda key, task: model.init(key, task.support.x),
        lambda params: jnp.array([2.0, 1.0]),
        lambda params, phi, x, call: model.outputs(params, x**2 * phi[0] + x * phi[1], call),
        lambda _: optax.sgd(0.1),
    )


def adapting_on(adaptation, rule=None):
    return query_learner(adaptation, Categorical(), InnerLoop(steps=2), rule or point())


def adapting(adaptation, norm, rule=None):
    """The learner of an adaptation, on a small network of that norm."""

    def make(model):
        return adapting_on(adaptation(model), rule)

    model = small(norm, blocks=2)
    return of_support(make, model) if norm == "task" else make(model)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("adaptation", [warped, widened, scaled])
@pytest.mark.slow
def test_task_norm_follows_whatever_a_learner_makes_of_the_network(adaptation):
    of_batch, of_task = adapting(adaptation, "batch"), adapting(adaptation, "task")
    params = of_batch.init(KEY, TASK)
    support = TASK.support
    # Support images in another batch are normalised as the support is.
    here = answer(of_batch, params, support, support.x)
    np.testing.assert_allclose(answer(of_task, params, support, support.x + 0), here, rtol=1e-9)
    np.testing.assert_allclose(answer(of_task, params, support, support.x[1:3]), here[1:3], rtol=1e-9)
    assert not depends_on_other_queries(of_task, params)
    mine, theirs = (
        jax.grad(lambda p, at=at: at.loss(p, Task(support, Batch(support.x + 0, support.y)), KEY)[0])(params)
        for at in (of_task, of_batch)
    )
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_curvature_by_layers_sees_the_same_network_under_task_norm():
    of_batch, of_task = (adapting(warped, norm, laplace(curvature="kfac")) for norm in ("batch", "task"))
    params, support = of_batch.init(KEY, TASK), TASK.support
    here = answer(of_batch, params, support, support.x)
    np.testing.assert_allclose(answer(of_task, params, support, support.x + 0), here, rtol=1e-9)
    plain = answer(adapting(warped, "batch"), params, support, support.x)
    assert abs(here - plain).max() > 1e-3


def test_a_network_without_calls_says_so():
    plain = small()
    model = Model(plain.init, lambda params, x: plain.apply(params, x))
    learner = make_learner("maml", model, Categorical(), posterior=laplace(curvature="kfac"))
    with pytest.raises(ValueError, match=r"model must take a `Call`.*curvature='dual'"):
        learner.adapt(learner.init(KEY, TASK), TASK.support, KEY)
    learner = make_learner("amortized_bml", model, Categorical(), local=True)
    with pytest.raises(ValueError, match="local must be False for a network"):
        learner.adapt(learner.init(KEY, TASK), TASK.support, KEY)


def test_task_norm_needs_a_support_of_examples():
    learner = make_learner("zero_shot", small("task"), Categorical(), way=WAY)
    task = Task(Batch(Attributes(jnp.eye(WAY)), jnp.arange(WAY)), TASK.query)
    with pytest.raises(ValueError, match="norm='task' needs a support of examples"):
        learner.loss(learner.init(KEY, task), task, KEY)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["maml", "imaml", "cnp"])
@pytest.mark.slow
def test_learners_under_task_norm_vmap_and_differentiate(name):
    learner = make_learner(name, small("task"), Categorical())
    params = learner.init(KEY, TASK)
    tasks = jax.tree.map(lambda *leaves: jnp.stack(leaves), TASK, Task(batch(6, 5), batch(4, 6)))

    @jax.jit
    def each(params, tasks):
        def one(task):
            seen = learner.predict(params, learner.adapt(params, task.support, KEY), task.query.x, KEY).mean()
            value, gradient = jax.value_and_grad(lambda p: learner.loss(p, task, KEY)[0])(params)
            return seen, value, gradient

        return jax.vmap(one)(tasks)

    seen, value, gradient = each(params, tasks)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((seen, value, gradient)))
    assert any(abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(seen[0], answer(learner, params, TASK.support, TASK.query.x), rtol=1e-7)
    if name == "maml":  # the gradient goes through the support's statistics too
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        direction = jax.random.normal(KEY, flat.shape)
        loss = jax.jit(lambda v: learner.loss(unravel(v), TASK, KEY)[0])
        finite = (loss(flat + 1e-6 * direction) - loss(flat - 1e-6 * direction)) / 2e-6
        mine = jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf: leaf[0], gradient))[0] @ direction
        np.testing.assert_allclose(mine, finite, rtol=1e-5)


@pytest.mark.slow
def test_moments_leave_out_what_weighs_nothing_and_none_at_all_normalises_nothing():
    x = images(5)[..., [0, 0]] * jnp.array([1.0, 3.0])
    some = moments(x, jnp.array([1.0, 0, 1, 1, 0]))
    kept = x[jnp.array([0, 2, 3])]
    np.testing.assert_allclose(some.mean, kept.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(some.variance, kept.var((0, 1, 2)), rtol=1e-5)
    none = moments(x, jnp.zeros(5))
    np.testing.assert_array_equal(none.mean, [0, 0])
    np.testing.assert_array_equal(none.variance, [1, 1])


@pytest.mark.slow
def test_group_norm_is_of_an_example_and_its_group():
    x = jax.random.normal(KEY, (2, 3, 3, 6)) * jnp.arange(1, 7)
    y = group_norm(x, 3).reshape(2, 9, 3, 2)
    np.testing.assert_allclose(y.mean((1, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(y.var((1, 3)), 1, rtol=1e-3)
    by_hand = (x[1] - x[1].mean()) / jnp.sqrt(x[1].var() + 1e-5)
    np.testing.assert_allclose(group_norm(x, 1)[1], by_hand, rtol=1e-5, atol=1e-6)


def test_fixed_statistics_of_the_batch_itself_are_batch_norm():
    model = small()
    params = model.init(KEY, TASK.support.x)
    fixed = given(model, statistics_of(partial(model.apply, params), TASK.query.x))
    np.testing.assert_allclose(
        fixed.apply(params, TASK.query.x), model.apply(params, TASK.query.x), rtol=1e-4, atol=1e-5
    )


def test_bad_input_is_named(pool):
    with pytest.raises(ValueError, match=r"norm must be one of batch, running, task, layer.* got 'batchnorm'"):
        resnet12(norm="batchnorm")
    with pytest.raises(ValueError, match="widths must have a number of channels"):
        resnet12(widths=())
    for norm in ("task", "running"):
        with pytest.raises(ValueError, match="make_learner"):
            maml(small(norm), Categorical()).adapt(small(norm).init(KEY, TASK.support.x), TASK.support, KEY)
    particles = make_learner("bmaml", small("running"), Categorical())
    with pytest.raises(ValueError, match="do not hold one network whose statistics"):
        settled(particles, particles.init(KEY, TASK), pool, KEY)
