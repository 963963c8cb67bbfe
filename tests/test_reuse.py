"""The study of feature reuse: similarities have their invariances, and nothing moves where nothing can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import subspace_angles

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.types import Call
from metaprior.learners import make_learner
from metaprior.networks import conv4, mlp, resnet12
from metaprior.networks.frozen import frozen, layer_names
from metaprior.studies import alike, reuse
from metaprior.studies.reuse import Subject, ends, outputs_of
from metaprior.studies.similarity import canonical_correlations, cca, cka
from metaprior.tasks import class_pool, sinusoid

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


# -- similarities ------------------------------------------------------------------------------------------------------


def orthogonal(p):
    return np.linalg.qr(RNG.normal(size=(p, p)))[0]


def test_cka_ignores_orthogonal_maps_and_scale_and_nothing_else():
    x = RNG.normal(size=(60, 8)) * np.arange(1, 9)
    for debiased in (False, True):
        assert cka(x, 3 * x @ orthogonal(8) + 5, debiased=debiased) == pytest.approx(1, abs=1e-12)
        assert cka(x, x @ RNG.normal(size=(8, 8)), debiased=debiased) < 0.95
    assert cca(x, x @ RNG.normal(size=(8, 8)) + 5) == pytest.approx(1, abs=1e-9)


def test_two_forms_of_cka_and_the_u_statistic():
    x, y = RNG.normal(size=(30, 5)), RNG.normal(size=(30, 7)) + RNG.normal(size=(30, 1))
    a, b = x - x.mean(0), y - y.mean(0)
    frobenius = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert cka(x, y, debiased=False) == pytest.approx(frobenius, abs=1e-12)

    def hsic(k, m):
        """The unbiased estimator in the words of its paper."""
        n, (k, m) = len(k), (g - np.diag(np.diag(g)) for g in (k, m))
        one = np.ones(n)
        cross = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ m @ one
        return (np.trace(k @ m) + cross) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    assert cka(x, y) == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)), abs=1e-12)


def test_few_rows_make_unrelated_layers_look_alike_but_for_the_debiased_cka():
    pairs = [(RNG.normal(size=(25, 64)), RNG.normal(size=(25, 64))) for _ in range(20)]
    assert min(cca(x, y) for x, y in pairs) == pytest.approx(1, abs=1e-9)
    assert np.mean([cka(x, y, debiased=False) for x, y in pairs]) > 0.7
    assert abs(np.mean([cka(x, y) for x, y in pairs])) < 0.1


def test_canonical_correlations_are_scipys_and_skip_dead_columns():
    x, y = RNG.normal(size=(50, 4)), RNG.normal(size=(50, 6))
    y[:, 0] += x[:, 1]
    angles = subspace_angles(x - x.mean(0), y - y.mean(0))
    np.testing.assert_allclose(canonical_correlations(x, y), np.cos(angles)[::-1], atol=1e-9)
    dead = np.concatenate([x, np.ones((50, 3))], 1)
    np.testing.assert_allclose(canonical_correlations(dead, y), canonical_correlations(x, y), atol=1e-9)
    large = x * [100, 1, 0.1, 0.1]
    assert len(canonical_correlations(large, y, 0.99)) == 1
    assert np.isnan(cca(np.ones((9, 2)), y[:9]))
    assert np.isnan(cka(np.ones((9, 2)), y[:9]))


def test_similarities_refuse():
    with pytest.raises(
        ValueError, match=r"must be \[n, p\] and \[n, q\] of the same n, got shapes \(5, 2\) and \(6, 2\)"
    ):
        cka(np.ones((5, 2)), np.ones((6, 2)))
    with pytest.raises(ValueError, match="at least 4 rows, got 3"):
        cka(np.ones((3, 2)), np.ones((3, 2)))


# -- looking into a network --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "shape", "expected"),
    [
        (mlp(2, (5, 4)), (3,), {"layer1": (6, 5), "layer2": (6, 4), "head": (6, 2)}),
        (conv4(3, 4, 2), (8, 8, 1), {"block1": (6, 4, 4, 4), "block2": (6, 2, 2, 4), "head": (6, 3)}),
        (resnet12(3, (4, 6)), (16, 16, 1), {"block1": (6, 8, 8, 4), "block2": (6, 4, 4, 6), "head": (6, 3)}),
    ],
)
def test_layers_are_what_the_next_one_reads(network, shape, expected):
    x = jax.random.normal(KEY, (6, *shape))
    params = network.init(KEY, x)
    found = jax.jit(lambda p: outputs_of(lambda x, call: network.outputs(p, x, call), x))(params)
    assert {name: rows.shape for name, rows in found.layers.items()} == expected
    assert layer_names(lambda x, call: network.outputs(params, x, call), x) == list(expected)
    np.testing.assert_allclose(found.layers["head"], network.apply(params, x), atol=1e-5)
    np.testing.assert_allclose(found.features, network.features(params, x), atol=1e-5)


def test_a_layer_can_be_replaced():
    network, x = mlp(1, (4,)), jnp.ones((2, 3))
    params = network.init(KEY, x)
    call = Call(layer=lambda name, s: 0 * s if name == "layer1" else s + 1)
    np.testing.assert_allclose(network.apply(params, x, call), params["head"]["b"] + jnp.ones((2, 1)))


@pytest.mark.slow
def test_frozen_layers_have_no_gradient_and_others_all_of_theirs():
    network, x = conv4(3, 4, 2), jax.random.normal(KEY, (4, 8, 8, 1))
    params = network.init(KEY, x)

    def gradient(model):
        return jax.grad(lambda p: (model.apply(p, x) ** 2).sum())(params)

    whole, part = gradient(network), gradient(frozen(network, {"block1": False, "head": True}))
    assert all(not leaf.any() for leaf in part["block1"].values())
    for name in ("block2", "head"):
        jax.tree.map(np.testing.assert_array_equal, part[name], whole[name])


# -- the study ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool():
    patterns = RNG.integers(60, 195, (12, 1, 8, 8, 1))
    images = patterns + RNG.integers(-20, 20, (12, 8, 8, 8, 1))
    return class_pool(images.reshape(-1, 8, 8, 1).astype(np.uint8), [8] * 12, way=3, shot=2, query=4)


NETWORK = mlp(3, (8, 6), "tanh")
NAMES = ["layer1", "layer2", "head"]


def subject(name, source, network=NETWORK, likelihood=Categorical(), **options):
    task = jax.tree.map(lambda leaf: leaf[0], source.sample(KEY, 1))

    def make(model):
        return make_learner(name, model, likelihood, **options)

    return Subject(make, network, make(network).init(KEY, task))


def means(layers, part):
    return [getattr(layer, part).mean for layer in layers.values()]


@pytest.mark.slow
def test_without_steps_nothing_changes(pool):
    found = reuse(subject("maml", pool, steps=0), pool, KEY, tasks=2)
    assert list(found.layers) == NAMES
    for part in ("cka", "plain_cka", "cca", "svcca", "cosine"):
        np.testing.assert_allclose(means(found.layers, part), 1, atol=1e-9)
    assert means(found.layers, "change") == [0, 0, 0]
    assert len({figure.mean for figure in found.frozen}) == 1
    assert found.nil["theta"].mean == found.nil["phi"].mean
    for control in ("other task", "shuffled labels", "untrained"):
        np.testing.assert_allclose([figure.mean for figure in found.controls[control].values()], 1, atol=1e-9)
    assert found.controls["unrelated"]["layer2"].mean < 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("maml", {}),
        ("meta_sgd", {}),
        ("imaml", {"steps": 2}),
        ("amortized_bml", {"steps": 2}),
        ("gem_bml", {"steps": 2}),
    ],
)
def test_freezing_is_a_mask_on_the_update(pool, name, options):
    own = subject(name, pool, rate=0.3, **options)
    task = jax.tree.map(lambda leaf: leaf[0], pool.sample(KEY, 1))

    @jax.jit
    def phi(moves):
        part = own.make(frozen(NETWORK, dict(zip(NAMES, moves, strict=True))))
        return [at.phi for at in ends(part, own.params, task.support, KEY)]

    before, whole = phi(jnp.array([True, True, True]))
    masked = phi(jnp.array([False, True, True]))[1]
    jax.tree.map(np.testing.assert_array_equal, masked["layer1"], before["layer1"])
    assert all(np.abs(masked[n]["w"] - before[n]["w"]).max() > 1e-5 for n in NAMES[1:])
    if name in ("maml", "meta_sgd"):  # one step
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), masked, whole | {"layer1": before["layer1"]}
        )
    jax.tree.map(np.testing.assert_array_equal, phi(jnp.array([False, False, False]))[1], before)


@pytest.mark.slow
def test_a_context_changes_the_outputs_of_layers_and_none_of_their_parameters(pool):
    found = reuse(subject("cavia", pool, steps=2, rate=0.5), pool, KEY, tasks=2, untrained=False)
    assert means(found.layers, "change") == [0, 0, 0]
    assert len(found.frozen) == 1
    assert found.layers["layer1"].cka.mean < 1 - 1e-6


@pytest.mark.slow
def test_layers_of_a_network_by_the_supports_statistics_are_the_querys(pool):
    own = subject("maml", pool, conv4(3, 4, 1, norm="task"), steps=1, rate=0.5)
    task = jax.tree.map(lambda leaf: leaf[0], pool.sample(KEY, 1))
    _, after = ends(own.make(own.model), own.params, task.support, KEY)
    inside = outputs_of(after.network, task.query.x)
    assert inside.layers["block1"].shape[0] == len(task.query.y)
    learner = own.make(own.model)
    predicted = learner.predict(own.params, learner.adapt(own.params, task.support, KEY), task.query.x, KEY)
    np.testing.assert_allclose(jax.nn.log_softmax(inside.layers["head"]), predicted.log_probs[0], atol=1e-5)


@pytest.mark.slow
def test_the_network_at_the_mean_predicts_what_the_learner_predicts():
    source = sinusoid(test_query=5).test
    task = jax.tree.map(lambda leaf: leaf[0], source.sample(KEY, 1))
    for name in ("anil", "meta_sgd", "cavia", "reptile"):
        own = subject(name, source, mlp(1, (6,)), Gaussian(1.0), rate=0.02)
        learner = own.make(own.model)
        posterior = learner.adapt(own.params, task.support, KEY)
        at = learner.at_mean(own.params, posterior)
        predicted = learner.predict(own.params, posterior, task.query.x, KEY).mean()
        np.testing.assert_allclose(at.network(task.query.x), predicted, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_regression_and_two_networks():
    source = sinusoid(test_query=12).test
    first = subject("maml", source, mlp(1, (6, 6)), Gaussian(1.0), steps=1)
    found = reuse(first, source, KEY, tasks=2, untrained=False)
    assert list(found.controls) == ["other task", "shuffled labels"]
    assert found.metric == "mse"
    assert found.nil == {}
    assert not found.layers["layer1"].enough
    same = alike(first, first, source, KEY, tasks=2)
    np.testing.assert_allclose([figure.mean for figure in same.after.values()], 1, atol=1e-9)
    task = jax.tree.map(lambda leaf: leaf[0], source.sample(KEY, 1))
    second = first._replace(params=first.make(first.model).init(jax.random.key(7), task))
    other = alike(first, second, source, KEY, tasks=2)
    assert list(other.before) == ["layer1", "layer2", "head"]
    assert other.before["layer2"].mean < 1 - 1e-4


@pytest.mark.slow
def test_reuse_refuses(pool):
    with pytest.raises(ValueError, match="without `path` or `at_mean`"):
        reuse(subject("protonet", pool), pool, KEY)
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        reuse(subject("maml", pool), pool, KEY, tasks=0)
    few = sinusoid(test_query=3).test
    with pytest.raises(ValueError, match=r"at least 4 query examples, .* got 3"):
        reuse(subject("maml", few, mlp(1, (4,)), Gaussian(1.0)), few, KEY)
    source = sinusoid(test_query=5).test
    with pytest.raises(ValueError, match="steps move them"):
        reuse(subject("meta_lstm", source, mlp(1, (4,)), Gaussian(1.0), steps=2), source, KEY, tasks=1)
