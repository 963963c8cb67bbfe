"""Queries that come together: what a report says of them, smaller company, and prototypes that they refine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaprior as mp
from metaprior.evaluation.report import Report
from metaprior.experiments.pages import result_table
from metaprior.experiments.results import Result
from metaprior.learners import maml, protonet, sib
from metaprior.tasks import sinusoid
from scenarios import BARE, KEY, batch, start

SINES = sinusoid(shot=5, query=6, test_query=6).test
TASK = jax.tree.map(lambda leaf: leaf[0], SINES.sample(KEY, 1))


def judged(learner, **options):
    return mp.evaluate(learner, learner.init(KEY, TASK), SINES, KEY, tasks=8, chunk=4, **options)


def regression(norm, **options):
    return maml(mp.mlp(1, (6,), norm=norm), mp.Gaussian(), **options)


@pytest.mark.parametrize(
    ("norm", "options", "found"),
    [
        (True, {}, "by batch statistics"),
        (True, {"transductive": False}, "no"),
        (False, {}, "no"),
        (False, {"posterior": mp.implicit(draws=3)}, "no"),  # the draws are the same in any company
    ],
)
@pytest.mark.slow
def test_a_report_says_whether_batch_norm_mixes_queries(norm, options, found):
    report = judged(regression(norm, **options))
    assert report.transductive == found
    assert any("by batch statistics" in note for note in report.notes) == (found != "no")
    assert Report.from_json(report.to_json()).transductive == found
    assert ("by batch statistics" in str(report)) == (found != "no")


@pytest.mark.slow
def test_the_tasks_that_are_judged_stay_the_same():
    """The check draws no other tasks: the figures are those of each task's nll by itself."""
    learner = regression(norm=True)
    params, (_, key) = learner.init(KEY, TASK), jax.random.split(KEY)

    @jax.jit
    def nll(key):
        key_task, key_adapt, key_predict, _ = jax.random.split(key, 4)
        task = jax.tree.map(lambda leaf: leaf[0], SINES.sample(key_task, 1))
        posterior = learner.adapt(params, task.support, key_adapt)
        return -learner.predict(params, posterior, task.query.x, key_predict).log_prob(task.query.y).mean()

    report = judged(learner)
    expected = [nll(k) for k in jax.random.split(key, 8)]
    assert report.tasks == 8
    np.testing.assert_allclose(report.figures["nll"].mean, np.mean(expected), rtol=1e-5)


@pytest.mark.slow
def test_queries_are_judged_in_smaller_batches():
    mixing, apart = regression(norm=True), regression(norm=False)
    whole, one, mixed = judged(apart), judged(apart, together=1), judged(mixing)
    np.testing.assert_allclose(one.figures["nll"].mean, whole.figures["nll"].mean, rtol=1e-5)
    np.testing.assert_allclose(one.curve[1]["nll"].mean, whole.curve[1]["nll"].mean, rtol=1e-5)
    np.testing.assert_allclose(judged(mixing, together=6).figures["nll"].mean, mixed.figures["nll"].mean, rtol=1e-5)
    alone, three = judged(mixing, together=1), judged(mixing, together=3)
    assert (alone.transductive, three.transductive) == ("no", "by batch statistics")
    assert len({report.figures["nll"].mean for report in (alone, three, mixed)}) == 3
    assert "the queries of a task were predicted one at a time" in alone.notes
    assert "the queries of a task were predicted 3 at a time" in three.notes
    with pytest.raises(ValueError, match="together must divide the number of queries of a task, 6, got 4"):
        judged(mixing, together=4)
    with pytest.raises(ValueError, match="together must be an integer of at least 1"):
        judged(mixing, together=0)


@jax.tree_util.register_static
class Classes:
    def sample(self, key, n):
        sides = ((3, 1), (6, 2))
        supports = [jax.vmap(lambda k, m=m: jax.random.normal(k, (m, 2)))(jax.random.split(key, n)) for m, _ in sides]
        labels = [jnp.tile(jnp.arange(m) % 3, (n, 1)) for m, _ in sides]
        return mp.Task(*(mp.Batch(x, y) for x, y in zip(supports, labels, strict=True)))


@pytest.mark.slow
def test_a_transductive_learner_alone():
    params = start(learner := sib(BARE, mp.Categorical()), batch(6))
    assert mp.evaluate(learner, params, Classes(), KEY, tasks=4).transductive == "by the learner"
    assert mp.evaluate(learner, params, Classes(), KEY, tasks=4, together=3).transductive == "by the learner"
    with pytest.raises(ValueError, match="query must have at least 2 examples for sib"):
        mp.evaluate(learner, params, Classes(), KEY, tasks=4, together=1)


def test_pages_show_it_where_it_is_known():
    def result(transductive):
        figures = {"accuracy": mp.evaluation.figures.Figure(0.5, 0.1)}
        return Result("maml", None, Report("classification", 600, figures, {}, transductive=transductive))

    old, new = {"a": result(None)}, {"b": result("by batch statistics"), "c": result("no"), "d": result(None)}
    assert "ransductive" not in result_table(old)
    page = result_table(new)
    assert "| by batch statistics |" in page
    assert "| no |" in page
    assert "| not checked |" in page
    assert "**Transductive**" in page


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_queries_refine_prototypes_by_soft_k_means(distance):
    options = {"distance": distance, "temperature": 0.5}
    learner, plain = (protonet(BARE, mp.Categorical(), refine=k, **options) for k in (2, 0))
    support, query = batch(6)._replace(y=jnp.array([0, 0, 1, 1, 1, 2])), batch(5, 3)
    weight = np.array([1.0, 1, 2, 0, 1])
    query = query._replace(weight=jnp.asarray(weight))
    params = start(learner, support)
    s, q, hard = np.asarray(support.x), np.asarray(query.x), np.eye(3)[np.asarray(support.y)]
    means = hard.T @ s / hard.sum(0)[:, None]
    np.testing.assert_allclose(plain.posterior(params, support, query, KEY).mean, means, rtol=1e-5)
    for _ in range(2):
        if distance == "euclidean":
            apart = ((q[:, None] - means) ** 2).sum(-1)
        else:
            apart = 1 - (q @ means.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(means, axis=1)
        soft = np.exp(-apart / 0.5)
        share = np.concatenate([hard, weight[:, None] * soft / soft.sum(-1, keepdims=True)])
        means = share.T @ np.concatenate([s, q]) / share.sum(0)[:, None]
    np.testing.assert_allclose(learner.posterior(params, support, query, KEY).mean, means, rtol=1e-4, atol=1e-5)
    assert plain.transduce is None
    with pytest.raises(ValueError, match="refine must be 0 with bayes, got 2"):
        protonet(BARE, mp.Categorical(), bayes=True, refine=2)
