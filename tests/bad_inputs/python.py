"""Calls from Python: arrays, labels, likelihoods, posteriors, estimators."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bad_inputs.judging import Case
from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.estimators.sklearn import MetaClassifier, MetaRegressor
from metaprior.inference.posteriors import implicit, laplace, point
from metaprior.learners import LEARNERS, make_learner, maml
from metaprior.networks import mlp
from metaprior.tasks import array_tasks, check_labels, encode_labels
from metaprior.training.loop import Training

X, Y, G = np.linspace(0, 1, 60)[:, None], np.linspace(0, 2, 60), np.repeat(np.arange(10), 6)


def with_value(array: np.ndarray, value: Any) -> np.ndarray:
    changed = np.array(array, dtype=object if isinstance(value, (str, type(None))) else float)
    changed[7] = value
    return changed


ARRAYS: dict[str, tuple[tuple[Any, Any, Any], dict[str, Any], tuple[str, ...]]] = {
    "x nan": ((with_value(X, np.nan), Y, G), {}, ("x", "nan")),
    "x inf": ((with_value(X, np.inf), Y, G), {}, ("x", "inf")),
    "x a word": ((with_value(X, "oops"), Y, G), {}, ("x", "must hold numbers")),
    "x a number": ((3, Y, G), {}, ("x",)),
    "x None": ((None, Y, G), {}, ("x",)),
    "x short": ((X[:9], Y, G), {}, ("9", "60")),
    "x empty": ((X[:0], Y[:0], G[:0]), {}, ("0",)),
    "x complex": ((X + 1j, Y, G), {}, ("x", "complex")),
    "y nan": ((X, with_value(Y, np.nan), G), {}, ("y", "nan")),
    "y inf": ((X, with_value(Y, np.inf), G), {}, ("y", "inf")),
    "y short": ((X, Y[:9], G), {}, ("9", "60")),
    "y None": ((X, None, G), {}, ("y",)),
    "groups short": ((X, Y, G[:9]), {}, ("9", "60")),
    "groups nan": ((X, Y, with_value(G, np.nan)), {}, ("nan",)),
    "groups None": ((X, Y, None), {}, ("groups",)),
    "groups one": ((X, Y, np.zeros(60)), {}, ("group",)),
    "groups each a row": ((X, Y, np.arange(60)), {}, ("row",)),
    "shot word": ((X, Y, G), {"shot": "3"}, ("shot", "3")),
    "shot 0": ((X, Y, G), {"shot": 0}, ("shot", "0")),
    "query -1": ((X, Y, G), {"query": -1}, ("query", "-1")),
    "ragged": ((X, Y, G), {"ragged": "padd"}, ("ragged", "did you mean 'pad'")),
    "small": ((X, Y, G), {"small": "dropp"}, ("small", "did you mean 'drop'")),
    "standardise": ((X, Y, G), {"standardise": 2}, ("standardise", "2")),
    "unknown": ((X, Y, G), {"shott": 3}, ("shott", "did you mean 'shot'")),
    "split": ((X, Y, G), {"split": (1, 1, 1)}, ("split",)),
    "seed": ((X, Y, G), {"seed": 1.5}, ("seed", "1.5")),
}
QUICK = Training(steps=1, meta_batch=2, chunk=1, validation_tasks=2)
FIT: dict[str, tuple[dict[str, Any], tuple[Any, ...], tuple[str, ...]]] = {
    "learner unknown": ({"learner": "mamll"}, (X, Y, G), ("learner", "did you mean 'maml'")),
    "learner a number": ({"learner": 3}, (X, Y, G), ("learner", "3")),
    "hidden a number": ({"hidden": 8}, (X, Y, G), ("hidden", "8")),
    "hidden floats": ({"hidden": (2.5,)}, (X, Y, G), ("hidden", "2.5")),
    "hidden 0": ({"hidden": (0,)}, (X, Y, G), ("hidden", "0")),
    "options unknown": ({"options": {"stepz": 3}}, (X, Y, G), ("stepz", "did you mean 'steps'")),
    "options a list": ({"options": [1]}, (X, Y, G), ("options",)),
    "option of a wrong type": ({"options": {"steps": 2.5}}, (X, Y, G), ("steps", "2.5")),
    "shot": ({"shot": 2.5}, (X, Y, G), ("shot", "2.5")),
    "query": ({"query": "a"}, (X, Y, G), ("query", "a")),
    "split": ({"split": (0.5, 0.5)}, (X, Y, G), ("split",)),
    "seed": ({"seed": "x"}, (X, Y, G), ("seed", "x")),
    "training a dict": ({"training": {"steps": 3}}, (X, Y, G), ("training",)),
    "X nan": ({}, (with_value(X, np.nan), Y, G), ("X", "nan")),
    "X one column": ({}, (X[:, 0], Y, G), ("array",)),
    "X words": ({}, (with_value(X, "oops"), Y, G), ("oops",)),
    "y nan": ({}, (X, with_value(Y, np.nan), G), ("y", "nan")),
    "y short": ({}, (X, Y[:9], G), ("inconsistent", "9")),
    "groups short": ({}, (X, Y, G[:9]), ("9", "60")),
    "groups nan": ({}, (X, Y, with_value(G, np.nan)), ("groups", "row 7")),
    "groups None": ({}, (X, Y, None), ("groups",)),
    "one row": ({}, (X[:1], Y[:1], G[:1]), ("sample",)),
}


def cases() -> list[Case]:
    found = [
        Case(f"array_tasks {name}", partial(lambda data, more, _: array_tasks(*data, **more), data, more), says)
        for name, (data, more, says) in ARRAYS.items()
    ]
    for kind in (MetaRegressor, MetaClassifier):
        for name, (options, data, says) in FIT.items():
            if kind is MetaClassifier:
                if name in ("y nan", "one row"):  # of one row: the classes are missed first, see below
                    continue
                data = (data[0], np.arange(len(data[1])) % 2, data[2])

            def fitted(kind: type, options: dict[str, Any], data: tuple, _: Path) -> Any:
                return kind(**{"training": QUICK, "hidden": (2,)} | options).fit(*data)

            found.append(Case(f"{kind.__name__} {name}", partial(fitted, kind, options, data), says))
        unfitted = partial(lambda kind, _: kind().predict(X), kind)
        found.append(Case(f"{kind.__name__} not fitted", unfitted, ("not fitted",)))
    for name in LEARNERS:
        given = {"model": (3, Gaussian()), "no model": (None, None), "likelihood": (mlp(1), "gaussian")}
        for title, arguments in given.items():
            run = partial(lambda name, arguments, _: make_learner(name, *arguments), name, arguments)
            found.append(Case(f"{name} {title}", run, (title.split()[-1],)))
    direct = {
        "MetaClassifier one class": (lambda _: MetaClassifier().fit(X, np.zeros(60, int), G), ("2 classes", "one")),
        "maml steps": (lambda _: maml(mlp(1), Gaussian(), steps=2.5), ("steps", "an integer of at least 0", "2.5")),
        "maml unknown": (lambda _: maml(mlp(1), Gaussian(), stepz=2), ("stepz", "did you mean 'steps'")),
        "maml posterior": (lambda _: maml(mlp(1), Gaussian(), posterior="laplace"), ("posterior", "laplace")),
        "gaussian scale": (lambda _: Gaussian(-1.0), ("scale", "-1")),
        "laplace precision": (lambda _: laplace(precision=-1), ("precision", "-1")),
        "laplace curvature": (lambda _: laplace(curvature="dua"), ("curvature", "dua")),
        "implicit temperature": (lambda _: implicit(temperature=0), ("temperature", "0")),
        "point noise": (lambda _: point(noise="a"), ("noise", "a")),
        "mlp hidden": (lambda _: mlp(1, 40), ("hidden", "40")),
        "labels float": (lambda _: check_labels(np.asarray([0.5]), 2), ("labels",)),
        "labels too large": (lambda _: check_labels(np.asarray([0, 2]), 2), ("labels", "2")),
        "labels negative": (lambda _: check_labels(np.asarray([0, -1]), 2), ("labels", "-1")),
        "labels none": (lambda _: encode_labels([]), ("labels",)),
        "labels nan": (lambda _: encode_labels([1.0, float("nan")]), ("labels", "nan")),
        "labels lists": (lambda _: encode_labels([[1], [2]]), ("labels",)),
        "nll of an unknown class": (lambda _: Categorical().nll(np.full((1, 3), -100.0), np.asarray([3])), ("3",)),
    }
    return found + [Case(name, run, says) for name, (run, says) in direct.items()]
