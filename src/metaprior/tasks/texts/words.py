"""Text as integers: reading plain or compressed files, words, sentences, and the hashed n-grams of a text."""

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

ABSENT = 0  # pads a row of numbers: no word, no n-gram
PACKED = {".xz": lzma.open, ".gz": gzip.open}
WORD = re.compile(r"\w+(?:['’]\w+)*")
# A sentence ends with its punctuation mark and any closing quotes or brackets after it, or with the paragraph.
SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n\s*\n")
HASHES = 2**31 - 1


def read_text(path: str | Path) -> str:
    """Reads a text file in UTF-8, which may be compressed (.xz or .gz).

    Args:
        path: The file.

    Raises:
        DataError: No such file, a folder, a damaged archive, or another encoding.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise DataError(f"{path} must be a text file, got a folder.")
    with reading(path, "Copy it again, or save it as text in UTF-8."):
        try:
            with PACKED.get(path.suffix.lower(), open)(path, "rb") as file:
                return io.TextIOWrapper(io.BytesIO(read_limited(file, path)), encoding="utf-8-sig").read()
        except lzma.LZMAError as error:
            raise DataError(f"{path} is corrupt or truncated ({error}). Copy it again.") from error


def kind_of(path: Path) -> str:
    """Returns the suffix of a file without that of its compression: '.csv' for lines.csv.xz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


def words_of(text: str) -> list[str]:
    """Returns the words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower().replace("’", "'"))


def sentences_of(text: str) -> list[list[str]]:
    """Returns the words of each sentence; a sentence ends at its punctuation mark or at the end of a paragraph."""
    return [words for part in SENTENCE_END.split(text) if (words := words_of(part))]


def rows_of_numbers(lists: Sequence[Sequence[int]], length: int) -> Int[np.ndarray, "n length"]:
    """Returns lists as rows of one length; longer lists are cut, shorter ones are filled with 0.

    Args:
        lists: Lists of integers.
        length: The length of a row.
    """
    rows = np.zeros((len(lists), length), np.int32)
    for row, numbers in zip(rows, lists, strict=True):
        row[: min(len(numbers), length)] = numbers[:length]
    return rows


@dataclass(frozen=True)
class Hashing:
    """Encodes a text as the set of its n-grams, each a number from 1 to 2^31 - 1 (a CRC-32).

    Attributes:
        words: The largest n of the word n-grams, which start with single words.
        characters: The smallest and largest n of the character n-grams of each word, whose ends are marked (Bojanowski
            et al. 2017); (0, 0) for none.
        length: The largest number of n-grams per text. Those that come last, the longest character n-grams, are cut.
    """

    words: int = 2
    characters: tuple[int, int] = (3, 4)
    length: int = 96

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: A field out of range.
        """
        check_count("words", self.words)
        check_count("length", self.length)
        given = self.characters
        if not isinstance(given, tuple) or len(given) != 2 or not 0 <= given[0] <= given[1]:
            raise ValueError(f"characters must be (smallest n, largest n), or (0, 0) for none, got {given!r}.")

    def grams(self, text: str) -> list[str]:
        """Returns the different n-grams of a text, word n-grams first."""
        words = words_of(text)
        found = [" ".join(words[i : i + n]) for n in range(1, self.words + 1) for i in range(len(words) - n + 1)]
        low, high = self.characters
        marked = [f"<{word}>" for word in words]
        # A whole marked word is excluded, because the word is among the word n-grams already.
        found += [w[i : i + n] for n in range(max(low, 1), high + 1) for w in marked if len(w) > n
                  for i in range(len(w) - n + 1)]  # fmt: skip
        return list(dict.fromkeys(found))

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "n length"]:
        """Encodes texts.

        Args:
            texts: The texts.

        Returns:
            One row of numbers per text, filled with 0, int32 [n, length].
        """
        numbers = [[zlib.crc32(gram.encode()) % HASHES + 1 for gram in self.grams(text)] for text in texts]
        return rows_of_numbers(numbers, self.length)
