"""Exact zeros in the optimisers: dead ReLU units, an input column of zeros, a head of zeros."""

import jax
import jax.numpy as jnp
import optax
import pytest

from metaprior.core.likelihoods import Gaussian
from metaprior.core.types import Batch, Task
from metaprior.inference.descent import NO_META_GRADIENT, descend, make_optimizer
from metaprior.learners import make_learner
from metaprior.networks import mlp
from scenarios import deadened, finite


def accepted(name):
    """Whether `make_optimizer` takes this name of optax's."""
    try:
        make_optimizer(name, 0.01, differentiated=False)
    except (ValueError, TypeError):
        return False
    return True


OPTIMIZERS = [name for name in dir(optax) if name not in NO_META_GRADIENT and accepted(name)]


def task():
    kx, ky = jax.random.split(jax.random.key(1))
    x = jax.random.normal(kx, (12, 3)).at[:, 1].set(0.0).at[1].set(0.0).at[2].set(0.0)
    y = jax.random.normal(ky, (12, 1))
    return Task(Batch(x[:6], y[:6]), Batch(x[6:], y[6:]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_that_is_accepted_is_finite_through_steps_at_exact_zeros(optimizer):
    weights = {"dead": jnp.array([-1.0, 1.0]), "zero": jnp.zeros(3), "w": jnp.array([0.5, 0.0, 1.0]), "b": jnp.ones(2)}

    def loss(w):
        return ((w["zero"] @ w["w"] - 1) ** 2 + (jax.nn.relu(w["dead"] - 2) ** 2).sum() + (w["w"][2:] ** 2).sum()) / 2

    for steps in (1, 6):

        @jax.jit
        @jax.grad
        def gradient(start, steps=steps):
            end = descend(loss, start, make_optimizer(optimizer, 0.01), steps).phi
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(end))

        assert finite(gradient(weights))
        assert finite(gradient(jax.tree.map(jnp.zeros_like, weights)))


@pytest.mark.parametrize("optimizer", NO_META_GRADIENT)
def test_optimizers_without_a_derivative_at_zero_are_refused_where_the_meta_gradient_flows(optimizer):
    with pytest.raises(ValueError, match=f"finite meta-gradient through its steps, got '{optimizer}'"):
        make_learner("maml", mlp(1, (4,)), Gaussian(), optimizer=optimizer)
    make_learner("maml", mlp(1, (4,)), Gaussian(), optimizer=optimizer, first_order=True)


@pytest.mark.parametrize(
    ("learner", "name"),
    [("maml", name) for name in ("adam", "adamw", "nadam", "nadamw", "amsgrad")]
    + [(learner, "adam") for learner in ("anil", "bmaml", "amortized_bml")],
)
@pytest.mark.slow
def test_adam_and_its_kin_in_the_learners_whose_meta_gradient_flows_through_them(learner, name):
    made = make_learner(learner, mlp(1, (4,), "relu"), Gaussian(), optimizer=name)
    data = task()
    params = deadened(made.init(jax.random.key(2), data))
    assert finite(jax.jit(jax.grad(lambda p: made.loss(p, data, jax.random.key(3))[0]))(params))


@pytest.mark.parametrize("name", ["clip", "scale", "global_norm", "apply_updates", "scale_by_adam", "sgdd"])
def test_what_is_no_optimizer_is_refused(name):
    with pytest.raises(ValueError, match="optimizer must be the name"):
        make_optimizer(name, 0.1)


@pytest.mark.parametrize("name", ["kl_chaser", "amortized_bml", "gem_bml", "maml", "bmaml", "platipus"])
@pytest.mark.slow
def test_a_task_that_shows_nothing_has_a_finite_meta_gradient(name):
    learner, data = make_learner(name, mlp(1, (4,), "relu"), Gaussian()), task()
    empty = data._replace(support=data.support._replace(weight=jnp.zeros(6)))
    params = learner.init(jax.random.key(2), data)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: learner.loss(p, empty, jax.random.key(3))[0]))(params)
    assert finite((value, gradient))
    assert optax.tree.norm(gradient) < 1e4


@pytest.mark.parametrize("name", ["kl_chaser", "amortized_bml"])
@pytest.mark.slow
def test_many_dead_weights_and_few_examples_stay_finite_through_adam(name):
    # Each step answers a gradient of 0, and five of them multiply.
    learner, data = make_learner(name, mlp(1, (16,), "relu"), Gaussian(), optimizer="adam"), task()
    few = data._replace(support=data.support._replace(weight=jnp.arange(6) < 1.0))
    params = deadened(learner.init(jax.random.key(2), data))
    gradient = jax.jit(jax.grad(lambda p: learner.loss(p, few, jax.random.key(3))[0]))(params)
    assert finite(gradient)
    assert jnp.isfinite(optax.tree.norm(gradient))
