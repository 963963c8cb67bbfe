"""Tables in and out by the command line and in Python: units, columns by name, levels, class codes, ids, offsets."""

import csv
import json
import warnings
from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaprior.core.likelihoods import Gaussian, Poisson
from metaprior.core.types import Batch
from metaprior.evaluation.plots import regression_tasks, training_curve
from metaprior.evaluation.protocol import Units, evaluate
from metaprior.experiments.opened import load
from metaprior.experiments.recipe import task_sources
from metaprior.learners import maml
from metaprior.networks import mlp
from metaprior.tasks import (
    DataError,
    FixedTasks,
    Preparation,
    array_tasks,
    read_columns,
    read_examples,
    read_texts,
    table,
)
from metaprior.tasks.tables.preparation import Column, Target
from scenarios import run_cli

GROUPS = [f"{i:03d}" for i in range(12)]
SHARES = (GROUPS[:8], GROUPS[8:10], GROUPS[10:])
TRAINING = [
    "training.chunk=20", "training.meta_batch=4", "training.validate_every=20", "training.validation_tasks=4",
    "training.steps=20",
]  # fmt: skip


def written(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def made(rows_a_group=8, seed=0):
    """Rows of a table: days at time stamps, a price of colour and days, whether the customer stays."""
    random = np.random.default_rng(seed)
    rows = []
    for group in GROUPS:
        slope, start = 5 + random.normal(), 250 + 20 * random.normal()
        for i in range(rows_a_group):
            colour, day = ("red", "green", "blue")[i % 3], 1.7e9 + 50 * random.random()
            price = start + slope * (day - 1.7e9) + {"red": 0, "green": 30, "blue": -30}[colour]
            kind = ("stay", "pause", "churn")[int(random.integers(3))]
            rows.append(
                {"day": repr(day), "colour": colour, "vip": str(i % 2 == 0), "price": repr(price), "who": group,
                 "state": kind}
            )  # fmt: skip
    return rows


def recipe(folder, target, features, likelihood, extra=""):
    lines = [
        'learner = "maml"', "[tasks]", 'name = "table"', f'path = "{folder / "table.csv"}"', f'target = "{target}"',
        'group = "who"', f"features = {json.dumps(features)}", f"split = {json.dumps(SHARES)}", "shot = 4", "query = 4",
        extra, "[network]", 'name = "mlp"', "hidden = [8]", "[likelihood]", f'name = "{likelihood}"',
    ]  # fmt: skip
    (folder / "own.toml").write_text("\n".join(lines) + "\n")
    return folder / "own.toml"


@pytest.fixture(scope="module")
def prices(tmp_path_factory):
    """A run on prices: its folder, and the rows of its table."""
    folder = tmp_path_factory.mktemp("prices")
    written(folder / "table.csv", rows := made())
    run_cli("train", recipe(folder, "price", ["day", "colour", "vip"], "gaussian"), "--out", folder / "run", "--set",
            *TRAINING)  # fmt: skip
    return folder, rows


def by_hand(rows):
    """Features and targets of the rows, standardised by the training groups, in float64."""
    x = np.asarray(
        [[float(r["day"]), *(float(r["colour"] == c) for c in ("blue", "green", "red")), float(r["vip"] == "True")]
         for r in rows]
    )  # fmt: skip
    return x, np.asarray([[float(r.get("price", 0))] for r in rows])


def adapted(folder, support, query, *options, code=0):
    out = folder / "out.csv"
    out.unlink(missing_ok=True)
    run_cli("adapt", folder / "run", "--support", support, "--query", query, "--out", out, *options, code=code)
    return list(csv.DictReader(out.open())) if code == 0 else None


def test_adapt_answers_in_the_units_of_the_table(prices, capsys):
    folder, rows = prices
    train = [row for row in rows if row["who"] in SHARES[0]]
    (x, y), new = by_hand(train), made(seed=1)
    support, query = new[:5], [{n: v for n, v in row.items() if n != "price"} for row in new[5:9]]
    (xs, ys), (xq, _) = by_hand(support), by_hand(query)
    x_mean, x_sd, y_mean, y_sd = x.mean(0), x.std(0), y.mean(0), y.std(0)
    opened = load(folder / "run")
    experiment, params = opened.experiment, opened.params
    learner, key = experiment.learner, jax.random.key(0)
    seen = Batch(*(jnp.asarray(v, jnp.float32) for v in ((xs - x_mean) / x_sd, (ys - y_mean) / y_sd)))
    predictive = learner.predict(params, learner.adapt(params, seen, key), jnp.asarray((xq - x_mean) / x_sd), key)
    right = np.asarray(predictive.mean(), float)[:, 0] * y_sd + y_mean
    low = np.asarray(predictive.quantile(0.05), float)[:, 0] * y_sd + y_mean

    shown = adapted(folder, written(folder / "s.csv", support), written(folder / "q.csv", query))
    np.testing.assert_allclose([float(row["mean"]) for row in shown], right, rtol=1e-5)
    np.testing.assert_allclose([float(row["5 %"]) for row in shown], low, rtol=1e-5)
    assert "predictions of price" in capsys.readouterr().out.replace("\n", " ")
    # Columns go by name: in any order, the target by its own name or a usual one, other columns are passed over.
    turned = [
        {"comment": "x", "target": r["price"], "vip": r["vip"], "colour": r["colour"], "day": r["day"]} for r in support
    ]
    asked = [{n: row[n] for n in ("vip", "who", "colour", "day")} for row in query]
    assert adapted(folder, written(folder / "s2.csv", turned), written(folder / "q2.csv", asked)) == shown
    # Levels are the run's: a file with one of them means that one.
    assert adapted(folder, folder / "s.csv", written(folder / "q3.csv", query[1:2]))[0]["mean"] == shown[1]["mean"]
    arrays = {n: np.asarray([row[n] for row in support]) for n in ("day", "colour", "vip", "price")}
    np.savez(folder / "s.npz", **(arrays | {n: arrays[n].astype(float) for n in ("day", "price")}))
    assert adapted(folder, folder / "s.npz", folder / "q.csv") == shown


def test_the_preparation_is_that_of_the_run_and_not_of_the_table_today(prices):
    folder, rows = prices
    new = made(seed=2)
    support, query = written(folder / "s.csv", new[:5]), written(folder / "q.csv", new[5:8])
    before = adapted(folder, support, query)
    try:
        written(folder / "table.csv", [row | {"price": repr(1000 * float(row["price"]))} for row in rows])
        assert adapted(folder, support, query) == before
        (folder / "table.csv").unlink()
        assert adapted(folder, support, query) == before
    finally:
        written(folder / "table.csv", rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": "violet"}, "column 'colour' has 'violet' in row 0 (line 2"),
        ({"colour": "gren"}, "did you mean 'green'?"),
        ({"day": "1,7"}, "a number with a comma"),
        ({"day": "soon"}, "'soon' in column 'day'"),
        ({"vip": "perhaps"}, "column 'vip' has 'perhaps'"),
        ({"price": "much"}, "'much' in column 'price'"),
        ({"price": ""}, "no missing values, got one in column 'price', row 0"),
        ({"day": None, "days": "3"}, "features must be one of"),
        ({"price": None}, "target must be one of"),
        ({"day": "1e300"}, "column 'day' has 1e+300 in row 0"),
    ],
)
def test_adapt_names_what_it_cannot_read(prices, tmp_path, capsys, change, words):
    folder, _ = prices
    rows = [{n: v for n, v in (row | change).items() if v is not None} for row in made(seed=3)[:3]]
    adapted(folder, written(tmp_path / "s.csv", rows), written(tmp_path / "q.csv", made(seed=3)[:2]), code=2)
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_header_that_is_missing_swallows_no_row(prices, tmp_path, capsys):
    folder, _ = prices
    (tmp_path / "q.csv").write_text("1700000000,1\n1700000001,2\n")
    adapted(folder, written(tmp_path / "s.csv", made()[:3]), tmp_path / "q.csv", code=2)
    assert "the first line holds numbers" in capsys.readouterr().err


def test_values_far_from_training_are_told(prices, tmp_path, capsys):
    folder, _ = prices
    query = [row | {"day": "0"} for row in made()[:2]]
    adapted(folder, written(tmp_path / "s.csv", made()[:3]), written(tmp_path / "q.csv", query))
    said = " ".join(capsys.readouterr().err.split())
    assert "column 'day' has 0 in row 0" in said
    assert "Check its units" in said


def test_reports_are_in_the_units_of_the_target(prices, capsys):
    folder, rows = prices
    run_cli("evaluate", folder / "run", "--tasks", 6, "--set", "evaluation.course=false")
    assert "in units of price" in " ".join(capsys.readouterr().out.split())
    report = json.loads(next((folder / "run").glob("report-own*.json")).read_text())
    assert report["target"] == "price"
    assert report["figures"]["width_90"]["mean"] == pytest.approx(2 * 1.6449 * 0.5**0.5 * by_sd(rows), rel=1e-3)


def by_sd(rows):
    return np.std([float(row["price"]) for row in rows if row["who"] in SHARES[0]])


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_figures_follow_the_units_exactly(scale):
    random = np.random.default_rng(0)
    x, groups = random.normal(size=120), np.repeat(np.arange(12), 10)
    y = scale * (x + random.normal(size=120) + 7)
    source = array_tasks(x, y, groups, standardise=True).test
    learner = maml(mlp(1, ()), Gaussian(0.5), steps=3, rate=0.1)
    tasks = source.sample(jax.random.key(0), 2)
    params = learner.init(jax.random.key(1), jax.tree.map(lambda leaf: leaf[0], tasks))
    own = evaluate(learner, params, source, jax.random.key(2), tasks=4)
    bare = evaluate(learner, params, replace(source, preparation=None), jax.random.key(2), tasks=4)
    sd = source.scaling.y_deviation[0]
    assert (own.target, bare.target) == ("y", None)
    for name, factor in {"mse": sd**2, "width_90": sd, "coverage_90": 1.0}.items():
        assert own.figures[name].mean == pytest.approx(bare.figures[name].mean * factor, rel=1e-4)
        assert own.figures[name].interval == pytest.approx(
            bare.figures[name].interval * factor, rel=1e-3, abs=1e-6 * factor
        )
    assert own.figures["nll"].mean == pytest.approx(bare.figures["nll"].mean + np.log(sd), rel=1e-4, abs=1e-4)
    assert own.curve[-1]["mse"].mean == pytest.approx(own.figures["mse"].mean, rel=1e-5)
    assert own.pooled["rmse"] == pytest.approx(bare.pooled["rmse"] * sd, rel=1e-4)
    assert own.pooled["variance_error_correlation"] == pytest.approx(
        bare.pooled["variance_error_correlation"], abs=1e-3
    )


def test_figures_of_targets_of_different_units():
    random = np.random.default_rng(0)
    x, groups = random.normal(size=120), np.repeat(np.arange(12), 10)
    y = np.stack([x, 1000 * x], 1) + random.normal(size=(120, 2)) * [1, 100]
    source = array_tasks(x, y, groups, standardise=True).test
    learner = maml(mlp(2, ()), Gaussian(0.5), steps=1, rate=0.1)
    task = source.sample(jax.random.key(0), 1)
    params = learner.init(jax.random.key(1), jax.tree.map(lambda leaf: leaf[0], task))
    report = evaluate(learner, params, FixedTasks(task), jax.random.key(2), tasks=1)
    support, key = jax.tree.map(lambda leaf: leaf[0], task.support), jax.random.key(0)
    predictive = learner.predict(params, learner.adapt(params, support, key), task.query.x[0], key)
    raw = source.scaling.predictive(predictive)
    error = (np.asarray(raw.mean()) - source.scaling.targets(task.query.y[0])) ** 2
    units = Units.of(source)
    scores = units.scaled(jax.tree.map(np.asarray, units.score(predictive, task.query.y[0])))
    np.testing.assert_allclose(scores["mse"], error.mean(-1), rtol=1e-3)
    np.testing.assert_allclose(scores["nll"], -raw.log_prob(source.scaling.targets(task.query.y[0])), rtol=1e-4)
    assert report.target is None  # a source without a table


def test_groups_of_training_stay_where_they_were(prices, capsys):
    folder, rows = prices
    try:
        more = [row | {"who": "new"} for row in rows[:4]]
        written(folder / "table.csv", [*more, *rows])
        run_cli("evaluate", folder / "run", "--tasks", 2, "--no-memorisation")
        assert "groups: 1 are new since training" in " ".join(capsys.readouterr().err.split())
        written(folder / "table.csv", [row for row in rows if row["who"] != SHARES[2][0]])
        run_cli("evaluate", folder / "run", "--tasks", 2, code=2)
        assert "the table no longer has group '010'" in capsys.readouterr().err
    finally:
        written(folder / "table.csv", rows)


@pytest.mark.parametrize("learner", ["maml", "protonet"])
def test_class_codes_are_those_of_the_run(tmp_path, learner, capsys):
    written(tmp_path / "table.csv", rows := made())
    features = ["day", "colour"]
    own = recipe(tmp_path, "state", features, "categorical")
    run_cli("train", own, "--learner", learner, "--out", tmp_path / "run", "--set", *TRAINING)
    query = written(tmp_path / "q.csv", [{n: row[n] for n in features} for row in rows[:3]])
    opened = load(tmp_path / "run")
    experiment, params = opened.experiment, opened.params
    prep, key = experiment.preparation, jax.random.key(0)
    assert prep.target.classes == ("churn", "pause", "stay")
    for kept in (["stay", "pause"], ["stay"]):
        support = [row | {"state": kept[i % len(kept)]} for i, row in enumerate(rows[:4])]
        shown = adapted(tmp_path, written(tmp_path / "s.csv", support), query)
        codes = np.asarray([["churn", "pause", "stay"].index(row["state"]) for row in support], np.int32)
        seen = Batch(jnp.asarray(prep.encode(read_columns(tmp_path / "s.csv"))), jnp.asarray(codes))
        x = jnp.asarray(prep.encode(read_columns(query)))
        p = experiment.learner.predict(params, experiment.learner.adapt(params, seen, key), x, key).mean()
        for i, name in enumerate(("churn", "pause", "stay")):
            np.testing.assert_allclose([float(row[f"p({name})"]) for row in shown], p[:, i], atol=6e-5)
        if learner == "maml":
            assert all(0 < float(row["p(churn)"]) < 0.9 for row in shown)
        else:  # four examples, three classes: Laplace's rule of succession
            assert all(float(row["p(churn)"]) == pytest.approx(1 / 7, abs=6e-5) for row in shown)
    if learner == "protonet":
        # A temperature is of the shown classes alone.
        run_cli("evaluate", tmp_path / "run", "--tasks", 2, "--calibrated", "--no-memorisation")
        run_cli("adapt", tmp_path / "run", "--support", tmp_path / "s.csv", "--query", query, "--calibrated",
                "--out", tmp_path / "p.csv")  # fmt: skip
        assert [line.split(",")[2] for line in (tmp_path / "p.csv").read_text().splitlines()[1:]] == ["0.1429"] * 3
    written(tmp_path / "s.csv", [row | {"state": "puase"} for row in rows[:2]])
    adapted(tmp_path, tmp_path / "s.csv", query, code=2)
    assert "got 'puase' in row 0" in (said := " ".join(capsys.readouterr().err.split()))
    assert "did you mean 'pause'?" in said


def groups_of(tmp_path, ids, **options):
    lines = ["a,g,y"] + [f"{i},{g},{i}.5" for i, g in enumerate(ids)]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    options = {"target": "y", "group": "g", "shot": 1, "query": 1, "split": (0.5, 0.25, 0.25)} | options
    return table(tmp_path / "t.csv", **options).train.preparation.groups


@pytest.mark.parametrize(
    "ids",
    [
        ["9007199254740993", "9007199254740992", "9007199254740991", "1"],
        ["007", "7", "07", "70"],
        ["1_0", "10", "1e1", "1e10", "10000000000"],
        ["a", "A", "a b", "inf", "0x10"],
    ],
)
def test_ids_stay_what_they_are(tmp_path, ids):
    groups = groups_of(tmp_path, ids * 3)
    assert sorted(str(name) for part in groups for name in part) == sorted(ids)


@pytest.mark.parametrize("lost", ["", "NA", "NaN", "null"])
def test_a_group_that_is_missing_is_an_error(tmp_path, lost):
    with pytest.raises(DataError, match=r"groups must have no missing values, got one in column 'g', row 1 \(line 3"):
        groups_of(tmp_path, ["a", lost, "b", "c"] * 3)


def test_groups_may_be_listed_as_numbers_or_text(tmp_path):
    for shares in ([[1, 2], [3], [4]], [["1", "2"], ["3"], ["4"]]):
        assert groups_of(tmp_path, ["1", "2", "3", "4"] * 3, split=shares) == ((1, 2), (3,), (4,))


def test_labels_come_back_as_they_stood(tmp_path):
    (tmp_path / "s.csv").write_text("a,label\n1,7\n2,10\n3,7\n")
    assert read_examples(tmp_path / "s.csv").labels == [7, 10, 7]
    assert str(read_examples(tmp_path / "s.csv").labels[0]) == "7"
    (tmp_path / "s.csv").write_text("a,label\n1,007\n2,7\n3,1e1\n")
    assert read_examples(tmp_path / "s.csv").labels == ["007", "7", "1e1"]


def column_of(tmp_path, cells, **options):
    rows = [f'"{cell}",g{i % 4},{i}.5' for i, cell in enumerate(cells)]
    (tmp_path / "t.csv").write_text("\n".join(["a,g,y", *rows]) + "\n")
    options = {"target": "y", "group": "g", "shot": 1, "query": 1, "split": (0.5, 0.25, 0.25)} | options
    return table(tmp_path / "t.csv", **options)


NUMBERS = [f"{i}.25" for i in range(16)]


@pytest.mark.parametrize(
    "cell",
    ["abc", "1_0", "inf", "Infinity", "-inf", "0x1F", "1,5", "1.234,5", "5%", "१२", "−5", "1 000", "1.5.2", "--1"],
)
def test_a_word_in_a_column_of_numbers_is_an_error(tmp_path, cell):
    with pytest.raises(DataError, match=r"(?s)'a'.*row 9 \(line 11") as told:
        column_of(tmp_path, [*NUMBERS[:9], cell, *NUMBERS[10:]])
    assert cell in str(told.value)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([f"2024-01-{i + 1:02d}" for i in range(16)], "'a' holds dates or times"),
        (["2024-01-01 12:00", "2024-01-02 13:00"] * 8, "'a' holds dates or times"),
        (["1/2/2024", "2/2/2024"] * 8, "'a' holds dates or times"),
        ([f"text {i}" for i in range(16)], "16 different texts in 16 rows"),
        ([f"{i},5" for i in range(16)], "a number with a comma"),
        (["1e308", *NUMBERS[1:]], "1e\\+308 in row 0"),
        (["1e30", *NUMBERS[1:]], "loses its digits"),
        (["1e400", *NUMBERS[1:]], "'1e400' in row 0"),
        ([str(2**60 + i) for i in range(16)], "float64 cannot represent"),
    ],
)
def test_columns_that_are_neither_numbers_nor_categories(tmp_path, cells, words):
    with pytest.raises(DataError, match=words):
        column_of(tmp_path, cells)


