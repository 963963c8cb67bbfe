"""Memory-augmented networks: one access against the paper's equations, and what a sequence means for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical
from metaprior.core.types import Task
from metaprior.evaluation.protocol import evaluate
from metaprior.learners import lstm, mann, ntm
from metaprior.learners.mann import by_instance
from metaprior.networks.memory import access, blank, locate, written
from metaprior.tasks import FixedTasks
from scenarios import BARE, KEY, answer, batch, start

SMALL = {"hidden": 5, "slots": 6, "width": 4, "heads": 2}
ALL = pytest.mark.parametrize(("factory", "options"), [(mann, SMALL), (ntm, SMALL), (lstm, {"hidden": 5})])


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_three_accesses_of_one_head_by_the_equations():
    memory, decay = blank(3, 2, 1), 0.9
    content, read, usage = np.zeros((3, 2)), np.zeros(3), np.zeros(3)
    keys, gates = [[1.0, 0], [0.6, 0.8], [-1, 2]], [0.3, 0.8, 0.5]
    for key, gate in zip(np.array(keys), gates, strict=True):
        least = np.eye(3)[np.argmin(usage)]
        write = gate * read + (1 - gate) * least
        content = content * (1 - least)[:, None] + write[:, None] * key
        norm = np.linalg.norm(content, axis=-1) * np.linalg.norm(key)
        similarity = np.where(norm > 0, content @ key / np.where(norm > 0, norm, 1), 0)
        read = np.exp(similarity) / np.exp(similarity).sum()
        usage = decay * usage + read + write
        memory = access(memory, jnp.asarray(key)[None], jnp.asarray([gate]), jnp.ones(1), decay)
        np.testing.assert_allclose(memory.content, content, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(memory.read[0], read, rtol=1e-9)
        np.testing.assert_allclose(memory.usage, usage, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_two_heads_wipe_and_write_the_two_least_used_slots():
    memory = blank(4, 2, 2)._replace(content=jnp.full((4, 2), 7.0), usage=jnp.array([0.5, 0.1, 0.9, 0.2]))
    keys = jnp.array([[1.0, 2], [3, 4]])
    after = access(memory, keys, jnp.zeros(2), jnp.full(2, 50.0), 1.0)
    np.testing.assert_allclose(after.content, [[7, 7], [1, 2], [7, 7], [3, 4]], rtol=1e-12)
    assert (after.read.argmax(-1) == jnp.array([1, 3])).all()
    np.testing.assert_allclose(after.usage - memory.usage, after.read.sum(0) + jnp.array([0, 1, 0, 1]), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_a_turing_machines_head_goes_by_the_equations():
    rng = np.random.default_rng(0)
    content, before, asked = rng.normal(size=(4, 2)), rng.dirichlet(np.ones(4), 1), rng.normal(size=(1, 8))
    softplus = lambda v: np.log1p(np.exp(v))  # noqa: E731
    key = np.tanh(asked[0, :2])
    similarity = content @ key / np.linalg.norm(content, axis=1) / np.linalg.norm(key)
    w = np.exp(softplus(asked[0, 2]) * similarity)
    gate = 1 / (1 + np.exp(-asked[0, 3]))
    w = gate * w / w.sum() + (1 - gate) * before[0]
    share = np.exp(asked[0, 5:]) / np.exp(asked[0, 5:]).sum()
    w = np.array([sum(share[s + 1] * w[(i - s) % 4] for s in (-1, 0, 1)) for i in range(4)])
    w = w ** (1 + softplus(asked[0, 4]))
    np.testing.assert_allclose(locate(content, before, asked)[0], w / w.sum(), rtol=1e-7)


def test_a_turing_machine_wipes_then_adds():
    content, write = jnp.ones((3, 2)), jnp.array([[1.0, 0, 0], [0.5, 0.5, 0]])
    after = written(content, write, jnp.array([[1.0, 0], [1, 1]]), jnp.array([[3.0, 0], [0, 2]]))
    np.testing.assert_allclose(after, [[0 + 3, 0.5 + 1], [0.5, 0.5 + 1], [1, 1]])


@pytest.mark.slow
def test_a_turing_machine_walks():
    """A head that asks for nothing and shifts by one walks along the tape."""
    walk, asked = jnp.eye(1, 4), jnp.array([[0.0, 0, 0, -40, 0, -20, -20, 20]])
    for place in (1, 2, 3, 0):
        walk = locate(jnp.zeros((4, 2)), walk, asked)
        assert walk[0].argmax() == place


@pytest.mark.usefixtures("x64")
@ALL
@pytest.mark.slow
def test_a_query_is_the_next_step_of_the_episode_whatever_the_other_queries_are(factory, options):
    learner = factory(BARE, Categorical(), **options)
    support, query = batch(4), batch(3, 2)
    params = start(learner, support)
    second = answer(learner, params, support, query.x)[1]
    np.testing.assert_allclose(answer(learner, params, support, query.x[1:])[0], second, rtol=1e-9)
    # The label comes one step late: what the last example is said to be is told to the query.
    told = [answer(learner, params, support._replace(y=support.y.at[-1].set(c)), query.x) for c in (0, 1)]
    assert abs(told[0] - told[1]).max() > 1e-4


@pytest.mark.usefixtures("x64")
@ALL
@pytest.mark.slow
def test_the_loss_is_the_nll_at_every_step_of_the_episode(factory, options):
    learner = factory(BARE, Categorical(), shuffle=False, **options)
    episode = batch(5)
    params = start(learner, episode)

    def part(low, high):
        return jax.tree.map(lambda leaf: leaf[low:high], episode)

    steps = [learner.loss(params, Task(part(0, 1), part(0, 0)), KEY)[0]]
    for n in range(1, 5):
        steps.append(-jnp.log(answer(learner, params, part(0, n), episode.x[n : n + 1])[0, episode.y[n]]))
    loss = learner.loss(params, Task(part(0, 3), part(3, 5)), KEY)[0]
    np.testing.assert_allclose(loss, np.mean(steps), rtol=1e-9)
    mixed, order = factory(BARE, Categorical(), **options), jax.random.permutation(KEY, 5)
    turned = Task(*(jax.tree.map(lambda leaf, part=part: leaf[order][part], episode) for part in np.s_[:3, 3:]))
    task = Task(part(0, 3), part(3, 5))
    np.testing.assert_allclose(mixed.loss(params, task, KEY)[0], learner.loss(params, turned, KEY)[0], rtol=1e-9)
    assert abs(mixed.loss(params, task, KEY)[0] - loss) > 1e-6


@pytest.mark.usefixtures("x64")
@ALL
@pytest.mark.slow
def test_padding_is_passed_over_wherever_it_stands_and_order_matters(factory, options):
    learner = factory(BARE, Categorical(), **options)
    support, x = batch(5), batch(3, 2).x
    params = start(learner, support)
    real = jnp.array([1, 0, 1, 1, 0])
    padded = answer(learner, params, support._replace(weight=real.astype(float)), x)
    plain = jax.tree.map(lambda leaf: leaf[real == 1], support)
    np.testing.assert_allclose(padded, answer(learner, params, plain, x), rtol=1e-9)
    turned = jax.tree.map(lambda leaf: leaf[::-1], support)
    assert abs(answer(learner, params, support, x) - answer(learner, params, turned, x)).max() > 1e-4


@pytest.mark.slow
def test_accuracy_is_told_by_how_often_a_class_was_seen():
    y = jnp.array([0, 1, 0, 1, 9, 0])
    outputs = jax.nn.one_hot(jnp.array([1, 1, 0, 0, 0, 0]), 2)
    figures = by_instance(outputs, y, jnp.array([1.0, 1, 1, 1, 0, 1]))
    assert figures == {"instance_1": 0.5, "instance_2": 0.5, "instance_3": 1.0}
    third = by_instance(jnp.tile(outputs, (4, 1)), jnp.tile(y, 4), jnp.ones(24))
    assert set(third) == {f"instance_{k}" for k in range(1, 11)}


def test_a_report_shows_accuracy_by_instance_where_asked():
    learner, task = lstm(BARE, Categorical(), hidden=5, shuffle=False), Task(batch(6), batch(3, 2))
    params, source = start(learner, task.support), FixedTasks(jax.tree.map(lambda leaf: leaf[None], task))
    report = evaluate(learner, params, source, KEY, tasks=1, metrics=("instance_2",))
    expected = learner.loss(params, task, KEY)[1]["instance_2"]
    np.testing.assert_allclose(report.figures["instance_2"].mean, expected, rtol=1e-6)
    assert "instance_1" not in report.figures
    with pytest.raises(
        ValueError, match=r"metrics must be names of the loss.s metrics on these tasks, nll, accuracy.*, got instance_7"
    ):
        evaluate(learner, params, source, KEY, tasks=1, metrics=("instance_7",))


def test_bad_input_is_named():
    for factory in (mann, ntm):
        with pytest.raises(ValueError, match="heads from 0 to slots, got slots=6, width=4, heads=7"):
            factory(BARE, Categorical(), **SMALL | {"heads": 7})
    with pytest.raises(ValueError, match="hidden must be an integer of at least 1, got 0"):
        lstm(BARE, Categorical(), hidden=0)
