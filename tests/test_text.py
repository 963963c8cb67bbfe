"""Texts by class, the networks that read rows of words, and queries of no class."""

import csv
import dataclasses
import gzip
import json
import lzma
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.likelihoods import Categorical
from metaprior.core.types import Batch, Task
from metaprior.evaluation.protocol import evaluate
from metaprior.evaluation.rejection import Scored, best_threshold, closeness, confidence, rejection, scored
from metaprior.learners import make_learner
from metaprior.networks import bag, token_lstm
from metaprior.tasks import DataError, clinc150, cloze, read_texts, texts
from metaprior.tasks.texts.words import Hashing, read_text, sentences_of, words_of
from metaprior.training.loop import Training, fit
from scenarios import run_cli, write_csv

TOPICS = {
    "weather": ("rain", "snow", "storm"), "money": ("card", "loan", "bank"), "music": ("song", "drum", "band"),
    "food": ("soup", "bread", "cake"), "travel": ("flight", "train", "hotel"), "sport": ("goal", "race", "team"),
}  # fmt: skip
SPLIT = (("food", "money", "music"), ("sport", "travel"), ("travel2", "weather"))


def lines(topic, n=6):
    """Texts that say at least one word of their topic."""
    return [f"please tell me about the {w} number {i}" for i in range(n // 3) for w in TOPICS[topic]]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def rows():
    return [(text, topic) for topic in TOPICS for text in lines(topic)]


# Reading


@pytest.mark.parametrize("kind", ["csv", "csv.xz", "tsv", "objects", "pairs", "by_label", "parts", "jsonl", "folder",
                                  "lines"])  # fmt: skip
def test_every_form_of_file_gives_the_same_texts(kind, rows, tmp_path):
    path = tmp_path / ("texts.csv" if kind == "csv" else f"texts.{kind}" if "." in kind else "texts.json")
    table = "text,label\n" + "".join(f'"{t}",{y}\n' for t, y in rows)
    groups = {topic: lines(topic) for topic in TOPICS}
    objects = [{"utterance": t, "intent": y} for t, y in rows]
    if kind == "csv":
        path.write_text(table)
    elif kind == "csv.xz":
        path.write_bytes(lzma.compress(table.encode()))
    elif kind == "tsv":
        path = tmp_path / "texts.tsv"
        path.write_text("text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in rows))
    elif kind == "jsonl":
        path = tmp_path / "texts.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, objects)).encode()))
    elif kind in ("folder", "lines"):
        path = tmp_path / "texts"
        for topic, group in groups.items():
            for i, text in enumerate(group if kind == "folder" else ["\n".join(group)]):
                file = path / topic / f"{i}.txt" if kind == "folder" else path / f"{topic}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
    else:
        form = {"objects": objects, "pairs": rows, "by_label": groups, "parts": {"a": rows[:9], "b": rows[9:]}}[kind]
        path.write_text(json.dumps(form))
    found = read_texts(path)
    assert sorted(zip(found.texts, found.labels, strict=True)) == sorted(rows)


def test_plain_lines_are_texts_without_labels(tmp_path):
    (tmp_path / "ask.txt").write_text("first one\n\nsecond one\n")
    assert read_texts(tmp_path / "ask.txt", labelled=False) == (["first one", "second one"], None)
    with pytest.raises(DataError, match="without labels"):
        read_texts(tmp_path / "ask.txt")


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "a.csv",
            "text,label\nhi,a\n",
            {"text": "txt"},
            r"text must be .* \('text', 'label'\), got 'txt'; did you mean",
        ),
        ("a.csv", "text,label\nhi,a\n", {"label": "intent"}, "label must be a column of .*, got 'intent'"),
        ("a.csv", "a,b\nhi,a\n", {}, "none of which is one of the usual names"),
        ("a.csv", "text,label\nhi\n", {}, "row 2 must have 2 values, one per column, got 1"),
        ("a.csv", "text,label\n ,a\n", {}, "must have a text in each row, got .* in row 0"),
        ("a.csv", "text,label\nhi,\n", {}, "must have a label in each row, got none in row 0"),
        ("a.csv", "text,label\n", {}, "must have a header and at least one row"),
        ("a.json", "[1, 2", {}, "is not JSON"),
        ("a.json", "[1, 2]", {}, "must hold a list of objects"),
        ("a.pdf", "x", {}, r"must end in one of .*, got \.pdf"),
        ("a.csv.xz", "not packed", {}, "corrupt or truncated"),
    ],
)
def test_errors_of_files_say_what_is_wrong(name, content, options, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / name, **options)