def test_kinds_of_columns(tmp_path):
    def column(cells, **options):
        return column_of(tmp_path, cells, **options).train.preparation.columns[0]

    assert column(list("xxxxyyyy") * 2).levels == ("x", "y")
    assert column(["TRUE", "false"] * 8).kind == "truth value"
    assert column(["1"] * 4 + ["2"] * 12, categories=["a"]).levels == ("1", "2")
    assert column(["2024-01-01"] * 4 + ["2024-01-02"] * 12, categories=["a"]).kind == "category"
    for cells in (["+3", "-.5", "1.", "1E5"] * 4, NUMBERS):
        assert column(cells).kind == "number"


def test_a_level_of_held_out_groups_only_is_told_and_is_none_of_the_known(tmp_path):
    cells = ["odd" if i % 4 == 3 else ("x", "y")[i // 4 % 2] for i in range(16)]
    with pytest.warns(UserWarning, match="column 'a' has 'odd' .* a level that no training group has"):
        splits = column_of(tmp_path, cells, split=(["g0", "g1"], ["g2"], ["g3"]))
    assert splits.train.preparation.columns[0].levels == ("x", "y")
    np.testing.assert_allclose(splits.test.x[np.asarray(splits.test.starts)], [[-1.0, -1.0]])
    with pytest.raises(DataError, match="'odd'"):
        splits.train.preparation.encode({"a": ["odd"]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,g,g\n1,s,2\n", "column 'g' occurs 2 times"),
        ("1,2,3\n4,5,6\n", "the first line holds numbers"),
        ("a;g;y\n1;s;2\n", "separated by ';'"),
        ('a,g,y\n"1,s,2\n', "is not CSV"),
    ],
)
def test_files_that_are_no_table(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_columns(tmp_path / "t.csv")


def test_a_column_twice_in_a_file_of_texts(tmp_path):
    (tmp_path / "t.csv").write_text("text,label,label\nhello,a,b\n")
    with pytest.raises(DataError, match="column 'label' occurs 2 times"):
        read_texts(tmp_path / "t.csv")


OFFSETS = [1e9, -1e10]


def offset_tasks(dx, dy, scale=1.0, **options):
    random = np.random.default_rng(0)
    # Quarters, which float64 holds exactly beside the offset.
    x = np.rint(random.uniform(0, 50, 120) * 4) / 4
    y = np.rint((3 * x + random.normal(size=120)) * 4) / 4
    groups = np.repeat(np.arange(12), 10)
    options = {"standardise": True} | options
    return array_tasks(scale * (x + dx), y + dy, groups, shot=3, query=3, **options), x


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.slow
def test_offsets_change_nothing(offset):
    (plain, x), (moved, _) = offset_tasks(0, 0), offset_tasks(offset, offset)
    np.testing.assert_allclose(moved.train.x, plain.train.x, atol=2e-6)
    np.testing.assert_allclose(moved.train.y, plain.train.y, atol=2e-6)
    prep = moved.train.preparation
    np.testing.assert_allclose(
        prep.encode({"x": x[:5] + offset}), plain.train.preparation.encode({"x": x[:5]}), atol=2e-6
    )
    np.testing.assert_allclose(
        prep.scaling.features(x[:5, None] + offset), prep.encode({"x": x[:5] + offset}), atol=1e-6
    )
    learner = maml(mlp(1, ()), Gaussian(0.5), steps=3, rate=0.1)
    task = jax.tree.map(lambda leaf: leaf[0], plain.train.sample(jax.random.key(0), 1))
    params = learner.init(jax.random.key(1), task)
    raw = []
    for splits in (plain, moved):
        seen = jax.tree.map(lambda leaf: leaf[0], splits.train.sample(jax.random.key(0), 1))
        predictive = learner.predict(
            params, learner.adapt(params, seen.support, jax.random.key(2)), seen.query.x, jax.random.key(2)
        )
        raw.append(splits.train.preparation.predictive(predictive).mean())
    np.testing.assert_allclose(raw[1] - offset, raw[0], atol=1e-3)


def test_digits_that_float32_would_lose_are_an_error_or_told():
    with pytest.raises(DataError, match=r"column 'x' loses its digits.*Set standardise=True"):
        offset_tasks(1.7e9, 0, standardise=False)
    with pytest.raises(DataError, match="y: column 'y' loses its digits"):
        offset_tasks(0, 1.7e9, standardise=False)
    offset_tasks(2000, 2000, standardise=False)  # years
    with jax.enable_x64(True):
        assert offset_tasks(1.7e9, 0, standardise=False)[0].train.x.dtype == np.float64
    x = (1.7e9 + 30 * np.arange(40)).astype(np.float32)
    with pytest.warns(UserWarning, match="is float32 with 9 rounding steps"):
        array_tasks(x, np.arange(40.0), np.repeat(np.arange(10), 4), standardise=True)
    with pytest.raises(DataError, match="float64 cannot represent"):
        array_tasks(2**62 + np.arange(40), np.arange(40.0), np.repeat(np.arange(10), 4), standardise=True)


@pytest.mark.parametrize("value", [0.1, 1e9 + 0.1, -7.3e-30, 0.0])
def test_a_constant_column_has_no_effect(value):
    x = np.stack([np.full(40, value), np.arange(40.0)], 1)
    x[::2, 0] *= 1 + 2e-16  # rounding of arithmetic
    prep = array_tasks(
        x, np.arange(40.0), np.repeat(np.arange(10), 4), standardise=True, columns=["c", "t"]
    ).train.preparation
    assert [column.constant for column in prep.columns] == [(True,), (False,)]
    # At 1e9, one more is within the tolerance, 1e-9 of the mean.
    told = nullcontext() if value > 1e9 else pytest.warns(UserWarning, match="column 'c' has .* In training it was")
    with told:
        assert prep.encode({"c": [value + 1], "t": [0.0]})[0, 0] == 0.0


@pytest.mark.parametrize("scale", [1e-200, 1e150])
def test_moments_neither_vanish_nor_overflow(scale):
    plain, scaled = offset_tasks(0, 0)[0].train, offset_tasks(0, 0, scale)[0].train
    np.testing.assert_allclose(scaled.x, plain.x, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.arange(40) + 1j, "x must hold numbers, got"),
        (np.arange(40).astype("datetime64[D]"), "x must hold numbers, got"),
        (np.arange(40).astype(str), "x must hold numbers, got"),
        (np.asarray([*range(39), None], object), "x must be finite numbers, got None in column 0, row 39"),
        (np.asarray([*range(39), "1_0"], object), "x must hold numbers, got"),
        (np.ma.masked_equal(np.arange(40.0), 3), "column 0, row 3"),
    ],
)
def test_arrays_that_numpy_would_bend_into_numbers(values, words):
    with pytest.raises(DataError, match=words):
        array_tasks(values, np.arange(40.0), np.repeat(np.arange(10), 4), standardise=True)


def test_ids_in_floats_that_cannot_tell_them_apart():
    x = np.arange(40.0)
    with pytest.raises(DataError, match="cannot distinguish ids"):
        array_tasks(x, x, 2.0**53 + np.repeat(np.arange(10), 4))
    with pytest.raises(DataError, match="cannot distinguish ids"):
        array_tasks(x, x, (2**24 + np.repeat(np.arange(10), 4)).astype(np.float32))
    groups = [("7", 7, "07", (7,))[i % 4] for i in range(40)]
    assert array_tasks(x, x, groups, split=(0.5, 0.25, 0.25)).train.groups.shape == (2,)


@pytest.mark.slow
def test_counts_are_not_standardised():
    x, groups = np.arange(40.0), np.repeat(np.arange(10), 4)
    y = np.arange(40) % 5
    with pytest.raises(DataError, match="may be classes, counts or other numbers"):
        array_tasks(x, y, groups)
    source = array_tasks(x, y, groups, standardise=True, counts=True).train
    np.testing.assert_array_equal(source.y[:, 0], y)
    assert abs(float(source.x.mean())) < 0.5
    assert source.preparation.target.kind == "count"
    for bad in (y - 1, y + 0.5):
        with pytest.raises(DataError, match="A count must be a whole number"):
            array_tasks(x, bad, groups, counts=True)
    classes = array_tasks(x, y, groups, classification=True).train
    assert classes.preparation.target.classes == (0, 1, 2, 3, 4)
    learner = maml(mlp(1, ()), Poisson(), steps=1, rate=0.01)
    task = jax.tree.map(lambda leaf: leaf[0], source.sample(jax.random.key(0), 1))
    params = learner.init(jax.random.key(1), task)
    predictive = learner.predict(
        params, learner.adapt(params, task.support, jax.random.key(0)), task.query.x, jax.random.key(0)
    )
    assert source.preparation.predictive(predictive) is predictive


@pytest.mark.parametrize(
    ("likelihood", "kind", "target"),
    [
        ("poisson", "count", "n"),
        ("categorical", "class", "n"),
        ("gaussian", "number", "n"),
        ("bernoulli", "class", "b"),
    ],
)
def test_the_likelihood_says_what_a_target_is(tmp_path, likelihood, kind, target):
    rows = [{"a": i / 2, "g": i % 8, "n": i % 3, "b": i % 2} for i in range(48)]
    written(tmp_path / "t.csv", rows)
    tasks = {"name": "table", "path": str(tmp_path / "t.csv"), "target": target, "group": "g", "features": ["a"]}
    source = task_sources(tasks, likelihood).train
    assert source.preparation.target.kind == kind
    if kind == "class":
        assert source.y.dtype == jnp.int32
    else:
        assert (float(source.y.std()) == pytest.approx(1, rel=0.1)) == (kind == "number")


def test_a_word_is_no_number_for_a_gaussian(tmp_path):
    written(tmp_path / "t.csv", [{"a": i, "g": i % 8, "y": "ab"[i % 2]} for i in range(48)])
    tasks = {"name": "table", "path": str(tmp_path / "t.csv"), "target": "y", "group": "g"}
    with pytest.raises(DataError, match="target must be numbers, got 'a' in column 'y'"):
        task_sources(tasks, "gaussian")


@given(
    numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
    names=st.lists(st.text(min_size=1), min_size=2, max_size=4, unique=True),
    labels=st.lists(st.integers() | st.text(), max_size=3, unique=True),
)
@pytest.mark.slow
def test_preparations_are_kept_to_the_last_bit(numbers, names, labels):
    spread = tuple(abs(number) or 1.0 for number in numbers)
    columns = (
        Column(names[0], "number", (), tuple(numbers), spread),
        Column(names[1], "category", tuple(names), (0.1,) * len(names), (0.3,) * len(names)),
    )
    name = "".join(names) + "'s"
    target = Target(name, "class" if labels else "number", tuple(labels), tuple(numbers), spread)
    prep = Preparation(columns, target, names[1], (tuple(labels), (), ("x",)))
    again = Preparation.from_json(prep.to_json())
    assert again == prep
    assert again.groups == prep.groups
    with pytest.raises(DataError, match="preparation is damaged"):
        Preparation.from_json(prep.to_json()[:-9])


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"kind": "numbr"}, "must be of kind number or truth value or category, got 'numbr'"),
        ({"mean": [1.0, 2.0]}, "'a' must have as many means and deviations, got 2 and 1"),
        ({"mean": [float("nan")]}, "finite"),
        ({"deviation": [0.0]}, "above 0"),
        ({"deviation": ["x"]}, "damaged"),
        ({"name": 3}, "name must be text, got 3"),
        ({"name": "y"}, "a name occurs twice"),
        ({"kind": "category", "levels": ["u", "u"], "mean": [0, 0], "deviation": [1, 1]}, "must be different texts"),
        ({"kind": "category", "levels": ["u"], "mean": [0, 0], "deviation": [1, 1]}, "must have 1 means"),
        ({"other": 1}, "other"),
    ],
)
def test_a_preparation_whose_parts_do_not_fit_is_damaged(part, says):
    table = json.loads(Preparation((Column("a", "number"),), Target("y", "number")).to_json())
    table["columns"][0] |= part
    with pytest.raises(DataError, match="preparation is damaged") as error:
        Preparation.from_json(json.dumps(table))
    assert says in str(error.value)


