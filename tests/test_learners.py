"""Each learner's own identities: what makes it this algorithm and no other."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaprior import networks
from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Call, Model, Task
from metaprior.inference.descent import descend, half_square
from metaprior.inference.posteriors import implicit, laplace
from metaprior.learners import (
    LEARNERS,
    anil,
    cavia,
    fomaml,
    imaml,
    llama,
    lslr,
    make_learner,
    maml,
    meta_sgd,
    nil,
    preconditioned,
    reptile,
)
from metaprior.learners.registry import learners_before, learners_having, traits_of
from metaprior.learners.reptile import minibatches
from metaprior.learners.traits import traits as state
from metaprior.networks import conv4, mlp
from metaprior.referees.conjugate import empirical_bayes_mean, exact_log_marginal, exact_posterior
from metaprior.tasks import linear_gaussian, sinusoid
from metaprior.tasks.synthetic.linear_gaussian import Hierarchy

NET = mlp(1, (8, 8), "tanh")
TASK = jax.tree.map(lambda leaf: leaf[0], sinusoid(shot=6, query=6).train.sample(jax.random.key(0), 1))
KEY = jax.random.key(1)


def linear(features):
    return Model(lambda key, x: jnp.zeros((features, 1)), lambda w, x: x @ w)


def gradient(learner, params, task=TASK):
    return jax.grad(lambda p: learner.loss(p, task, KEY)[0])(params)


def gap(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    norm = sum((v**2).sum() for v in jax.tree.leaves(b)) ** 0.5
    return sum(((u - v) ** 2).sum() for u, v in leaves) ** 0.5 / norm


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_first_order_is_the_query_gradient_at_phi_and_differs_from_second_order():
    second, first = maml(NET, Gaussian(), rate=0.05), fomaml(NET, Gaussian(), rate=0.05)
    params = second.init(KEY, TASK)
    phi = second.adapt(params, TASK.support, KEY).posterior.mean
    at_phi = jax.grad(lambda p: Gaussian().nll(NET.apply(p, TASK.query.x), TASK.query.y).mean())(phi)
    assert gap(gradient(first, params), at_phi) < 1e-12
    assert gap(gradient(first, params), gradient(second, params)) > 0.01
    still = [gradient(learner(NET, Gaussian(), rate=0.0), params) for learner in (fomaml, maml)]
    assert gap(*still) == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.slow
def test_learned_rates_at_their_start_are_maml(steps):
    plain = maml(NET, Gaussian(), rate=0.05, steps=steps)
    theta = plain.init(KEY, TASK)
    for factory in (meta_sgd, lslr, preconditioned):
        learner = factory(NET, Gaussian(), rate=0.05, steps=steps)
        params = learner.init(KEY, TASK)._replace(theta=theta)
        np.testing.assert_allclose(learner.loss(params, TASK, KEY)[0], plain.loss(theta, TASK, KEY)[0], rtol=1e-12)
        assert gap(gradient(learner, params).theta, gradient(plain, theta)) < 1e-10
        assert any(jnp.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(gradient(learner, params).rule))


@pytest.mark.usefixtures("x64")
def test_low_rank_preconditioner_moves_along_b():
    learner = preconditioned(NET, Gaussian(), rate=0.05, rank=3)
    params = learner.init(KEY, TASK)
    phi = learner.adapt(params, TASK.support, KEY).posterior.mean
    fit = jax.grad(lambda p: Gaussian().nll(NET.apply(p, TASK.support.x), TASK.support.y).mean())
    flat = jax.flatten_util.ravel_pytree
    g, factor = flat(fit(params.theta))[0], params.rule.factor
    expected = flat(params.theta)[0] - (jnp.diag(jnp.exp(params.rule.log_diagonal)) + factor @ factor.T) @ g
    np.testing.assert_allclose(flat(phi)[0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_anil_moves_the_head_alone():
    learner = anil(NET, Gaussian(), rate=0.1, steps=3)
    params = learner.init(KEY, TASK)
    phi = learner.adapt(params, TASK.support, KEY).posterior.mean
    assert len(jax.tree.leaves(phi)) == 2
    assert not np.allclose(phi["head"]["w"], params["head"]["w"])
    body = gradient(learner, params)["layer1"]["w"]
    assert jnp.abs(body).sum() > 0  # the outer gradient reaches the body
    with pytest.raises(ValueError, match=r"head must be a layer of the model.*layer1.*got 'tail'"):
        anil(NET, Gaussian(), head="tail").init(KEY, TASK)


@pytest.mark.slow
def test_nil_classifies_by_similarity_without_adapting():
    x = jnp.array([[2.0, 0.1], [0.1, 2.0], [2.1, 0.0], [0.0, 1.9]])
    support = Batch(x, jnp.array([1, 0, 1, 0]))
    identity = Model(lambda key, x: {"head": jnp.zeros((2, 2))}, lambda p, x: x @ p["head"], lambda p, x: x)
    for softmax in (False, True):
        learner = nil(identity, Categorical(), softmax=softmax)
        params = learner.init(KEY, Task(support, support))
        memory = learner.adapt(params, support, KEY)
        probabilities = learner.predict(params, memory, jnp.array([[5.0, 1.0], [1.0, 5.0]]), KEY).mean()
        assert (probabilities.argmax(-1) == jnp.array([1, 0])).all()
        np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_reptiles_gradient_is_theta_minus_phi():
    learner = reptile(NET, Gaussian(), optimizer="sgd", rate=0.05, steps=4, minibatch=5)
    params = learner.init(KEY, TASK)
    data = jax.tree.map(lambda s, q: jnp.concatenate([s, q]), TASK.support, TASK.query)

    def fit(phi, places):
        return Gaussian().nll(NET.apply(phi, data.x[places]), data.y[places]).mean()

    phi = descend(fit, params, optax.sgd(0.05), 4, data=minibatches(KEY, 12, 5, 4)).phi
    assert gap(gradient(learner, params), jax.tree.map(jnp.subtract, params, phi)) < 1e-12
    np.testing.assert_allclose(learner.loss(params, TASK, KEY)[0], half_square(params, phi))


def test_minibatches_see_every_example_once_in_a_pass():
    order = minibatches(KEY, 12, 4, 6)
    for part in (order[:3], order[3:]):
        assert sorted(part.reshape(-1).tolist()) == list(range(12))


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_imaml_approaches_the_derivative_of_the_inner_solution():
    def learner(cg_steps):
        return imaml(NET, Gaussian(), strength=1.0, steps=3000, rate=0.02, cg_steps=cg_steps)

    params = learner(1).init(KEY, TASK)
    solver = imaml(NET, Gaussian(), strength=1.0, steps=3000, rate=0.02)
    direction = jax.tree.map(jnp.ones_like, params)

    def at(size):
        moved = jax.tree.map(lambda p, d: p + size * d, params, direction)
        return solver.loss(moved, TASK, KEY)[0]

    finite = (at(1e-5) - at(-1e-5)) / 2e-5
    errors = [
        abs(sum(leaf.sum() for leaf in jax.tree.leaves(gradient(learner(k), params))) - finite) / abs(finite)
        for k in (1, 5, 40)
    ]
    assert errors[2] < 1e-4
    assert errors[2] < errors[0]


# The conjugate hierarchy: everything below is exact.


def conjugate(tasks=40, shot=4, query=3):
    splits = linear_gaussian(features=2, shot=shot, query=query, mean=jnp.array([1.0, -0.5]), noise=0.5)
    return splits.train.theta, splits.train.sample(jax.random.key(3), tasks)


def joined(tasks):
    return jax.tree.map(lambda s, q: jnp.concatenate([s, q], 1), tasks.support, tasks.query)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_llamas_evidence_is_the_exact_log_marginal_likelihood():
    theta, tasks = conjugate()
    theta = Hierarchy(*(jnp.asarray(leaf, float) for leaf in theta))
    tasks = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tasks)
    learner = llama(
        linear(2), Gaussian(0.5), objective="evidence", precision=1.0, steps=2000, rate=0.03, learn_precision=True
    )
    params = learner.init(KEY, jax.tree.map(lambda leaf: leaf[0], tasks))
    params = params._replace(theta=jnp.array([[0.3], [0.7]]))
    data = joined(tasks)

    def exact(theta, log_precision, batch):
        prior = Hierarchy(theta[:, 0], jnp.eye(2) / jnp.exp(log_precision), jnp.asarray(0.5))
        return -exact_log_marginal(prior, batch) / batch.y.shape[0]

    ours = jax.vmap(lambda t: learner.loss(params, t, KEY)[0])(tasks)
    theirs = jax.vmap(exact, in_axes=(None, None, 0))(params.theta, params.log_precision, data)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    # So are its gradients in the prior's mean and in its precision.
    ours = jax.grad(lambda p: jax.vmap(lambda t: learner.loss(p, t, KEY)[0])(tasks).mean())(params)
    theirs = jax.grad(lambda p: jax.vmap(exact, in_axes=(None, None, 0))(*p, data).mean())(params)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7)


@pytest.mark.usefixtures("x64")
def test_llamas_optimum_recovers_the_prior_mean():
    theta, tasks = conjugate(tasks=400)
    tasks = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tasks)
    learner = llama(linear(2), Gaussian(0.5), objective="evidence", precision=1.0, steps=200, rate=0.05)
    params = learner.init(KEY, jax.tree.map(lambda leaf: leaf[0], tasks))
    optimizer = optax.adam(0.05)

    def step(carry, _):
        params, state = carry
        g = jax.grad(lambda p: jax.vmap(lambda t: learner.loss(p, t, KEY)[0])(tasks).mean())(params)
        update, state = optimizer.update(g, state)
        return (optax.apply_updates(params, update), state), None

    params = jax.lax.scan(step, (params, optimizer.init(params)), length=300)[0][0]
    true = Hierarchy(*(jnp.asarray(leaf, float) for leaf in theta))
    best = empirical_bayes_mean(true, joined(tasks))
    np.testing.assert_allclose(params.theta[:, 0], best, atol=1e-4)
    # 400 tasks with prior sd 1 tell the mean to about 1/sqrt(400), noise of the observations aside.
    np.testing.assert_allclose(params.theta[:, 0], true.mean, atol=0.2)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_llamas_posterior_is_the_exact_one_in_the_conjugate_case():
    theta, tasks = conjugate(tasks=1)
    task = jax.tree.map(lambda leaf: jnp.asarray(leaf[0], float), tasks)
    learner = llama(
        linear(2), Gaussian(0.5), objective="evidence", precision=1.0, steps=3000, rate=0.03, posterior=laplace(None)
    )
    params = learner.init(KEY, task)._replace(theta=jnp.asarray(theta.mean, float)[:, None])
    posterior = learner.adapt(params, task.support, KEY)
    exact = exact_posterior(Hierarchy(*(jnp.asarray(leaf, float) for leaf in theta)), task.support)
    np.testing.assert_allclose(posterior.posterior.mean[:, 0], exact.mean, rtol=1e-8)
    predictive = learner.predict(params, posterior, task.query.x, KEY)
    spread = jnp.einsum("nd,de,ne->n", task.query.x, exact.covariance, task.query.x) + 0.25
    np.testing.assert_allclose(predictive.variance()[:, 0], spread, rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("curvature", ["dual", "kfac", "diagonal", "lanczos"])
@pytest.mark.parametrize("curvature_on", ["support", "query"])
@pytest.mark.slow
def test_llama_differentiates_through_each_curvature(curvature, curvature_on):
    learner = llama(NET, Gaussian(0.5), eta=0.1, steps=2, curvature=curvature, curvature_on=curvature_on)
    plain = llama(NET, Gaussian(0.5), eta=0.0, steps=2, curvature=curvature, curvature_on=curvature_on)
    params = learner.init(KEY, TASK)
    direction = jax.tree.map(lambda leaf: jax.random.normal(KEY, leaf.shape), params)

    def at(size):
        return learner.loss(jax.tree.map(lambda p, d: p + size * d, params, direction), TASK, KEY)[0]

    g = gradient(learner, params)
    along = sum((a * b).sum() for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(direction), strict=True))
    # log_precision is held fixed, so its share of the direction must not count.
    held = learner.loss(params._replace(log_precision=params.log_precision + 1e-5 * direction.log_precision), TASK, KEY)
    share = (held[0] - learner.loss(params, TASK, KEY)[0]) / 1e-5
    np.testing.assert_allclose(along, (at(1e-5) - at(-1e-5)) / 2e-5 - share, rtol=2e-4)
    assert gap(g, gradient(plain, params)) > 1e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_implicit_posterior_of_few_steps_is_the_one_they_are_the_mode_of():
    # On a linear task, k steps from theta end at the mode under prior N(theta, Q); the posterior's covariance is
    # (H + Q^-1)^-1 with Q = ((1 - a H)^-k - 1) H^-1 (Santos 1996; Grant et al. 2018, sec. 3.2).
    _, tasks = conjugate(tasks=1)
    task = jax.tree.map(lambda leaf: jnp.asarray(leaf[0], float), tasks)
    n, rate, k = task.support.y.shape[0], 0.02, 5
    learner = maml(linear(2), Gaussian(0.5), steps=k, rate=rate, posterior=implicit())
    start = jnp.array([[0.4], [-0.2]])
    posterior = learner.adapt(start, task.support, KEY).posterior
    h = task.support.x.T @ task.support.x / 0.25
    a = rate / n
    q = (jnp.linalg.matrix_power(jnp.linalg.inv(jnp.eye(2) - a * h), k) - jnp.eye(2)) @ jnp.linalg.inv(h)
    exact = exact_posterior(Hierarchy(start[:, 0], q, jnp.asarray(0.5)), task.support)
    np.testing.assert_allclose(posterior.mean[:, 0], exact.mean, rtol=1e-10)
    columns = [posterior.push(e[:, None])[:, 0] for e in jnp.eye(2)]
    root = jnp.stack(columns, 1)
    np.testing.assert_allclose(root @ root.T, exact.covariance, rtol=1e-10)
    assert posterior.clipped == 0


@pytest.mark.parametrize("name", ["fomaml", "reptile", "imaml"])
def test_memory_is_flat_in_the_inner_steps_on_images(name):
    labels = jnp.arange(5)
    task = Task(*(Batch(jax.random.uniform(key, (5, 40, 40, 3)), labels) for key in jax.random.split(KEY)))

    def temporary(steps):
        settings = {"minibatch": None} if name == "reptile" else {}
        learner = make_learner(name, conv4(filters=16, blocks=2), Categorical(), steps=steps, rate=1e-3, **settings)
        params = jax.eval_shape(learner.init, KEY, task)
        gradient = jax.jit(jax.grad(lambda p: learner.loss(p, task, KEY)[0]))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) == pytest.approx(temporary(4), rel=0.01)
    assert temporary(16) < 1.1 * temporary(1)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_cavia_moves_a_context_from_zero_and_nothing_else():
    """By hand, for a linear map of inputs and context: one step on phi, from which the meta-gradient goes to theta."""
    x, y = jnp.array([[1.0], [2.0]]), jnp.array([[0.5], [3.0]])
    learner = cavia(networks.linear(init_scale=1.0), Gaussian(1.0), context=2, steps=1, rate=0.25)
    task = Task(Batch(x, y), Batch(x[:1] + 1, y[:1]))
    params = learner.init(jax.random.key(0), task)
    w = params.theta["head"]["w"]
    assert w.shape == (3, 1)

    def phi(w):
        return -0.25 * ((x * w[0, 0] - y).mean() * w[1:, 0])

    def loss(w):
        f = task.query.x[0, 0] * w[0, 0] + phi(w) @ w[1:, 0]
        return 0.5 * (f - task.query.y[0, 0]) ** 2 + 0.5 * jnp.log(2 * jnp.pi)

    np.testing.assert_allclose(learner.adapt(params, task.support, jax.random.key(1)).posterior.mean, phi(w))
    value, gradient = jax.value_and_grad(lambda p: learner.loss(p, task, jax.random.key(1))[0])(params)
    np.testing.assert_allclose(value, loss(w))
    np.testing.assert_allclose(gradient.theta["head"]["w"], jax.grad(loss)(w))


@pytest.mark.parametrize("norm", ["batch", "task", "running"])
@pytest.mark.slow
def test_cavia_modulates_one_layer_after_its_norm(norm):
    """At phi = 0 the network is as it is; elsewhere its channels are scaled and shifted, which no norm undoes."""
    model, layer = conv4(3, filters=4, blocks=2, norm=norm), "block2"
    learner = make_learner("cavia", model, Categorical(), context=3, layer=layer, steps=0)
    x = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    batch = Batch(x, jnp.arange(6) % 3)
    params = learner.init(jax.random.key(1), Task(batch, batch))
    assert params.film.shape == (3, 8)
    by = jnp.ones(6)
    plain = jax.nn.softmax(model.apply(params.theta, x, Call(by=by)))
    start = learner.predict(params, learner.adapt(params, batch, KEY), x, KEY).mean()
    np.testing.assert_allclose(start, plain, rtol=1e-4)
    moved = make_learner("cavia", model, Categorical(), context=3, layer=layer, steps=3)
    after = moved.adapt(params, batch, KEY)
    assert abs(moved.predict(params, after, x, KEY).mean() - plain).max() > 1e-2
    gain, shift = jnp.split((after.posterior.posterior if norm == "task" else after.posterior).mean @ params.film, 2)
    call = Call(by=by, modulate=lambda name, s: s * (1 + gain) + shift if name == layer else s)
    expected = jax.nn.softmax(model.apply(params.theta, x, call))
    np.testing.assert_allclose(moved.predict(params, after, x, KEY).mean(), expected, rtol=1e-4)


def test_cavia_names_a_layer_that_is_not_there():
    batch = Batch(jnp.zeros((2, 8, 8, 1)), jnp.arange(2))
    learner = cavia(conv4(3, filters=4, blocks=2), Categorical(), layer="block3")
    with pytest.raises(ValueError, match=r"layer must be one of block1, block2, got 'block3'\."):
        learner.init(KEY, Task(batch, batch))
    with pytest.raises(ValueError, match=r"layer must be given for a network that does not take .* must be images"):
        cavia(conv4(3, filters=4, blocks=2), Categorical()).init(KEY, Task(batch, batch))


def test_what_a_learner_is_stands_in_its_own_file_and_nowhere_else():
    """No list of learners' names in the package, and no name that something is compared with."""
    root = Path(networks.__file__).parents[1]
    names, found = set(LEARNERS), []
    for path in root.rglob("*.py"):
        if path.parent.name == "learners":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            parts: list = []
            if path.name == "omniglot.py":  # "maml" is a split of its classes there, too
                continue
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                parts = node.elts
            elif isinstance(node, ast.Dict):
                parts = node.keys
            elif isinstance(node, ast.Compare):
                parts = [*node.comparators, node.left] * 2
            said = [part.value for part in parts if isinstance(part, ast.Constant) and part.value in names]
            if len(said) > 1:
                found.append(f"{path.relative_to(root)}:{node.lineno}: {', '.join(said)}")
    assert not found, found


def test_traits_are_asked_by_name():
    assert traits_of("protonet").of_classes
    assert not traits_of("maml").of_classes
    assert learners_having("reads_attributes") == ["zero_shot"]
    assert set(learners_before("nuts")) <= set(LEARNERS)
    with pytest.raises(ValueError, match="did you mean 'maml'"):
        traits_of("mamll")
    with pytest.raises(TypeError):
        state(of_clases=True)
