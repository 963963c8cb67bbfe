"""Texts by class: few-shot classification of the user's own texts, and the intents of CLINC150 and Banking77."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from metaprior.core.named import passes_options_to
from metaprior.core.options import Count, Seed, Way, checked
from metaprior.core.types import Splits, Task
from metaprior.tasks.checks import DataError
from metaprior.tasks.drawing import Labels, as_task, draw_rows
from metaprior.tasks.images.decoding import fingerprint
from metaprior.tasks.pool import check_enough
from metaprior.tasks.splitting import Split, split_groups
from metaprior.tasks.store import Arrays, cached, data_folder
from metaprior.tasks.texts.reading import Texts, read_texts
from metaprior.tasks.texts.words import Hashing

INTENTS = {"clinc150": ("clinc150_full.json.xz",), "banking77": ("banking77_train.csv.xz", "banking77_test.csv.xz")}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextPool:
    """Episodes of `way` classes with `shot` support and `query` query texts per class; a text is a row of its n-grams.

    Attributes:
        grams: The n-grams of all texts, sorted by class; the splits share this array.
        classes: The numbers of the classes of this source.
        starts: The first text of each class. The texts of class i are grams[starts[i] : starts[i] + counts[i]].
        counts: The number of texts of each class.
        outside: Texts that belong to no class, to be distinguished from the others; None if there are none.
        encode: Encodes the user's texts.
        way: Classes per task.
        shot: Support texts per class.
        query: Query texts per class.
        labels: What the label of a class is, "task", "class" or "slot"; see `draw_classes`.
    """

    grams: Int[Array, "total length"]
    classes: Int[Array, " classes"]
    starts: Int[Array, " classes"]
    counts: Int[Array, " classes"]
    outside: Int[Array, "m length"] | None
    encode: Hashing = field(metadata={"static": True})
    way: int = field(metadata={"static": True})
    shot: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    labels: Labels = field(default="task", metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks.

        Returns:
            Support x int32 [n, way * shot, length] and y int32 [n, way * shot], sorted by class; the query likewise.
                The labels are those of `draw_classes`.
        """

        def one(key: PRNGKeyArray) -> Task:
            size = self.shot + self.query
            rows, _, labels = draw_rows(key, self.starts, self.counts, self.way, size, self.labels)
            return as_task(self.grams[rows], labels, self.shot)

        return jax.vmap(one)(jax.random.split(key, n))


@checked
def text_splits(
    name: str,
    origin: Any,
    read: Callable[[], Texts],
    outside: str | None = None,
    drop_small: bool = False,
    *,
    way: Way = 5,
    shot: Count = 1,
    query: Count = 15,
    test_query: Count = 15,
    train_way: Way | None = None,
    train_labels: Labels = "task",
    split: Split = (0.64, 0.16, 0.2),
    seed: Seed = 0,
    words: Count = 2,
    characters: tuple[int, int] = (3, 4),
    length: Count = 96,
) -> Splits:
    """Makes pools of texts, which are encoded once and then cached.

    Args:
        name: A readable prefix of the name in the cache.
        origin: What identifies the texts, as JSON. Other texts must have another value.
        read: Reads the texts.
        outside: As in `texts`.
        drop_small: As in `texts`.
        way: Classes per task.
        shot: Support texts per class.
        query: Query texts per class in training.
        test_query: Query texts per class in validation and test.
        train_way: As in `images`.
        train_labels: As in `images`.
        split: How classes are assigned: three fractions, three lists of labels, or a table of 'train', 'validation' and
            'test'.
        seed: The seed of the random assignment.
        words: As in `Hashing`.
        characters: As in `Hashing`.
        length: As in `Hashing`.

    Returns:
        Tasks of the training, validation and test classes.

    Raises:
        DataError: Unknown labels, or too few classes or texts.
        ValueError: Options out of range.
    """
    train_way = way if train_way is None else train_way
    encode = Hashing(words, characters, length)
    identity = {"version": 1, "encode": asdict(encode), "outside": outside, "origin": origin}
    arrays = cached(name, identity, lambda: _by_class(read(), outside, encode))
    names, counts = [str(label) for label in arrays["names"]], np.asarray(arrays["counts"])
    parts = split_groups(names, split, seed, "class")
    sizes = (query, test_query, test_query)
    if drop_small:
        parts = [part[counts[part] >= shot + size] for part, size in zip(parts, sizes, strict=True)]
    ways = (train_way, way, way)
    for part, w, size in zip(parts, ways, sizes, strict=True):
        check_enough(part, counts, names, w, shot, size, "texts")
    grams, starts = jnp.asarray(arrays["grams"]), np.cumsum(counts) - counts
    own: tuple[Labels, ...] = (train_labels, "task", "task")
    return Splits(*(
        TextPool(grams, jnp.asarray(part, jnp.int32), jnp.asarray(starts[part], jnp.int32),
                 jnp.asarray(counts[part], jnp.int32), apart, encode, w, shot, size, labels)
        for part, apart, w, size, labels in zip(parts, _halves(arrays["outside"], seed), ways, sizes, own, strict=True)
    ))  # fmt: skip


