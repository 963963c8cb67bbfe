"""Meta-regularisation: the random encoder, its divergence, and what is left without them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import kl_divergence

from metaprior import Categorical, Gaussian, make_learner, mlp
from metaprior.core.types import Batch, Model, Task
from metaprior.inference.gaussian import DiagonalGaussian
from metaprior.learners import cnp, maml, mr_cnp, mr_maml
from metaprior.learners.builders.bottleneck import Bottleneck, noise_of
from metaprior.networks import bag, conv4
from metaprior.tasks import sinusoid_nme
from scenarios import KEY

ENCODER = mlp(3, (5,), "tanh")
SPREAD = mlp(6, (5,), "tanh")  # means and deviations of three numbers
BASE = mlp(1, (7,), "tanh")


def one_task():
    draw = jax.jit(lambda source: source.sample(KEY, 1))
    return jax.tree.map(lambda leaf: leaf[0], draw(sinusoid_nme(names=4, shot=6, query=5).train))


def begun(learner, task):
    return jax.jit(learner.init)(KEY, task)


def answer(learner, params, task):
    return jax.jit(lambda p: learner.predict(p, learner.adapt(p, task.support, KEY), task.query.x, KEY).mean())(params)


def loss_of(learner, params, task, key=KEY):
    return jax.jit(learner.loss)(params, task, key)


def certain(params, on):
    """Parameters whose encoder has next to no variance."""
    code = params.bottleneck
    if on == "weights":
        return params._replace(bottleneck=code._replace(log_sd=jax.tree.map(lambda s: s * 0 - 50.0, code.log_sd)))
    head = code["head"]
    head = {"w": head["w"].at[:, 3:].set(0), "b": head["b"].at[3:].set(-60.0)}  # sd = softplus(-60)
    return params._replace(bottleneck=code | {"head": head})


def fixed(on, params):
    """The base network behind an encoder that is a constant."""
    code = params.bottleneck

    def z(x):
        return ENCODER.apply(code.mean, x) if on == "weights" else SPREAD.apply(code, x)[:, :3]

    return Model(lambda key, x: BASE.init(key, z(x)), lambda theta, x: BASE.apply(theta, z(x)))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("on", ["weights", "activations"])
def test_without_spread_and_weight_it_is_maml_behind_a_fixed_encoder(on):
    task, options = one_task(), {"steps": 2, "rate": 0.1}
    encoder = ENCODER if on == "weights" else SPREAD
    learner = mr_maml(BASE, Gaussian(), on=on, beta=0.0, bottleneck=encoder, draws=2, **options)
    params = certain(begun(learner, task), on)
    plain = maml(fixed(on, params), Gaussian(), **options)

    def ours(params):
        return learner.loss(params, task, KEY)[0]

    def theirs(params):
        return maml(fixed(on, params), Gaussian(), **options).loss(params.theta, task, KEY)[0]

    (a, da), (b, db) = (jax.jit(jax.value_and_grad(f))(params) for f in (ours, theirs))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-9, atol=1e-12), da, db)
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(da.bottleneck)) > 1e-4  # the outer loop trains the encoder

    np.testing.assert_allclose(answer(learner, params, task), answer(plain, params.theta, task), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_process_without_spread_and_weight_is_cnp_on_codes():
    task, small = one_task(), {"width": 4, "encoder": (6,), "decoder": (6,)}
    learner = mr_cnp(BASE, Gaussian(), beta=0.0, bottleneck=ENCODER, log_sd=-50.0, draws=2, **small)
    params = begun(learner, task)
    code, theta = params.embedding.bottleneck.mean, params.embedding.theta
    plain = cnp(BASE, Gaussian(), **small)
    seen = Task(*(batch._replace(x=ENCODER.apply(code, batch.x)) for batch in task))
    same = params._replace(embedding=theta)
    np.testing.assert_allclose(loss_of(learner, params, task)[0], loss_of(plain, same, seen)[0], rtol=1e-12)
    np.testing.assert_allclose(answer(learner, params, task), answer(plain, same, seen), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [mr_maml, mr_cnp])
@pytest.mark.parametrize("on", ["weights", "activations"])
def test_the_loss_has_beta_times_the_divergence_that_numpyro_computes(make, on):
    """On weights the sum over weights. On activations the mean over queries and numbers (MR-MAML), or the mean over the
    support of the sum over numbers (MR-CNP)."""
    task = one_task()
    encoder = ENCODER if on == "weights" else SPREAD
    free, costly = (make(BASE, Gaussian(), on=on, beta=b, bottleneck=encoder, log_sd=-1.0) for b in (0.0, 0.7))
    params = begun(free, task)
    (without, _), (value, metrics) = (loss_of(each, params, task) for each in (free, costly))
    q = params.bottleneck if make is mr_maml else params.embedding.bottleneck
    if on == "weights":
        leaves = zip(jax.tree.leaves(q.mean), jax.tree.leaves(q.log_sd), strict=True)
        expected = sum(kl_divergence(dist.Normal(m, jnp.exp(s)), dist.Normal()).sum() for m, s in leaves)
    else:
        out = SPREAD.apply(q, (task.query if make is mr_maml else task.support).x)
        each = kl_divergence(dist.Normal(out[:, :3], jax.nn.softplus(out[:, 3:])), dist.Normal())
        expected = each.mean() if make is mr_maml else each.sum(-1).mean()
    np.testing.assert_allclose(metrics["kl"], expected, rtol=1e-9)
    np.testing.assert_allclose(value - without, 0.7 * expected, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_the_divergence_of_one_weight():
    coder = Bottleneck("weights", None, None, -3.0)
    batch = Batch(jnp.ones((1, 1)), jnp.ones((1, 1)))
    at = DiagonalGaussian(jnp.array([0.5]), jnp.log(jnp.array([0.2])))
    np.testing.assert_allclose(coder.divergence(at, batch), 1.25443791, atol=1e-8)
    assert coder.divergence(DiagonalGaussian(jnp.zeros(3), jnp.zeros(3)), batch) == 0


@pytest.mark.slow
def test_the_inner_loop_leaves_the_encoder_as_it_was_drawn():
    task = one_task()
    learner = mr_maml(BASE, Gaussian(), bottleneck=ENCODER, steps=4, rate=0.3, draws=5)
    params = begun(learner, task)
    posterior = jax.jit(learner.adapt)(params, task.support, KEY)
    drawn = jax.tree.leaves(posterior.drawn.params)
    for leaf, mean, log_sd in zip(drawn, *map(jax.tree.leaves, params.bottleneck), strict=True):
        assert leaf.shape == (5, *mean.shape)
        assert (abs(leaf - mean) < 6 * jnp.exp(log_sd)).all()
        assert (leaf[0] != leaf[1]).any()  # each draw is another encoder
    course = jax.jit(learner.path)(params, task.support, KEY)
    first, last = (jax.tree.leaves(course.posterior.posterior)[0][k] for k in (0, -1))
    assert abs(first - last).max() > 1e-3  # the base network moves
    predictive = jax.jit(learner.predict)(params, posterior, task.query.x, KEY)
    assert predictive.means.shape == (5, 5, 1)
    assert float(predictive.means.std(0).min()) > 0


@pytest.mark.parametrize("on", ["weights", "activations"])
@pytest.mark.slow
def test_no_draws_are_the_mean_of_the_encoder(on):
    task = one_task()
    encoder = ENCODER if on == "weights" else SPREAD
    learner, drawn = (mr_maml(BASE, Gaussian(), on=on, bottleneck=encoder, draws=n, rate=0.1) for n in (0, 2))
    params = begun(learner, task)
    mean = answer(maml(fixed(on, params), Gaussian(), rate=0.1), params.theta, task)
    np.testing.assert_allclose(answer(learner, params, task), mean, rtol=1e-5)
    assert abs(answer(drawn, params, task) - mean).max() > 1e-3
    assert loss_of(learner, params, task)[0] == loss_of(drawn, params, task)[0]  # training draws in any case


def test_noise_belongs_to_the_input_and_not_to_its_place():
    x = jax.random.normal(KEY, (40, 3)).at[:, 2].set(0.0)
    like = jnp.zeros((40, 4))
    noise = noise_of(jax.random.key(1), x, like)
    turn = jax.random.permutation(KEY, 40)
    np.testing.assert_array_equal(noise_of(jax.random.key(1), x[turn], like), noise[turn])
    np.testing.assert_array_equal(noise_of(jax.random.key(1), x.at[:, 2].set(-0.0), like), noise)
    assert abs(noise_of(jax.random.key(2), x, like) - noise).min() > 0
    # Pictures of ink and paper, of which a weak hash would make the same number.
    pictures = jax.random.bernoulli(KEY, 0.3, (2000, 8, 8, 1)).astype(float)
    draws = np.asarray(noise_of(jax.random.key(3), pictures, jnp.zeros((2000, 2))))
    assert len(np.unique(draws[:, 0])) == 2000
    assert abs(draws.mean(0)).max() < 0.1
    assert abs(draws.std(0) - 1).max() < 0.1
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.1


def test_training_sees_fresh_noise_in_each_task_and_the_same_in_all_inner_steps():
    task = one_task()
    learner = mr_maml(BASE, Gaussian(), on="activations", beta=0.0, bottleneck=SPREAD, draws=1)
    params = begun(learner, task)
    values = [loss_of(learner, params, task, jax.random.key(seed))[0] for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


@pytest.mark.slow
def test_images_have_an_encoder_too():
    x = jax.random.uniform(KEY, (6, 28, 28, 1))
    batch = Batch(x, jnp.arange(6) % 3)
    task = Task(batch, batch)
    learner = make_learner("mr_maml", conv4(3, filters=4, norm="task"), Categorical(), draws=2)
    params = begun(learner, task)
    grads = jax.jit(jax.grad(lambda p: learner.loss(p, task, KEY)[0]))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(answer(learner, params, task).sum(-1), 1, rtol=1e-5)


def test_a_code_may_be_an_image():
    batch = Batch(jnp.zeros((6, 28, 28, 1)), jnp.arange(6) % 3)
    learner = mr_maml(conv4(3, filters=4, downsample="stride"), Categorical(), code=(14, 14, 3))
    params = jax.eval_shape(learner.init, KEY, Task(batch, batch))
    assert params.theta["block1"]["w"].shape == (3, 3, 3, 4)
    assert params.theta["head"]["w"].shape == (4, 3)  # 14 -> 7 -> 4 -> 2 -> 1


@pytest.mark.slow
def test_texts_have_an_encoder_of_texts():
    x = jax.random.randint(KEY, (6, 9), 0, 50)
    batch = Batch(x, jnp.arange(6) % 3)
    learner = mr_maml(mlp(3, (8,)), Categorical(), bottleneck=bag(4), draws=2)
    params = begun(learner, Task(batch, batch))
    assert params.theta["layer1"]["w"].shape == (4, 8)
    assert jnp.isfinite(loss_of(learner, params, Task(batch, batch))[0])


def test_inputs_of_another_form_need_an_encoder():
    batch = Batch({"a": jnp.zeros((6, 2))}, jnp.zeros((6, 1)))
    with pytest.raises(
        ValueError, match="bottleneck must be given for inputs that are not one array, got None for dict"
    ):
        mr_maml(BASE, Gaussian()).init(KEY, Task(batch, batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": mlp(5), "code": (2, 3)}, r"bottleneck must be a network with 6 outputs .*, got shape \(6, 5\)"),
        ({"on": "activations", "bottleneck": mlp(5)}, "with an even number of outputs"),
        ({"on": "activations", "bottleneck": mlp(5), "code": (5,)}, "with 10 outputs .means and deviations."),
    ],
)
def test_an_encoder_that_does_not_fit_the_code(options, message):
    with pytest.raises(ValueError, match=message):
        mr_maml(BASE, Gaussian(), **options).init(KEY, one_task())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, "beta must be a finite number of at least 0"),
        ({"on": "weight"}, "on must be one of 'weights', 'activations', got 'weight'"),
        ({"log_sd": -100.0}, "log_sd must be"),
        ({"draws": -1}, "draws must be an integer of at least 0"),
        ({"code": (0,)}, "code must be"),
    ],
)
def test_bad_options(options, message):
    for make in (mr_maml, mr_cnp):
        with pytest.raises(ValueError, match=message):
            make(BASE, Gaussian(), **options)