@pytest.mark.slow
def test_pictures_are_in_the_units_of_the_table():
    splits, _ = offset_tasks(1e6, 0, columns=["price $"], names=("wage", "who"))
    learner = maml(mlp(1, ()), Gaussian(0.5), steps=1, rate=0.1)
    tasks = splits.test.sample(jax.random.key(0), 1)
    params = learner.init(jax.random.key(1), jax.tree.map(lambda leaf: leaf[0], tasks))
    figure = regression_tasks(learner, params, tasks, jax.random.key(2), preparation=splits.test.preparation)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == (r"price \$", "wage")
    low, high = axes.get_xlim()
    assert 1e6 - 5 < low < high < 1e6 + 55
    row = {"step": 1.0, "train/nll": 1.0, "train/loss": 1.0}
    assert "standardised wage" in training_curve([row], "wage").axes[0].get_ylabel()


@pytest.mark.data
def test_sleepstudy_answers_in_milliseconds(data_dir, tmp_path):
    run_cli("train", "sleepstudy", "--learner", "maml", "--out", tmp_path / "run", "--set", "training.steps=100",
            "training.chunk=100")  # fmt: skip
    rows = list(csv.DictReader((data_dir / "grouped_tables" / "sleepstudy.csv").open()))
    train, *_ = Preparation.from_json((tmp_path / "run" / "preparation.json").read_text()).groups
    y = np.asarray([float(row["Y"]) for row in rows if int(row["G"]) in train])
    days, times = np.asarray([0, 2, 4, 6, 8.0]), np.asarray([250, 260, 275, 290, 300.0])
    opened = load(tmp_path / "run")
    experiment, params = opened.experiment, opened.params
    learner, key = experiment.learner, jax.random.key(0)
    x_sd = np.std(np.arange(10))
    seen = Batch(*(jnp.asarray(v[:, None], jnp.float32) for v in ((days - 4.5) / x_sd, (times - y.mean()) / y.std())))
    asked = jnp.asarray([[(day - 4.5) / x_sd] for day in (1, 5, 9)])
    right = learner.predict(params, learner.adapt(params, seen, key), asked, key).mean()[:, 0] * y.std() + y.mean()
    query = written(tmp_path / "q.csv", [{"U": day} for day in (1, 5, 9)])
    for name in ("target", "Y"):
        support = [{"U": day, name: time} for day, time in zip(days, times, strict=True)]
        shown = adapted(tmp_path, written(tmp_path / "s.csv", support), query)
        np.testing.assert_allclose([float(row["mean"]) for row in shown], right, rtol=1e-5)
    assert 230 < right[0] < right[1] < right[2] < 350


