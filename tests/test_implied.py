"""The implicit posterior is the one that the inner steps imply, against the dense recursion C <- (I - B H) C + B."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metaprior.core.likelihoods import Gaussian
from metaprior.core.types import Batch, Model, Task
from metaprior.inference.linear_descent import alike
from metaprior.inference.posteriors import implicit
from metaprior.learners import anil, imaml, lslr, maml, meta_sgd, preconditioned, reptile

KEY, SD, N = jax.random.key(0), 0.9, 4
BATCH = Batch(jax.random.normal(KEY, (N, 5)), jnp.zeros((N, 1)))


def init(key, x):
    return {"body": {"w": jnp.zeros((3, 1)), "b": jnp.zeros(())}, "head": {"w": jnp.zeros((2, 1))}}


MODEL = Model(init, lambda phi, x: x[:, :3] @ phi["body"]["w"] + phi["body"]["b"] + x[:, 3:] @ phi["head"]["w"])


def dense(posterior):
    """C, column by column, from row C row'."""
    zero, unravel = ravel_pytree(posterior.mean)
    eye = jnp.eye(zero.size)
    q = jax.jit(jax.vmap(lambda v: posterior.quadratic(unravel(v))))
    pairs = q((eye[:, None] + eye).reshape(-1, zero.size)).reshape(zero.size, -1)
    return (pairs - q(eye)[:, None] - q(eye)) / 2


def curvature(phi, params, parts=lambda phi: phi):
    """The Hessian of the mean nll in the adapted parameters, and phi's size."""
    flat, unravel = ravel_pytree(phi)
    x = BATCH.x.astype(flat.dtype)
    j = jax.jacobian(lambda v: MODEL.apply(parts(unravel(v)), x)[:, 0])(flat)
    return j.T @ j / SD**2 / N, flat.size


def recursion(h, matrices, momentum=0.0, nesterov=False):
    """C <- C - B (H C - I) with a velocity, as optax.trace has it; on the sum of N examples."""
    c = v = jnp.zeros_like(h)
    for b in matrices:
        g = h @ c - jnp.eye(h.shape[0])
        v = g + momentum * v
        c = c - b @ (g + momentum * v if nesterov else v)
    return c / N


def adapted(learner, params, path=False):
    batch = jax.tree.map(lambda a: a.astype(jax.tree.leaves(params)[0].dtype), BATCH)
    return jax.jit(learner.path if path else learner.adapt)(params, batch, KEY).posterior


def holds(learner, params, matrices, tolerance=1e-8, **momentum):
    posterior = adapted(learner, params)
    h, _ = curvature(posterior.mean, params)
    exact = recursion(h, matrices, **momentum)
    np.testing.assert_allclose(dense(posterior), (exact + exact.T) / 2, atol=tolerance * jnp.abs(exact).max())
    assert posterior.clipped == 0
    return posterior, exact


