"""Grouped tables and whole hierarchies: what NUTS, restricted likelihood and learners say of new groups."""

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.cli import main
from metaprior.cli.truth import truth
from metaprior.core.extras import MissingExtra
from metaprior.core.likelihoods import Gaussian, Normals
from metaprior.core.types import Batch
from metaprior.inference.gaussian import DiagonalGaussian
from metaprior.inference.particles import systematic
from metaprior.learners import llama, make_learner
from metaprior.learners.llama import Prior
from metaprior.networks import known_noise, linear, mlp
from metaprior.referees import nuts
from metaprior.referees.conjugate import empirical_bayes, exact_posterior, exact_predictive
from metaprior.referees.grouped import GroupScores, folds, held_out_tasks, judge_groups, pooled, rows_of_source
from metaprior.referees.mixed import Rows, mixed_by_nuts, mixed_by_statsmodels, new_group, with_intercept, within_sd
from metaprior.referees.nuts import NOISE, Agreement, Draws, Learned, learned_against_nuts, new_task, prior_agreement
from metaprior.tasks import eight_schools, eight_schools_reference, radon_all
from metaprior.tasks.synthetic.linear_gaussian import Hierarchy

KEY = jax.random.key(0)
THETA = Hierarchy(jnp.asarray([0.5, -1.0]), jnp.asarray([[1.0, 0.3], [0.3, 0.5]]), jnp.asarray(0.4))


def simulated(groups: int, rows: int) -> Rows:
    """A table of THETA's mixed model."""
    kp, kx, ke = jax.random.split(jax.random.key(5), 3)
    phi = THETA.mean + jax.random.normal(kp, (groups, 2)) @ jnp.linalg.cholesky(THETA.covariance).T
    x = jax.random.normal(kx, (groups, rows, 1))
    noise = THETA.noise * jax.random.normal(ke, (groups, rows, 1))
    y = phi[:, None, :1] + x * phi[:, None, 1:] + noise
    return Rows(x.reshape(-1, 1), y.reshape(-1, 1), jnp.repeat(jnp.arange(groups), rows))


@pytest.mark.slow
def test_learned_prior_agrees_with_nuts_on_the_whole_hierarchy(monkeypatch):
    """Gaussian observations, where LLAMA's evidence is exact: its optimum lies where NUTS has its posterior."""
    quick = {"objective": "evidence", "learn_precision": True, "steps": 30, "test_steps": 60, "rate": 0.3}
    monkeypatch.setattr(llama, "traits", replace(llama.traits, referees={"nuts prior": quick}))
    found = learned_against_nuts("gaussian", ("llama",), steps=200, seen=40, tasks=20)
    prior, posterior = found["llama"]
    assert prior.bias < 0.1
    assert prior.sd_ratio == pytest.approx(1, abs=0.12)
    assert prior.coverage == 1
    assert posterior.bias < 0.15
    assert posterior.sd_ratio == pytest.approx(1, abs=0.05)
    assert found["truth"][1].bias == 0
    assert found["truth"][1].coverage > 0.7


@pytest.mark.slow
def test_new_tasks_of_a_known_prior_are_exact():
    """All draws the same prior: the weighted draws must follow the conjugate posterior."""
    mean, sd = jnp.asarray([1.0, -1.0]), jnp.asarray([0.5, 2.0])
    x = jax.random.normal(KEY, (4, 2))
    support = Batch(x, x @ jnp.asarray([[1.5], [0.5]]))
    hierarchy = Draws(jnp.tile(mean, (2000, 1)), jnp.tile(sd, (2000, 1)), jnp.zeros((2000, 0, 2)))
    draws = new_task("gaussian", hierarchy, support, KEY, each=100)
    exact = exact_posterior(Hierarchy(mean, jnp.diag(sd**2), jnp.asarray(NOISE)), support)
    assert np.allclose(draws.mean(0), exact.mean, atol=0.03)
    assert np.allclose(np.cov(draws.T), exact.covariance, atol=0.02)


def test_prior_agreement_by_hand():
    draws = Draws(jnp.linspace(0, 2, 101)[:, None], jnp.linspace(1, 3, 101)[:, None], jnp.zeros((101, 0, 1)))
    found = prior_agreement(np.asarray([2.0]), np.asarray([1.0]), draws)
    assert found.bias == pytest.approx(0.5)  # 1 away, in prior sds of 2
    assert found.sd_ratio == pytest.approx(0.5)
    assert found.coverage == 0
    point = prior_agreement(np.asarray([1.0]), None, draws)
    assert np.isnan(point.sd_ratio)
    assert point.coverage == 1


