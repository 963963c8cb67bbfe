"""Learned optimisers: what they see, what they differentiate, and that they are optimisers for anything."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Batch, Task
from metaprior.evaluation.plots import gate_values
from metaprior.inference.descent import Descent, descend, inner_rates, optimizer_step
from metaprior.inference.learned_optimizers import log_sign, optimise, unrolled
from metaprior.learners import l2l, learned_optimizer, meta_lstm
from metaprior.learners.l2l import init_rule
from metaprior.learners.meta_lstm import cell_optimizer, gates, init_cell
from metaprior.networks import linear, mlp
from metaprior.networks.lstm import lstm, lstm_init, lstm_start
from metaprior.tasks import digits, quadratics
from metaprior.training.loop import Training, init_state, run_chunk

KEY = jax.random.key(0)
EXACT = Gaussian((1 / 20) ** 0.5)  # its mean nll over ten rows is |W theta - y|^2 and a constant
CONSTANT = 0.5 * np.log(2 * np.pi / 20)


def a_quadratic(n=None):
    tasks = quadratics().train.sample(jax.random.key(1), n or 1)
    return tasks if n else jax.tree.map(lambda leaf: leaf[0], tasks)


def value(task, theta):
    return ((task.support.x @ theta - task.support.y) ** 2).sum()


# ------------------------------------------------------------------------------------------------- the network's parts


def test_an_lstm_step_by_hand():
    layer = lstm_init(KEY, 1, 1)
    assert (layer["b"] == jnp.array([0.0, 1.0, 0.0, 0.0])).all()
    layer = {"w": jnp.array([[1.0, 0.0, 2.0, 0.5], [0.0, 0.0, 1.0, 0.0]]), "b": jnp.array([0.0, 1.0, 0.0, -0.5])}
    one = lstm(layer, lstm_start(layer, 1), jnp.array([[0.3]]))
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    c = sigmoid(0.3) * np.tanh(0.6)
    h = sigmoid(0.15 - 0.5) * np.tanh(c)
    np.testing.assert_allclose([one.h[0, 0], one.c[0, 0]], [h, c], rtol=1e-6)
    two = lstm(layer, one, jnp.array([[-1.0]]))
    c2 = sigmoid(1.0) * c + sigmoid(-1.0) * np.tanh(-2.0 + h)
    np.testing.assert_allclose(two.c[0, 0], c2, rtol=1e-6)


@pytest.mark.slow
def test_log_sign_is_the_papers_and_has_a_derivative_everywhere():
    g = jnp.array([1.0, -np.e, np.exp(-10.0) * 0.5, 0.0, 1e-8])
    shown = log_sign(g)
    expected = [[0, 1], [0.1, -1], [-1, 0.5], [-1, 0], [-1, 1e-8 * np.exp(10)]]
    np.testing.assert_allclose(shown, expected, rtol=1e-5, atol=1e-7)
    assert jnp.isfinite(jax.jacobian(lambda v: log_sign(v))(g)).all()
    # Scale is a shift: the sign does not see it, the logarithm sees it added.
    np.testing.assert_allclose(log_sign(100 * g[:2])[:, 0] - shown[:2, 0], np.log(100) / 10, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- the optimiser


@pytest.mark.slow
def test_each_coordinate_is_optimised_alone_and_all_alike():
    optimizer = learned_optimizer(init_rule(KEY))
    grads = [jax.random.normal(k, (6,)) for k in jax.random.split(KEY, 3)]
    turn = jax.random.permutation(jax.random.key(5), 6)

    def run(grads):
        state, updates = optimizer.init(grads[0]), []
        for g in grads:
            update, state = optimizer.update(g, state)
            updates.append(update)
        return jnp.stack(updates)

    plain = run(grads)
    np.testing.assert_allclose(run([g[turn] for g in grads]), plain[:, turn], rtol=1e-5, atol=1e-7)
    other = run([grads[0], grads[1].at[2].set(9.0), grads[2]])
    np.testing.assert_allclose(jnp.delete(other, 2, axis=1), jnp.delete(plain, 2, axis=1), rtol=1e-5, atol=1e-7)
    assert jnp.abs(other[1:, 2] - plain[1:, 2]).min() > 1e-6
    assert jnp.abs(plain[0] - plain[1]).min() > 0


def test_it_is_an_optax_transformation_for_any_parameters():
    params = {"a": jnp.ones((2, 3)), "b": [jnp.zeros(()), jnp.ones(4)]}
    chained = optax.chain(optax.clip(1.0), learned_optimizer(init_rule(KEY)))
    loss = lambda p: sum((leaf**2).sum() for leaf in jax.tree.leaves(p))  # noqa: E731
    phi, losses = jax.jit(lambda p: optimise(loss, p, chained, 5))(params)
    assert jax.tree.structure(phi) == jax.tree.structure(params)
    assert losses.shape == (5,)
    assert losses[0] == 10
    # The same by hand, as a user of optax writes it.
    state, at = chained.init(params), params
    for t in range(5):
        np.testing.assert_allclose(loss(at), losses[t], rtol=1e-5)
        update, state = chained.update(jax.grad(loss)(at), state, at)
        at = optax.apply_updates(at, update)
    np.testing.assert_allclose(at["a"], phi["a"], rtol=1e-5)


def test_an_optimiser_that_asks_is_told_the_loss():
    # Polyak's step f / |g|^2 halves theta on theta^2.
    loss = lambda theta: (theta**2).sum()  # noqa: E731
    polyak = optax.polyak_sgd(max_learning_rate=10.0)
    after = descend(loss, jnp.array([3.0]), polyak, 2).phi
    np.testing.assert_allclose(after, 3 / 4, rtol=1e-5)
    assert optimizer_step(loss, Descent(jnp.array([3.0]), polyak.init(jnp.array([3.0]))), polyak)[1] == 9
    batches = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(
        optimise(lambda theta, b: ((theta - b) ** 2).sum(), jnp.zeros(1), optax.sgd(0.5), 2, batches)[1], [1, 1]
    )


# -------------------------------------------------------------------------------------------------- the meta-objective


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_without_truncation_and_stops_the_gradient_is_the_derivative():
    task = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), a_quadratic())
    learner = l2l(linear(), EXACT, steps=6, unroll=6, units=4, first_order=False, start="learned")
    params = learner.init(KEY, task)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    direction = jax.random.normal(KEY, flat.shape)
    at = jax.jit(lambda v: learner.loss(unravel(v), task, KEY)[0])
    finite = (at(flat + 1e-6 * direction) - at(flat - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(jax.jit(jax.grad(at))(flat) @ direction, finite, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_truncation_sums_the_gradients_of_each_unroll_from_where_it_starts():
    task = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), a_quadratic())
    rule, theta = init_rule(KEY, units=4), jnp.zeros((10, 1))
    fit = lambda th: value(task, th)  # noqa: E731

    def total(rule, steps, unroll, at=None):
        optimizer = learned_optimizer(rule)
        if at is None:
            return unrolled(fit, fit, theta, optimizer, steps, unroll)[1].sum()
        second = 0.0
        for _ in range(3):
            at, _ = optimizer_step(fit, at, optimizer, first_order=True)
            second = second + fit(at.phi)
        return second

    middle = jax.lax.stop_gradient(descend(fit, theta, learned_optimizer(rule), 3))
    whole = jax.grad(total)(rule, 6, 3)
    parts = [jax.grad(total)(rule, 3, 3), jax.grad(lambda r: total(r, 0, 0, middle))(rule)]
    for a, b, c in zip(*map(jax.tree.leaves, (whole, *parts)), strict=True):
        np.testing.assert_allclose(a, b + c, rtol=1e-8, atol=1e-10)
    untruncated = jax.grad(total)(rule, 6, 6)
    assert any(not np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, (whole, untruncated)), strict=True))


@pytest.mark.slow
def test_the_objective_is_the_mean_over_the_course_of_the_function_itself():
    task = a_quadratic()
    learner = l2l(linear(), EXACT, steps=8, unroll=4, start="learned")
    params = learner.init(KEY, task)
    at, values = {"head": params.theta["head"]}, []
    optimizer = learned_optimizer(params.rule)
    state = optimizer.init(at)
    for _ in range(8):
        g = jax.grad(lambda p: value(task, p["head"]["w"]))(at)
        update, state = optimizer.update(g, state)
        at = optax.apply_updates(at, update)
        values.append(value(task, at["head"]["w"]))
    np.testing.assert_allclose(learner.loss(params, task, KEY)[0], np.mean(values) + CONSTANT, rtol=1e-4)
    posterior = learner.adapt(params, task.support, KEY).posterior.mean
    np.testing.assert_allclose(posterior["head"]["w"], at["head"]["w"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_random_starts_come_from_the_key_and_nothing_of_them_is_learned():
    task = a_quadratic()
    learner = l2l(linear(init_scale=1.0), EXACT, steps=2, unroll=2)
    params = learner.init(KEY, task)
    assert params.theta is None
    losses = [learner.loss(params, task, jax.random.key(k))[0] for k in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    courses = [learner.path(params, task.support, jax.random.key(k)).posterior.mean["head"]["w"] for k in (1, 2)]
    assert not np.allclose(courses[0][0], courses[1][0])


@pytest.mark.slow
def test_training_steps_see_minibatches_of_the_support_and_padding_counts_for_nothing():
    x = jax.random.normal(KEY, (12, 3))
    task = Task(Batch(x, x[:, :1]), Batch(x, x[:, :1]))
    make = lambda size: l2l(linear(), Gaussian(), steps=4, unroll=2, minibatch=size, start="learned")  # noqa: E731
    params = make(None).init(KEY, task)
    loss = lambda size, task, key: make(size).loss(params, task, key)[0]  # noqa: E731
    assert loss(3, task, jax.random.key(1)) != loss(3, task, jax.random.key(2))
    np.testing.assert_allclose(loss(99, task, jax.random.key(1)), loss(None, task, KEY), rtol=1e-5)
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:4] + 7]), task.support)
    padded = padded._replace(weight=jnp.concatenate([jnp.ones(12), jnp.zeros(4)]))
    np.testing.assert_allclose(loss(None, task._replace(support=padded), KEY), loss(None, task, KEY), rtol=1e-5)


def test_a_minute_of_training_beats_the_best_rate_of_gradient_descent_on_new_quadratics():
    learner = l2l(linear(), EXACT, steps=20, unroll=20)
    splits, training = quadratics(), Training(steps=300, meta_batch=8, rate=5e-3, clip_norm=1.0, schedule="cosine")
    state = init_state(learner, splits.train, training)
    state, _ = run_chunk(learner, training)(state, splits.train, 300)
    held_out = splits.test.sample(jax.random.key(9), 50)

    def course(optimizer):
        def one(task):
            phi, _ = optimise(lambda theta: value(task, theta), jnp.zeros((10, 1)), optimizer, 20)
            return value(task, phi)

        return jax.jit(jax.vmap(one))(held_out).mean()

    learned = course(learned_optimizer(state.params.rule))
    by_hand = [course(optax.sgd(rate)) for rate in (0.003, 0.01, 0.015, 0.02, 0.03)]
    assert by_hand.index(min(by_hand)) not in (0, 4)
    assert learned < 0.9 * min(by_hand), f"{learned:.3f} against {min(by_hand):.3f}"


# ------------------------------------------------------------------------------------------------------- tasks, errors


@pytest.mark.slow
def test_a_quadratic_is_its_likelihood():
    task, theta = a_quadratic(), jax.random.normal(KEY, (10, 1))
    nll = EXACT.nll(linear().apply({"head": {"w": theta}}, task.support.x), task.support.y).mean()
    np.testing.assert_allclose(nll, value(task, theta) + CONSTANT, rtol=1e-5)
    splits = quadratics(dimension=3)
    x = [part.sample(KEY, 200).support.x for part in splits]
    assert x[0].shape == (200, 3, 3)
    assert not np.allclose(x[0], x[1])
    assert abs(x[0].mean()) < 0.1
    assert abs(x[0].std() - 1) < 0.1


@pytest.mark.slow
def test_digits_are_real_and_their_splits_share_no_image():
    splits = digits(shot=100, query=50)
    task = splits.train.sample(KEY, 2)
    assert task.support.x.shape == (2, 100, 64)
    assert task.query.y.shape == (2, 50)
    assert 0 <= task.support.x.min() < task.support.x.max() == 1
    rows = [np.arange(int(s.starts[0]), int(s.starts[0] + s.counts[0])) for s in splits]
    assert sum(map(len, rows)) == len(np.unique(np.concatenate(rows))) == 1797
    with pytest.raises(ValueError, match="Lower shot or query"):
        digits(shot=600)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "anywhere"}, "start must be .* got 'anywhere'"),
        ({"steps": 10, "unroll": 4}, "steps must be a multiple of unroll.* got 10 and 4"),
        ({"units": 0}, "units must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        l2l(mlp(), Categorical(), **options)


# ----------------------------------------------------------------------------------------------------- the cell as rule

NET = mlp(1, (5,), "tanh")


def a_cell(steps=3, **options):
    x = jax.random.normal(KEY, (6, 2))
    task = Task(Batch(x, x[:, :1] ** 2), Batch(x[:4], x[:4, :1] ** 2))
    learner = meta_lstm(NET, Gaussian(), steps=steps, **options)
    return learner, learner.init(KEY, task), task


def fit_of(task):
    return lambda phi: Gaussian().nll(NET.apply(phi, task.support.x), task.support.y).mean()


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_with_blind_gates_the_cell_is_gradient_descent_with_decay():
    learner, params, task = a_cell(rate=0.05)
    blind = jax.tree.map(jnp.zeros_like, (params.rule.forget["w"], params.rule.input["w"]))
    rule = params.rule._replace(
        forget={"w": blind[0], "b": params.rule.forget["b"]}, input={"w": blind[1], "b": params.rule.input["b"]}
    )
    phi = params.theta
    keep = 1 / (1 + np.exp(-6.0))
    for _ in range(3):
        phi = jax.tree.map(lambda t, g: keep * t - 0.05 * g, phi, jax.grad(fit_of(task))(phi))
    ours = learner.adapt(params._replace(rule=rule), task.support, KEY).posterior.mean
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(phi), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.slow
def test_a_step_of_the_cell_by_hand():
    rule = init_cell(KEY, 3, 0.02)
    rule = rule._replace(input={"w": jnp.array([0.3, -0.2, 0.1, 0.5, 2.0]), "b": jnp.array(-1.0)})
    optimizer = cell_optimizer(rule)
    theta, g, value = jnp.array([0.5, -2.0]), jnp.array([3.0, -1e-3]), jnp.array(0.7)
    state = optimizer.init(theta)._replace(forget=jnp.array([0.9, 0.8]), input=jnp.array([0.1, 0.2]))
    update, after = optimizer.update(g, state, theta, value=value)
    seen = np.array([[np.log(3) / 10, 1, np.log(0.7) / 10, 1], [np.log(1e-3) / 10, -1, np.log(0.7) / 10, 1]])
    h = lstm(rule.layer, state.lstm, jnp.asarray(seen, g.dtype)).h
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    i = sigmoid(h @ np.array([0.3, -0.2, 0.1]) + 0.5 * theta + 2.0 * state.input - 1.0)
    w = rule.forget["w"]
    f = sigmoid(h @ w[:3] + w[3] * theta + w[4] * state.forget + 6.0)
    np.testing.assert_allclose(after.input, i, rtol=1e-5)
    np.testing.assert_allclose(after.forget, f, rtol=1e-5)
    np.testing.assert_allclose(theta + update, f * theta - i * g, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_gradients_and_losses_are_constants_to_the_meta_gradient():
    learner, params, task = a_cell(rate=0.1)
    fit = jax.value_and_grad(fit_of(task))

    def course(params, told=None):
        """The query loss, with gradients and losses as `told`; and those."""
        phi, optimizer, seen = params.theta, cell_optimizer(params.rule), []
        state = optimizer.init(phi)
        for t in range(3):
            value, g = fit(phi) if told is None else told[t]
            seen.append((value, g))
            update, state = optimizer.update(g, state, phi, value=value)
            phi = optax.apply_updates(phi, update)
        return Gaussian().nll(NET.apply(phi, task.query.x), task.query.y).mean(), seen

    value, told = course(params)
    np.testing.assert_allclose(learner.loss(params, task, KEY)[0], value, rtol=1e-10)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    direction = jax.random.normal(KEY, flat.shape)
    at = jax.jit(lambda v: course(unravel(v), told)[0])
    finite = (at(flat + 1e-6 * direction) - at(flat - 1e-6 * direction)) / 2e-6
    gradient = jax.grad(lambda v: learner.loss(unravel(v), task, KEY)[0])(flat)
    np.testing.assert_allclose(gradient @ direction, finite, rtol=1e-6)
    free = jax.jit(lambda v: course(unravel(v))[0])
    assert abs((free(flat + 1e-6 * direction) - free(flat - 1e-6 * direction)) / 2e-6 - finite) > 1e-3 * abs(finite)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_gates_can_be_seen_and_the_input_gate_is_the_implied_rate():
    learner, params, task = a_cell(rate=0.1)
    seen = gates(NET, Gaussian(), params, task.support, 3)
    assert jax.tree.structure(seen.forget) == jax.tree.structure(params.theta)
    assert seen.input["head"]["w"].shape == (3, 5, 1)
    phi = params.theta
    for t in range(3):
        f, i = jax.tree.map(lambda leaf, t=t: leaf[t], seen)
        phi = jax.tree.map(lambda p, g, f, i: f * p - i * g, phi, jax.grad(fit_of(task))(phi), f, i)
    ours = learner.adapt(params, task.support, KEY).posterior.mean
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(phi), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)
    optimizer = cell_optimizer(params.rule)
    at = descend(fit_of(task), params.theta, optimizer, 2)
    for rate, gate in zip(
        jax.tree.leaves(inner_rates(fit_of(task), at, optimizer)), jax.tree.leaves(seen.input), strict=True
    ):
        np.testing.assert_allclose(rate, gate[2], rtol=1e-8)


def test_the_cell_names_what_it_lacks():
    with pytest.raises(ValueError, match=r"rate must be between 0 and 1.*got 1\.5"):
        meta_lstm(NET, Gaussian(), rate=1.5)
    with pytest.raises(ValueError, match="units must be"):
        meta_lstm(NET, Gaussian(), units=0)
    optimizer = cell_optimizer(init_cell(KEY, 2, 0.1))
    theta = jnp.ones(2)
    with pytest.raises(ValueError, match="value=loss"):
        optimizer.update(theta, optimizer.init(theta), theta)


def test_gates_are_drawn_a_line_a_layer():
    forget = {"layer1": {"w": jnp.full((2, 3, 4), 0.9), "b": jnp.full((2, 3, 1), 0.9)}, "head": jnp.full((2, 3), 1.0)}
    spread = jnp.linspace(0, 1, 11) * jnp.array([1.0, 2, 4])[None, :, None]
    input = {"layer1": {"w": jnp.concatenate([spread, spread]), "b": jnp.zeros((2, 3, 0))}, "head": jnp.zeros((2, 3))}
    left, right = gate_values(forget, input).axes
    assert [line.get_label() for line in right.lines] == ["head", "layer1"]
    np.testing.assert_allclose(left.lines[1].get_ydata(), [0.9] * 3, rtol=1e-6)
    np.testing.assert_allclose(right.lines[1].get_ydata(), [0.5, 1, 2], rtol=1e-6)
    np.testing.assert_allclose(right.lines[1].get_xdata(), [1, 2, 3])
    band = right.collections[1].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [0.1, 3.6], atol=1e-6)