STEPS = 5
SCHEDULE = optax.cosine_decay_schedule(0.08, 7)
UNIFORM = {
    "sgd": (optax.sgd(0.05), lambda t: 0.05, {}),
    "schedule": (optax.sgd(SCHEDULE), SCHEDULE, {}),
    "momentum": (optax.sgd(0.02, momentum=0.7), lambda t: 0.02, {"momentum": 0.7}),
    "nesterov": (optax.sgd(0.02, momentum=0.5, nesterov=True), lambda t: 0.02, {"momentum": 0.5, "nesterov": True}),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("curvature", ["dual", "lanczos"])
@pytest.mark.parametrize("name", UNIFORM)
@pytest.mark.slow
def test_optimisers_that_treat_all_parameters_alike(name, curvature):
    optimizer, rate, momentum = UNIFORM[name]
    learner = maml(MODEL, Gaussian(SD), steps=STEPS, optimizer=optimizer, posterior=implicit(curvature=curvature))
    holds(learner, init(None, None), [rate(t) * jnp.eye(6) for t in range(STEPS)], **momentum)


@pytest.mark.usefixtures("x64")
def test_weight_decay_is_a_prior_of_its_own():
    # The steps descend the mean loss + 0.3 / 2 |phi|^2: of all steps, C would be (H + 0.3 N)^-1.
    optimizer = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.05))
    learner = maml(MODEL, Gaussian(SD), steps=2000, optimizer=optimizer, posterior=implicit())
    posterior = adapted(learner, init(None, None))
    h, p = curvature(posterior.mean, None)
    np.testing.assert_allclose(dense(posterior), jnp.linalg.inv(N * h + 0.3 * N * jnp.eye(p)), atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_meta_sgd_has_a_rate_a_parameter():
    learner = meta_sgd(MODEL, Gaussian(SD), steps=STEPS, posterior=implicit())
    params = learner.init(KEY, Task(BATCH, BATCH))
    flat, unravel = ravel_pytree(init(None, None))
    rates = jnp.linspace(0.01, 0.08, flat.size)
    holds(learner, params._replace(rule=unravel(rates), theta=init(None, None)), [jnp.diag(rates)] * STEPS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.slow
def test_preconditioned_has_a_matrix_of_rates(rank):
    learner = preconditioned(MODEL, Gaussian(SD), steps=STEPS, rate=0.02, rank=rank, posterior=implicit())
    params = learner.init(KEY, Task(BATCH, BATCH))
    rule = params.rule._replace(
        log_diagonal=jnp.log(jnp.linspace(0.005, 0.03, 6)), factor=0.08 * jax.random.normal(KEY, (6, rank))
    )
    b = jnp.diag(jnp.exp(rule.log_diagonal)) + rule.factor @ rule.factor.T
    posterior, exact = holds(learner, params._replace(rule=rule, theta=init(None, None)), [b] * STEPS)
    draws = jax.vmap(lambda k: ravel_pytree(posterior.sample(k))[0])(jax.random.split(KEY, 20000))
    np.testing.assert_allclose(jnp.cov(draws.T), exact, atol=0.05 * jnp.abs(exact).max())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_preconditioned_starts_near_its_rate(rank):
    learner = preconditioned(MODEL, Gaussian(SD), rate=0.02, rank=rank)
    wide = Model(lambda key, x: jnp.zeros((30, 1)), lambda phi, x: x @ phi)
    rule = preconditioned(wide, Gaussian(SD), rate=0.02, rank=rank).init(KEY, Task(BATCH, BATCH)).rule
    b = jnp.diag(jnp.exp(rule.log_diagonal)) + rule.factor @ rule.factor.T
    np.testing.assert_allclose(jnp.linalg.eigvalsh(b) / 0.02, 1, atol=0.05)
    assert learner.init(KEY, Task(BATCH, BATCH)).rule.factor.any()


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_anil_moves_its_head_alone():
    learner = anil(MODEL, Gaussian(SD), steps=STEPS, rate=0.05, posterior=implicit())
    posterior = adapted(learner, init(None, None))
    h, p = curvature(posterior.mean, None, lambda phi: init(None, None) | {"head": phi["head"]})
    assert p == 2
    np.testing.assert_allclose(dense(posterior), recursion(h, [0.05 * jnp.eye(2)] * STEPS), rtol=1e-9)


LSLR = {"body": {"w": [0.1, 0.08, 0.05, 0.005], "b": [0.01, 0.08, 0.02, 0.0]}, "head": {"w": [0.02, 0.03, 0.06, 0.1]}}


def by_tensor():
    rates = jax.tree.map(jnp.array, LSLR, is_leaf=lambda leaf: isinstance(leaf, list))
    theta = init(None, None)
    flat = [ravel_pytree(jax.tree.map(lambda p, a, t=t: jnp.full(p.shape, a[t]), theta, rates))[0] for t in range(4)]
    return rates, theta, [jnp.diag(a) for a in flat]


@pytest.mark.usefixtures("x64")
def test_lslr_has_rates_by_tensor_and_step():
    rates, theta, matrices = by_tensor()
    learner = lslr(MODEL, Gaussian(SD), steps=4, posterior=implicit())
    params = learner.init(KEY, Task(BATCH, BATCH))._replace(theta=theta, rule=rates)
    posterior, exact = holds(learner, params, matrices)
    asymmetry = jnp.linalg.norm(exact - exact.T) / jnp.linalg.norm(exact + exact.T)
    np.testing.assert_allclose(posterior.asymmetry, asymmetry, rtol=1e-8)
    assert 1e-4 < asymmetry < 0.1
    draws = jax.vmap(lambda k: ravel_pytree(posterior.sample(k))[0])(jax.random.split(KEY, 20000))
    np.testing.assert_allclose(jnp.cov(draws.T), (exact + exact.T) / 2, atol=0.05 * jnp.abs(exact).max())


@pytest.mark.usefixtures("x64")
def test_an_optimiser_of_labelled_tensors_is_recognised():
    labels = {"body": "slow", "head": "fast"}
    optimizer = optax.multi_transform({"slow": optax.sgd(0.01), "fast": optax.sgd(SCHEDULE)}, labels)
    learner = maml(MODEL, Gaussian(SD), steps=4, optimizer=optimizer, posterior=implicit())
    fast = jnp.array([0.0, 0, 0, 0, 1, 1])
    holds(learner, init(None, None), [jnp.diag(0.01 * (1 - fast) + fast * SCHEDULE(t)) for t in range(4)])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["momentum", "lslr", "preconditioned"])
@pytest.mark.slow
def test_the_path_has_the_posterior_of_each_step(name):
    rates, theta, matrices = by_tensor()
    task, momentum = Task(BATCH, BATCH), {}
    if name == "momentum":
        learner, params = maml(MODEL, Gaussian(SD), steps=4, optimizer=UNIFORM[name][0], posterior=implicit()), theta
        matrices, momentum = [0.02 * jnp.eye(6)] * 4, UNIFORM[name][2]
    elif name == "lslr":
        learner = lslr(MODEL, Gaussian(SD), steps=4, posterior=implicit())
        params = learner.init(KEY, task)._replace(theta=theta, rule=rates)
    else:
        learner = preconditioned(MODEL, Gaussian(SD), steps=4, rate=0.02, rank=2, posterior=implicit())
        params = learner.init(KEY, task)
        factor = params.rule.factor
        matrices = [0.02 * jnp.eye(6) + factor @ factor.T] * 4
    course = adapted(learner, params, path=True)
    for k in range(5):
        at = jax.tree.map(lambda leaf, k=k: leaf[k], course)
        exact = recursion(curvature(theta, None)[0], matrices[:k], **momentum)
        np.testing.assert_allclose(dense(at), (exact + exact.T) / 2, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [lslr, preconditioned, maml])
def test_temperature_and_noise_may_be_traced(make):
    def variance(knobs):
        options = {"rank": 2} if make is preconditioned else {}
        learner = make(MODEL, Gaussian(SD), steps=3, posterior=implicit(knobs[0], knobs[1]), **options)
        params = learner.init(KEY, Task(BATCH, BATCH))
        return learner.predict(params, learner.adapt(params, BATCH, KEY), 3 * BATCH.x, KEY).variance().sum()

    value, slope = jax.jit(jax.value_and_grad(variance))(jnp.array([1.3, 0.2]))
    own = value - N * 0.04
    np.testing.assert_allclose(slope, [own / 1.3, 2 * N * 0.2], rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rates", ["large", "diverging"])
def test_where_steps_overshoot_the_likelihood_alone_counts(rates):
    a = {"large": 0.4, "diverging": 2.0}[rates]
    theta = init(None, None)
    learner = lslr(MODEL, Gaussian(SD), steps=3, rate=a, posterior=implicit())
    plain = maml(MODEL, Gaussian(SD), steps=3, rate=a, posterior=implicit())
    params = learner.init(KEY, Task(BATCH, BATCH))._replace(theta=theta)
    one, other = adapted(learner, params), adapted(plain, theta)
    np.testing.assert_allclose(dense(one), dense(other), atol=1e-8)
    assert one.clipped == other.clipped > 0
    assert one.asymmetry < 1e-12


@pytest.mark.slow
def test_optimisers_are_told_apart():
    phi = init(None, None)
    linear = [optax.sgd(0.1), optax.sgd(SCHEDULE, momentum=0.9, nesterov=True)]
    linear += [optax.chain(optax.ema(0.9), optax.sgd(0.1)), optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1))]
    assert [alike(o, phi, 5) for o in linear] == ["all"] * len(linear)
    clip = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    others = [optax.adam(0.1), optax.rmsprop(0.1), clip, optax.lamb(0.1), optax.sign_sgd(0.1), optax.lion(0.1)]
    others += [optax.lbfgs(0.1), optax.polyak_sgd(), optax.noisy_sgd(0.1, key=KEY)]
    assert [alike(o, phi, 5) for o in others] == [None] * len(others)
    centred = optax.chain(optax.centralize(), optax.sgd(0.1))
    assert alike(centred, {"w": jnp.zeros((2, 3))}, 5) is None
    masked = optax.chain(optax.add_decayed_weights(0.1, {"body": True, "head": False}), optax.sgd(0.1))
    assert alike(masked, phi, 5) == "tensor"
    assert jax.jit(lambda rate: jnp.asarray(alike(optax.sgd(rate), phi, 5) is None))(0.1)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_parameters_without_a_gradient_do_not_move_under_adam():
    batch = BATCH._replace(x=BATCH.x.at[:, 3].set(0.0), y=jnp.ones((N, 1)))
    for optimizer in ("adam", "rmsprop"):
        learner = maml(MODEL, Gaussian(SD), steps=3, rate=0.01, optimizer=optimizer, posterior=implicit())
        posterior = learner.adapt(init(None, None), batch, KEY).posterior
        c = dense(posterior)
        assert c[4, 4] == 0
        assert 0 < c[5, 5] < 1
    posterior = adapted(reptile(MODEL, Gaussian(SD), posterior=implicit()), init(None, None))
    assert jnp.isfinite(dense(posterior)).all()
    own = adapted(imaml(MODEL, Gaussian(SD), strength=2.0, posterior=implicit()), init(None, None))
    h, p = curvature(own.mean, None)
    np.testing.assert_allclose(dense(own), jnp.linalg.inv(N * (h + 2 * jnp.eye(p))), rtol=1e-8)