def test_systematic_draws_follow_the_weights():
    rows = systematic(KEY, jnp.asarray([0.1, 0.0, 0.6, 0.3]), 1000)
    assert np.abs(np.bincount(rows, minlength=4) - [100, 0, 600, 300]).max() <= 1


@pytest.fixture(scope="module")
def group():
    rows = simulated(1, 5)
    return Batch(rows.x[:3], rows.y[:3]), rows.x[3:]


@pytest.mark.slow
def test_a_new_group_under_one_draw_is_conjugate(group):
    support, x = group
    found = new_group(jax.tree.map(lambda a: a[None], THETA), support, x, KEY)
    exact = exact_predictive(THETA, support._replace(x=with_intercept(support.x)), with_intercept(x))
    assert np.allclose(found.mean()[:, 0], exact.mean, atol=1e-5)
    assert np.allclose(found.variance()[:, 0], jnp.diagonal(exact.covariance), atol=1e-5)


@pytest.mark.slow
def test_the_support_weighs_the_draws(group):
    """Padding counts for nothing, whatever a draw's noise; a draw that the support denies is not heard."""
    support, x = group
    other = Hierarchy(THETA.mean + 0.3, THETA.covariance, THETA.noise * 2)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), THETA, other)
    padded = Batch(jnp.pad(support.x, ((0, 4), (0, 0)), constant_values=9.0), jnp.pad(support.y, ((0, 4), (0, 0))),
                   jnp.asarray([1.0] * 3 + [0.0] * 4))  # fmt: skip
    found, same = new_group(both, support, x, KEY), new_group(both, padded, x, KEY)
    assert np.allclose(found.means, same.means, atol=1e-4)
    far = Hierarchy(THETA.mean + 100, THETA.covariance, THETA.noise)
    denied = new_group(jax.tree.map(lambda a, b: jnp.stack([a, b]), THETA, far), support, x, KEY)
    alone = new_group(jax.tree.map(lambda a: a[None], THETA), support, x, KEY)
    assert np.allclose(denied.mean(), alone.mean(), atol=1e-4)
    nothing = new_group(both, padded._replace(weight=jnp.zeros(7)), x, KEY)
    assert np.allclose(nothing.mean()[:, 0], with_intercept(x) @ (THETA.mean + 0.15), atol=1e-4)


@pytest.fixture(scope="module")
def table():
    return simulated(30, 6)


@pytest.fixture(scope="module")
def optimum(table):
    """The maximum of the marginal likelihood, by EM."""
    batches = Batch(with_intercept(table.x).reshape(30, 6, 2), table.y.reshape(30, 6, 1))
    return empirical_bayes(THETA, batches, 300)


def test_nuts_finds_the_mixed_model(table, optimum):
    found = mixed_by_nuts(table, KEY, draws=300, warmup=300)
    assert np.allclose(found.mean.mean(0), optimum.mean, atol=0.1)
    assert np.allclose(found.covariance.mean(0), optimum.covariance, atol=0.25)
    assert found.noise.mean() == pytest.approx(float(optimum.noise), abs=0.04)
    assert 0.5 < (found.mean[:, 0].std() / (optimum.covariance[0, 0] / 30) ** 0.5) < 2


def test_statsmodels_finds_the_mixed_model(table, optimum):
    pytest.importorskip("statsmodels")
    found = jax.tree.map(lambda a: a[0], mixed_by_statsmodels(table))
    assert np.allclose(found.mean, optimum.mean, atol=0.01)
    # Restricted likelihood counts one degree of freedom a mean, so its variances are about 1/30 larger.
    assert np.allclose(found.covariance, optimum.covariance, atol=0.08)
    assert float(found.noise) == pytest.approx(float(optimum.noise), abs=0.01)
    fixed_slope = jax.tree.map(lambda a: a[0], mixed_by_statsmodels(table, varying=(0,)))
    assert fixed_slope.covariance[0, 0] > 0.1
    assert np.all(fixed_slope.covariance[1] == 0)


def test_noise_within_groups(table):
    assert within_sd(table) == pytest.approx(0.4, abs=0.06)
    with pytest.raises(ValueError, match="rows must have a group with more rows"):
        within_sd(simulated(5, 2))


def test_bad_input_and_missing_packages(table, monkeypatch):
    with pytest.raises(ValueError, match=r"varying must be different columns of .*, got \(0, 2\)"):
        mixed_by_nuts(table, KEY, varying=(0, 2))
    with pytest.raises(ValueError, match="seen must be"):
        learned_against_nuts("gaussian", ("llama",), seen=0)
    with pytest.raises(ValueError, match="did you mean 'llama'"):
        learned_against_nuts("gaussian", ("lama",))
    monkeypatch.setitem(sys.modules, "statsmodels.regression.mixed_linear_model", None)
    with pytest.raises(MissingExtra, match=r"mixed_by_statsmodels needs the extra `truth`.*statsmodels"):
        mixed_by_statsmodels(table)


