"""The Bayesian family against what is known exactly: closed forms, limits, and one another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Model, Task
from metaprior.inference.descent import descend, mean_nll
from metaprior.inference.gaussian import DiagonalGaussian, around, cross_entropy, entropy, kl
from metaprior.inference.particles import stein, stein_direction
from metaprior.inference.variational import Variational, expected_nll, infer, natural_descent
from metaprior.learners import gem_bml, make_learner, maml
from metaprior.learners.amortized_bml import hyper_nll
from metaprior.learners.gem_bml import gem_gradient, natural
from metaprior.networks import conv4, mlp
from metaprior.referees.conjugate import exact_log_marginal, exact_posterior
from metaprior.tasks import sinusoid
from metaprior.tasks.synthetic.linear_gaussian import Hierarchy

LINE = Model(lambda key, x: {"head": jnp.ones((x.shape[1], 1))}, lambda phi, x: x @ phi["head"])
BAYESIAN = ["amortized_bml", "gem_bml", "gem_bml_plus", "kl_chaser", "bmaml", "platipus", "llama"]


def gaussian(mean, sd):
    return DiagonalGaussian(jnp.asarray(mean, float), jnp.log(jnp.asarray(sd, float)))


def orthogonal_task(features=3):
    """Inputs that are axes, so that the exact posterior is a diagonal Gaussian."""

    def batch(key):
        x = jnp.tile(jnp.eye(features), (2, 1))
        return Batch(x, jax.random.normal(key, (2 * features, 1)) + 1)

    return Task(batch(jax.random.key(1)), batch(jax.random.key(2)))


def exact(prior, batch, noise):
    """The exact posterior as a diagonal Gaussian."""
    mean, sd = prior.mean["head"][:, 0], jnp.exp(prior.log_sd["head"][:, 0])
    normal = exact_posterior(Hierarchy(mean, jnp.diag(sd**2), jnp.asarray(noise)), batch)
    log_sd = 0.5 * jnp.log(jnp.diagonal(normal.covariance))
    return DiagonalGaussian({"head": normal.mean[:, None]}, {"head": log_sd[:, None]})


def close(a, b, tolerance):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("stiff", [0.1, 10.0, 1e5])
def test_natural_steps_reach_the_posterior_however_far_it_is_where_adam_does_not(stiff):
    prior = gaussian([0.5, -1.0], [1.0, 0.3])

    def energy(q):
        # The expectation of stiff (phi - 2)^2 / 2 under q, in closed form.
        return 0.5 * stiff * ((q.mean - 2) ** 2 + jnp.exp(2 * q.log_sd)).sum() + kl(q, prior)

    precision = stiff + jnp.exp(-2 * prior.log_sd)
    truth = gaussian((2 * stiff + prior.mean * jnp.exp(-2 * prior.log_sd)) / precision, precision**-0.5)
    close(descend(energy, prior, natural_descent(1.0), 12).phi, truth, 1e-5)
    assert kl(descend(energy, prior, optax.adam(0.01), 12).phi, truth) > 1e-4


@pytest.mark.usefixtures("x64")
def test_gaussians_against_values_computed_by_hand():
    q, p = gaussian([0.5], [0.2]), gaussian([0.0], [1.0])
    np.testing.assert_allclose(kl(q, p), 1.25443791, atol=1e-8)
    np.testing.assert_allclose(kl(p, q), 13.51556209, atol=1e-8)
    np.testing.assert_allclose(cross_entropy(q, p) - entropy(q), kl(q, p), atol=1e-12)
    np.testing.assert_allclose(q.quadratic(jnp.asarray([3.0])), 9 * 0.04, atol=1e-12)
    draws = jax.vmap(q.sample)(jax.random.split(jax.random.key(0), 20_000))
    np.testing.assert_allclose([draws.mean(), draws.std()], [0.5, 0.2], atol=0.005)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("sd", "expected"), [(1.0, (0.5, -0.71)), (0.5, (2.0, 0.16))])
def test_gem_gradient_by_hand(sd, expected):
    gradient = gem_gradient(gaussian([0.0], [sd]), gaussian([0.5], [0.2]))
    close(gradient, [jnp.asarray([v]) for v in expected], 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_gem_gradient_is_the_gradient_of_the_exact_marginal():
    """Theorem 1 of Zou & Lu, and GEM-BML+ as the difference of two such gradients."""
    task, noise = orthogonal_task(), 0.7
    prior = gaussian([[0.3], [-0.2], [1.0]], [[0.5], [1.0], [2.0]])
    prior = DiagonalGaussian({"head": prior.mean}, {"head": prior.log_sd})
    both = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), *task)

    def log_marginal(p, batch):
        covariance = jnp.diag(jnp.exp(2 * p.log_sd["head"][:, 0]))
        return exact_log_marginal(Hierarchy(p.mean["head"][:, 0], covariance, jnp.asarray(noise)), batch)

    q_s, q_sq = exact(prior, task.support, noise), exact(prior, both, noise)
    slope = jax.jit(jax.grad(log_marginal))
    whole, part = slope(prior, both), slope(prior, task.support)
    close(gem_gradient(prior, q_sq), whole, 1e-9)
    predictive = jax.tree.map(jnp.subtract, whole, part)
    close(gem_gradient(prior, q_sq, q_s), predictive, 1e-9)
    # The KL-chaser gets the same gradient through the inference; KL the other way round would get another.
    chaser = jax.jit(jax.grad(lambda p: kl(q_sq, exact(p, task.support, noise))))(prior)
    close(chaser, jax.tree.map(jnp.negative, predictive), 1e-9)


@pytest.mark.usefixtures("x64")
def test_variational_inference_finds_the_exact_posterior():
    task, noise = orthogonal_task(), 0.7
    how = {"steps": 1000, "rate": 0.01, "samples": 100}
    prior = DiagonalGaussian({"head": jnp.asarray([[0.3], [-0.2], [1.0]])}, {"head": jnp.zeros((3, 1))})
    found = infer(LINE, Gaussian(noise), prior, task.support, jax.random.key(0), Variational(**how))
    truth = exact(prior, task.support, noise)
    np.testing.assert_allclose(found.mean["head"], truth.mean["head"], atol=0.02)
    np.testing.assert_allclose(found.log_sd["head"], truth.log_sd["head"], atol=0.05)


@pytest.mark.usefixtures("x64")
def test_natural_steps_are_held_to_a_trust_region_and_differentiable_where_nothing_moves():
    prior = gaussian([0.5, -1.0], [1.0, 0.3])

    def energy(q, to):
        # A mean that is pulled far and a variance that is not: without the region the first step would be 1e4 sds long.
        return -1e4 * (to * q.mean).sum() + kl(q, prior)

    def end(to, steps):
        return descend(lambda q: energy(q, to), prior, natural_descent(0.5), steps, first_order=False).phi.mean

    step = (end(jnp.ones(2), 1) - prior.mean) / jnp.exp(prior.log_sd)
    np.testing.assert_allclose(jnp.linalg.norm(step), 1 + 0.1 * 2**0.5, rtol=1e-9)
    free = descend(lambda q: energy(q, jnp.ones(2)), prior, natural_descent(0.5, guarded=False), 1).phi.mean
    np.testing.assert_allclose(free - prior.mean, 0.5e4 * jnp.exp(2 * prior.log_sd), rtol=1e-9)
    slope = jax.jacobian(lambda to: end(to, 1))(jnp.zeros(2))
    np.testing.assert_allclose(slope, jnp.diag(0.5e4 * jnp.exp(2 * prior.log_sd)), rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_mirrored_draws_leave_no_noise_in_the_mean_of_a_linear_model():
    task = orthogonal_task()
    q = DiagonalGaussian({"head": jnp.asarray([[0.3], [-0.2], [1.0]])}, {"head": jnp.zeros((3, 1))})

    def slope(samples, key):
        how = Variational(samples=samples)
        return jax.grad(lambda q: expected_nll(LINE, Gaussian(0.7), q, task.support, key, how))(q).mean["head"]

    exact = jax.grad(lambda phi: mean_nll(Gaussian(0.7), LINE.apply(phi, task.support.x), task.support))(q.mean)["head"]
    np.testing.assert_allclose(slope(2, jax.random.key(0)), exact, rtol=1e-12)
    assert abs(slope(1, jax.random.key(0)) - exact).max() > 0.01


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shown", [1, 4])
@pytest.mark.parametrize("kl_weight", [0.1, 1.0])
def test_natural_steps_find_the_tempered_posterior_of_however_few_examples(shown, kl_weight):
    """A KL of weight w is Bayes' rule with noise sd sqrt(w) times as small."""
    task, noise = orthogonal_task(), 0.7
    how = Variational(steps=60, rate=0.2, optimizer="natural", samples=200, kl_weight=kl_weight)
    prior = DiagonalGaussian({"head": jnp.asarray([[0.3], [-0.2], [1.0]])}, {"head": jnp.zeros((3, 1))})
    seen = task.support._replace(weight=(jnp.arange(task.support.x.shape[0]) < shown).astype(float))
    found = infer(LINE, Gaussian(noise), prior, seen, jax.random.key(0), how)
    truth = exact(prior, jax.tree.map(lambda leaf: leaf[:shown], task.support), noise * kl_weight**0.5)
    np.testing.assert_allclose(found.mean["head"], truth.mean["head"], atol=1e-3)
    np.testing.assert_allclose(found.log_sd["head"], truth.log_sd["head"], atol=0.1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.slow
def test_the_gradient_of_gem_is_minus_its_closed_form(plus, precondition):
    task = jax.tree.map(lambda leaf: leaf[0], sinusoid(shot=6, query=6).train.sample(jax.random.key(0), 1))
    options = {"steps": 4, "rate": 0.05}
    learner = gem_bml(mlp(1, (5,), "tanh"), Gaussian(), predictive=plus, precondition=precondition, **options)
    theta, key = learner.init(jax.random.key(1), task), jax.random.key(2)
    gradient = jax.jit(jax.grad(lambda p: learner.loss(p, task, key)[0]))(theta)
    model, key_s, key_q = mlp(1, (5,), "tanh"), *jax.random.split(key)
    how = Variational(**options)
    fit = jax.jit(lambda prior, batch, key: infer(model, Gaussian(), prior, batch, key, how, first_order=True))
    q_s = fit(theta, task.support, key_s)
    q_sq = fit(q_s, task.query, key_q)
    closed = gem_gradient(theta, q_sq, q_s if plus else None)
    closed = natural(closed, theta) if precondition else closed
    close(gradient, jax.tree.map(jnp.negative, closed), 1e-9)


@pytest.mark.usefixtures("x64")
def test_reptile_is_the_limit_of_gem_for_a_narrow_posterior():
    """With sd -> 0 and no KL the inference is the descent of the mean, and sigma^2 times the gradient theta - phi."""
    task = jax.tree.map(lambda leaf: leaf[0], sinusoid(shot=6, query=6).train.sample(jax.random.key(0), 1))
    task = Task(task.support, task.support)
    model = mlp(1, (5,), "tanh")
    gem = gem_bml(model, Gaussian(), steps=3, rate=0.02, optimizer="sgd", kl_weight=0.0, log_sd=-18.0)
    reptile = make_learner(
        "reptile", model, Gaussian(), steps=6, rate=0.02, optimizer="sgd", minibatch=None, test_steps=6
    )
    theta = gem.init(jax.random.key(1), task)
    moved = jax.jit(jax.grad(lambda p: gem.loss(p, task, jax.random.key(2))[0]))(theta).mean
    expected = jax.jit(jax.grad(lambda p: reptile.loss(p, task, jax.random.key(2))[0]))(theta.mean)
    close(moved, expected, 1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_maml_is_the_limit_of_platipus_and_of_bmaml():
    task = jax.tree.map(lambda leaf: leaf[0], sinusoid(shot=6, query=6).train.sample(jax.random.key(0), 1))
    model, key = mlp(1, (5,), "tanh"), jax.random.key(2)
    plain = maml(model, Gaussian(), steps=3, rate=0.02)
    phi = plain.init(jax.random.key(1), task)
    expected = jax.jit(jax.grad(lambda p: plain.loss(p, task, key)[0]))(phi)
    one = make_learner("bmaml", model, Gaussian(), particles=1, steps=3, rate=0.02, loss="mixture")
    alone = jax.tree.map(lambda leaf: leaf[None], phi)
    gradient = jax.jit(jax.grad(lambda p: one.loss(p, task, key)[0]))(alone)
    close(jax.tree.map(lambda leaf: leaf[0], gradient), expected, 1e-12)
    narrow = make_learner(
        "platipus", model, Gaussian(), steps=3, rate=0.02, kl_weight=0.0, log_sd=-18.0, inference_rate=1e-12
    )
    params = narrow.init(jax.random.key(1), task)
    close(jax.jit(jax.grad(lambda p: narrow.loss(p, task, key)[0]))(params).prior.mean, expected, 1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_platipus_has_no_divergence_where_both_gaussians_are_the_prior():
    task = jax.tree.map(lambda leaf: leaf[0], sinusoid(shot=6, query=6).train.sample(jax.random.key(0), 1))
    learner = make_learner("platipus", mlp(1, (5,)), Gaussian(), inference_rate=1e-300)
    metrics = learner.loss(learner.init(jax.random.key(1), task), task, jax.random.key(0))[1]
    assert abs(metrics["kl"]) < 1e-20


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_stein_direction_by_hand_and_for_one_particle():
    particles = jnp.asarray([[0.0], [1.0]])
    # The median of the one pair's d^2 over log 2 is h = 1.4427; target N(0, 1): grad log p = -phi.
    h = 1 / np.log(2)
    k = np.exp(-1 / h)
    by_hand = [[(k * -1 + -2 / h * 1 * k) / 2], [(-1 + 2 / h * 1 * k) / 2]]
    close(stein_direction(particles, -particles), jnp.asarray(by_hand), 1e-12)
    close(stein_direction(particles[1:], -particles[1:]), -particles[1:], 0)
    # Particles in one place have nowhere to be pushed: they follow the gradient together.
    together = jnp.full((3, 2), 0.7)
    close(stein_direction(together, -together), -together, 1e-12)


@pytest.mark.usefixtures("x64")
def test_what_stein_descends_is_its_direction_up_the_log_density_and_nothing_without_data():
    particles, slopes = jnp.asarray([[0.0], [1.0]]), jnp.asarray([[0.3], [-2.0]])
    data = Batch(jnp.zeros((4, 1)), jnp.zeros((4, 1)))
    transformation = stein(data)
    step = transformation.update(slopes, transformation.init(particles), particles)[0]
    close(step, -stein_direction(particles, -slopes, 1 / 4), 1e-12)
    # Without a slope only the repulsion is left: a step down it parts the particles.
    apart = transformation.update(jnp.zeros((2, 1)), transformation.init(particles), particles)[0]
    assert apart[0, 0] > 0 > apart[1, 0]
    empty = stein(data._replace(weight=jnp.zeros(4)))
    close(empty.update(slopes, empty.init(particles), particles)[0], jnp.zeros((2, 1)), 0)


@pytest.mark.usefixtures("x64")
def test_stein_particles_spread_like_their_target():
    """Fifty particles under N(1, 0.5^2): mean and sd of the target."""
    start = 0.1 * jax.random.normal(jax.random.key(0), (50, 1))

    def step(at, _):
        return at + 0.05 * stein_direction(at, -(at - 1) / 0.25), None

    at = jax.lax.scan(step, start, length=4000)[0]
    np.testing.assert_allclose([at.mean(), at.std()], [1.0, 0.5], atol=0.05)


@pytest.mark.usefixtures("x64")
def test_local_reparametrisation_has_the_same_mean_and_less_noise():
    x = jax.random.normal(jax.random.key(0), (6, 3))
    model, y = mlp(1, (8,), "tanh"), jnp.ones((6, 1))
    plain, local = (nll_draws(model, Gaussian(1.0), -1.0, x, y, local, 4000) for local in (False, True))
    np.testing.assert_allclose(plain.mean(), local.mean(), rtol=0.05)
    assert local.std() < 0.8 * plain.std()


def nll_draws(model, likelihood, log_sd, x, y, local, n):
    q, how = around(model.init(jax.random.key(1), x), log_sd), Variational(samples=1, local=local)
    one = lambda k: expected_nll(model, likelihood, q, Batch(x, y), k, how)  # noqa: E731
    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), n))


