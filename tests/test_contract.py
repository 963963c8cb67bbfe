"""What every learner must pass. A learner that is in the registry is in here."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.named import option_names
from metaprior.core.types import Attributes, Batch, Learner, Task, TaskSource
from metaprior.inference.posteriors import implicit, laplace
from metaprior.learners import LEARNERS, make_learner
from metaprior.learners.registry import learners_having, traits_of
from metaprior.networks import linear, mlp
from metaprior.tasks import sinusoid
from metaprior.training.loop import Training, outer_optimizer
from scenarios import deadened, finite

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
CLASSIFIERS = [name for name in LEARNERS if traits_of(name).of_classes or traits_of(name).pretrained]
TRUE_GRADIENT = [name for name in LEARNERS if not traits_of(name).estimates]


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


def options_of(name, rate, options):
    """What differs from the factory's defaults: the learner's own small options, or a rate if it has one."""
    small = traits_of(name).small or ({"rate": rate} if "rate" in option_names(LEARNERS[name]) else {})
    return {**small, **options}


def regression(name, **options):
    options = options_of(name, 0.02, options)
    return Case(make_learner(name, mlp(1, (16, 16), "tanh"), Gaussian(), **options), sinusoid(shot=8, query=8).train)


def classification(name, **options):
    told = traits_of(name)
    way = {"way": WAY} if told.pretrained or told.reads_attributes else {}
    options = way | options_of(name, 0.3, options)
    outputs = PRETRAINING_CLASSES if told.pretrained else WAY
    source = DescribedBlobs(BLOBS.plane) if told.reads_attributes else BLOBS
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
    [(n, problem) for n in LEARNERS]
    + [(n, classification) for n in learners_having("reads_names") if n not in CLASSIFIERS],
)
def test_a_small_budget_of_training_lowers_the_test_loss(name, make):
    case = make(name)
    learner, source, params = case.learner, case.source, case.start[1]
    optimizer = outer_optimizer(Training(steps=1500, **{"rate": 5e-3, "clip_norm": 1.0, **traits_of(name).training}))
    training = NamedBlobs(BLOBS.plane) if traits_of(name).pretrained else source

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

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    # The nll of a perfect answer: 0 of classes, that of a perfect mean under sd sqrt(1/2).
    floor = 0.0 if name in CLASSIFIERS or make is classification else 0.5 * np.log(np.pi)
    carry, before = (params, optimizer.init(params)), score(params) - floor
    for keys in jax.random.split(jax.random.key(6), (6, 250)):
        carry = run(carry, keys)
        now = score(carry[0]) - floor
        if now < 0.7 * before:  # well below: more steps would show no more
            break
    assert now < 0.8 * before, f"{before:.3f} -> {now:.3f}"


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
    if not traits_of(name).ordered:
        close(answer(params, shuffled, task.query.x, key), plain)
    close(answer(params, task.support, task.query.x[back], key), plain[back])


@pytest.mark.parametrize("name", [name for name in LEARNERS if not traits_of(name).reads_names])
def test_renaming_the_classes_renames_the_answers(name):
    case = classification(name, **traits_of(name).silent)
    tasks, params = case.start
    task, key, answer = first(tasks), jax.random.key(8), case.answer
    if not traits_of(name).of_classes:
        # An untrained head of logits tells the classes apart only by its random start: start it equal for all of them.
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.zeros_like(leaf) if "'head'" in str(path) and _is_weight(path) else leaf, params
        )
    rename = jnp.array([2, 0, 1])
    plain = answer(params, task.support, task.query.x, key)
    renamed = answer(params, task.support._replace(y=rename[task.support.y]), task.query.x, key)
    assert abs(plain - 1 / WAY).max() > 0.01  # the answer depends on the labels, or this would say nothing
    close(renamed[:, rename], plain, 1e-4)


def _is_weight(path):
    """Of theta, not of the rates, spreads or encoders beside it."""
    names = [getattr(k, "name", None) for k in path]
    return not {"rule", "log_sd", "log_sd_q", "bottleneck"} & set(names)


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
    [(n, r) for r in ("implicit", "laplace") for n in OWNERS if r == "laplace" or traits_of(n).descends],
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

        along = jax.vmap(lambda p: at(p, task.query.x).mean())(course)
        drawn = sampler.means(params, task.support, task.support.x, key)
        return along, at(posterior, task.query.x).mean(), drawn

    along, end, drawn = answers(params, first(tasks))
    assert jnp.isfinite(drawn).all()
    # The course of posteriors goes from before the first step to after the last, and all of them predict.
    assert jnp.isfinite(along).all()
    close(along[-1], end)


@pytest.mark.parametrize(
    ("name", "rule"),
    [(n, r) for r in ("implicit", "laplace") for n in OWNERS if r == "laplace" or traits_of(n).descends],
)
def test_more_examples_leave_less_uncertainty(name, rule):
    """On a linear map, whose derivative does not change with what was learned: after eight examples and after one."""
    make = {"implicit": implicit, "laplace": laplace}[rule]
    learner = make_learner(name, linear(init_scale=1.0), Gaussian(), posterior=make(), **options_of(name, 0.02, {}))
    x, key = jax.random.normal(jax.random.key(1), (16, 2)), jax.random.key(8)
    task = Task(Batch(x[:8], x[:8, :1]), Batch(x[8:], x[8:, :1]))
    params = learner.init(key, task)

    @jax.jit
    def variance(weight):
        posterior = learner.adapt(params, task.support._replace(weight=weight), key)
        return (learner.predict(params, posterior, task.support.x, key).variance() - 0.5).mean()

    one, eight = variance((jnp.arange(8) < 1) * 1.0), variance(jnp.ones(8))
    assert 0 < eight < 0.95 * one


@pytest.mark.parametrize("name", LEARNERS)
def test_with_its_default_options_and_a_relu_network_a_learner_keeps_the_contract(name):
    """Tasks together and alone, padded, in another order, and by the same key; its meta-gradient is finite."""
    told = traits_of(name)
    model = mlp(WAY if name in CLASSIFIERS else 1, (8,), "relu")
    way = {"way": WAY} if told.reads_attributes else {}
    learner = make_learner(name, model, Categorical() if name in CLASSIFIERS else Gaussian(), **way)
    case = Case(learner, problem(name).source)
    tasks, params = case.start
    (support, query), key, n = first(tasks), jax.random.key(8), len(first(tasks).support.y)
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:2] + 1]), support)
    padded = padded._replace(weight=jnp.concatenate([jnp.ones(n), jnp.zeros(2)]))
    shuffled = jax.tree.map(lambda leaf: leaf[jnp.arange(n)[::-1]], support)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), support, shuffled)
    # Two programs in place of one each: the answer to a padded task, alone, and those to both orders, together.
    alone = case.answer(params, padded, query.x, key)
    together = jax.jit(jax.vmap(case.means, (None, 0, None, None)))(params, both, query.x, key)
    close(together[0], alone, 1e-4)
    if not told.ordered:
        close(together[1], alone, 1e-4)
    (value, gradient), again = (case.gradient(params, first(tasks), key) for _ in range(2))
    assert finite((value, gradient))
    # Dead units, a head of zeros, and inputs of zeros: gradients that are exactly zero.
    x = jax.tree.map(lambda leaf: leaf.at[1:].set(0).at[:, 1:2].set(0), support.x)
    assert finite(case.gradient(deadened(params), Task(support._replace(x=x), query), key))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), (value, gradient), again))


@pytest.mark.parametrize("name", [n for n in LEARNERS if not traits_of(n).descends])
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
        with pytest.raises(ValueError, match="y must have shape"):
            case.learner.adapt(params, support._replace(y=support.y[:, 0]), jax.random.key(0))


def test_unknown_learners_are_suggested():
    with pytest.raises(ValueError, match="did you mean 'maml'"):
        make_learner("mamml", mlp(), Gaussian())