def test_truth_writes_both_comparisons(tmp_path, monkeypatch, capsys):
    """Given and learned priors, by their names, in the file and on the screen; without NumPyro it says what to do."""
    asked = {}

    def learned(family, names, **options):
        asked.update(options)
        return {"truth": (Learned(0.1, 1.0, 0.9), Agreement(0.0, 1.0, 0.91))}

    monkeypatch.setattr(nuts, "against_nuts", lambda *a, **k: {"nuts": Agreement(0.0, 1.0, 0.89)})
    monkeypatch.setattr(nuts, "learned_against_nuts", learned)
    assert truth(family="poisson", seen=30, steps=7, tasks=5, out=tmp_path) == 0
    assert asked == {"steps": 7, "tasks": 5, "shot": 5, "seen": 30, "seed": 0}
    written = json.loads((tmp_path / "poisson.json").read_text())
    assert written["given"]["nuts"]["coverage"] == 0.89
    assert written["learned"]["truth"]["prior"]["bias"] == 0.1
    assert "with a prior learned from 30 tasks" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "metaprior.referees.nuts")
    monkeypatch.setitem(sys.modules, "numpyro", None)
    with pytest.raises(SystemExit) as exit_:
        main(["truth", "--family", "poisson", "--out", str(tmp_path)])
    assert exit_.value.code == 1
    assert "error: NUTS needs the extra `truth`" in capsys.readouterr().err


SIZES = [2, 3, 4, 7, 9, 12, 1]


@pytest.fixture(scope="module")
def parts():
    """Seven groups of SIZES rows, one of them too small; y says the row."""
    names = np.repeat([f"g{i}" for i in range(7)], SIZES)
    n = len(names)
    return names, list(folds(np.arange(n)[:, None], np.arange(n)[:, None], names, 3, shot=2, query=2))


def test_folds_hold_every_group_out_once(parts):
    names, made = parts
    held = [rows_of_source(fold.held_out) for fold in made]
    raw = np.concatenate([fold.held_out.scaling.targets(rows.y)[:, 0] for fold, rows in zip(made, held, strict=True)])
    assert sorted(raw.round().astype(int)) == [i for i in range(len(names)) if names[i] != "g6"]
    for fold, rows in zip(made, held, strict=True):
        seen = rows_of_source(fold.seen)
        assert not set(np.asarray(seen.y)[:, 0].tolist()) & set(np.asarray(rows.y)[:, 0].tolist())
        assert float(seen.y.mean()) == pytest.approx(0, abs=1e-5)
        assert float(seen.y.std()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=r"count must be at least 2, .* got 9 folds of 6 groups"):
        next(folds(np.zeros((len(names), 1)), np.zeros((len(names), 1)), names, 9))


def test_held_out_tasks_show_what_they_say(parts):
    source = parts[1][0].held_out
    held = held_out_tasks(source, (0, 1, 3), draws=2, query=4, seed=3)
    counts = np.asarray(source.counts)
    for n in (0, 1, 3):
        assert np.array_equal(np.unique(held.group[held.size == n]), np.arange(len(counts)))
    support, query = jax.tree.map(np.asarray, held.tasks)
    assert (support.weight.sum(1) == np.minimum(held.size, counts[held.group] - 1)).all()
    for i, j in enumerate(held.group):
        rows = set(np.asarray(source.y)[source.starts[j] : source.starts[j] + counts[j], 0].tolist())
        shown = support.y[i, support.weight[i] > 0, 0].tolist()
        asked = query.y[i, query.weight[i] > 0, 0].tolist()
        assert set(shown) | set(asked) <= rows
        assert len(set(shown) | set(asked)) == len(shown) + len(asked)
        assert len(asked) == min(4, counts[j] - min(3, counts[j] - 1))
    # The same order of rows for every size: the same queries, a growing support.
    same = [np.flatnonzero((held.group == held.group[-1]) & (held.size == n))[0] for n in (0, 1, 3)]
    assert (query.y[same[0]] == query.y[same[1]]).all()
    assert support.y[same[1], 0] == support.y[same[2], 0]
    again = held_out_tasks(source, (0, 1, 3), draws=2, query=4, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(held), jax.tree.leaves(again), strict=True))
    with pytest.raises(ValueError, match=r"sizes must be numbers .*, got \(-1,\)"):
        held_out_tasks(source, (-1,))