@pytest.mark.slow
def test_local_reparametrisation_of_convolutions():
    """Only the head is drawn an example at a time: the mean is the same."""
    x, y = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1)), jnp.arange(2)
    model = conv4(3, filters=4, blocks=1)
    plain, local = (nll_draws(model, Categorical(), -2.0, x, y, local, 3000) for local in (False, True))
    np.testing.assert_allclose(plain.mean(), local.mean(), atol=5 * (plain.std() + local.std()) / 3000**0.5)
    with pytest.raises(ValueError, match="local must be False for a network"):
        nll_draws(LINE, Gaussian(), -1.0, jnp.ones((1, 2)), jnp.ones((1, 1)), True, 1)


def test_the_hyper_prior_is_lowest_at_its_mode():
    """Gamma(2, 0.2) on the precision: d/dlog sd (2 log sd + 0.2 / sd^2) = 0 at sd^2 = 0.2."""
    gradient = jax.grad(lambda p: hyper_nll(p, 2.0, 0.2))(gaussian([0.0], [0.2**0.5]))
    close(gradient, jax.tree.map(jnp.zeros_like, gradient), 1e-5)


@pytest.mark.parametrize("name", BAYESIAN)
@pytest.mark.slow
def test_without_support_the_posterior_is_the_prior(name):
    task = jax.tree.map(lambda leaf: leaf[0], sinusoid(shot=5, query=5).train.sample(jax.random.key(0), 1))
    model, key = mlp(1, (5,), "tanh"), jax.random.key(2)
    options = {"draws": 4000} if name == "platipus" else {}
    learner = make_learner(name, model, Gaussian(), steps=3, **options)
    params, adapt = learner.init(jax.random.key(1), task), jax.jit(learner.adapt)
    nothing = jax.tree.map(lambda leaf: leaf[:0], task.support)
    for support in (nothing, task.support._replace(weight=jnp.zeros(5))):
        posterior = adapt(params, support, key)
        if name == "bmaml":
            close(posterior.phi, params, 1e-6)
        elif name == "platipus":
            close(jax.tree.map(lambda leaf: leaf.mean(0), posterior.phi), params.prior.mean, 0.01)
            close(jax.tree.map(lambda leaf: jnp.log(leaf.std(0)), posterior.phi), params.prior.log_sd, 0.1)
        elif name == "llama":
            # N(theta, I) of the linearised network: its variance is the squared norm of the outputs' gradient.
            spread = learner.predict(params, posterior, task.query.x, key).variance() - 0.5
            rows = jax.jacobian(lambda p: model.apply(p, task.query.x)[:, 0])(params.theta)
            norms = sum((leaf**2).reshape(5, -1).sum(1) for leaf in jax.tree.leaves(rows))
            np.testing.assert_allclose(spread[:, 0], norms, rtol=1e-4)
        else:
            close(posterior, params, 1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bmaml", {"particles": 0}, "particles must be"),
        ("bmaml", {"loss": "chase"}, "loss must be .* got 'chase'"),
        ("platipus", {"kl_weight": -1.0}, "kl_weight must be"),
        ("platipus", {"draws": 0}, "draws must be at least 1, got 0"),
        ("gem_bml", {"kl_weight": -0.1}, "kl_weight must be"),
        ("gem_bml", {"log_sd": -200.0}, "log_sd must be .* got -200.0"),
        ("amortized_bml", {"samples": 0}, "samples must be"),
        ("amortized_bml", {"samples": 3}, "samples must be 1 or even.* got 3"),
        ("gem_bml", {"optimizer": "natural", "rate": 2.0}, r"rate must be in \(0, 1\].* got rate 2.0"),
        ("gem_bml", {"optimizer": "natural", "kl_weight": 0.0}, "kl_weight above 0.* and kl_weight 0.0"),
        ("maml_noise", {"noise": 0.0}, "noise must be above 0, got 0.0"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_learner(name, mlp(), Gaussian(), **options)
