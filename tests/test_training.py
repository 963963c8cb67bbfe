"""The outer loop: determinism, accumulation, devices, and how it stops."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaprior.core.likelihoods import Categorical, Gaussian, Poisson
from metaprior.core.types import Batch, Splits, Task
from metaprior.evaluation.protocol import evaluate
from metaprior.experiments.runs import Run
from metaprior.inference.descent import count, mean_nll
from metaprior.learners.registry import make_learner
from metaprior.networks import mlp
from metaprior.tasks import FixedTasks
from metaprior.training.loop import (
    NonFiniteLoss,
    Training,
    fit,
    init_state,
    mean_gradient,
    meta_gradient,
    meta_step,
    outer_optimizer,
    outer_update,
    run_chunk,
    step_mesh,
)
from scenarios import TINY, same_bits, tiny_learner, tiny_splits


def test_training_learns_and_reports_each_chunk():
    rows = []
    fitted = fit(tiny_learner(16), tiny_splits(), replace(TINY, steps=400, chunk=100, meta_batch=8), report=rows.append)
    assert [row["step"] for row in rows] == [100, 200, 300, 400]
    assert rows == fitted.history
    assert rows[-1]["train/mse"] < 0.9 * rows[0]["train/mse"]
    lowest = min(row["validation/nll"] for row in rows)
    assert lowest <= rows[-1]["validation/nll"]
    assert not fitted.interrupted


def test_chunks_do_not_change_the_result():
    runs = [fit(tiny_learner(), tiny_splits(), replace(TINY, chunk=chunk)) for chunk in (12, 5, 1)]
    for other in runs[1:]:  # to rounding: a loop of another length is another program
        for a, b in zip(jax.tree.leaves(runs[0].params), jax.tree.leaves(other.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_accumulated_gradients_are_the_gradients_and_need_less_memory():
    learner, splits = tiny_learner(64), tiny_splits()
    tasks = splits.train.sample(jax.random.key(0), 32)
    keys = jax.random.split(jax.random.key(1), 32)
    params = init_state(learner, splits.train, TINY).params

    def compiled(task_chunk):
        f = jax.jit(lambda p, t, k: meta_gradient(learner, p, t, k, task_chunk))
        return f.lower(params, tasks, keys).compile()

    whole, parts = compiled(None), compiled(4)
    results = (jax.tree.leaves(f(params, tasks, keys)) for f in (whole, parts))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
    temporary = [c.memory_analysis().temp_size_in_bytes for c in (whole, parts)]
    assert temporary[1] < 0.5 * temporary[0]


def test_how_many_tasks_at_once_is_the_machines_to_say(monkeypatch):
    training = replace(TINY, task_chunk="auto")
    assert (training.at_once, replace(TINY, task_chunk=2).at_once, TINY.at_once) == (1, 2, None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (training.at_once, replace(TINY, task_chunk=2).at_once) == (None, 2)


SHARED_OUT = """
import jax, numpy as np, sys
from dataclasses import replace
from metaprior.core.runtime import configure
configure(devices=2)
from metaprior.evaluation import evaluate
from metaprior.training.loop import fit, init_state, run_chunk, step_mesh
from scenarios import TINY, same_bits, tiny_learner, tiny_splits
learner, splits, training = tiny_learner(), tiny_splits(), replace(TINY, task_chunk=1)
print("DEVICES", step_mesh(training).size)
state = init_state(learner, splits.train, training)
text = run_chunk(learner, training).lower(state, splits.train, 4).compile().as_text()
print("REDUCED", "all-reduce" in text)
fitted = fit(learner, splits, training)
rows = [row["validation/nll"] for row in fitted.history]
report = evaluate(learner, fitted.params, splits.test, jax.random.key(5), tasks=6)
np.savez(sys.argv[1], rows, [report.figures["mse"].mean, report.figures["nll"].mean], *jax.tree.leaves(fitted.params))
try:
    step_mesh(replace(training, meta_batch=3))
except ValueError as error:
    print(error)