def test_folders_and_encodings_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_texts(tmp_path / "none.csv")
    with pytest.raises(DataError, match="must contain class folders of text files"):
        read_texts(tmp_path)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_text(tmp_path / "latin.txt")


# Words and n-grams


def test_words_and_sentences():
    assert words_of("Don’t stop, 3 Times!") == ["don't", "stop", "3", "times"]
    assert sentences_of('He said: "Go!" She went.\n\nA HEADING\n\nThe end') == [
        ["he", "said", "go"], ["she", "went"], ["a", "heading"], ["the", "end"]
    ]  # fmt: skip


def test_a_texts_ngrams_are_hashed_once_each_and_words_come_first():
    assert Hashing(2, (0, 0)).grams("go to go") == ["go", "to", "go to", "to go"]
    assert Hashing(1, (3, 3)).grams("cat") == ["cat", "<ca", "cat"][:2] + ["at>"]
    encode = Hashing(2, (0, 0), 3)
    x = encode(["go to go", "GO", "?"])
    assert x.dtype == np.int32
    assert (x > 0).sum(1).tolist() == [3, 1, 0]
    assert x[0, 0] == x[1, 0] == Hashing(1)(["go"])[0, 0]
    with pytest.raises(ValueError, match="characters"):
        Hashing(1, (4, 3))


# Task sources


def source(path, **options):
    options = {"way": 2, "shot": 1, "query": 2, "test_query": 2, "split": (0.34, 0.33, 0.33), "length": 40} | options
    return texts(path=path, **options)


@pytest.mark.slow
def test_classes_of_the_splits_are_disjoint_and_an_episode_repeats_no_text(rows, tmp_path):
    splits = source(write_csv(tmp_path / "t.csv", rows + [rows[0], (f"  {rows[1][0].upper()}", rows[1][1])]))
    classes = [set(np.asarray(part.classes).tolist()) for part in splits]
    assert [len(c) for c in classes] == [2, 2, 2]
    assert len(set.union(*classes)) == 6
    grams = {tuple(row): topic for topic in TOPICS for row in splits.test.encode(lines(topic)).tolist()}
    assert int(splits.test.counts.sum() + splits.train.counts.sum() + splits.validation.counts.sum()) == len(grams)
    tasks = jax.device_get(splits.test.sample(jax.random.key(0), 20))
    for i in range(20):
        x = np.concatenate([tasks.support.x[i], tasks.query.x[i]])
        y = np.concatenate([tasks.support.y[i], tasks.query.y[i]])
        assert len({tuple(row) for row in x.tolist()}) == 6
        topics = [{grams[tuple(row)] for row in x[y == c].tolist()} for c in (0, 1)]
        assert [len(t) for t in topics] == [1, 1]
        assert topics[0] != topics[1]


def test_texts_of_no_class_go_with_validation_and_test(rows, tmp_path):
    apart = [(f"nothing of the sort {i}", "none") for i in range(5)]
    splits = source(write_csv(tmp_path / "t.csv", rows + apart), outside="none")
    assert splits.train.outside is None
    halves = [np.asarray(part.outside).tolist() for part in (splits.validation, splits.test)]
    assert sorted(map(len, halves)) == [2, 3]
    assert sorted(halves[0] + halves[1]) == sorted(splits.test.encode([t for t, _ in apart]).tolist())
    assert sum(len(part.classes) for part in splits) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"way": 3}, "way must be at most 2, the number of classes of this split, got 3"),
        ({"shot": 5}, r"shot \+ query must be at most 6, the number of texts of class .*, got 5 \+ 2"),
        ({"outside": "nothing"}, "outside must be the label of some text, got 'nothing'"),
        ({"split": (("food",), ("sport",), ("moon",))}, "unknown class 'moon'"),
        ({"label": "topic"}, "label must be a column of .*, got 'topic'"),
        ({"train_labels": "own"}, "train_labels"),
    ],
)
def test_errors_of_the_text_source(options, message, rows, tmp_path):
    with pytest.raises(ValueError, match=message):
        source(write_csv(tmp_path / "t.csv", rows), **options)


def test_small_classes_are_left_out_where_asked(rows, tmp_path):
    file = write_csv(tmp_path / "t.csv", [*rows, ("a lonely text", "alone")])
    listed = (("food", "money"), ("music", "sport"), ("travel", "weather", "alone"))
    with pytest.raises(DataError, match="at most 1, the number of texts of class alone"):
        source(file, split=listed)
    assert len(source(file, split=listed, drop_small=True).test.classes) == 2


