"""The options of an inner loop: one meaning in every learner that has them."""

from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaprior import Batch, Gaussian, Task, make_learner, mlp
from metaprior.core.options import parameters_of
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.variational import Variational
from metaprior.learners import LEARNERS
from scenarios import KEY

X = jnp.linspace(-1, 1, 6)[:, None]
TASK = Task(Batch(X, jnp.sin(2 * X)), Batch(X[::2], jnp.cos(X[::2])))
OPTIONS = {field.name for field in fields(InnerLoop)}
# Learners with inner steps, and the options of an inner loop that mean nothing to them.
WITHOUT = {
    "fomaml": {"first_order"},
    "meta_sgd": {"optimizer"},
    "lslr": {"optimizer"},
    "preconditioned": {"optimizer"},
    "imaml": {"first_order", "remat"},
    "reptile": {"first_order", "remat"},
    "llama": {"optimizer"},
    "fine_tune": {"first_order", "remat"},
    "gem_bml": {"first_order"},
    "gem_bml_plus": {"first_order"},
    "gem_mixture": {"first_order"},
    "kl_chaser": {"first_order"},
    "l2l": {"optimizer", "remat"},
    "meta_lstm": {"optimizer", "first_order", "remat"},
    "sib": {"optimizer", "first_order", "remat", "transductive"},
}
DESCENDING = ["maml", "taml", "anil", "nil", "cavia", "mr_maml", "amortized_bml", "bmaml", "platipus", "maml_noise"]
DESCENDING += ["mt_net", "mmaml", "hsml", "arml", *WITHOUT]


def learner_of(name, **options):
    small = {"minibatch": None} if name == "reptile" else {}
    return make_learner(name, mlp(1, (8,), "tanh"), Gaussian(0.3), **small, **options)


def gradient_of(learner):
    params = learner.init(KEY, TASK)
    return params, jax.grad(lambda p: learner.loss(p, TASK, KEY)[0])(params)


@pytest.mark.parametrize("name", DESCENDING)
def test_a_learner_has_all_options_that_mean_something_to_it(name):
    has = OPTIONS & parameters_of(LEARNERS[name]).keys()
    assert has == OPTIONS - WITHOUT.get(name, set())


def test_nobody_else_has_inner_steps():
    has = {name for name in LEARNERS if {"steps", "test_steps"} <= parameters_of(LEARNERS[name]).keys()}
    assert has == set(DESCENDING)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("cavia", {"rate": 1.0}), ("lslr", {"steps": 5}), ("imaml", {"optimizer": "line_search", "steps": 16}),
     ("reptile", {"steps": 5, "test_steps": 50, "optimizer": "adam"}), ("amortized_bml", {"optimizer": "sgd"}),
     ("l2l", {"steps": 100, "first_order": True}), ("fine_tune", {"steps": 100, "rate": 0.1})],
)  # fmt: skip
@pytest.mark.slow
def test_the_defaults_that_a_signature_shows_are_those_that_are_used(name, shown):
    parameters = parameters_of(LEARNERS[name])
    assert {option: parameters[option].default for option in shown} == shown
    if name == "l2l":
        return  # a hundred steps of an LSTM say no more
    plain, explicit = (learner_of(name, **options) for options in ({}, shown))
    params = plain.init(KEY, TASK)
    answers = [each.predict(params, each.adapt(params, TASK.support, KEY), X, KEY).mean() for each in (plain, explicit)]
    np.testing.assert_array_equal(*answers)
    other = learner_of(name, **shown | {"test_steps": 1 if name != "cavia" else 0})
    assert jnp.abs(other.predict(params, other.adapt(params, TASK.support, KEY), X, KEY).mean() - answers[0]).max() > 0


@pytest.mark.parametrize("name", ["anil", "cavia", "platipus", "bmaml", "amortized_bml"])
@pytest.mark.slow
def test_recomputed_steps_have_the_same_gradient(name):
    found = [gradient_of(learner_of(name, steps=6, rate=0.05, remat=remat))[1] for remat in (False, True)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)


@pytest.mark.parametrize("name", ["anil", "cavia", "llama", "platipus", "amortized_bml"])
@pytest.mark.slow
def test_first_order_changes_the_gradient_and_not_the_loss(name):
    through, stopped = (learner_of(name, steps=2, rate=0.1, first_order=first) for first in (False, True))
    params, exact = gradient_of(through)
    np.testing.assert_allclose(*(each.loss(params, TASK, KEY)[0] for each in (through, stopped)), rtol=1e-5)
    gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), exact, gradient_of(stopped)[1])
    assert max(jax.tree.leaves(gaps)) > 1e-4


def test_what_a_name_fixes_is_no_option():
    with pytest.raises(ValueError, match="first_order is not an option of fomaml"):
        learner_of("fomaml", first_order=False)
    with pytest.raises(ValueError, match="predictive is not an option of gem_bml_plus"):
        learner_of("gem_bml_plus", predictive=False)


@pytest.mark.slow
def test_an_optax_transformation_is_taken_as_it_is():
    by_name, by_hand = (learner_of("cavia", steps=3, optimizer=o) for o in ("sgd", optax.sgd(1.0)))
    params = by_name.init(KEY, TASK)
    np.testing.assert_array_equal(
        *(each.adapt(params, TASK.support, KEY).posterior.mean for each in (by_name, by_hand))
    )


@pytest.mark.parametrize("bad", [{"steps": -1}, {"rate": -0.1}, {"optimizer": "sdg"}, {"transductive": "no"}])
def test_options_are_checked(bad):
    for make in (InnerLoop, Variational):
        with pytest.raises(ValueError, match=next(iter(bad))):
            make(**bad)
