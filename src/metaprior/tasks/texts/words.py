"""Text as whole numbers: reading plain or compressed files, words, sentences, and the hashed n-grams of a text."""

import gzip
import io
import lzma
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from metaprior.tasks.checks import DataError, check_count
from metaprior.tasks.limits import read_limited
from metaprior.tasks.store import reading

ABSENT = 0  # what pads a row of numbers: no word, no n-gram
PACKED = {".xz": lzma.open, ".gz": gzip.open}
WORD = re.compile(r"\w+(?:['’]\w+)*")
# A sentence ends with its mark, and with what closes a quotation or a bracket after it, or where a paragraph does.
SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n\s*\n")
HASHES = 2**31 - 1


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, also packed (.xz or .gz).

    Raises:
        DataError: no such file, a folder, a damaged archive, or another encoding.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(f"{path}: is a folder, needs a text file")
    with reading(path, "copy it again, or save it as text in UTF-8"):
        try:
            with PACKED.get(path.suffix.lower(), open)(path, "rb") as file:
                return io.TextIOWrapper(io.BytesIO(read_limited(file, path)), encoding="utf-8-sig").read()
        except lzma.LZMAError as error:
            raise DataError(f"{path}: corrupt or truncated ({error}); copy it again") from error


def kind_of(path: Path) -> str:
    """A file's suffix without that of its packing: '.csv' of lines.csv.xz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower().replace("’", "'"))


def sentences_of(text: str) -> list[list[str]]:
    """The words of each sentence; a sentence ends at its mark or at the end of a paragraph."""
    return [words for part in SENTENCE_END.split(text) if (words := words_of(part))]


def rows_of_numbers(lists: Sequence[Sequence[int]], length: int) -> Int[np.ndarray, "n length"]:
    """Lists as rows of one length: cut at `length`, filled up with 0."""
    rows = np.zeros((len(lists), length), np.int32)
    for row, numbers in zip(rows, lists, strict=True):
        row[: min(len(numbers), length)] = numbers[:length]
    return rows


@dataclass(frozen=True)
class Hashing:
    """A text as the set of its n-grams, each a number from 1 to 2^31 - 1 (a CRC-32); a call encodes texts.

    words: word n-grams up to that n, single words first. characters: character n-grams of each word, its ends marked,
    of the first n to the last (0, 0 for none; Bojanowski et al. 2017). length: n-grams a text at most; those that come
    last, the longest runs of characters, are cut.
    """

    words: int = 2
    characters: tuple[int, int] = (3, 4)
    length: int = 96

    def __post_init__(self) -> None:
        check_count("words", self.words)
        check_count("length", self.length)
        given = self.characters
        if not isinstance(given, tuple) or len(given) != 2 or not 0 <= given[0] <= given[1]:
            raise ValueError(f"characters: came {given!r}, needs (least n, largest n), or (0, 0) for none")

    def grams(self, text: str) -> list[str]:
        """The different n-grams of a text, those of words first."""
        words = words_of(text)
        found = [" ".join(words[i : i + n]) for n in range(1, self.words + 1) for i in range(len(words) - n + 1)]
        low, high = self.characters
        marked = [f"<{word}>" for word in words]
        # A whole marked word is no part of it, and stands among the words already.
        found += [w[i : i + n] for n in range(max(low, 1), high + 1) for w in marked if len(w) > n
                  for i in range(len(w) - n + 1)]  # fmt: skip
        return list(dict.fromkeys(found))

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n length"]:
        """A row of numbers a text, filled up with 0."""
        numbers = [[zlib.crc32(gram.encode()) % HASHES + 1 for gram in self.grams(text)] for text in texts]
        return rows_of_numbers(numbers, self.length)
