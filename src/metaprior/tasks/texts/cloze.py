"""Cloze tasks (Taylor 1953): which word is missing? One-shot language modelling on any text.

Vinyals et al. 2016, section 4.3: a class is a word, an example a sentence with that word left blank; words and
sentences of validation and test are not seen in training.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from metaprior.core.options import Count, Seed, Way, checked
from metaprior.core.types import Splits, Task
from metaprior.tasks.checks import DataError
from metaprior.tasks.drawing import as_task, draw_rows
from metaprior.tasks.splitting import split_groups
from metaprior.tasks.store import Arrays, cached, data_folder, stamp
from metaprior.tasks.texts.words import ABSENT, read_text, rows_of_numbers, sentences_of, words_of

BLANK, UNKNOWN = 1, 2  # the numbers of the blank and of a word without one of its own; words start at 3
FIRST_WORD = 3
SHORTEST = 4  # words of a sentence that can have a blank
BLOCK = 100  # sentences that stay together when they are shared out
GUTENBERG = re.compile(r"\*\*\* ?START OF.*?\*\*\*(.*?)\*\*\* ?END OF", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Window:
    """Sentences with a blank as rows of numbers, the blank in the middle of 2 * reach + 1; a call encodes texts."""

    numbers: dict[str, int]
    reach: int

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n length"]:
        """A row a text; its blank is written as two or more underscores.

        Raises:
            DataError: a text without a blank, or with more than one.
        """
        rows = []
        for i, text in enumerate(texts):
            parts = re.split(r"_{2,}", text)
            if len(parts) != 2:
                raise DataError(f"text: came {text!r} in row {i}, with {len(parts) - 1} blanks; needs one, written ___")
            before, after = ([self.numbers.get(word, UNKNOWN) for word in words_of(part)] for part in parts)
            before = before[-self.reach :]
            rows.append([*[ABSENT] * (self.reach - len(before)), *before, BLANK, *after[: self.reach]])
        return rows_of_numbers(rows, 2 * self.reach + 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClozePool:
    """Episodes of `way` words with `shot` support and `query` query sentences a word, the word left blank.

    words: the whole text, as places in the vocabulary; sentences: the number of each word's sentence; shown: what a
    network sees of each word of the vocabulary. Word i of this split stands at places[starts[i] : starts[i] +
    counts[i]] of the text, in another sentence each time. `encode` makes rows of the user's sentences.
    """

    words: Int[Array, " total"]
    sentences: Int[Array, " total"]
    shown: Int[Array, " vocabulary"]
    places: Int[Array, " examples"]
    starts: Int[Array, " classes"]
    counts: Int[Array, " classes"]
    encode: Window = field(metadata={"static": True})
    way: int = field(metadata={"static": True})
    shot: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    own_labels: bool = field(default=False, metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n tasks: support x int32 [n, way * shot, 2 * reach + 1] and y int32 [n, way * shot]; query alike, weighted.

        The blank (1) is in the middle; the word that it stands for is blank wherever it stands in the sentence. 0 is
        padding, 2 an unknown word. A query whose sentence is in the support has weight 0.
        """

        def one(key: PRNGKeyArray) -> Task:
            rows, chosen = draw_rows(key, self.starts, self.counts, self.way, self.shot + self.query)
            labels = chosen if self.own_labels else jnp.arange(self.way)
            places = as_task(self.places[rows], labels.astype(jnp.int32), self.shot)
            seen, asked = (self.sentences[batch.x] for batch in places)
            weight = 1.0 - (asked[:, None] == seen).any(-1)
            support, query = (batch._replace(x=jax.vmap(self._window)(batch.x)) for batch in places)
            return Task(support, query._replace(weight=weight))

        return jax.vmap(one)(jax.random.split(key, n))

    def _window(self, place: Int[Array, ""]) -> Int[Array, " length"]:
        at = place + jnp.arange(-self.encode.reach, self.encode.reach + 1)
        inside = jnp.clip(at, 0, self.words.shape[0] - 1)
        there = (inside == at) & (self.sentences[inside] == self.sentences[place])
        seen = jnp.where(self.words[inside] == self.words[place], BLANK, self.shown[self.words[inside]])
        return jnp.where(there, seen, ABSENT)