"""


def test_two_devices_share_the_tasks_and_agree_with_one(tmp_path):
    env = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    code = [sys.executable, "-c", SHARED_OUT, str(tmp_path / "two.npz")]
    done = subprocess.run(code, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "DEVICES 2" in done.stdout
    assert "REDUCED True" in done.stdout  # gradients are averaged over devices, so the tasks were spread over them
    assert "training.meta_batch must be a multiple of 2 for 2 devices" in done.stdout
    fitted = fit(tiny_learner(), tiny_splits(), TINY)
    report = evaluate(tiny_learner(), fitted.params, tiny_splits().test, jax.random.key(5), tasks=6)
    rows = [row["validation/nll"] for row in fitted.history]
    one = rows, [report.figures["mse"].mean, report.figures["nll"].mean], *jax.tree.leaves(fitted.params)
    for a, b in zip(one, np.load(tmp_path / "two.npz").values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert step_mesh(TINY) is None


def test_a_non_finite_loss_names_the_step_and_keeps_the_last_good_state():
    learner = tiny_learner()

    def poisoned(params, task, key):
        loss, metrics = learner.loss(params, task, key)
        # The third chunk's first tasks end in a division by zero.
        return jnp.where(jnp.abs(params["head"]["b"][0]) > 0.05, loss / 0.0, loss), metrics

    with pytest.raises(NonFiniteLoss, match=r"maml became non-finite at meta-step \d+.*lower inner rate") as caught:
        fit(learner._replace(loss=poisoned), tiny_splits(), replace(TINY, steps=400, rate=0.05), name="maml")
    assert caught.value.step > int(caught.value.state.step)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(caught.value.state.params))


def test_meta_steps_that_diverge_are_passed_over_up_to_so_many_in_a_row():
    learner, rows = tiny_learner(), []

    def poisoned(share):
        def loss(params, task, key):
            value, metrics = learner.loss(params, task, key)
            return value * jnp.where(jax.random.uniform(key) < share, jnp.inf, 1.0), metrics

        return learner._replace(loss=loss)

    fitted = fit(poisoned(0.1), tiny_splits(), replace(TINY, steps=40, skip=30), report=rows.append)
    lost = sum(row["train/skipped"] for row in rows)
    assert 0 < lost < 40
    assert int(optax.tree.get(fitted.state.opt_state, "total_notfinite")) == lost
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    # Adam counts the steps that it took.
    assert int(optax.tree.get_all_with_path(fitted.state.opt_state, "count")[0][1]) == 40 - lost
    with pytest.raises(NonFiniteLoss, match=r"meta-step 1\."):
        fit(poisoned(1.0), tiny_splits(), replace(TINY, skip=3))


def test_ctrl_c_finishes_the_chunk():
    before = signal.getsignal(signal.SIGINT)

    def interrupt(row):
        if row["step"] == 8:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)

    fitted = fit(tiny_learner(), tiny_splits(), replace(TINY, steps=100), report=interrupt)
    assert fitted.interrupted
    assert int(fitted.state.step) == 8
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "training.steps must be"),
        ({"skip": -1}, "training.skip must be"),
        ({"schedule": "cosin"}, "training.schedule"),
        ({"task_chunk": 3}, "must divide training.meta_batch"),
        ({"task_chunk": "some"}, "training.task_chunk must be"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Training(**({"meta_batch": 4} | options))


def test_schedules_clipping_and_unknown_optimizers():
    params = {"w": jnp.zeros(2)}
    gradient = {"w": jnp.array([100.0, -0.5])}
    for options, expected in [
        ({"clip_value": 10.0}, [-10.0, 0.5]),
        ({"clip_norm": 1.0}, [-1.0, 0.005]),
        ({"schedule": "linear", "warmup": 10}, [0.0, 0.0]),
        ({"schedule": "cosine"}, [-100.0, 0.5]),
    ]:
        optimizer = outer_optimizer(Training(optimizer="sgd", rate=1.0, **options))
        update, _ = optimizer.update(gradient, optimizer.init(params), params)
        np.testing.assert_allclose(update["w"], expected, rtol=1e-3)
    with pytest.raises(ValueError, match="'adamm'"):
        outer_optimizer(Training(optimizer="adamm"))


def test_an_optax_transformation_is_an_outer_optimizer_and_is_told_the_loss(tmp_path):
    """The same steps as by name; one that asks for the loss gets the mean over the meta-step's tasks."""
    named = fit(tiny_learner(), tiny_splits(), replace(TINY, optimizer="sgd"))
    given = fit(tiny_learner(), tiny_splits(), replace(TINY, optimizer=optax.sgd(TINY.rate), rate=1e-3))
    assert same_bits(named.params, given.params)
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()),
        lambda g, state, params=None, *, value, **_: (jax.tree.map(jnp.zeros_like, g), value),
    )
    one = replace(TINY, steps=1, chunk=1, optimizer=seen, rate=1e-3)
    run = Run.create(tmp_path / "run", {"name": "own"})
    fitted = fit(tiny_learner(), tiny_splits(), one, run=run)
    run.close()
    np.testing.assert_allclose(jax.tree.leaves(fitted.state.opt_state)[0], fitted.history[0]["train/loss"], rtol=1e-6)
    assert "an optax transformation" in (tmp_path / "run" / "training.json").read_text()
    with pytest.raises(ValueError, match=r"training.schedule must be left out if training.optimizer is an optax"):
        Training(optimizer=seen, schedule="cosine")