def test_scores_by_hand(parts):
    source = parts[1][0].held_out
    held = held_out_tasks(source, (0, 1), draws=1, query=30)

    def standard(learned, support, x, key):
        return Normals(jnp.zeros((1, x.shape[0], 1)) + learned, jnp.ones((1, x.shape[0], 1)))

    found = judge_groups(standard, jnp.asarray(0.5), held, 10.0, KEY)[0]
    weight = np.asarray(held.tasks.query.weight)
    gaps = np.asarray(held.tasks.query.y)[..., 0] - 0.5
    for j in range(len(source.counts)):
        i = np.flatnonzero((held.group == j) & (held.size == 0))[0]
        own = gaps[i, weight[i] > 0]
        assert found.mse[j] == pytest.approx(100 * (own**2).mean(), rel=1e-4)
        assert found.nll[j] == pytest.approx((0.5 * own**2).mean() + 0.5 * np.log(2 * np.pi) + np.log(10), rel=1e-4)
        assert found.coverage[j] == pytest.approx((np.abs(own) < 1.64485).mean())
    figures = GroupScores(np.asarray([1.0, 3.0]), np.asarray([4.0, 4.0]), np.asarray([0.8, 1.0])).figures()
    assert figures["log_score"].mean == -2
    assert figures["rmse"].mean == 2
    assert figures["rmse"].interval == 0
    assert pooled([{0: found}, {0: found, 1: found}])[0].mse.size == 2 * found.mse.size


@pytest.mark.parametrize("name", ["llama", "gem_bml", "amortized_bml", "bmaml"])
def test_without_observations_the_prior_predicts(name):
    options = {"objective": "evidence"} if name == "llama" else {} if name == "bmaml" else {"draws": 0}
    learner = make_learner(name, mlp(1, ()), Gaussian(0.5), steps=3, **options)
    support = Batch(jnp.ones((2, 1)), jnp.ones((2, 1)), jnp.zeros(2))
    mean = {"head": {"w": jnp.asarray([[2.0]]), "b": jnp.asarray([1.0])}}
    spread = jax.tree.map(jnp.zeros_like, mean)
    params = Prior(mean, jnp.zeros(())) if name == "llama" else DiagonalGaussian(mean, spread)
    if name == "bmaml":
        params = jax.tree.map(lambda leaf: leaf + jnp.arange(-2.0, 3.0).reshape(5, *leaf.ndim * [1]), mean)
    x = jnp.asarray([[0.0], [3.0]])
    found = learner.predict(params, learner.adapt(params, support, KEY), x, KEY)
    assert np.allclose(found.mean()[:, 0], [1.0, 7.0], atol=1e-5)
    variance = [2.25, 16 * 2 + 0.25] if name == "bmaml" else [1.25, 10.25]
    assert np.allclose(found.variance()[:, 0], variance, atol=1e-4)


@pytest.mark.data
def test_eight_schools_shrink_as_they_should(data_dir):
    """Under a given prior N(mu, tau^2) LLAMA's posterior of each school is the precision-weighted mean."""
    schools, mu, tau = eight_schools(), 4.0, 5.0
    learner = make_learner(
        "llama", known_noise(linear()), Gaussian(None), objective="evidence", learn_precision=True, steps=300, rate=2.0
    )
    params = Prior({"head": {"w": jnp.full((1, 1), mu)}}, jnp.log(jnp.asarray(tau**-2)))
    at = jnp.asarray([[1.0, 1e-3]])

    def effect(support: Batch) -> tuple:
        found = learner.predict(params, learner.adapt(params, support, KEY), at, KEY)
        return found.mean()[0, 0], found.variance()[0, 0]

    mean, variance = jax.jit(jax.vmap(effect))(schools)
    precision = schools.x[:, 0, 1] ** -2 + tau**-2
    assert np.allclose(mean, (schools.y[:, 0, 0] * schools.x[:, 0, 1] ** -2 + mu * tau**-2) / precision, rtol=1e-3)
    assert np.allclose(variance, 1 / precision, rtol=1e-3)
    draws = eight_schools_reference()
    assert draws["theta"].shape == (10_000, 8)
    assert draws["mu"].mean() == pytest.approx(4.4, abs=0.2)
    assert draws["theta"].mean(0).argmin() == 4


@pytest.mark.data
def test_radon_of_all_counties(data_dir):
    splits = radon_all(shot=3, query=3)
    task = splits.test.sample(KEY, 4)
    assert task.support.x.shape == (4, 3, 2)
    with pytest.raises(ValueError, match="shot must be"):
        radon_all(shot=0)
