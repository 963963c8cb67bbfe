"""The memorisation diagnosis: against a closed form, on learners that ignore their support, on all kinds of tasks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as ss

import metaprior as mp
from metaprior.core.likelihoods import Categories, Normals
from metaprior.core.types import Batch, Learner, Task
from metaprior.evaluation.memorisation import Answers, _shuffled, diagnose, memorisation
from metaprior.evaluation.protocol import evaluate
from metaprior.evaluation.report import Report
from metaprior.referees.conjugate import exact_posterior
from metaprior.tasks import linear_gaussian
from scenarios import KEY, run_cli, tiny_splits

NET = mp.mlp(1, (8,), "tanh")


def exact_learner(theta) -> Learner:
    """The exact posterior predictive of the conjugate hierarchy; rows of weight 0 have no effect."""

    def adapt(params, support, key):
        there = jnp.ones(support.x.shape[0]) if support.weight is None else support.weight
        return exact_posterior(theta, Batch(support.x * there[:, None], support.y * there[:, None]))

    def predict(params, posterior, x, key):
        spread = jnp.einsum("nd,de,ne->n", x, posterior.covariance, x) + theta.noise**2
        return Normals((x @ posterior.mean)[None, :, None], spread[None, :, None])

    return Learner(lambda k, t: None, adapt, predict, lambda p, t, k: (0.0, {}))


@pytest.mark.slow
def test_the_information_of_the_exact_posterior_is_its_closed_form():
    """y given x has the variance v(x) before the support and w(x) after it: I = E[log v(x) / w(x)] / 2."""
    source = linear_gaussian(features=2, shot=2).test
    found = memorisation(exact_learner(source.theta), None, source, KEY, tasks=192, others=63)
    covariance, noise = (np.asarray(part, float) for part in source.theta[1:])
    tasks = source.sample(jax.random.key(7), 4000)
    s, q = (np.asarray(x, float) for x in (tasks.support.x, tasks.query.x[:, :20]))
    after = np.linalg.inv(np.linalg.inv(covariance) + np.swapaxes(s, 1, 2) @ s / noise**2)
    before = np.einsum("tnd,de,tne->tn", q, covariance, q) + noise**2
    exact = np.log(before / (np.einsum("tnd,tde,tne->tn", q, after, q) + noise**2)).mean() / 2
    high, low = found.information, found.information_least
    assert 0.2 < exact < 2
    assert abs(high.mean - exact) < 1.3 * high.interval + 0.03  # the bias for 63 other supports is below 0.03
    assert abs(low.mean - exact) < 1.3 * low.interval + 0.03
    assert low.mean < high.mean
    assert low.interval < 0.2 * exact
    # No support leaves the prior: the nll rises by the same information.
    assert abs(found.rise["empty"].mean - exact) < 1.3 * found.rise["empty"].interval
    assert found.warning is None


def test_intervals_hold_although_tasks_share_supports():
    """In simulated repeats, the spread of each figure is the one that its intervals state."""
    rng, size, blocks, noise = np.random.default_rng(0), 8, 8, 0.5
    figures = []
    for _ in range(200):
        phi = rng.normal(size=(blocks, size))
        seen, y = (phi + noise * rng.normal(size=phi.shape) for _ in range(2))
        shrink = 1 / (1 + noise**2)
        centre, spread = shrink * seen, (1 - shrink + noise**2) ** 0.5
        order = (np.arange(size)[:, None] + np.arange(size)) % size
        nll = -ss.norm.logpdf(y[:, :, None], centre[:, order], spread).reshape(-1, size, 1)
        one = nll[:, 0]
        found = diagnose(Answers({"nll": nll}, {"nll": one}, {"nll": one}, np.ones((blocks * size, 1))))
        figures.append([found.rise["other"], found.information, found.information_least])
    for kind in zip(*figures, strict=True):
        stated = np.mean([figure.interval for figure in kind]) / ss.t.ppf(0.975, blocks * size - 1)
        assert stated == pytest.approx(np.std([figure.mean for figure in kind]), rel=0.12)
    exact = np.log((1 + noise**2) / (1 - 1 / (1 + noise**2) + noise**2)) / 2
    high, low = (np.mean([row[i].mean for row in figures]) for i in (1, 2))
    assert exact < high < exact + 0.25
    assert exact - 0.15 < low < exact


def started(learner, source):
    return learner.init(KEY, jax.tree.map(lambda leaf: leaf[0], source.sample(KEY, 1)))


@pytest.mark.slow
def test_a_learner_that_ignores_its_support_is_told_so():
    source = tiny_splits().test
    learner = mp.learners.maml(NET, mp.Gaussian(), rate=1e-7)
    report = evaluate(learner, started(learner, source), source, KEY, tasks=32, memorisation=True)
    found = report.memorisation
    assert found.warning.startswith("the learner ignores its support: with another task's support the NLL changes by")
    assert abs(found.information.mean) < 1e-4
    assert found.warning in str(report)
    again = Report.from_json(report.to_json())
    assert again == report


@pytest.mark.slow
def test_few_noisy_tasks_are_no_evidence():
    """A difference with a wide interval is neither called a use of the support nor an ignored one."""
    rng = np.random.default_rng(1)
    nll = rng.normal(size=(8, 4, 1))
    found = diagnose(Answers({"nll": nll}, {"nll": nll[:, 0]}, {"nll": nll[:, 0]}, np.ones((8, 1))))
    assert found.warning.startswith("there is no evidence that the learner uses its support")
    steep = nll + 3 * (np.arange(4) > 0)[:, None]
    assert diagnose(Answers({"nll": steep}, {"nll": nll[:, 0]}, {"nll": nll[:, 0]}, np.ones((8, 1)))).warning is None
    # The information is bounded, so that a few enormous losses cannot hide that every task uses its support.
    steep[0, 1:] = 1e4
    found = diagnose(Answers({"nll": steep}, {"nll": nll[:, 0]}, {"nll": nll[:, 0]}, np.ones((8, 1))))
    assert found.rise["other"].mean < found.rise["other"].interval
    assert found.warning is None


@jax.tree_util.register_static
@dataclass(frozen=True)
class Corners:
    """Three classes around the corners of a triangle; names are drawn per task, or fixed (`memorisable`)."""

    memorisable: bool
    padded: bool = False

    def sample(self, key, n):
        return jax.vmap(self.one)(jax.random.split(key, n))

    def one(self, key):
        key, key_names, key_turn = jax.random.split(key, 3)
        labels = jnp.tile(jnp.arange(3), 4)
        place = labels if self.memorisable else jax.random.permutation(key_names, 3)[labels]
        turn = 0 if self.memorisable else jax.random.uniform(key_turn, maxval=6.0)
        angle = 2 * jnp.pi * place / 3 + turn
        x = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1) + 0.2 * jax.random.normal(key, (12, 2))
        if not self.padded:
            return Task(Batch(x[:6], labels[:6]), Batch(x[6:], labels[6:]))
        there = jnp.arange(12) % 6 < 5
        x, labels = jnp.where(there[:, None], x, jnp.nan), jnp.where(there, labels, 99)
        weight = there.astype(float)
        return Task(Batch(jnp.nan_to_num(x[:6]), labels[:6] % 3, weight[:6]), Batch(x[6:], labels[6:], weight[6:]))


def memoriser() -> Learner:
    """Knows the corners, and does not look at the support."""

    def predict(params, posterior, x, key):
        angle = 2 * jnp.pi * jnp.arange(3) / 3
        corners = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
        return Categories(jax.nn.log_softmax(-((x[:, None] - corners) ** 2).sum(-1) / 0.08)[None])

    return Learner(lambda k, t: None, lambda p, s, k: s.x.sum(), predict, lambda p, t, k: (0.0, {}))


@pytest.mark.slow
def test_classes_that_can_be_memorised_and_classes_that_cannot():
    prototypes = mp.learners.protonet(mp.networks.linear(3), mp.Categorical(), temperature=0.1, way=3)
    for source in (Corners(False), Corners(False, padded=True), Corners(True)):
        params = started(prototypes, source)._replace(embedding=identity(started(prototypes, source).embedding))
        found = memorisation(prototypes, params, source, KEY, tasks=24, others=11)
        assert found.tasks == 24
        assert found.warning is None or source.memorisable
        assert found.figures["right"]["accuracy"].mean > 0.9
        if not source.memorisable:
            # Names are a fair draw, so the support is worth at most log 3.
            assert found.information_least.mean < np.log(3) < found.information.mean + found.information.interval + 0.1
            assert found.figures["other"]["accuracy"].mean < 0.5
        else:
            assert found.figures["other"]["accuracy"].mean > 0.9
    found = memorisation(memoriser(), None, Corners(True), KEY, tasks=24, others=11)
    assert found.warning.startswith("the learner ignores its support")
    for support in ("other", "shuffled", "empty"):
        assert found.figures[support]["accuracy"] == found.figures["right"]["accuracy"]
        assert found.rise[support].mean == pytest.approx(0, abs=1e-12)


def identity(params):
    """A linear embedding of two numbers that keeps them."""
    return jax.tree.map(lambda leaf: jnp.eye(*leaf.shape) if leaf.ndim == 2 else jnp.zeros_like(leaf), params)


@pytest.mark.slow
def test_a_transductive_learner_is_given_the_queries_without_their_targets():
    source = linear_gaussian(features=2, shot=2).test
    plain = exact_learner(source.theta)
    seen = []

    def transduce(params, support, query, key):
        seen.append(query.y)
        return plain.adapt(params, support, key)

    both = [
        memorisation(each, None, source, KEY, tasks=12, others=3)
        for each in (plain, plain._replace(transduce=transduce))
    ]
    assert both[0].rise["other"].mean == pytest.approx(both[1].rise["other"].mean, rel=1e-5)
    assert both[0].information.interval == pytest.approx(both[1].information.interval, rel=1e-4)
    assert seen == [None]  # no target of a query


@jax.tree_util.register_static
@dataclass(frozen=True)
class Families:
    """Groups whose targets are their number: a support of the same group would tell all."""

    group_count: int

    def of_group(self, key, group):
        y = group + 0.1 * jax.random.normal(key, (4, 1))
        return Task(Batch(jnp.ones((2, 1)), y[:2]), Batch(jnp.ones((2, 1)), y[2:]))

    def sample(self, key, n):
        return jax.vmap(self.of_group)(jax.random.split(key, n), jnp.arange(n) % self.group_count)


def averaging() -> Learner:
    return Learner(
        lambda k, t: None,
        lambda p, s, k: s.y.mean(),
        lambda p, m, x, k: Normals(jnp.full((1, x.shape[0], 1), m), jnp.full((1, x.shape[0], 1), 0.02)),
        lambda p, t, k: (0.0, {}),
    )


@pytest.mark.slow
def test_each_group_gives_one_task_so_that_no_support_is_of_the_querys_group():
    for groups, tasks, others in ((20, 20, 9), (7, 7, 6), (40, 39, 12)):
        found = memorisation(averaging(), None, Families(groups), KEY)
        assert (found.tasks, found.others) == (tasks, others)
        assert found.figures["other"]["mse"].mean > 1
    assert memorisation(averaging(), None, Families(1), KEY) is None
    report = evaluate(averaging(), None, Families(1), KEY, memorisation=True)
    assert "no estimate of memorisation" in str(report)
    assert report.memorisation is None


@pytest.mark.slow
def test_a_learner_that_cannot_take_an_empty_support_is_named():
    source = Families(8)

    def refuse(params, support, key):
        if support.weight is not None:
            raise ValueError("weight must be None, got an array.")
        return support.y.mean()

    def divide(params, support, key):
        there = jnp.ones(2) if support.weight is None else support.weight
        return (there * support.y[:, 0]).sum() / there.sum()

    for adapt, told in ((refuse, "(weight must be None, got an array)"), (divide, "its NLL is not finite")):
        found = memorisation(averaging()._replace(adapt=adapt), None, source, KEY)
        assert "empty" not in found.figures
        assert set(found.rise) == {"other", "shuffled"}
        assert len(found.notes) == 1
        assert "this learner cannot take an empty support" in found.notes[0]
        assert told in found.notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["protonet", "matching", "cnp", "mann", "gnn", "fine_tune", "nearest_neighbour"])
def test_no_support_is_possible_for_learners_of_all_kinds(name):
    from test_contract import problem

    case = problem(name)
    found = memorisation(case.learner, case.start[1], case.source, KEY, tasks=8, others=3)
    assert all(np.isfinite(figure.mean) for figure in found.rise.values())
    assert ("empty" in found.rise) != bool(found.notes)


def test_only_rows_that_count_are_shuffled():
    y = jnp.array([3, 1, 4, 1, 5, -1, 9])
    support = Batch(jnp.zeros((7, 1)), y, jnp.array([1.0, 0, 1, 1, 1, 1, 1]), jnp.array([1, 1, 1, 1, 1, 0, 1], bool))
    rounds = np.array([_shuffled(support, key).y for key in jax.random.split(KEY, 30)])
    assert (rounds[:, 1] == 1).all()
    assert (rounds[:, 5] == -1).all()
    assert (np.sort(rounds[:, [0, 2, 3, 4, 6]], 1) == [1, 3, 4, 5, 9]).all()
    assert len(np.unique(rounds, axis=0)) > 20
    assert (_shuffled(support, KEY).x == support.x).all()


@pytest.mark.slow
def test_counts():
    source = linear_gaussian(features=2, shot=2).test

    class Counted:
        def sample(self, key, n):
            return Task(*(b._replace(y=jnp.round(jnp.abs(b.y))) for b in source.sample(key, n)))

    jax.tree_util.register_static(Counted)
    learner = mp.learners.maml(NET, mp.Poisson(), rate=0.1, steps=3)
    found = memorisation(learner, started(learner, Counted()), Counted(), KEY, tasks=6, others=2)
    assert all(np.isfinite(figure.mean) for figure in found.rise.values())
    assert {"mse", "nll"} == set(found.figures["empty"])


RECIPE = """
learner = "maml"

[tasks]
name = "sinusoid"
shot = 4
query = 4

[network]
name = "mlp"
hidden = [8]

[likelihood]
name = "gaussian"

[learners.maml]
steps = 0

[training]
steps = 2
meta_batch = 2
chunk = 2
validate_every = 2
validation_tasks = 2
"""


def test_the_command_warns_and_saves_what_it_says(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    run_cli("train", tmp_path / "recipe.toml", "--out", tmp_path / "run")
    run_cli("evaluate", tmp_path / "run", "--tasks", 8)
    shown = capsys.readouterr().out
    assert "warning: the learner ignores its support" in shown
    assert "another task's support" in shown
    report = Report.from_json((tmp_path / "run" / "report-own.json").read_text())
    assert report.memorisation.tasks == 8
    run_cli("evaluate", tmp_path / "run", "--tasks", 8, "--no-memorisation")
    assert "support" not in capsys.readouterr().out
    assert Report.from_json((tmp_path / "run" / "report-own.json").read_text()).memorisation is None


@pytest.mark.slow
def test_queries_in_batches_are_noted():
    report = evaluate(averaging(), None, Families(8), KEY, memorisation=True, together=1)
    assert report.memorisation.notes == ["here, all queries of a task are predicted together"]
