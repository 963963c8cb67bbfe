"""Tasks from arrays and tables: every row says which group and row it is."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaprior.tasks import DataError, array_tasks, check_labels, encode_labels, radon, sleepstudy, table
from metaprior.tasks.drawing import distinct
from metaprior.tasks.tables.table import read_columns

SIZES = {"a": 2, "b": 9, "c": 5, "d": 12, "e": 3, "f": 7}
SPLIT = (["a", "b", "c"], ["d"], ["e", "f"])

sample = jax.jit(lambda source, key, n: source.sample(key, n), static_argnums=2)


def rows():
    """x = (group, row), shuffled so that groups are not adjacent; y = 100 group + row."""
    marks = [(g, i) for g, size in enumerate(SIZES.values()) for i in range(size)]
    order = np.random.default_rng(0).permutation(len(marks))
    x = np.asarray(marks, float)[order]
    return x, 100 * x[:, 0] + x[:, 1], np.asarray(list(SIZES))[x[:, 0].astype(int)]


@settings(max_examples=20)
@given(seed=st.integers(0, 9999), ragged=st.sampled_from(["pad", "resample"]))
@pytest.mark.slow
def test_ragged_groups(seed, ragged):
    source = array_tasks(*rows(), shot=4, query=3, split=SPLIT, ragged=ragged).train
    task = sample(source, jax.random.key(seed), 5)
    assert task.support.x.shape == (5, 4, 2)
    assert task.query.y.shape == (5, 3, 1)
    for j in range(5):
        support, query = ([tuple(r) for r in np.asarray(batch.x[j])] for batch in task)
        (group,) = {g for g, _ in support + query}
        size = list(SIZES.values())[int(group)]
        seen = min(4, size - 1)
        shown = min(3, size - seen)
        assert group in (0, 1, 2)
        assert not set(support) & set(query)
        assert (len(set(support)), len(set(query))) == (seen, shown)
        np.testing.assert_array_equal(task.query.y[j, :, 0], [100 * g + i for g, i in query])
        if ragged == "pad":
            np.testing.assert_array_equal(task.support.weight[j], np.arange(4) < seen)
            np.testing.assert_array_equal(task.query.weight[j], np.arange(3) < shown)
            assert len(set(support[:seen])) == seen
        else:
            assert task.support.weight is None


def test_each_group_once_before_any_twice():
    source = array_tasks(*rows(), shot=1, query=1, split=SPLIT).train
    groups = np.asarray(sample(source, jax.random.key(0), 7).support.x[:, 0, 0]).astype(int)
    assert sorted(groups[:3]) == sorted(groups[3:6]) == [0, 1, 2]


@pytest.mark.slow
def test_distinct_of_a_smaller_population():
    for population in range(1, 6):
        got = np.asarray(jax.vmap(lambda k, p=population: distinct(k, p, 5))(jax.random.split(jax.random.key(0), 20)))
        assert all(sorted(row[:population]) == list(range(population)) for row in got)
        assert (got[:, population:] == -1).all()


@pytest.mark.slow
def test_jit_and_bits():
    source = array_tasks(*rows(), split=SPLIT).train
    a, b = sample(source, jax.random.key(1), 3), sample(source, jax.random.key(1), 3)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    jax.tree.map(np.testing.assert_array_equal, a, source.sample(jax.random.key(1), 3))
    with jax.enable_x64():
        assert array_tasks(*rows(), split=SPLIT).train.sample(jax.random.key(0), 1).support.x.dtype == jnp.float64


@pytest.mark.slow
def test_standardising_by_training_groups_and_back():
    x, y, groups = rows()
    splits = array_tasks(x, y, groups, shot=1, query=1, split=SPLIT, standardise=True)
    train = np.isin(groups, SPLIT[0])
    scaling = splits.test.scaling
    np.testing.assert_allclose(scaling.x_mean, x[train].mean(0), rtol=1e-6)
    np.testing.assert_allclose(scaling.y_deviation, [y[train].std()], rtol=1e-6)
    task = splits.test.sample(jax.random.key(0), 5)
    raw_x = task.query.x * scaling.x_deviation + scaling.x_mean
    np.testing.assert_allclose(scaling.targets(task.query.y)[..., 0], 100 * raw_x[..., 0] + raw_x[..., 1], atol=1e-3)
    np.testing.assert_allclose(scaling.features(raw_x), task.query.x, atol=1e-5)
    np.testing.assert_allclose(scaling.variances(1.0), [y[train].var()], rtol=1e-5)


def test_random_splits_are_disjoint_and_seeded():
    x, groups = np.arange(60.0), [("school", i % 20) for i in range(60)]
    parts = [array_tasks(x, x, groups, seed=seed) for seed in (0, 0, 1)]
    ids = [[set(np.asarray(s.groups).tolist()) for s in splits] for splits in parts]
    assert ids[0] == ids[1] != ids[2]
    assert set.union(*ids[0]) == set(range(20))
    assert [len(part) for part in ids[0]] == [14, 3, 3]


@pytest.mark.slow
def test_labels():
    codes, classes = encode_labels(["no", "yes", "no"])
    assert (codes.tolist(), classes) == ([0, 1, 0], ["no", "yes"])
    assert encode_labels([("b", 1), None, ("b", 1)])[0].tolist() == [0, 1, 0]
    assert encode_labels(np.asarray([7, -3]))[1] == [-3, 7]
    for bad, words in (([], "got none"), ([[1]], "hashable"), ([1.0, float("nan")], "NaN in row 1")):
        with pytest.raises(DataError, match=words):
            encode_labels(bad)
    with pytest.raises(DataError, match=r"labels must be of at most 2 classes, .* got 3"):
        encode_labels(list("abc"), way=2)
    assert check_labels([0, 1, 1], way=2).dtype == np.int32
    for bad, words in (([0, 2], "must be 0 to 1, got 2 in row 1"), ([-1], "got -1"), ([0.5], "whole numbers")):
        with pytest.raises(DataError, match=words):
            check_labels(bad, way=2)
    x, _, groups = rows()
    task = array_tasks(x, ["odd" if r % 2 else "even" for _, r in x], groups, split=SPLIT).train.sample(
        jax.random.key(0), 2
    )
    np.testing.assert_array_equal(task.query.y, task.query.x[..., 1] % 2)
    assert task.query.y.dtype == jnp.int32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ragged": "exact"}, r"groups: 3 have fewer rows than the 10 .* 'a' \(2\), .*small='drop'"),
        ({"ragged": "mask"}, "ragged must be"),
        ({"small": "keep"}, "small must be"),
        ({"shot": 0}, "shot must be"),
        ({"split": (["a"], ["b"], ["z"])}, "unknown group 'z'"),
        ({"ragged": "exact", "small": "drop", "shot": 40}, "none of a split has the 45 rows"),
        ({"y": [1.0]}, "equal lengths, got 38, 1 and 38 rows"),
        ({"x": [["one"]] * 38}, "x must hold numbers, got"),
        ({"y": ["one"] * 38, "classification": False}, "y must be numbers, got 'one'"),
    ],
)
def test_bad_arrays(options, words):
    x, y, groups = rows()
    with pytest.raises(ValueError, match=words):
        array_tasks(**{"x": x, "y": y, "groups": groups, "split": SPLIT} | options)


def test_nan_names_column_and_row():
    x, y, groups = rows()
    x[3, 1] = np.nan
    with pytest.raises(DataError, match="x must be finite numbers, got nan in column 'row', row 3"):
        array_tasks(x, y, groups, columns=["group", "row"])
    x, y, groups = rows()
    y[5] = np.inf
    with pytest.raises(DataError, match="y must be finite numbers, got inf in column 0, row 5"):
        array_tasks(x, y, groups)


def test_small_groups_can_be_dropped():
    splits = array_tasks(*rows(), shot=3, query=2, split=SPLIT, ragged="exact", small="drop")
    assert splits.train.groups.tolist() == [1, 2]
    assert splits.test.groups.tolist() == [5]
    assert splits.train.sample(jax.random.key(0), 1).support.weight is None


def write_csv(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_table_from_csv_and_npz(tmp_path):
    lines = ["id,kind,dose,school,score"] + [f"{i},{'ab'[i % 2]},{i},s{i % 6},{2 * i}" for i in range(36)]
    path = write_csv(tmp_path / "t.csv", lines)
    options = {"target": "score", "group": "school", "features": ["dose", "kind"], "standardise": False, "shot": 2,
               "query": 2}  # fmt: skip
    splits = table(path, **options, split=(0.5, 0.25, 0.25))
    task = splits.train.sample(jax.random.key(0), 3)
    assert task.support.x.shape == (3, 2, 3)
    np.testing.assert_array_equal(task.query.y[..., 0], 2 * task.query.x[..., 0])
    np.testing.assert_array_equal(task.query.x[..., 2], task.query.x[..., 0] % 2)
    np.savez(tmp_path / "t.npz", **read_columns(path))
    again = table(tmp_path / "t.npz", **options, split=(0.5, 0.25, 0.25)).train.sample(jax.random.key(0), 3)
    jax.tree.map(np.testing.assert_array_equal, task, again)


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        (["a,g,y", "1,s,2", ",s,3", "4,t,5"], {}, "missing values or NaN, got one in column 'a', row 1"),
        (["a,g,y", "1,s,2", "3,s,NA"], {}, "missing values, got one in column 'y', row 1"),
        (["a,g,y", "1,s,2", "3,s"], {}, "line 3 must have 3 values, one per column, got 2"),
        (["a,g,y"], {}, "got 1 lines"),
        (["a,g,y", "1,s,2"], {"target": "z"}, "target must be one of a, g, y, got 'z'"),
        (["a,g,y", "1,s,2"], {"group": None}, "target and group must be columns of .*, got 'y' and None"),
        (["a,g,y", "1,s,2"], {"features": []}, "features must name at least one column, got none"),
        (["a,g,y", "1,s,2", "2,t,3", "3,u,3"], {"split": (1 / 3,) * 3}, r"fewer rows than the 2 .* \(1\)"),
        (["a,g,y", "1,s,2", "2,t,3", "3,u,3"], {}, "at least one group in each part, got 2 / 1 / 0"),
    ],
)
def test_bad_tables(tmp_path, lines, options, words):
    with pytest.raises(DataError, match=words):
        table(write_csv(tmp_path / "t.csv", lines), **{"target": "y", "group": "g"} | options)


def test_absent_and_damaged_tables(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file"):
        table(tmp_path / "absent.csv", target="y", group="g")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(DataError, match=r"bad.npz is corrupt or truncated"):
        table(tmp_path / "bad.npz", target="y", group="g")
    (tmp_path / "bytes.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(DataError, match=r"bytes.csv is corrupt"):
        table(tmp_path / "bytes.csv", target="y", group="g")
    monkeypatch.setenv("METAPRIOR_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"sleepstudy: no file sleepstudy.csv. Put it into a folder grouped_tables"):
        sleepstudy()


REAL = Path(os.environ.get("METAPRIOR_DATA", "/nowhere"), "grouped_tables")


@pytest.mark.skipif(not REAL.is_dir(), reason="METAPRIOR_DATA has no folder grouped_tables")
@pytest.mark.slow
def test_sleepstudy_and_radon():
    splits = sleepstudy(shot=3, query=7)
    task = splits.train.sample(jax.random.key(0), 13)
    assert task.support.x.shape == (13, 3, 1)
    assert task.support.weight.min() == 1
    days = task.query.x * splits.train.scaling.x_deviation + splits.train.scaling.x_mean
    assert set(np.rint(days).ravel().astype(int)) == set(range(10))
    times = splits.train.scaling.targets(jnp.concatenate([task.support.y, task.query.y], 1))
    assert 190 < times.min() < times.max() < 470
    assert abs(float(task.query.y.mean())) < 0.3

    splits = radon(shot=4, query=4)
    task = splits.train.sample(jax.random.key(0), 50)
    assert task.query.x.shape == (50, 4, 2)
    assert 0 < task.support.weight.mean() < 1
    assert (task.query.weight.sum(1) >= 1).all()
    counties = [set(np.asarray(s.groups).tolist()) for s in splits]
    assert sum(map(len, counties)) == len(set.union(*counties)) <= 85


def frame(**columns):
    """A table of 6 groups with 4 rows each."""
    group = np.repeat(np.arange(6), 4)
    return columns, np.linspace(0.0, 1.0, 24), group


@pytest.mark.parametrize("twice", [["a", "a"], [0, "0"]])
def test_columns_of_one_name_are_refused(twice):
    x, y, group = pd.DataFrame(np.arange(48.0).reshape(24, 2)), np.linspace(0.0, 1.0, 24), np.repeat(np.arange(6), 4)
    x.columns = twice
    with pytest.raises(ValueError, match=r"2 columns are named '[a0]'. Give each a different name"):
        array_tasks(x, y, group, shot=2, query=2)


def test_a_categorical_of_numbers_is_a_category():
    """A feature a level, whatever the levels are written as; a missing one is missing."""
    _, y, group = frame()
    kinds = pd.DataFrame({"a": np.arange(24.0), "t": pd.Categorical(np.arange(24) % 3)})
    splits = array_tasks(kinds, y, group, shot=2, query=2)
    assert splits.train.x.shape == (24, 4)
    lost = kinds.assign(t=pd.Categorical([None, *(np.arange(23) % 3)]))
    with pytest.raises(ValueError, match=r"'t'.*row 0"):
        array_tasks(lost, y, group, shot=2, query=2)


@pytest.mark.parametrize("unit", ["D", "s", "ns"])
def test_dates_name_groups_and_classes_alike_in_every_unit(unit):
    x, y, group = np.arange(24.0)[:, None], np.linspace(0.0, 1.0, 24), np.repeat(np.arange(6), 4)
    days = (np.datetime64("2024-03-01", "D") + group).astype(f"M8[{unit}]")
    prep = array_tasks(x, y, days, shot=2, query=2, standardise=True).train.preparation
    assert sorted(name for part in prep.groups for name in part) == [f"2024-03-0{i + 1}" for i in range(6)]
    assert prep.from_json(prep.to_json()) == prep
    times = (np.datetime64("2024-03-01T06:30", "m") + group % 2).astype("M8[ns]")
    asked = array_tasks(x, times, group, shot=2, query=2, classification=True).train.preparation
    assert asked.target.classes == ("2024-03-01T06:30:00", "2024-03-01T06:31:00")
    assert asked.from_json(asked.to_json()) == asked


def test_truth_values_and_frames_of_one_column_are_read_as_they_stand():
    x, y, group = np.arange(48).reshape(24, 2) % 3 == 0, np.linspace(0.0, 1.0, 24), np.repeat(np.arange(6), 4)
    plain = array_tasks(x.astype(float), y, group, shot=2, query=2)
    for other in (
        array_tasks(x, y, group, shot=2, query=2),
        array_tasks(x, pd.DataFrame({"y": y}), pd.DataFrame({"g": group}), shot=2, query=2),
    ):
        np.testing.assert_array_equal(other.train.x, plain.train.x)
        np.testing.assert_array_equal(other.train.y, plain.train.y)
