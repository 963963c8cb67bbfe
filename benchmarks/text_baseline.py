"""The nearest class by TF-IDF (scikit-learn) on the very tasks that `metaprior evaluate` draws of few-shot intents.

Document frequencies are counted on the texts of the training classes; a class is the mean of its support texts.
Needs METAPRIOR_DATA.
"""

from dataclasses import asdict

import jax
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from harness import options, write
from metaprior.core.types import Task
from metaprior.evaluation.figures import figure_of
from metaprior.experiments.recipe import Evaluation
from metaprior.tasks import SOURCES
from metaprior.tasks.store import data_folder
from metaprior.tasks.texts.reading import read_texts
from metaprior.tasks.texts.sources import INTENTS

FEATURES = {"words": {"analyzer": "word"}, "characters": {"analyzer": "char_wb", "ngram_range": (2, 5)}}


def texts_of_rows(data: str, encode) -> dict[bytes, str]:
    """The texts by the rows that a task shows of them; texts of the same n-grams are the same to both sides."""
    folder = data_folder("text")
    found = [text for file in INTENTS[data] for text in read_texts(folder / file).texts]
    return {row.tobytes(): text for row, text in zip(encode(found), found, strict=True)}


def drawn_tasks(source, seed: int, tasks: int) -> Task:
    """The tasks of `metaprior evaluate --seed`, in its order."""
    keys = jax.vmap(lambda key: jax.random.split(key, 3)[0])(jax.random.split(jax.random.key(seed), tasks))
    return jax.jit(jax.vmap(lambda key: jax.tree.map(lambda leaf: leaf[0], source.sample(key, 1))))(keys)


def accuracies(vectorizer: TfidfVectorizer, known: dict[bytes, str], tasks: Task) -> np.ndarray:
    """One share of right answers a task."""

    def vectors(rows: np.ndarray) -> np.ndarray:
        return vectorizer.transform([known[row.tobytes()] for row in rows]).toarray()

    found = []
    support, query = jax.device_get((tasks.support, tasks.query))
    for at in range(len(support.y)):
        f, y = vectors(support.x[at]), support.y[at]
        means = normalize(np.stack([f[y == label].mean(0) for label in range(y.max() + 1)]))
        found.append(((vectors(query.x[at]) @ means.T).argmax(1) == query.y[at]).mean())
    return np.asarray(found)


def main() -> None:
    chosen = options(
        __doc__,
        data={"nargs": "+", "choices": list(INTENTS), "default": list(INTENTS), "help": "which intents"},
        shots={"type": int, "nargs": "+", "default": [1, 5]},
    )
    tasks, seed, result = 20 if chosen.quick else Evaluation().tasks, Evaluation().seed, {}
    if chosen.quick:
        del chosen.data[1:], chosen.shots[1:]
    for data in chosen.data:
        for shot in chosen.shots:
            splits = SOURCES[data](shot=shot)
            known = texts_of_rows(data, splits.test.encode)
            train, drawn = splits.train, drawn_tasks(splits.test, seed, tasks)
            rows = [np.arange(start, start + count) for start, count in zip(train.starts, train.counts, strict=True)]
            seen = [known[row.tobytes()] for row in np.asarray(train.grams)[np.concatenate(rows)]]
            for name, settings in FEATURES.items():
                figure = figure_of(accuracies(TfidfVectorizer(**settings).fit(seen), known, drawn))
                print(f"{data}, 5 ways, {shot} shot, {name}: {figure}", flush=True)
                result[f"{data}-{shot}-{name}"] = asdict(figure)
    write(chosen.json, result)


if __name__ == "__main__":
    main()