def test_what_was_constant_in_training_has_no_effect_and_other_values_of_it_are_warned_of(tmp_path):
    rows = [f"{i % 5},1000,g{i // 4},{i % 7}.5" for i in range(48)]
    (tmp_path / "t.csv").write_text("\n".join(["a,size,g,y", *rows]) + "\n")
    prep = table(tmp_path / "t.csv", target="y", group="g", shot=2, query=2).train.preparation
    same, other = (read_columns(written(tmp_path / "q.csv", [{"a": 1, "size": size}])) for size in (1000, 1050))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = prep.encode(same, strict=True)
    with pytest.warns(UserWarning, match=r"'size' has 1050 .* In training it was always 1000"):
        found = prep.encode(other, strict=True)
    np.testing.assert_array_equal(found, expected)
    assert prep.from_json(prep.to_json()) == prep
    assert (prep.scaling.features([[1.0, 1050.0]]) == prep.scaling.features([[1.0, 7.0]])).all()
    with pytest.warns(UserWarning, match="target: column 'y' has .* deviations from the training mean"):
        prep.examples(read_columns(written(tmp_path / "s.csv", [{"a": 1, "size": 1000, "y": 1e6}])), labelled=True)
    both = read_columns(written(tmp_path / "s.csv", [{"a": 1, "size": 1000, "label": 3, "target": 4}]))
    with pytest.raises(DataError, match="'label', 'target' could all be the target"):
        prep.examples(both, labelled=True)
