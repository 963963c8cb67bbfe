"""The PAC-Bayes bound of learners with random encoder weights."""

import json
from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior import Gaussian, Training, mlp
from metaprior.core.likelihoods import Categories, Counts, Normals
from metaprior.core.types import Task
from metaprior.learners import maml, mr_maml
from metaprior.studies import kl_weight, pac_bayes
from metaprior.studies.bound import gap, gibbs_loss
from metaprior.tasks import FixedTasks, sinusoid_nme
from metaprior.training.loop import draw_tasks
from scenarios import KEY, run_cli

CODE = mlp(3, (4,), "tanh")
BASE = mlp(1, (6,), "tanh")


def test_the_weight_of_the_kl():
    """Golden value G9 of the facts: 20 tasks, 10 queries, delta 0.1."""
    assert kl_weight(20, 10, 0.1) == pytest.approx(0.07171851, abs=1e-8)


def test_the_weight_is_the_slope_of_the_bound():
    here, there = (gap(divergence, 20, 10, 0.1) for divergence in (0.0, 1e-4))
    assert (there - here) / 1e-4 == pytest.approx(kl_weight(20, 10, 0.1), rel=1e-4)
    # In numbers: (sqrt(1/18) + sqrt(1/38)) sqrt(5 + log(20 * 11 / 0.1)).
    assert gap(5.0, 20, 10, 0.1) == pytest.approx((18**-0.5 + 38**-0.5) * (5 + log(2200)) ** 0.5)


def test_losses_are_of_each_drawn_network_and_at_most_one():
    p = jnp.log(jnp.array([[[0.7, 0.3], [0.2, 0.8]], [[0.4, 0.6], [0.1, 0.9]]]))
    np.testing.assert_allclose(gibbs_loss(Categories(p), jnp.array([0, 1]), 1.0), [0.5, 0.0])
    normals = Normals(jnp.array([[[0.0], [1.0]], [[3.0], [2.0]]]), jnp.ones((2, 2, 1)))
    np.testing.assert_allclose(gibbs_loss(normals, jnp.array([[1.0], [1.0]]), 4.0), [(0.25 + 1) / 2, (0 + 0.25) / 2])
    with pytest.raises(ValueError, match="learner must predict classes or numbers, got Counts"):
        gibbs_loss(Counts(jnp.zeros((1, 2, 1))), jnp.zeros((2, 1)), 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [False, True])
def test_the_risk_is_that_of_the_tasks_of_the_training(fixed):
    source = sinusoid_nme(names=3, shot=3, query=4).train
    learner = mr_maml(BASE, Gaussian(), bottleneck=CODE, log_sd=-50.0, draws=1, rate=0.1)
    params = jax.jit(learner.init)(KEY, jax.tree.map(lambda leaf: leaf[0], source.sample(KEY, 1)))
    training = Training(steps=3, meta_batch=2, seed=5)
    draw = jax.jit(draw_tasks(training))
    tasks = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(draw(t, source)[0] for t in range(3)))
    if fixed:
        source = FixedTasks(tasks)
        training = Training(steps=100, meta_batch=2)  # sees each task many times
    bound = pac_bayes(learner, params, source, KEY, training, scale=0.5, delta=0.1)
    plain = maml(BASE, Gaussian(), rate=0.1)  # on the codes of the mean, since the weights are certain
    coded = Task(*(b._replace(x=jax.vmap(lambda x: CODE.apply(params.bottleneck.mean, x))(b.x)) for b in tasks))

    def error(task):
        predictive = plain.predict(params.theta, plain.adapt(params.theta, task.support, KEY), task.query.x, KEY)
        return jnp.minimum((predictive.mean() - task.query.y) ** 2 / 0.5, 1).mean()

    errors = jax.jit(jax.vmap(error))(coded)
    assert float((errors < 1).mean()) > 0  # not all are cut
    assert (bound.tasks, bound.queries, bound.loss) == (6, 4, "squared error / 0.5, at most 1")
    assert bound.risk.mean == pytest.approx(float(errors.mean()), rel=1e-4)
    assert bound.bound == pytest.approx(bound.risk.mean + gap(bound.divergence, 6, 4, 0.1))
    assert bound.weight == kl_weight(6, 4, 0.1)
    means = [np.asarray(leaf, float) for leaf in jax.tree.leaves(params.bottleneck.mean)]
    expected = sum((0.5 * (np.exp(-100) + m**2 - 1) + 50).sum() for m in means)
    assert bound.divergence == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_what_has_no_bound_is_refused():
    source = sinusoid_nme(shot=2, query=2).train
    one = jax.tree.map(lambda leaf: leaf[0], source.sample(KEY, 1))
    training = Training(steps=2, meta_batch=1)
    for learner in (maml(BASE, Gaussian()), mr_maml(BASE, Gaussian(), on="activations")):
        with pytest.raises(ValueError, match="learner must have an encoder with random weights"):
            pac_bayes(learner, learner.init(KEY, one), source, KEY, training)
    learner = mr_maml(BASE, Gaussian(), draws=1)
    params = learner.init(KEY, one)
    with pytest.raises(ValueError, match="training must have at least 2 tasks, got 1"):
        pac_bayes(learner, params, source, KEY, training, steps=1)
    with pytest.raises(ValueError, match="source must have tasks with at least 2 queries, got 1"):
        pac_bayes(learner, params, sinusoid_nme(shot=2, query=1).train, KEY, training)
    with pytest.raises(ValueError, match="delta must be"):
        pac_bayes(learner, params, source, KEY, training, delta=1.0)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    small = ["training.steps=4", "training.chunk=2", "training.validation_tasks=2", "learner.test_steps=2"]
    small += ["training.validate_every=4"]
    run_cli("train", "nme-sinusoid", "--out", tmp_path / "run", "--set", *small)
    run_cli("study", "bound", tmp_path / "run", "--out", tmp_path, "--tasks", 3, "--delta", 0.1)
    shown = capsys.readouterr().out
    assert "A bound of 1 or more says nothing" in shown
    found = json.loads((tmp_path / "bound.json").read_text())["mr_maml"]
    assert (found["tasks"], found["queries"]) == (4, 10)
    assert found["weight"] == pytest.approx(kl_weight(4, 10, 0.1))
    assert found["bound"] > 1 > found["risk"]["mean"] > 0
    assert (tmp_path / "bound.png").stat().st_size > 1000
