"""TAML: the measures of inequality, and a term of the whole meta-batch in training."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior import Batch, Bernoulli, Categorical, Gaussian, Poisson, Task, conv4, make_learner, mlp
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.taml import inequality
from metaprior.training.loop import NonFiniteLoss, draw_tasks, fit, mean_gradient, meta_gradient
from scenarios import KEY, TINY, batch, tiny_splits

NET = mlp(1, (8,), "tanh")
GOLDEN = [  # of the losses 1, 2, 3
    ({}, 0.08720802),
    ({"measure": "generalised_entropy", "order": 2}, 0.08333333),
    ({"measure": "atkinson"}, 0.04491621),
    ({"measure": "atkinson", "order": 1}, 0.09143970),
    ({"measure": "gini"}, 0.22222222),
    ({"measure": "log_variance", "centre": "arithmetic"}, 0.21495166),
    ({"measure": "log_variance"}, 0.20575599),
]
MEASURES = [options for options, _ in GOLDEN] + [
    {"measure": "generalised_entropy", "order": order} for order in (-1, 0, 0.3, 1)
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("options", "expected"), GOLDEN)
def test_golden_inequalities(options, expected):
    assert inequality(jnp.array([1.0, 2.0, 3.0]), **options) == pytest.approx(expected, abs=5e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", MEASURES)
def test_an_inequality_is_zero_for_equal_losses_and_has_no_scale(options):
    losses = jnp.array([0.3, 1.1, 5.0, 0.02])
    assert inequality(jnp.full(5, 0.7), **options) == pytest.approx(0, abs=1e-12)
    found = float(inequality(losses, **options))
    assert found > 0.1
    assert inequality(1000 * losses, **options) == pytest.approx(found, rel=1e-9)
    slope = jax.grad(lambda values: inequality(values, **options))(losses)
    # A function without a scale has a gradient at right angles to its argument (Euler).
    assert losses @ slope == pytest.approx(0, abs=1e-9)
    assert slope[2] > 0 > slope[3]


@pytest.mark.parametrize("limit", [0, 1])
def test_generalised_entropy_is_continuous_in_its_order(limit):
    losses = jnp.array([0.3, 1.1, 5.0])
    at = inequality(losses, "generalised_entropy", order=limit)
    for near in (limit - 1e-5, limit + 1e-5):
        assert inequality(losses, "generalised_entropy", order=near) == pytest.approx(float(at), rel=1e-4)
    one = inequality(losses, "atkinson", order=1)
    assert inequality(losses, "atkinson", order=1 + 1e-5) == pytest.approx(float(one), rel=1e-4)


def test_losses_that_have_no_inequality_are_named():
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"losses must be above 0, got {bad:g}"):
            inequality(jnp.array([1.0, bad]))
        assert jnp.isnan(jax.jit(inequality)(jnp.array([1.0, bad])))
    with pytest.raises(ValueError, match="at least 2 tasks, got 1"):
        inequality(jnp.ones(1))
    with pytest.raises(ValueError, match="order must be above 0 for 'atkinson', got 0"):
        inequality(jnp.ones(2), "atkinson", order=0)
    with pytest.raises(ValueError, match="order must be above 0 for 'atkinson', got -1"):
        make_learner("taml", NET, Gaussian(), measure="atkinson", order=-1)
    for likelihood in (Gaussian(), Poisson()):
        with pytest.raises(ValueError, match=r"'theil', for .*, got 'entropy'"):
            make_learner("taml", NET, likelihood, measure="entropy")


def problem(**options):
    """A learner, params, six tasks and their keys."""
    learner = make_learner("taml", NET, Gaussian(), rate=0.05, steps=2, weight=0.7, **options)
    tasks = tiny_splits().train.sample(KEY, 6)
    params = learner.init(KEY, jax.tree.map(lambda leaf: leaf[0], tasks))
    return learner, params, tasks, jax.random.split(KEY, 6)


def whole(params, tasks, options):
    """The objective of the paper, written out: MAML's loss and the inequality of the supports' squared errors."""
    maml = make_learner("maml", NET, Gaussian(), rate=0.05, steps=2)
    losses = jax.vmap(lambda task: maml.loss(params, task, KEY)[0])(tasks)
    errors = jax.vmap(lambda s: ((NET.apply(params, s.x) - s.y) ** 2).mean())(tasks.support)
    return losses.mean() + 0.7 * inequality(errors, **options)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{}, {"measure": "gini"}])
@pytest.mark.slow
def test_the_meta_gradient_is_that_of_the_whole_objective_however_many_tasks_are_in_memory(options):
    learner, params, tasks, keys = problem(**options)
    value, gradient = jax.jit(jax.value_and_grad(whole), static_argnums=2)(params, tasks, Frozen(options))
    plain = meta_gradient(make_learner("maml", NET, Gaussian(), rate=0.05, steps=2), params, tasks, keys, None)[1]
    gap = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradient, plain)
    assert max(jax.tree.leaves(gap)) > 1e-2  # the term matters
    for chunk in (None, 1, 3):
        metrics, found = jax.jit(lambda p, t, k, chunk=chunk: meta_gradient(learner, p, t, k, chunk))(
            params, tasks, keys
        )
        assert metrics["loss"] == pytest.approx(float(value), rel=1e-10)
        assert metrics["loss"] - metrics["inequality"] == pytest.approx(float(metrics["nll"]), rel=1e-10)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, gradient)


class Frozen(dict):
    """Options that a compiled function can depend on."""

    def __hash__(self):
        return hash(tuple(self.items()))


SHARED_OUT = """
import jax, numpy as np, sys
from dataclasses import replace
from metaprior.core.runtime import configure
configure(devices=3)
from metaprior.training.loop import draw_tasks, mean_gradient, step_mesh
from scenarios import TINY, tiny_splits
from test_taml import problem
learner, params, _, _ = problem()
training = replace(TINY, meta_batch=6, task_chunk=1)
drawn = draw_tasks(training)(0, tiny_splits().train)
print("DEVICES", step_mesh(training).size)
metrics, gradient = jax.jit(mean_gradient(learner, training))(params, drawn)
np.savez(sys.argv[1], metrics["loss"], metrics["inequality"], *jax.tree.leaves(gradient))
"""


@pytest.mark.slow
def test_three_devices_share_the_term_of_all_tasks(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), os.path.dirname(__file__)])}
    code = [sys.executable, "-c", SHARED_OUT, str(tmp_path / "three.npz")]
    done = subprocess.run(code, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "DEVICES 3" in done.stdout
    training = replace(TINY, meta_batch=6)
    learner, params, _, _ = problem()
    tasks, keys = draw_tasks(training)(0, tiny_splits().train)
    metrics, gradient = jax.jit(mean_gradient(learner, training))(params, (tasks, keys))
    one = metrics["loss"], metrics["inequality"], *jax.tree.leaves(gradient)
    for a, b in zip(one, np.load(tmp_path / "three.npz").values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_meta_batch_of_one_task_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 tasks, got 1. Give training.meta_batch"):
        fit(problem()[0], tiny_splits(), replace(TINY, meta_batch=1))


class Nothing:
    """Tasks whose second one has an empty support."""

    def sample(self, key, n):
        tasks = tiny_splits().train.sample(key, n)
        weight = jnp.ones((n, 5)).at[1].set(0.0)
        return tasks._replace(support=tasks.support._replace(weight=weight))


@pytest.mark.slow
def test_a_task_without_a_loss_ends_training_with_the_cause():
    splits = tiny_splits()._replace(train=Nothing())
    jax.tree_util.register_static(Nothing)
    with pytest.raises(NonFiniteLoss, match=r"losses must be above 0, got 0.*give every support an example"):
        fit(problem()[0], splits, TINY)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_the_entropy_form_by_hand(likelihood):
    net = mlp(3 if isinstance(likelihood, Categorical) else 1, (8,), "tanh")
    support, query = (
        Batch(b.x, jnp.minimum(b.y, net.apply(net.init(KEY, b.x), b.x).shape[1])) for b in (batch(6), batch(4, 2))
    )
    support = support._replace(weight=jnp.array([1.0, 1, 1, 1, 1, 0]))
    task = Task(support, query)
    learner = make_learner("taml", net, likelihood, measure="entropy", weight=0.4, rate=0.5)
    params = learner.init(KEY, task)

    def mean_loss(params, data):
        return (likelihood.nll(net.apply(params, data.x), data.y)).mean()

    seen = Batch(support.x[:5], support.y[:5])
    phi = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(mean_loss)(params, seen))

    def entropy(params):
        p = likelihood.predictive(net.apply(params, jnp.concatenate([seen.x, query.x]))[None]).mean()
        return -(p * jnp.log(p)).sum(-1).mean()

    expected = mean_loss(phi, query) + 0.4 * (entropy(phi) - entropy(params))
    loss, metrics = learner.loss(params, task, KEY)
    assert loss == pytest.approx(float(expected), rel=1e-10)
    assert metrics["entropy_before"] == pytest.approx(float(entropy(params)), rel=1e-10)
    assert abs(metrics["entropy_before"] - metrics["entropy_after"]) > 1e-3
    assert fit_metrics(likelihood, net.apply(phi, query.x), query)["nll"] == pytest.approx(float(mean_loss(phi, query)))


@pytest.mark.parametrize("norm", ["task", "running"])
@pytest.mark.slow
def test_the_term_survives_what_wraps_a_learner(norm):
    model = conv4(3, 4, norm=norm)
    images = jax.random.uniform(KEY, (6, 28, 28, 1))
    task = Task(Batch(images[:3], jnp.arange(3)), Batch(images[3:], jnp.arange(3)))
    learner = make_learner("taml", model, Categorical())
    params = learner.init(KEY, task)
    score = learner.joint.score(params, task, KEY)
    assert jnp.isfinite(score)
    turned = make_learner("taml", NET, Gaussian()).turn({"noise": 2.0})
    assert turned.joint.name == "inequality"