@checked
def cloze(
    *,
    path: str | Path | None = None,
    way: Way = 5,
    shot: Count = 1,
    query: Count = 4,
    test_query: Count = 4,
    train_way: Way | None = None,
    train_labels: Literal["task", "class"] = "task",
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    sentence_split: tuple[float, float, float] = (0.7, 0.15, 0.15),
    hide: bool = True,
    seed: Seed = 0,
    least: Count = 8,
    vocabulary: Count = 10_000,
    reach: Count = 10,
) -> Splits:
    """Which word is missing? x int32 [n, 2 * reach + 1], a sentence around its blank, y int32 [n].

    The words that are classes are shared out over training, validation and test, and so are the sentences, so that
    neither a word nor a sentence of the test is seen in training.

    Args:
        path: a text file in UTF-8 (or .xz, .gz of one); by default METAPRIOR_DATA/text/warandpeace.txt.xz. Of a
            Project Gutenberg file, the book alone is read.
        way, shot, query, test_query: words a task; sentences a word of the support, of the query in training, and in
            validation and test.
        train_way, train_labels: as in `images`.
        split, sentence_split: fractions of the words, and of the sentences (in blocks of 100). seed: of both.
        hide: words held out are unknown as context, too; else they are but never left blank in training.
        least: sentences of its part that a word must stand in (at least shot + query), so that tasks of different
            shots can have the same words.
        vocabulary: words known as context, the most frequent ones of the training sentences.
        reach: words seen before the blank, and after it.

    Raises:
        DataError: no such file, or a text with too few repeated words for a task.
    """
    train_way = way if train_way is None else train_way
    if train_labels not in ("task", "class"):
        raise ValueError(f"train_labels: came {train_labels!r}, needs 'task' or 'class'")
    file = _file(path)
    arrays = cached(f"cloze-{file.stem}", {"version": 1, "origin": stamp(file)}, lambda: _parse(file))
    words, sentences, names = (np.asarray(arrays[name]) for name in ("words", "sentences", "names"))
    first = _first_in_sentence(words, sentences)
    frequent = np.flatnonzero(np.bincount(words[first], minlength=len(names)) >= least)
    if len(frequent) < 3 * way:
        raise DataError(_too_few(file, len(frequent), sentences, least, "the text", way))
    part_of_sentence = _share_sentences(int(sentences.max()) + 1, sentence_split, seed)
    parts = [frequent[part] for part in split_groups(names[frequent].tolist(), split, seed, "word")]
    hidden = np.concatenate(parts[1:]) if hide else np.zeros(0, int)
    shown = _shown(words[part_of_sentence[sentences] == 0], len(names), hidden, vocabulary)
    encode = Window({name: int(number) for name, number in zip(names, shown, strict=True)}, reach)
    on_device = [jnp.asarray(array) for array in (words, sentences, shown)]

    def pool(k: int, title: str, way: int, query: int, own: bool) -> ClozePool:
        here = first[(part_of_sentence[sentences[first]] == k) & np.isin(words[first], parts[k])]
        counts = np.bincount(words[here], minlength=len(names))
        kept = np.flatnonzero(counts >= max(least, shot + query))
        if len(kept) < way:
            raise DataError(_too_few(file, len(kept), sentences, max(least, shot + query), title, way))
        here = here[np.isin(words[here], kept)]
        places = here[np.argsort(words[here], kind="stable")]
        starts = np.cumsum(counts[kept]) - counts[kept]
        own_rows = [jnp.asarray(array, jnp.int32) for array in (places, starts, counts[kept])]
        return ClozePool(*on_device, *own_rows, encode=encode, way=way, shot=shot, query=query, own_labels=own)

    return Splits(
        pool(0, "the training part", train_way, query, train_labels == "class"),
        pool(1, "the validation part", way, test_query, False),
        pool(2, "the test part", way, test_query, False),
    )


def _file(path: str | Path | None) -> Path:
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise DataError(f"path: came {path}, which is no file; needs a text file (.txt, or .xz, .gz of one)")
        return file
    folder = data_folder("text")
    if folder is None or not (folder / "warandpeace.txt.xz").is_file():
        raise DataError(
            "cloze: needs path=, a text file of your own (--set tasks.path=FILE), or warandpeace.txt.xz in a folder "
            "text/ inside the one that METAPRIOR_DATA names"
        )
    return folder / "warandpeace.txt.xz"


def _parse(file: Path) -> Arrays:
    text = read_text(file)
    book = GUTENBERG.search(text)
    found = [s for s in sentences_of(book.group(1) if book else text) if len(s) >= SHORTEST]
    if not found:
        raise DataError(f"{file}: came no sentence of {SHORTEST} words or more, needs running text")
    names, words = np.unique([word for sentence in found for word in sentence], return_inverse=True)
    lengths = [len(sentence) for sentence in found]
    sentences = np.repeat(np.arange(len(found), dtype=np.int32), lengths)
    return {"words": words.astype(np.int32), "sentences": sentences, "names": names}


def _share_sentences(total: int, split: Any, seed: int) -> Int[np.ndarray, " total"]:
    block = max(1, min(BLOCK, total // 30))
    parts = split_groups(range(-(-total // block)), split, seed, "block of sentences")
    part_of_block = np.zeros(-(-total // block), np.int32)
    for k, blocks in enumerate(parts):
        part_of_block[blocks] = k
    return part_of_block[np.arange(total) // block]


def _first_in_sentence(words: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    """Where each word stands for the first time in its sentence, so that an example is another sentence each time."""
    pairs = sentences.astype(np.int64) * (int(words.max()) + 1) + words
    return np.sort(np.unique(pairs, return_index=True)[1])


def _shown(training: np.ndarray, total: int, hidden: np.ndarray, vocabulary: int) -> Int[np.ndarray, " total"]:
    counts = np.bincount(training, minlength=total)
    counts[hidden] = 0
    known = np.argsort(-counts, kind="stable")[:vocabulary]
    known = known[counts[known] > 0]
    shown = np.full(total, UNKNOWN, np.int32)
    shown[known] = FIRST_WORD + np.arange(len(known))
    return shown


def _too_few(file: Path, came: int, sentences: np.ndarray, least: int, where: str, way: int) -> str:
    return (
        f"{file}: a text with too few repeated words: {came} of {where} stand in {least} sentences or more (the text "
        f"has {int(sentences[-1]) + 1}), needs {way} in each of three parts; give a longer text, or lower least, shot, "
        "query or way"
    )
