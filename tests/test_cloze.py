"""Missing words: one-shot language modelling on any text."""

import csv
import random

import jax
import numpy as np
import pytest

from metaprior.experiments.recipe import build, load_recipe, with_overrides
from metaprior.tasks import DataError, cloze
from metaprior.tasks.texts.words import words_of
from scenarios import run_cli, write_csv

pytestmark = pytest.mark.usefixtures("own_cache")
NOUNS = [f"noun{i}" for i in range(12)]


@pytest.fixture
def story(tmp_path):
    """600 sentences of five words; 'the' and 'sees' stand in all of them, a noun twice in some."""
    rng = random.Random(0)
    path = tmp_path / "story.txt"
    path.write_text(" ".join(f"The {rng.choice(NOUNS)} sees {rng.choice(NOUNS)} now{i}." for i in range(600)))
    return path


def cloze_of(path, **options):
    small = {"way": 2, "shot": 1, "query": 2, "least": 4, "reach": 3, "split": (0.5, 0.25, 0.25)}
    return cloze(path=path, **small | options)


def names_of(part):
    """The words that a split leaves blank."""
    return {list(part.encode.numbers)[int(part.words[p])] for p in np.asarray(part.places)}


def test_words_and_sentences_of_a_cloze_test_are_not_seen_in_training(story):
    splits = cloze_of(story)
    words, sentences = ([f(part) for part in splits] for f in (names_of, sentences_used))
    for k, other in ((0, 1), (0, 2), (1, 2)):
        assert not words[k] & words[other]
        assert not sentences[k] & sentences[other]
    held_out = words[1] | words[2]
    assert all(splits.train.encode.numbers[word] == 2 for word in held_out)
    assert all(splits.train.encode.numbers[word] > 2 for word in words[0])
    open_ = cloze_of(story, hide=False).train.encode.numbers
    assert all(open_[word] > 2 for word in held_out)


def sentences_used(part):
    return set(np.asarray(part.sentences[part.places]).tolist())


@pytest.mark.slow
def test_a_cloze_example_is_its_sentence_with_the_word_blank_wherever_it_stands(story):
    train = cloze_of(story, hide=False).train
    written = [words_of(s) for s in story.read_text().split(".") if s.strip()]
    number = train.encode.numbers
    order = list(number)
    task = jax.device_get(train.sample(jax.random.key(3), 30))
    places = np.asarray(train.places)
    windows = np.asarray(jax.vmap(train._window)(places)).tolist()
    marked = [(int(train.sentences[p]), order[int(train.words[p])]) for p in places]
    rows = dict(zip(map(tuple, windows), marked, strict=True))
    for row in task.support.x.reshape(-1, 7).tolist():
        sentence, word = rows[tuple(row)]
        middle = written[sentence].index(word)
        expected = [1 if w == word else number[w] for w in written[sentence]]
        inside = [expected[i] if 0 <= i < 5 else 0 for i in range(middle - 3, middle + 4)]
        assert row == inside
        # A user's sentence is encoded alike.
        shown = " ".join(["___" if i == middle else w for i, w in enumerate(written[sentence])])
        if written[sentence].count(word) == 1:
            assert train.encode([shown])[0].tolist() == row


@pytest.mark.slow
def test_a_query_whose_sentence_is_in_the_support_does_not_count(story):
    part = cloze_of(story, train_way=5, query=4, reach=5, hide=False).train
    task = jax.device_get(part.sample(jax.random.key(0), 40))
    # The last word of a sentence is its own and stands in each of its rows.
    own = {n for word, n in part.encode.numbers.items() if word.startswith("now")}
    asked, seen = (np.where(np.isin(batch.x, list(own)), batch.x, 0).max(-1) for batch in (task.query, task.support))
    repeated = (asked[:, :, None] == seen[:, None]).any(-1)
    np.testing.assert_array_equal(task.query.weight, 1.0 - repeated)
    assert 0 < repeated.mean() < 0.5


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("The cat sat on the mat. A dog ran far away today.", {}, "too few repeated words: .* got 0 in the text"),
        (" ".join(f"One two three w{i}." for i in range(90)), {}, "too few repeated words: .* got . in the"),
        ("Hm. No. Yes!", {}, "sentences of at least 4 words, got none"),
    ],
)
def test_a_text_with_too_few_repeated_words(text, options, message, tmp_path):
    (tmp_path / "short.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        cloze_of(tmp_path / "short.txt", **options)


def test_a_users_sentence_needs_one_blank(story):
    encode = cloze_of(story).test.encode
    with pytest.raises(DataError, match=r"one blank, written ___, got 0 in .* \(row 1\)"):
        encode(["a ___ b", "a b"])


@pytest.mark.data
@pytest.mark.parametrize("learner", ["matching", "protonet"])
def test_war_and_peace_makes_tasks_for_either_learner(learner, data_dir):
    recipe = with_overrides(load_recipe("war-and-peace-5way-1shot"), learner)
    experiment = build(recipe)
    task = jax.tree.map(lambda leaf: leaf[0], experiment.splits.test.sample(jax.random.key(0), 1))
    assert task.support.x.shape == (5, 21)
    assert len(names_of(experiment.splits.test)) > 50
    params = experiment.learner.init(jax.random.key(0), task)
    assert np.isfinite(experiment.learner.loss(params, task, jax.random.key(0))[0])


def test_own_text_from_the_command_line(story, tmp_path, capsys):
    folder = tmp_path / "run"
    small = (f"tasks.path={story}", "tasks.way=2", "tasks.query=2", "tasks.test_query=2", "tasks.least=4",
             "tasks.split=[0.5, 0.25, 0.25]", "training.chunk=5", "training.meta_batch=4",
             "training.validation_tasks=5")  # fmt: skip
    run_cli("train", "war-and-peace-5way-1shot", "--out", folder, "--steps", 5, "--set", *small)
    support = write_csv(tmp_path / "support.csv", [("The ___ sees noun1 now3", "A"), ("The noun2 sees ___ now4", "B")])
    query = write_csv(tmp_path / "query.csv", [("The noun3 sees ___ now9",)], ("text",))
    run_cli("adapt", folder, "--support", support, "--query", query, "--out", tmp_path / "out.csv")
    row = next(csv.DictReader((tmp_path / "out.csv").open()))
    assert float(row["p(A)"]) + float(row["p(B)"]) == pytest.approx(1, abs=1e-3)
    (tmp_path / "tiny.txt").write_text("The cat sat on the mat. The dog ran away from it.")
    capsys.readouterr()
    path = f"tasks.path={tmp_path / 'tiny.txt'}"
    run_cli("train", "war-and-peace-5way-1shot", "--out", tmp_path / "b", "--set", path, code=2)
    assert "too few repeated words" in capsys.readouterr().err
