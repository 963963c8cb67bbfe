"""MT-nets and T-nets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from metaprior import Batch, Categorical, Gaussian, Task, conv4, make_learner, mlp
from metaprior.networks import linear
from scenarios import KEY

X = jax.random.normal(jax.random.key(1), (8, 2))
TASK = Task(Batch(X[:5], jnp.sin(X[:5, :1])), Batch(X[5:], jnp.cos(X[5:, :1])))
INNER = {"steps": 3, "rate": 0.1}


def with_logits(params, value):
    return params._replace(rule=params.rule._replace(logits=jax.tree.map(lambda z: 0 * z + value, params.rule.logits)))


def test_with_identity_and_a_full_mask_it_is_maml():
    model = mlp(1, (6,), "tanh")
    maml, mt_net = (make_learner(name, model, Gaussian(), **INNER) for name in ("maml", "mt_net"))
    params = with_logits(mt_net.init(KEY, TASK), 50.0)
    expected, gradient = jax.value_and_grad(lambda p: maml.loss(p, TASK, KEY)[0])(params.theta)
    loss, found = jax.value_and_grad(lambda p: mt_net.loss(p, TASK, KEY)[0])(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found.theta, gradient)
    answers = [
        each.predict(p, each.adapt(p, TASK.support, KEY), X, KEY).mean()
        for each, p in ((maml, params.theta), (mt_net, params))
    ]
    np.testing.assert_allclose(*answers, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_a_step_of_a_t_net_is_preconditioned_by_t_t_transposed():
    """With rows x, y = x W T: in terms of U = W T, a step of W is U - a G T' T with the gradient G of U."""
    x, y = (jax.random.normal(k, (7, 3)) for k in jax.random.split(jax.random.key(3)))
    support = Batch(x, y)
    learner = make_learner("mt_net", linear(3), Gaussian(), mask=False, steps=1, rate=0.2)
    params = learner.init(KEY, Task(support, support))
    t = jax.random.normal(jax.random.key(4), (3, 3))
    w = jax.random.normal(jax.random.key(5), (3, 3))
    params = params._replace(theta={"head": {"w": w}}, rule=params.rule._replace(transforms={"head": t}))
    mean = learner.predict(params, learner.adapt(params, support, KEY), x, KEY).mean()
    u = w @ t
    gradient = 2 * x.T @ (x @ u - y) / 7  # of the mean of the squared errors' sum, Gaussian's default sd
    np.testing.assert_allclose(mean, x @ (u - 0.2 * gradient @ t.T @ t), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_the_meta_gradient_of_a_t_net_is_the_derivative_of_its_loss():
    learner = make_learner("mt_net", mlp(1, (4,), "tanh"), Gaussian(), mask=False, steps=2, rate=0.1)
    params = learner.init(KEY, TASK)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    check_grads(lambda p: learner.loss(p, TASK, KEY)[0], (params,), order=1, modes=["rev"], rtol=1e-5)


def test_the_gradient_of_a_logit_is_that_of_the_mask_times_the_soft_masks_slope():
    """Straight-through, with the one step of each unit's parameters written by hand."""
    model, rate = mlp(1, (4,), "tanh"), 0.3
    learner = make_learner("mt_net", model, Gaussian(), steps=1, rate=rate, temperature=0.5)
    params = with_logits(learner.init(KEY, TASK), 0.4)
    found = jax.grad(lambda p: learner.loss(p, TASK, KEY)[0])(params).rule.logits

    def nll(theta, batch):
        return Gaussian().nll(model.apply(theta, batch.x), batch.y).mean()

    key = jax.random.split(KEY)[0]  # of the builder: one for the start of the task
    keys = dict(zip(("head", "layer1"), jax.random.split(key, 2), strict=True))
    noisy = {n: z + jax.random.logistic(keys[n], z.shape) for n, z in params.rule.logits.items()}
    hard = {n: (v > 0) * 1.0 for n, v in noisy.items()}

    def query(mask):
        gradient = jax.grad(nll)(params.theta, TASK.support)
        phi = {
            n: {k: v - rate * mask[n] * gradient[n][k] for k, v in layer.items()} for n, layer in params.theta.items()
        }
        return nll(phi, TASK.query)

    of_mask = jax.grad(query)(hard)
    for name, v in noisy.items():
        soft = jax.nn.sigmoid(v / 0.5)
        np.testing.assert_allclose(found[name], of_mask[name] * soft * (1 - soft) / 0.5, rtol=1e-4, atol=1e-7)
    assert any(jnp.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(found))


@pytest.mark.slow
def test_masked_channels_of_a_convolutional_network_stay():
    images = jax.random.normal(KEY, (4, 8, 8, 1))
    support = Batch(images, jnp.array([0, 1, 0, 1]))
    learner = make_learner("mt_net", conv4(2, filters=4, blocks=2, gain=True), Categorical(), steps=2, rate=0.1)
    params = learner.init(KEY, Task(support, support))
    pattern = {name: jnp.where(jnp.arange(len(z)) % 2 == 0, 50.0, -50.0) for name, z in params.rule.logits.items()}
    params = params._replace(rule=params.rule._replace(logits=pattern))
    adapted = learner.adapt(params, support, KEY).posterior.mean
    for name, layer in params.theta.items():
        for part, before in layer.items():
            change = jnp.abs(adapted[name][part] - before)
            assert (change[..., 1::2] == 0).all()
            assert change[..., ::2].max() > 0, (name, part)


def test_a_unit_adapts_with_the_probability_of_its_logit():
    learner = make_learner("mt_net", linear(2000), Gaussian(), **INNER)
    support = Batch(X[:5], jnp.ones((5, 2000)))
    params = learner.init(KEY, Task(support, support))
    for logit, share in ((0.0, 0.5), (1.0, 0.7311)):
        adapted = learner.adapt(with_logits(params, logit), support, KEY)
        moved = (adapted.posterior.mean["head"]["w"] != params.theta["head"]["w"]).any(0)
        assert abs(moved.mean() - share) < 0.05
    again = learner.adapt(params, support, jax.random.key(9))
    assert (again.params.mask["head"] != learner.adapt(params, support, KEY).params.mask["head"]).any()


def test_a_network_without_a_call_is_refused():
    plain = mlp(1, (4,))._replace(calls=False)
    with pytest.raises(ValueError, match="model must take a `Call`"):
        make_learner("mt_net", plain, Gaussian()).init(KEY, TASK)


@pytest.mark.parametrize("inputs", [3, 6])
def test_further_inputs_of_a_layer_are_not_units(inputs):
    """A mask of zeros stops all units, but not the bias inputs, whatever their number."""
    model = mlp(1, (6,), "tanh", bias_inputs=inputs)
    learner = make_learner("mt_net", model, Gaussian(), **INNER)
    params = with_logits(learner.init(KEY, TASK), -50.0)
    phi = learner.adapt(params, TASK.support, KEY).posterior.mean
    moved = phi["layer1"].pop("inputs")
    jax.tree.map(np.testing.assert_array_equal, phi["layer1"], {n: params.theta["layer1"][n] for n in ("w", "b")})
    assert moved.shape == (inputs,)
    assert (np.abs(moved) > 0).all()
