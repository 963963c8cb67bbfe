"""The knobs of a learner: what validation tasks can fit, in every learner alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaprior as mp
from metaprior.core.types import as_knobs
from metaprior.learners.builders.knobs import temperature_scaled, turned
from metaprior.learners.builders.metric import with_unseen
from metaprior.learners.registry import traits_of
from metaprior.tasks import two_circles
from scenarios import KEY

X = jnp.linspace(-1, 1, 6)[:, None]
TASK = mp.Task(mp.Batch(X, jnp.sin(2 * X)), mp.Batch(X[::2], jnp.cos(X[::2])))
LABELS = jnp.array([0, 1, 2, 0, 1, 2])
CLASSES = mp.Task(mp.Batch(X, LABELS), mp.Batch(X, LABELS))
OF_NUMBERS = [name for name in mp.LEARNERS if not traits_of(name).of_classes and not traits_of(name).reads_attributes]


def answer(learner, params, task=TASK):
    return learner.predict(params, learner.adapt(params, task.support, KEY), task.query.x, KEY)


@pytest.mark.parametrize("name", OF_NUMBERS)
@pytest.mark.slow
def test_the_noise_is_a_knob_of_every_learner_of_numbers(name):
    """It widens predictions by exactly what it adds, and moves nothing else."""
    small = traits_of(name).small
    learner = mp.make_learner(name, mp.mlp(1, (8,), "tanh"), mp.Gaussian(0.3), **small)
    assert dict(learner.knobs)["noise"] == pytest.approx(0.3)
    params = learner.init(KEY, TASK)
    plain, wide = answer(learner, params), answer(turned(learner, {"noise": 0.9}), params)
    np.testing.assert_allclose(wide.mean(), plain.mean(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(wide.variance() - plain.variance(), 0.81 - 0.09, rtol=1e-3)
    again = turned(turned(learner, {"noise": 0.9}), {"noise": 0.3})
    assert dict(again.knobs) == pytest.approx(dict(learner.knobs))
    np.testing.assert_allclose(answer(again, params).variance(), plain.variance(), rtol=1e-4)


@pytest.mark.slow
def test_training_does_not_know_of_the_knobs():
    learner = mp.learners.maml(mp.mlp(1, (8,)), mp.Gaussian(0.3), steps=2, rate=0.1, posterior=mp.implicit())
    params = learner.init(KEY, TASK)
    other = turned(learner, {"noise": 2.0, "temperature": 0.1})
    assert dict(other.knobs) == pytest.approx({"temperature": 0.1, "noise": 2.0})
    assert other.loss(params, TASK, KEY)[0] == learner.loss(params, TASK, KEY)[0]
    np.testing.assert_array_equal(
        *(each.adapt(params, TASK.support, KEY).posterior.mean["head"]["w"] for each in (learner, other))
    )


@pytest.mark.parametrize(
    ("rule", "knobs"),
    [(mp.point(), {"noise": 0.3}), (mp.point(noise=2.0), {"noise": 2.0}),
     (mp.implicit(), {"temperature": 1.0, "noise": 0.3}), (mp.laplace(precision=4.0), {"precision": 4.0, "noise": 0.3}),
     (mp.laplace(precision=None), {"noise": 0.3})],
)  # fmt: skip
def test_a_posterior_states_its_own(rule, knobs):
    learner = mp.learners.imaml(mp.mlp(1, (8,)), mp.Gaussian(0.3), posterior=rule)
    assert dict(learner.knobs) == pytest.approx(knobs)
    turned_to = turned(learner, dict.fromkeys(knobs, 0.7))
    assert dict(turned_to.knobs) == pytest.approx(dict.fromkeys(knobs, 0.7))
    with pytest.raises(ValueError, match=r"knobs must be among those of the learner \(.*noise.*\), got shift"):
        turned(learner, {"shift": 1.0})


def test_several_noises_are_no_scalar():
    learner = mp.learners.maml(mp.mlp(2, (8,)), mp.Gaussian(jnp.array([0.1, 0.2])))
    assert learner.knobs == ()
    assert as_knobs({"a": 1, "b": jnp.ones(2), "c": None}) == (("a", 1.0),)


def test_a_rule_of_ones_own_has_the_noise_if_it_takes_one():
    plain = mp.point()
    bare = mp.learners.maml(mp.mlp(1, (8,)), mp.Gaussian(0.3), posterior=type(plain)(plain.infer, lambda *a: 0))
    assert bare.knobs == ()
    assert bare.turn is None
    own = mp.learners.maml(mp.mlp(1, (8,)), mp.Gaussian(0.3), posterior=type(plain)(plain.infer, plain.predict))
    assert dict(own.knobs) == pytest.approx({"noise": 0.3})


@pytest.mark.slow
def test_temperatures_do_not_pile_up():
    learner = mp.learners.protonet(mp.mlp(4, (8,)), mp.Categorical(), way=3)
    params = learner.init(KEY, CLASSES)
    twice = turned(temperature_scaled(learner, 3.0), {"softmax_temperature": 2.0})
    expected = answer(temperature_scaled(learner, 2.0), params, CLASSES).mean()
    np.testing.assert_allclose(answer(twice, params, CLASSES).mean(), expected, rtol=1e-5)
    assert twice.knobs == (("softmax_temperature", 2.0),)


@pytest.mark.slow
def test_the_temperature_is_that_of_shown_classes_alone():
    inner = mp.learners.protonet(mp.mlp(4, (8,)), mp.Categorical(), way=4)
    learner = with_unseen(inner, 4)
    assert learner.knobs == (("softmax_temperature", 1.0),)
    params = learner.init(KEY, CLASSES)
    plain, soft = (
        answer(each, params, CLASSES).mean() for each in (learner, turned(learner, {"softmax_temperature": 5.0}))
    )
    np.testing.assert_allclose(soft[:, 3], plain[:, 3], rtol=1e-5)
    assert jnp.abs(soft[:, :3] - plain[:, :3]).max() > 1e-3


@pytest.mark.parametrize("norm", ["batch", "task"])
@pytest.mark.slow
def test_a_learner_over_task_norm_is_turned_as_any_other(norm):
    model = mp.conv4(3, filters=4, blocks=2, norm=norm)
    images = mp.Batch(jax.random.uniform(KEY, (6, 8, 8, 1)), LABELS)
    learner = mp.make_learner("maml", model, mp.Categorical(), posterior=mp.implicit())
    params, task = learner.init(KEY, mp.Task(images, images)), mp.Task(images, images)
    assert dict(learner.knobs) == {"temperature": 1.0}
    hot = turned(learner, {"temperature": 50.0})
    assert jnp.abs(answer(hot, params, task).mean() - answer(learner, params, task).mean()).max() > 1e-4
    by_hand = mp.make_learner("maml", model, mp.Categorical(), posterior=mp.implicit(temperature=50.0))
    np.testing.assert_allclose(answer(hot, params, task).mean(), answer(by_hand, params, task).mean(), rtol=1e-5)


def test_calibrate_returns_the_learner_with_its_knobs_fitted():
    splits = mp.tasks.sinusoid(shot=5, query=10)
    learner = mp.learners.maml(mp.mlp(1, (16,)), mp.Gaussian(), steps=2, posterior=mp.implicit())
    params = learner.init(KEY, jax.tree.map(lambda leaf: leaf[0], splits.train.sample(KEY, 1)))
    fitted = mp.calibrate(learner, params, splits.validation, KEY, tasks=20, evaluations=15)
    assert dict(fitted.knobs).keys() == {"temperature", "noise"}
    assert dict(fitted.knobs)["noise"] > 1.5  # an untrained network misses by the amplitude
    before, after = (
        mp.evaluate(each, params, splits.test, KEY, tasks=20).figures["nll"].mean for each in (learner, fitted)
    )
    assert after < before - 0.5


@pytest.mark.slow
def test_calibrate_gives_any_classifier_a_temperature():
    splits = two_circles()
    learner = mp.learners.maml(mp.mlp(2, (8,)), mp.Categorical(), steps=1, rate=2.0)
    params = learner.init(KEY, jax.tree.map(lambda leaf: leaf[0], splits.train.sample(KEY, 1)))
    fitted = mp.calibrate(learner, params, splits.validation, KEY, tasks=20)
    assert dict(fitted.knobs).keys() == {"softmax_temperature"}
    again = mp.calibrate(fitted, params, splits.validation, KEY, tasks=20)
    assert dict(again.knobs).keys() == {"softmax_temperature"}


def test_a_learner_without_a_knob_says_so():
    splits = mp.tasks.sinusoid(shot=5, query=10)
    learner = mp.learners.maml(mp.mlp(2, (8,)), mp.Gaussian(None))
    params = learner.init(KEY, jax.tree.map(lambda leaf: leaf[0], splits.train.sample(KEY, 1)))
    with pytest.raises(ValueError, match="learner must have a knob to fit, got none"):
        mp.calibrate(learner, params, splits.validation, KEY, tasks=5)
    with pytest.raises(ValueError, match="learner"):
        mp.calibrate(lambda knobs: learner, params, splits.validation, KEY)