def test_files_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="does not exist"):
        source(tmp_path / "none.csv")
    monkeypatch.delenv("METAPRIOR_DATA", raising=False)
    with pytest.raises(DataError, match="METAPRIOR_DATA"):
        clinc150()
    with pytest.raises(DataError, match="METAPRIOR_DATA"):
        cloze()
    with pytest.raises(DataError, match="not a file"):
        cloze(path=tmp_path / "none.txt")


# Networks

NETS = {
    "bag": lambda **o: bag(buckets=50, width=8, hidden=(6,), **o),
    "places": lambda **o: bag(buckets=50, width=8, places=True, **o),
    "mean": lambda **o: token_lstm(buckets=50, width=4, hidden=3, pool="mean", **o),
    "last": lambda **o: token_lstm(buckets=50, width=4, hidden=3, pool="last", **o),
    "blank": lambda **o: token_lstm(buckets=50, width=4, hidden=3, pool="blank", **o),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.slow
def test_padding_is_not_read_and_its_derivative_is_finite(name):
    model = NETS[name](outputs=3)
    x = jnp.array([[7, 1, 9, 0, 0], [0, 0, 0, 0, 0], [4, 1, 0, 0, 0]])
    params = model.init(jax.random.key(0), x)
    out = model.apply(params, x)
    assert out.shape == (3, 3)
    # What stands in the row of padding, bucket 0, changes nothing.
    other = params | {"table": params["table"].at[0].add(5.0)}
    np.testing.assert_array_equal(out, model.apply(other, x))
    longer = {"places": jnp.ones((9, 8))} if name == "places" else {}
    np.testing.assert_allclose(out, model.apply(params | longer, jnp.pad(x, ((0, 0), (0, 4)))), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda p: (model.apply(p, x) ** 2).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not np.asarray(gradient["table"][0]).any()
    assert np.asarray(gradient["table"][7]).any()


def test_a_bag_is_the_weighted_sum_over_its_length():
    model = bag(buckets=10, width=4, head=False)
    x = jnp.array([[3, 14, 0]])
    params = model.init(jax.random.key(0), x) | {"log_weight": jnp.log(jnp.arange(1.0, 11))}
    e = params["table"]
    np.testing.assert_allclose(model.apply(params, x)[0], (4 * e[3] + 5 * e[4]) / 41**0.5, rtol=1e-5)


@pytest.mark.slow
def test_the_blank_sees_what_is_before_and_after_it():
    model = NETS["blank"](head=False)
    x = jnp.array([[5, 6, 1, 7, 8]])
    params = model.init(jax.random.key(0), x)
    f = model.apply(params, x)[0]
    before, after = (model.apply(params, x.at[0, i].set(9))[0] for i in (0, 4))
    assert (before[:3] != f[:3]).all()
    assert (before[3:] == f[3:]).all()
    assert (after[:3] == f[:3]).all()
    assert (after[3:] != f[3:]).all()


def test_networks_refuse_what_is_no_row_of_words():
    with pytest.raises(ValueError, match=r"x must be integers .*, got float32 of shape \(2, 3\)"):
        bag().init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"pool must be one of .* got 'max'"):
        token_lstm(pool="max")


# Texts of no class


def test_the_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    # Few values, so that scores tie.
    inside, outside = rng.integers(2, 9, (4, 10)).astype(float), rng.integers(0, 7, (4, 10)).astype(float)
    correct, counted = rng.random((4, 10)) < 0.8, rng.random((4, 10)) < 0.9

    def gain(t):
        return ((inside >= t) & correct & counted).sum() + (outside < t).sum()

    best = best_threshold(Scored(inside, correct, counted, outside))
    assert gain(best) == max(gain(t) for t in np.arange(-0.5, 10))
    assert best_threshold(Scored(outside, correct & False, counted, inside)) == np.inf
    found = Scored(
        np.array([[5.0, 6.0, 8.0, 9.0]]), np.array([[True, True, False, True]]), np.array([[True, True, True, False]]),
        np.array([[1.0, 2.0, 7.0]]),
    )  # fmt: skip
    report = rejection(found, found)
    assert report.threshold == 3.5
    assert report.accuracy.mean == pytest.approx(2 / 3)
    assert (report.kept.mean, report.rejected.mean) == (1, pytest.approx(2 / 3))
    assert report.auroc.mean == pytest.approx(7 / 9)


@dataclasses.dataclass(frozen=True)
class Two:
    """Two words, each its own class."""

    def sample(self, key, n):
        batch = Batch(jnp.array([[1], [2]]), jnp.array([0, 1]))
        return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], n, 0), Task(batch, batch))


