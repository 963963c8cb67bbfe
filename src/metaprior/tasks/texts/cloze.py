"""Cloze tasks (Taylor 1953): predict the missing word. This is one-shot language modelling on any text.

A class is a word, and an example is a sentence in which that word is blank. The words and sentences of validation and
test do not occur in training.

References:
    Vinyals et al. 2016, sec. 4.3.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from metaprior.core.options import Count, Seed, Way, checked
from metaprior.core.types import Splits, Task
from metaprior.tasks.checks import DataError
from metaprior.tasks.drawing import Labels, as_task, draw_rows
from metaprior.tasks.splitting import split_groups
from metaprior.tasks.store import Arrays, cached, data_folder, stamp
from metaprior.tasks.texts.words import ABSENT, read_text, rows_of_numbers, sentences_of, words_of

BLANK, UNKNOWN = 1, 2  # the numbers of the blank and of an unknown word; known words start at 3
FIRST_WORD = 3
SHORTEST = 4  # the fewest words of a sentence that is used
BLOCK = 100  # consecutive sentences that are assigned to the same split
GUTENBERG = re.compile(r"\*\*\* ?START OF.*?\*\*\*(.*?)\*\*\* ?END OF", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Window:
    """Encodes sentences with one blank as rows of numbers; the blank is in the middle.

    Attributes:
        numbers: The number of each known word.
        reach: The number of words before the blank, and after it. A row has length 2 * reach + 1.
    """

    numbers: dict[str, int]
    reach: int

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n length"]:
        """Encodes texts.

        Args:
            texts: Texts with one blank each, written as two or more underscores.

        Returns:
            One row per text, int32 [n, 2 * reach + 1].

        Raises:
            DataError: A text without a blank, or with more than one.
        """
        rows = []
        for i, text in enumerate(texts):
            parts = re.split(r"_{2,}", text)
            if len(parts) != 2:
                raise DataError(f"text must have one blank, written ___, got {len(parts) - 1} in {text!r} (row {i}).")
            before, after = ([self.numbers.get(word, UNKNOWN) for word in words_of(part)] for part in parts)
            before = before[-self.reach :]
            rows.append([*[ABSENT] * (self.reach - len(before)), *before, BLANK, *after[: self.reach]])
        return rows_of_numbers(rows, 2 * self.reach + 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClozePool:
    """Episodes of `way` words with `shot` support and `query` query sentences per word, in which the word is blank.

    Attributes:
        words: The whole text, as positions in the vocabulary.
        sentences: The number of the sentence of each word of the text.
        shown: The number that a network sees for each word of the vocabulary.
        places: The positions in the text of the words that can be blank, sorted by word.
        starts: The first place of each word of this split. Word i occurs at places[starts[i] : starts[i] + counts[i]],
            each time in another sentence.
        counts: The number of places of each word.
        encode: Encodes the user's sentences.
        way: Words per task.
        shot: Support sentences per word.
        query: Query sentences per word.
        labels: What the label of a class is, "task", "class" or "slot"; see `draw_classes`.
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
    labels: Labels = field(default="task", metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks.

        The blank (1) is in the middle of a row. If its word occurs again in the sentence, it is blank there too. 0 is
        padding, and 2 is an unknown word.

        Returns:
            Support x int32 [n, way * shot, 2 * reach + 1] and y int32 [n, way * shot]; the query likewise, with
                weights. A query sentence that is also in the support has weight 0.
        """

        def one(key: PRNGKeyArray) -> Task:
            size = self.shot + self.query
            rows, _, labels = draw_rows(key, self.starts, self.counts, self.way, size, self.labels)
            places = as_task(self.places[rows], labels, self.shot)
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
    train_labels: Labels = "task",
    split: tuple[float, float, float] = (0.8, 0.1, 0.1),
    sentence_split: tuple[float, float, float] = (0.7, 0.15, 0.15),
    hide: bool = True,
    seed: Seed = 0,
    least: Count = 8,
    vocabulary: Count = 10_000,
    reach: Count = 10,
) -> Splits:
    """Makes tasks of predicting the missing word: x int32 [n, 2 * reach + 1], a sentence around its blank, y int32 [n].

    The words that are classes are divided among training, validation and test, and so are the sentences. No word and no
    sentence of the test occurs in training.

    Args:
        path: A text file in UTF-8 (.txt, or a compressed .xz or .gz). By default
            METAPRIOR_DATA/text/warandpeace.txt.xz. Of a Project Gutenberg file, only the book is read.
        way: Words per task.
        shot: Support sentences per word.
        query: Query sentences per word in training.
        test_query: Query sentences per word in validation and test.
        train_way: Words per task in training. By default `way`.
        train_labels: As in `images`.
        split: The fractions of the words for training, validation and test.
        sentence_split: The fractions of the sentences, which are divided in blocks of 100.
        hide: Whether the words of validation and test are unknown as context, too. If False, they are known as context,
            but are never blank in training.
        seed: The seed of both divisions.
        least: The number of sentences of its part that a word must occur in (at least shot + query). With the same
            value, tasks of different shots can have the same words.
        vocabulary: The number of words that are known as context, the most frequent ones of the training sentences.
        reach: The number of words that are visible before the blank, and after it.

    Returns:
        Tasks of the training, validation and test words.

    Raises:
        DataError: No such file, or a text with too few repeated words for a task.
        ValueError: Options out of range.
    """
    train_way = way if train_way is None else train_way
    file = _file(path)
    arrays = cached(f"cloze-{file.stem}", {"version": 1, "origin": stamp(file)}, lambda: _parse(file))
    words, sentences, names = (np.asarray(arrays[name]) for name in ("words", "sentences", "names"))
    first = _first_in_sentence(words, sentences)
    frequent = np.flatnonzero(np.bincount(words[first], minlength=len(names)) >= least)
    if len(frequent) < 3 * way:
        raise DataError(_too_few(file, len(frequent), sentences, least, "the text", way))
    part_of_sentence = _share_sentences(int(sentences.max()) + 1, sentence_split, seed)
    parts = [frequent[part] for part in split_groups(names[frequent].tolist(), split, seed, "word")]
    held_out = np.concatenate(parts[1:]) if hide else np.zeros(0, int)
    shown = _shown(words[part_of_sentence[sentences] == 0], len(names), held_out, vocabulary)
    encode = Window({name: int(number) for name, number in zip(names, shown, strict=True)}, reach)
    on_device = [jnp.asarray(array) for array in (words, sentences, shown)]

    def pool(k: int, title: str, way: int, query: int, labels: Labels) -> ClozePool:
        here = first[(part_of_sentence[sentences[first]] == k) & np.isin(words[first], parts[k])]
        counts = np.bincount(words[here], minlength=len(names))
        kept = np.flatnonzero(counts >= max(least, shot + query))
        if len(kept) < way:
            raise DataError(_too_few(file, len(kept), sentences, max(least, shot + query), title, way))
        here = here[np.isin(words[here], kept)]
        places = here[np.argsort(words[here], kind="stable")]
        starts = np.cumsum(counts[kept]) - counts[kept]
        own_rows = [jnp.asarray(array, jnp.int32) for array in (places, starts, counts[kept])]
        return ClozePool(*on_device, *own_rows, encode=encode, way=way, shot=shot, query=query, labels=labels)

    return Splits(
        pool(0, "the training part", train_way, query, train_labels),
        pool(1, "the validation part", way, test_query, "task"),
        pool(2, "the test part", way, test_query, "task"),
    )


def _file(path: str | Path | None) -> Path:
    if path is not None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise DataError(
                f"path must be a text file (.txt, or a compressed .xz or .gz), got {path}, which is not a file."
            )
        return file
    folder = data_folder("text")
    if folder is None or not (folder / "warandpeace.txt.xz").is_file():
        raise DataError(
            "cloze: no text. Set path= to a text file (--set tasks.path=FILE), or put warandpeace.txt.xz into a folder "
            "text/ inside METAPRIOR_DATA."
        )
    return folder / "warandpeace.txt.xz"


def _parse(file: Path) -> Arrays:
    text = read_text(file)
    book = GUTENBERG.search(text)
    found = [s for s in sentences_of(book.group(1) if book else text) if len(s) >= SHORTEST]
    if not found:
        raise DataError(f"{file} must hold sentences of at least {SHORTEST} words, got none. Use running text.")
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
    """Returns where each word occurs for the first time in its sentence, so that each example is another sentence."""
    pairs = sentences.astype(np.int64) * (int(words.max()) + 1) + words
    return np.sort(np.unique(pairs, return_index=True)[1])


def _shown(training: np.ndarray, total: int, unknown: np.ndarray, vocabulary: int) -> Int[np.ndarray, " total"]:
    counts = np.bincount(training, minlength=total)
    counts[unknown] = 0
    known = np.argsort(-counts, kind="stable")[:vocabulary]
    known = known[counts[known] > 0]
    shown = np.full(total, UNKNOWN, np.int32)
    shown[known] = FIRST_WORD + np.arange(len(known))
    return shown


def _too_few(file: Path, came: int, sentences: np.ndarray, least: int, where: str, way: int) -> str:
    return (
        f"{file} has too few repeated words: at least {way} in each of three parts must occur in {least} sentences or "
        f"more, got {came} in {where} (the text has {int(sentences[-1]) + 1} sentences). Use a longer text, or lower "
        "least, shot, query or way."
    )
