"""What every learner must pass. A learner that is in the registry is in here."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaprior.inference.posteriors import implicit, laplace
from metaprior.learners import LEARNERS, make_learner
from metaprior.likelihoods import Categorical, Gaussian
from metaprior.named import option_names
from metaprior.networks import mlp
from metaprior.tasks import sinusoid
from metaprior.types import Attributes, Batch, Learner, Task, TaskSource

WAY = 3
PRETRAINING_CLASSES = 12


def blobs(key, centres, labels):
    """A task of 2 + 3 examples around each centre, blurred most off the plane of the centres."""
    place = jnp.tile(jnp.arange(WAY), 5)
    noise = jax.random.normal(key, (place.size, 7))
    x = centres[place] + 0.3 * noise[:, :6] + 3 * noise[:, 6:] * jnp.array([1.0, -1, 1, -1, 1, -1])
    y, cut = labels[place], 2 * WAY
    return Task(Batch(x[:cut], y[:cut]), Batch(x[cut:], y[cut:]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blobs:
    """Classification: classes are blobs around centres on a fixed 2-plane in 6-d."""

    plane: jax.Array

    def sample(self, key, n):
        def one(key):
            k1, k2 = jax.random.split(key)
            return blobs(k2, 3 * jax.random.normal(k1, (WAY, 2)) @ self.plane, jnp.arange(WAY))

        return jax.vmap(one)(jax.random.split(key, n))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NamedBlobs:
    """The same plane, but always the same classes under labels of their own: plain classification, to pretrain by."""

    plane: jax.Array

    def sample(self, key, n):
        centres = 3 * jax.random.normal(jax.random.key(10), (PRETRAINING_CLASSES, 2)) @ self.plane

        def one(key):
            k1, k2 = jax.random.split(key)
            labels = jax.random.permutation(k1, PRETRAINING_CLASSES)[:WAY]
            return blobs(k2, centres[labels], labels)

        return jax.vmap(one)(jax.random.split(key, n))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DescribedBlobs:
    """The same plane; the support has a row of attributes a class, its centre, in place of examples."""

    plane: jax.Array

    def sample(self, key, n):
        def one(key):
            k1, k2 = jax.random.split(key)
            centres = 3 * jax.random.normal(k1, (WAY, 2)) @ self.plane
            classes = jnp.arange(WAY)
            return Task(Batch(Attributes(centres), classes), blobs(k2, centres, classes).query)

        return jax.vmap(one)(jax.random.split(key, n))


BLOBS = Blobs(jax.random.normal(jax.random.key(9), (2, 6)))
# What differs from the factory's defaults to make small problems learnable in a few steps.
OPTIONS = {
    "reptile": {"optimizer": "sgd", "rate": 0.02, "steps": 10, "test_steps": 10},
    "imaml": {"strength": 0.1, "steps": 16, "rate": 0.05},
    "llama": {"steps": 2, "rate": 0.02},
    "lslr": {"steps": 2, "rate": 0.02},
    "preconditioned": {"rank": 2, "rate": 0.02},
    "amortized_bml": {"steps": 3, "rate": 0.02, "draws": 4},
    "gem_bml": {"steps": 10, "rate": 0.02, "draws": 4},
    "gem_bml_plus": {"steps": 10, "rate": 0.02, "draws": 4},
    "gem_mixture": {"components": 2, "steps": 10, "rate": 0.02, "draws": 8},
    "kl_chaser": {"steps": 3, "rate": 0.02, "optimizer": "sgd", "draws": 4},
    "bmaml": {"particles": 3, "steps": 2, "rate": 0.05},
    "platipus": {"steps": 2, "rate": 0.02, "draws": 4},
    "maml_noise": {"steps": 2, "rate": 0.02, "draws": 4},
    "zero_shot": {"way": WAY, "normalise": False},
    "matching": {"temperature": 0.1},
    "cnp": {"width": 32, "encoder": (32,), "decoder": (32,)},
    "anp": {"width": 32, "encoder": (32,), "decoder": (32,), "heads": 4},
    "snail": {"filters": 8, "attention": ((8, 8), (8, 8), (8, 8))},
    "mann": {"hidden": 16, "slots": 16, "width": 8, "heads": 2},
    "lstm": {"hidden": 16},
    "ntm": {"hidden": 32, "slots": 16, "width": 8, "heads": 1},
    "gnn": {"layers": 2, "filters": 8},
    "l2l": {"start": "learned", "steps": 10, "unroll": 5},
}
SAMPLING = ("amortized_bml", "gem_bml", "gem_bml_plus", "gem_mixture", "kl_chaser")
# What makes a sampling learner's answers the same under another order of the classes: no noise, and no Adam to blow up
# what is left of it.
SILENT = {
    **{n: {"kl_weight": 0.0, "log_sd": -15.0, "optimizer": "sgd"} for n in SAMPLING},
    "platipus": {"log_sd": -15.0},
    "maml_noise": {"noise": 1e-6},
    "preconditioned": {"rank": 0},
}
CLASSIFIERS = ("nil", "protonet", "siamese", "zero_shot", "matching", "nearest_neighbour", "fine_tune", "gnn")
# Learners that are trained by plain classification, with labels of the classes' own.
PRETRAINED = ("nearest_neighbour", "fine_tune")
# Learners to which a class is its attributes.
DESCRIBED = ("zero_shot",)
# Learners whose network reads labels as inputs: that names mean nothing is taught by tasks, not built in.
READS_NAMES = ("cnp", "anp", "snail", "mann", "lstm", "ntm", "gnn")
# Learners to which the support is a sequence.
ORDERED = ("snail", "mann", "lstm", "ntm")
# The outer rate of Reptile multiplies phi - theta, not a gradient.
# imaml on sinusoids has gradients of up to 5,000, after which the end of an unclipped training is a matter of luck.
OUTER = {
    "reptile": optax.sgd(0.7),
    "imaml": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3)),
}
# Their steps are said by a network and follow no gradient at any rate: they imply no prior.
NO_DESCENT = ("l2l",)
# The factor by which 1,500 meta-steps of 8 tasks must lower the excess test nll; 0.75 where nothing is said.
FACTOR = {"nil": 0.8}
# Learners whose `jax.grad` is the derivative of their loss; the others' estimators are tested by their own identities.
ESTIMATORS = (
    "fomaml", "reptile", "imaml", "gem_bml", "gem_bml_plus", "gem_mixture", "kl_chaser", "bmaml", "l2l", "meta_lstm"
)  # fmt: skip
TRUE_GRADIENT = [name for name in LEARNERS if name not in ESTIMATORS]


@dataclass(frozen=True)
class Case:
    """A learner and a problem for it; what several tests run is traced and compiled once."""

    learner: Learner
    source: TaskSource

    def started(self, n=3):
        """n tasks, and params that have seen the first of them."""

        @jax.jit
        def start(source):
            tasks = source.sample(jax.random.key(1), n)
            return tasks, self.learner.init(jax.random.key(2), first(tasks))

        return start(self.source)

    @cached_property
    def start(self):
        return self.started()

    @cached_property
    def answer(self):
        """(params, support, x, key) -> the predictive mean."""
        return jax.jit(self.means)

    @cached_property
    def gradient(self):
        return jax.jit(jax.value_and_grad(self.loss))

    def means(self, params, support, x, key):
        return self.learner.predict(params, self.learner.adapt(params, support, key), x, key).mean()

    def loss(self, params, task, key):
        return self.learner.loss(params, task, key)[0]


def regression(name, **options):
    options = OPTIONS.get(name, {"rate": 0.02}) | options
    return Case(make_learner(name, mlp(1, (16, 16), "tanh"), Gaussian(), **options), sinusoid(shot=8, query=8).train)


def classification(name, **options):
    rate = {"rate": 0.3} if "rate" in option_names(LEARNERS[name]) else {}
    way = {"way": WAY} if name in PRETRAINED else {}
    options = rate | way | OPTIONS.get(name, {}) | options
    outputs = PRETRAINING_CLASSES if name in PRETRAINED else WAY
    source = DescribedBlobs(BLOBS.plane) if name in DESCRIBED else BLOBS
    return Case(make_learner(name, mlp(outputs, (16,), "tanh"), Categorical(), **options), source)


@lru_cache(maxsize=2)
def problem(name):
    """Tests of one learner run after one another (conftest.py) and share its case."""
    return classification(name) if name in CLASSIFIERS else regression(name)


def first(tasks):
    return jax.tree.map(lambda leaf: leaf[0], tasks)


def close(a, b, tolerance=2e-5):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(u, v, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_batch_of_tasks_is_its_tasks_one_by_one(name):
    case, keys = problem(name), jax.random.split(jax.random.key(3), 3)
    tasks, params = case.start
    together = (
        jax.jit(jax.vmap(case.means, (None, 0, 0, 0)))(params, tasks.support, tasks.query.x, keys),
        jax.jit(jax.vmap(case.loss, (None, 0, 0)))(params, tasks, keys),
    )
    for i in range(3):
        task, key = jax.tree.map(lambda leaf, i=i: leaf[i], tasks), keys[i]
        alone = case.answer(params, task.support, task.query.x, key), case.gradient(params, task, key)[0]
        close(alone, jax.tree.map(lambda leaf, i=i: leaf[i], together))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", TRUE_GRADIENT)
def test_the_meta_gradient_is_the_derivative_of_the_loss(name):
    case = problem.__wrapped__(name)  # of its own, in float64
    tasks, params = case.started(1)
    task, key = first(tasks), jax.random.key(4)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def loss(vector):
        return case.loss(unravel(vector), task, key)

    direction = jax.random.normal(jax.random.key(5), flat.shape)
    direction /= jnp.linalg.norm(direction)
    value, gradient = jax.jit(jax.value_and_grad(loss))(flat)
    assert jnp.isfinite(value)
    step, at = 1e-5, jax.jit(loss)
    finite = (at(flat + step * direction) - at(flat - step * direction)) / (2 * step)
    np.testing.assert_allclose(gradient @ direction, finite, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "make"),
    [(n, problem) for n in LEARNERS] + [(n, classification) for n in READS_NAMES if n not in CLASSIFIERS],
)
def test_a_small_budget_of_training_lowers_the_test_loss(name, make):
    case = make(name)
    learner, source, params = case.learner, case.source, case.start[1]
    optimizer = OUTER.get(name, optax.adam(5e-3))
    training = NamedBlobs(BLOBS.plane) if name in PRETRAINED else source

    def step(carry, key):
        params, state = carry
        batch = training.sample(key, 8)

        def mean_loss(p):
            return jax.vmap(case.loss, (None, 0, 0))(p, batch, jax.random.split(key, 8)).mean()

        update, state = optimizer.update(jax.grad(mean_loss)(params), state, params)
        return (optax.apply_updates(params, update), state), None

    @jax.jit
    def score(p):
        held_out = source.sample(jax.random.key(77), 50)

        def nll(task, key):
            posterior = learner.adapt(p, task.support, key)
            return -learner.predict(p, posterior, task.query.x, key).log_prob(task.query.y).mean()

        return jax.vmap(nll)(held_out, jax.random.split(jax.random.key(78), 50)).mean()

    run = jax.jit(lambda c: jax.lax.scan(step, c, jax.random.split(jax.random.key(6), 1500))[0][0])
    after = run((params, optimizer.init(params)))
    # The nll of a perfect answer: 0 of classes, that of a perfect mean under sd sqrt(1/2).
    floor = 0.0 if name in CLASSIFIERS or make is classification else 0.5 * np.log(np.pi)
    before, now = score(params) - floor, score(after) - floor
    assert now < FACTOR.get(name, 0.75) * before, f"{before:.3f} -> {now:.3f}"


@pytest.mark.parametrize("name", LEARNERS)
def test_a_meta_step_and_its_answers_are_programs_for_a_gpu_too(name):
    case = problem(name)
    tasks, params = case.start
    task, key = first(tasks), jax.random.key(4)
    for program, args in (
        (case.gradient, (params, task, key)),
        (case.answer, (params, task.support, task.query.x, key)),
    ):
        text = program.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert "metaprior_" not in text  # the kernels are a processor's


@pytest.mark.parametrize("name", LEARNERS)
def test_the_same_key_gives_the_same_bits(name):
    case = problem(name)
    tasks, params = case.start
    once, again = (case.gradient(params, first(tasks), jax.random.key(7)) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), once, again))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, case.started()[1]))


@pytest.mark.parametrize("name", LEARNERS)
def test_the_order_of_examples_does_not_matter(name):
    case = problem(name)
    tasks, params = case.start
    task, key, answer = first(tasks), jax.random.key(8), case.answer
    turn, back = (jax.random.permutation(k, task.support.y.shape[0]) for k in jax.random.split(key))
    shuffled = jax.tree.map(lambda leaf: leaf[turn], task.support)
    back = back[jnp.arange(task.query.y.shape[0]) % back.size] % task.query.y.shape[0]
    plain = answer(params, task.support, task.query.x, key)
    if name not in ORDERED:
        close(answer(params, shuffled, task.query.x, key), plain)
    close(answer(params, task.support, task.query.x[back], key), plain[back])


@pytest.mark.parametrize("name", [name for name in LEARNERS if name not in READS_NAMES])
def test_renaming_the_classes_renames_the_answers(name):
    case = classification(name, **SILENT.get(name, {}))
    tasks, params = case.start
    task, key, answer = first(tasks), jax.random.key(8), case.answer
    # An untrained head tells the classes apart only by its random start: start it equal for all of them.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "'head'" in str(path) and _is_weight(path) else leaf, params
    )
    rename = jnp.array([2, 0, 1])
    renamed = answer(params, task.support._replace(y=rename[task.support.y]), task.query.x, key)
    close(renamed[:, rename], answer(params, task.support, task.query.x, key), 1e-4)


def _is_weight(path):
    """Of theta, not of the rates or spreads beside it."""
    names = [getattr(k, "name", None) for k in path]
    return not {"rule", "log_sd", "log_sd_q"} & set(names)


@pytest.mark.parametrize("name", LEARNERS)
def test_padding_changes_nothing(name):
    case = problem(name)
    tasks, params = case.start
    (support, query), key = first(tasks), jax.random.key(8)
    n = support.y.shape[0]
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:2] + 1]), support)
    padded = padded._replace(weight=jnp.concatenate([jnp.ones(n), jnp.zeros(2)]))
    close(case.answer(params, padded, query.x, key), case.answer(params, support, query.x, key))


OWNERS = [n for n in LEARNERS if "posterior" in option_names(LEARNERS[n]) and n != "nil"]


@pytest.mark.parametrize(
    ("name", "rule"),
    [(n, r) for r in ("implicit", "laplace") for n in OWNERS if r == "laplace" or n not in NO_DESCENT],
)
def test_every_gradient_learner_owns_a_posterior(name, rule):
    make = {"implicit": implicit, "laplace": laplace}[rule]
    case, sampler = regression(name, posterior=make()), regression(name, posterior=make(draws=64))
    (tasks, params), learner, key = case.start, case.learner, jax.random.key(8)

    @jax.jit
    def answers(params, task):
        posterior, course = learner.adapt(params, task.support, key), learner.path(params, task.support, key)

        def at(posterior, x):
            return learner.predict(params, posterior, x, key)

        near, far = (at(posterior, x).variance().mean() - 0.5 for x in (task.support.x, jnp.full((1, 1), 12.0)))
        along = jax.vmap(lambda p: at(p, task.query.x).mean())(course)
        drawn = sampler.means(params, task.support, task.support.x, key)
        return near, far, along, at(posterior, task.query.x).mean(), drawn

    near, far, along, end, drawn = answers(params, first(tasks))
    assert 0 < near < far
    assert jnp.isfinite(drawn).all()
    # The course of posteriors goes from before the first step to after the last, and all of them predict.
    assert jnp.isfinite(along).all()
    close(along[-1], end)


@pytest.mark.parametrize("name", NO_DESCENT)
def test_what_follows_no_gradient_implies_no_posterior(name):
    case = regression(name, posterior=implicit())
    tasks, params = case.start
    with pytest.raises(ValueError, match=r"must be 'laplace' or 'point' .* imply no prior"):
        case.learner.adapt(params, first(tasks).support, jax.random.key(8))


@pytest.mark.parametrize("name", LEARNERS)
def test_bad_input_is_named(name):
    option = max(option_names(LEARNERS[name])[2:], key=len)
    with pytest.raises(ValueError, match=f"did you mean '{option}'"):
        make_learner(name, mlp(), Gaussian(), **{option[:-1]: 0.1})
    if name not in CLASSIFIERS:
        case = problem(name)
        tasks, params = case.start
        support = first(tasks).support
        with pytest.raises(ValueError, match="y: the outputs predict"):
            case.learner.adapt(params, support._replace(y=support.y[:, 0]), jax.random.key(0))


def test_unknown_learners_are_suggested():
    with pytest.raises(ValueError, match="did you mean 'maml'"):
        make_learner("mamml", mlp(), Gaussian())