def test_closeness_and_confidence_of_prototypes():
    model = bag(buckets=4, width=3, head=False)
    learner = make_learner("protonet", model, Categorical(), way=2)
    params = learner.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf[0], Two().sample(jax.random.key(0), 1)))
    e = jnp.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    params = params._replace(embedding={"table": e, "log_weight": jnp.zeros(4)})
    outside, key = jnp.array([[3]]), jax.random.key(0)
    near = scored(learner, closeness(model, 2), params, Two(), outside, key, tasks=2)
    np.testing.assert_allclose(near.inside, 0, atol=1e-6)
    np.testing.assert_allclose(near.outside, -1, atol=1e-5)
    sure = scored(learner, confidence(learner), params, Two(), outside, key, tasks=2)
    np.testing.assert_allclose(sure.outside, 0.5, atol=1e-6)
    np.testing.assert_allclose(sure.inside, 1 / (1 + np.exp(-2)), rtol=1e-5)
    assert sure.correct.all()


# End to end


def test_training_learns_which_words_matter(tmp_path):
    rng = random.Random(0)
    filler = [f"filler{i}" for i in range(12)]
    rows = [(" ".join([*rng.sample(filler, 5), f"key{c}"]), f"c{c:02d}") for c in range(20) for _ in range(30)]
    rows = list(dict.fromkeys(rows))
    file = write_csv(tmp_path / "t.csv", rows)
    small = {"query": 5, "test_query": 5, "split": (0.5, 0.25, 0.25)}
    splits = texts(path=file, **small, words=1, characters=(0, 0), length=8)
    learner = make_learner("protonet", bag(buckets=512, width=32, head=False), Categorical(), way=5, distance="cosine",
                           temperature=0.1)  # fmt: skip
    training = Training(steps=150, meta_batch=4, rate=3e-2, chunk=50, validation_tasks=20)
    fitted = fit(learner, splits, training)
    task = jax.tree.map(lambda leaf: leaf[0], splits.train.sample(jax.random.key(0), 1))
    before = learner.init(jax.random.key(0), task)
    start, end = (evaluate(learner, p, splits.test, jax.random.key(1), tasks=60) for p in (before, fitted.params))
    assert end.figures["accuracy"].mean > start.figures["accuracy"].mean + 0.1
    assert end.figures["accuracy"].mean > 0.95


@pytest.mark.data
def test_intents_from_the_command_line(data_dir, tmp_path, capsys):
    folder = tmp_path / "run"
    small = ("network.width=128", "training.rate=1e-2", "training.chunk=20", "training.validation_tasks=20")
    run_cli("train", "intents-5way-1shot", "--out", folder, "--steps", 60, "--set", *small)
    run_cli("evaluate", folder, "--tasks", 40)
    report = json.loads((folder / "report-own.json").read_text())
    assert report["figures"]["accuracy"]["mean"] > 0.65
    assert set(report["rejection"]) == {"confidence", "closeness"}
    assert report["rejection"]["confidence"]["auroc"]["mean"] > 0.65
    support = write_csv(tmp_path / "support.csv", [("what is my balance", "balance"), ("play a song", "music")])
    (tmp_path / "query.txt").write_text("tell me my balance please\nplay another song\n")
    capsys.readouterr()
    run_cli("adapt", folder, "--support", support, "--query", tmp_path / "query.txt", "--out", tmp_path / "out.csv")
    assert "2 support examples, 2 predictions" in capsys.readouterr().out
    assert [row["prediction"] for row in csv.DictReader((tmp_path / "out.csv").open())] == ["balance", "music"]
    wrong = write_csv(tmp_path / "wrong.csv", [("what is my balance", "balance")], ("words", "label"))
    run_cli("adapt", folder, "--support", wrong, "--query", tmp_path / "query.txt", code=2)
    assert "'words', 'label'" in capsys.readouterr().err


def test_white_space_around_a_label_does_not_make_a_class(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("text,label\nhello, alpha\nbye,alpha \nhi,beta\n")
    assert read_texts(path).labels == ["alpha", "alpha", "beta"]
    path = tmp_path / "texts.json"
    path.write_text('{"alpha": ["hello"], " alpha": ["bye"]}')
    assert read_texts(path).labels == ["alpha", "alpha"]
    path.write_text('[["hello", " "], ["bye", "b"]]')
    with pytest.raises(ValueError, match="must have a label in each row, got none in row 0"):
        read_texts(path)


@pytest.mark.parametrize("labels", ['1, "1"', 'true, "True"'])
def test_a_label_that_is_text_and_a_number_is_named(tmp_path, labels):
    one, other = labels.split(", ")
    path = tmp_path / "texts.json"
    path.write_text(f'[["hello", {one}], ["bye", {other}]]')
    with pytest.raises(ValueError, match="as text and as a number"):
        read_texts(path)