@pytest.mark.slow
def test_a_meta_step_is_a_gradient_and_an_update():
    """Gradients of two halves of the tasks, made apart, are put together outside."""
    learner, splits = tiny_learner(), tiny_splits()
    state = init_state(learner, splits.train, TINY)
    tasks, keys = splits.train.sample(jax.random.key(0), 4), jax.random.split(jax.random.key(1), 4)
    whole, _ = meta_step(learner, TINY)(state, (tasks, keys))
    mean = mean_gradient(learner, replace(TINY, meta_batch=2))
    drawn = [jax.tree.map(lambda leaf, h=h: leaf[h], (tasks, keys)) for h in (slice(2), slice(2, None))]
    halves = [mean(state.params, half) for half in drawn]
    metrics, gradient = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    apart = outer_update(TINY)(state, gradient, metrics)
    assert int(apart.step) == int(whole.step) == 1
    for a, b in zip(jax.tree.leaves(apart.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_data_are_arguments_of_the_compiled_chunk_not_constants():
    learner, splits = tiny_learner(), tiny_splits()
    state = init_state(learner, splits.train, TINY)
    run_chunk(learner, TINY)(state, splits.train, 2)
    run_chunk(learner, TINY)(state, splits.test, 2)  # another source of the same shape is another argument


def labelled_tasks(labels, weight=None):
    x = jnp.zeros((len(labels), 2))
    batch = Batch(x, jnp.asarray(labels), None if weight is None else jnp.asarray(weight, float))
    return FixedTasks(jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), Task(batch, batch)))


@pytest.mark.parametrize("name", ["maml", "cnp", "protonet"])
def test_training_on_labels_that_are_no_class_names_them(name):
    learner = make_learner(name, mlp(3, (4,)), Categorical())
    settings = Training(steps=2, meta_batch=2, chunk=2, validation_tasks=2)
    bad = labelled_tasks([0, 1, 3])
    with pytest.raises((NonFiniteLoss, ValueError), match=r"labels of the 3 classes 0..2, got 3"):
        fit(learner, Splits(bad, bad, bad), settings)
    # Of weight 0 it may be anything, in loss and gradient.
    padded = labelled_tasks([0, 1, 3], [1, 1, 0])
    assert np.isfinite(fit(learner, Splits(padded, padded, padded), settings).history[-1]["train/loss"])


def test_training_that_ends_with_lost_validation_is_not_done():
    learner = make_learner("maml", mlp(3, (4,)), Categorical())
    good, bad = labelled_tasks([0, 1, 2]), labelled_tasks([0, 1, -1])
    with pytest.raises(NonFiniteLoss, match=r"validation tasks.*got -1"):
        fit(learner, Splits(good, bad, good), Training(steps=2, meta_batch=2, chunk=2, validation_tasks=2))


def test_the_scale_of_weights_changes_no_mean():
    outputs, y = jnp.arange(6.0)[:, None], jnp.zeros((6, 1))
    plain = float(mean_nll(Gaussian(), outputs, Batch(outputs, y)))
    for weight in (0.1, 1.0, 7.0):
        assert mean_nll(Gaussian(), outputs, Batch(outputs, y, jnp.full(6, weight))) == pytest.approx(plain, rel=1e-6)
    assert float(count(Batch(outputs, y, jnp.full(6, 0.1)))) == pytest.approx(0.6)
    assert mean_nll(Gaussian(), outputs, Batch(outputs, y, jnp.zeros(6))) == 0
    for bad in (-1.0, jnp.nan, jnp.inf):
        weight = jnp.ones(6).at[2].set(bad)
        with pytest.raises(ValueError, match="weight must be finite"):
            mean_nll(Gaussian(), outputs, Batch(outputs, y, weight))
        assert jnp.isnan(jax.jit(lambda w: mean_nll(Gaussian(), outputs, Batch(outputs, y, w)))(weight))


@pytest.mark.parametrize(("likelihood", "bad"), [(Gaussian(), jnp.nan), (Poisson(), -1.0)])
def test_rows_of_weight_0_reach_no_gradient(likelihood, bad):
    y, weight = jnp.ones((3, 1)).at[2].set(bad), jnp.asarray([1.0, 1.0, 0.0])
    slope = jax.jit(jax.grad(lambda o, y, w: mean_nll(likelihood, o, Batch(o, y, w))))(jnp.ones((3, 1)), y, weight)
    assert jnp.isfinite(slope).all()
    assert slope[2] == 0