@passes_options_to(text_splits)
def texts(
    *,
    path: str | Path,
    text: str | None = None,
    label: str | None = None,
    outside: str | None = None,
    drop_small: bool = False,
    **options: Any,
) -> Splits:
    """Makes few-shot classification tasks of texts by class: x int32 [n, length], y int32 [n].

    A row of x holds the hashed n-grams of a text.
    A text that occurs twice in a class counts once, so that no text is in both support and query. The texts are encoded
    once. Later calls memory-map them from the cache.

    Args:
        path: A CSV, TSV or JSON file, or a folder by class; see `read_texts`.
        text: The column of the texts; see `read_texts`.
        label: The column of the labels; see `read_texts`.
        outside: The label of texts that belong to no class. Half of them go to validation and half to test.
        drop_small: Whether to leave out classes of fewer than shot + query texts instead of raising an error.
        **options: Options of `text_splits`, from `way` on.

    Returns:
        Tasks of the training, validation and test classes.

    Raises:
        DataError: Nothing to read, unknown columns or labels, or too few classes or texts.
        ValueError: Options out of range.
    """
    if not Path(path).expanduser().exists():
        raise DataError(f"path must be a CSV or JSON file, or a folder by class, got {path}, which does not exist.")
    origin = [fingerprint(path), text, label]
    read = partial(read_texts, path, text=text, label=label)
    return text_splits(f"texts-{Path(path).stem}", origin, read, outside, drop_small, **options)


@passes_options_to(text_splits)
def clinc150(*, path: str | Path | None = None, **options: Any) -> Splits:
    """Makes tasks of CLINC150: 150 intents with 150 utterances each, and 1,200 utterances out of scope.

    The utterances out of scope are `outside` of validation and test, half each, at random.

    Args:
        path: The official data_full.json. By default METAPRIOR_DATA/text/clinc150_full.json.xz.
        **options: Options of `text_splits`, from `way` on.

    Returns:
        Tasks of the training, validation and test intents.

    Raises:
        DataError: No such file, or an argument that `texts` rejects.

    References:
        Larson et al. 2019 (CC BY 3.0).
    """
    file = _intents("clinc150", path)[0]
    return text_splits("clinc150", fingerprint(file), partial(read_texts, file), "oos", **options)


@passes_options_to(text_splits)
def banking77(*, path: str | Path | None = None, **options: Any) -> Splits:
    """Makes tasks of Banking77: 77 intents of a bank's customers, 13,083 utterances.

    Args:
        path: One CSV file with text and category. By default METAPRIOR_DATA/text/banking77_{train,test}.csv.xz.
        **options: Options of `text_splits`, from `way` on.

    Returns:
        Tasks of the training, validation and test intents.

    Raises:
        DataError: No such file, or an argument that `texts` rejects.

    References:
        Casanueva et al. 2020 (CC BY 4.0).
    """
    files = _intents("banking77", path)

    def read() -> Texts:
        parts = [read_texts(file) for file in files]
        return Texts([t for part in parts for t in part.texts], [y for part in parts for y in part.labels or ()])

    return text_splits("banking77", [fingerprint(file) for file in files], read, **options)


def _intents(name: str, path: str | Path | None) -> list[Path]:
    if path is not None:
        files = [Path(path).expanduser()]
        if not files[0].is_file():
            raise DataError(f"path must be the file of {name}, got {path}, which is not a file.")
        return files
    folder = data_folder("text")
    files = [] if folder is None else [folder / file for file in INTENTS[name]]
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"{name}: no file {' and '.join(INTENTS[name])}. Put it into a folder text/ inside METAPRIOR_DATA, or set "
            "path= to a file."
        )
    return files


def _by_class(found: Texts, outside: str | None, encode: Hashing) -> Arrays:
    labels = [str(label) for label in found.labels or ()]
    if outside is not None and outside not in labels:
        raise DataError(f"outside must be the label of some text, got {outside!r}. Correct it or leave it out.")
    # Texts of the same label that differ only in case and spacing count once.
    unique = dict.fromkeys(
        (label, " ".join(text.lower().split())) for text, label in zip(found.texts, labels, strict=True)
    )
    groups: dict[str, list[str]] = {name: [] for name in sorted(set(labels) - {outside})}
    apart = [text for label, text in unique if label == outside]
    for label, text in unique:
        if label != outside:
            groups[label].append(text)
    return {
        "grams": encode([text for group in groups.values() for text in group]),
        "counts": np.asarray([len(group) for group in groups.values()], np.int32),
        "names": np.asarray(list(groups)),
        "outside": encode(apart),
    }


def _halves(outside: np.ndarray, seed: int) -> Sequence[Int[Array, "m length"] | None]:
    if not len(outside):
        return None, None, None
    order = np.random.default_rng(seed).permutation(len(outside))
    return None, *(jnp.asarray(outside[np.sort(half)]) for half in np.array_split(order, 2))
