"""The scikit-learn face: `fit` on rows with a group column, then `predict` with error bars for old and new groups.

A group (county, patient, school) is a task. `fit` learns the prior that groups share; `predict(X, groups)` gives each
known group the posterior of its own rows, an unknown one the prior; `adapt(X, y)` is for a new group with some rows.
"""

import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from metaprior.calibration import calibrate, calibrate_softmax, temperature_scaled
from metaprior.inference.posteriors import implicit
from metaprior.learners.registry import LEARNERS, make_learner
from metaprior.likelihoods import Categorical, Gaussian
from metaprior.named import lookup, option_names
from metaprior.networks import mlp
from metaprior.options import Count, Seed, accept, parameters_of
from metaprior.tasks.arrays import ArrayTasks, Scaling, array_tasks
from metaprior.tasks.checks import DataError
from metaprior.tasks.labels import encode_labels
from metaprior.training import Training, fit
from metaprior.types import Batch, Learner


@dataclass(frozen=True)
class Setting:
    """What a learner is made of, hashable, so that one compiled program serves all its calls."""

    learner: str
    hidden: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    outputs: int
    classes: bool

    def owns_posterior(self) -> bool:
        return "posterior" in option_names(lookup("learner", self.learner, LEARNERS))

    def knobs(self) -> dict[str, float]:
        """The scalars that held-out groups fit first: the noise, and the implicit posterior's temperature."""
        temperature = {"temperature": 1.0} if self.owns_posterior() else {}
        return temperature | ({} if self.classes else {"noise": 0.5})

    def build(self, knobs: dict[str, Any]) -> Learner:
        """The learner, with the implicit posterior where it can have one."""
        options, likelihood = dict(self.options), Categorical() if self.classes else Gaussian()
        inner = {name: value for name, value in knobs.items() if name != "softmax_temperature"}
        if self.owns_posterior():
            # The noise of predictions alone: in the likelihood it would change the inner steps that theta was made for.
            options = {"posterior": implicit(**inner)} | options
        elif not self.classes:
            likelihood = Gaussian(knobs["noise"])
        learner = make_learner(self.learner, mlp(self.outputs, self.hidden), likelihood, **options)
        scale = knobs.get("softmax_temperature")
        return learner if scale is None else temperature_scaled(learner, scale)


@lru_cache(maxsize=32)
def compiled(setting: Setting) -> Any:
    """(params, knobs, support, x) -> predictive, adapted and predicted in one program."""

    @jax.jit
    def answer(params: Any, knobs: dict[str, Any], support: Batch, x: jax.Array) -> Any:
        learner, (key_adapt, key_predict) = setting.build(knobs), jax.random.split(jax.random.key(0))
        return learner.predict(params, learner.adapt(params, support, key_adapt), x, key_predict)

    return answer


def padded(rows: np.ndarray) -> np.ndarray:
    """As many rows as the next power of two, so that few sizes are compiled: the last is repeated (zeros if none)."""
    lacking = (1 << max(len(rows) - 1, 0).bit_length()) - len(rows)
    last = rows[-1:] if len(rows) else np.zeros((1, *rows.shape[1:]), rows.dtype)
    return np.concatenate([rows, np.repeat(last, lacking, 0)])


class _MetaEstimator(BaseEstimator):
    _classes: bool
    classes_: np.ndarray
    scaling_: Scaling
    group_: tuple[np.ndarray, np.ndarray]

    def __init__(
        self,
        learner: str = "maml",
        *,
        hidden: tuple[Count, ...] = (40, 40),
        options: dict[str, Any] | None = None,
        shot: Count = 5,
        query: Count = 5,
        split: Any = (0.7, 0.15, 0.15),
        training: Training | None = None,
        seed: Seed = 0,
    ):
        self.learner = learner
        self.hidden = hidden
        self.options = options
        self.shot = shot
        self.query = query
        self.split = split
        self.training = training
        self.seed = seed

    def fit(self, X: Any, y: Any, groups: Any) -> Self:
        """Learn the prior that groups share, and keep each group's rows for `predict`.

        X [N, d], y [N] and groups [N], any hashable values. Groups of one row train nothing, but are predicted.
        """
        for name, parameter in parameters_of(type(self)).items():
            accept(parameter.annotation, getattr(self, name), name)
        X, targets = validate_data(self, X, y, dtype=float, y_numeric=not self._classes, ensure_min_samples=2)
        targets = self._encode(targets)
        splits = array_tasks(
            X, targets, groups, shot=self.shot, query=self.query, split=self.split, seed=self.seed, small="drop",
            standardise=True, classification=self._classes,
        )  # fmt: skip
        assert isinstance(splits.train, ArrayTasks)
        assert splits.train.scaling is not None
        self.scaling_ = splits.train.scaling
        outputs = len(self.classes_) if self._classes else 1
        own = {k: tuple(v) if isinstance(v, list) else v for k, v in (self.options or {}).items()}
        options = tuple(sorted(own.items()))
        self.setting_ = Setting(self.learner, tuple(self.hidden), options, outputs, self._classes)
        training = self.training or Training(steps=3000, clip_norm=1.0, chunk=500, validate_every=500, seed=self.seed)
        # Prior and noise are learned from different groups, as a prior looks too good on those it was fitted to.
        knobs = self.setting_.knobs()
        self.params_ = fit(self.setting_.build(knobs), splits, training, name=self.learner).best
        key = jax.random.key(self.seed)
        self.knobs_ = calibrate(self.setting_.build, self.params_, splits.test, key, knobs).knobs if knobs else {}
        if self._classes:
            self.knobs_ |= calibrate_softmax(self.setting_.build(self.knobs_), self.params_, splits.test, key).knobs
        ids, names = encode_labels(groups)
        self.groups_ = {name: (X[ids == i], targets[ids == i]) for i, name in enumerate(names)}
        return self

    def adapt(self, X: Any, y: Any) -> Self:
        """This estimator for one more group, of these rows: `predict(X)` without groups then answers for it."""
        check_is_fitted(self)
        X, targets = validate_data(self, X, y, dtype=float, reset=False, y_numeric=not self._classes)
        adapted = type(self)(**self.get_params(deep=False))
        adapted.__dict__.update(self.__dict__)
        adapted.group_ = (X, self._encode(targets))
        return adapted

    def _encode(self, y: Any) -> np.ndarray:
        return y

    def _predictives(self, X: Any, groups: Any) -> list[tuple[np.ndarray, Any]]:
        """(rows, predictive) of each group in turn."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=float, reset=False)
        empty = X[:0], np.zeros(0, np.int32 if self._classes else float)
        if groups is None:
            return [(np.arange(len(X)), self._predictive(X, *getattr(self, "group_", empty)))]
        ids, names = encode_labels(groups)
        if len(ids) != len(X):
            raise DataError(f"groups: came {len(ids)} for {len(X)} rows of X, needs one a row")
        parts = [np.flatnonzero(ids == i) for i in range(len(names))]
        return [
            (rows, self._predictive(X[rows], *self.groups_.get(name, empty)))
            for rows, name in zip(parts, names, strict=True)
        ]

    def _predictive(self, X: np.ndarray, seen: np.ndarray, targets: np.ndarray) -> Any:
        x, seen, scaling = padded(X), padded(seen), self.scaling_
        weight = (np.arange(len(seen)) < len(targets)).astype(float)
        y = padded(targets) if self._classes else scaling.standardised(padded(targets)[:, None])
        support = Batch(*(jnp.asarray(values) for values in (scaling.features(seen), y, weight)))
        knobs = {name: jnp.asarray(value, float) for name, value in self.knobs_.items()}
        return compiled(self.setting_)(self.params_, knobs, support, jnp.asarray(scaling.features(x)))

    def _collect(self, X: Any, groups: Any, of: Any, columns: tuple[int, ...]) -> np.ndarray:
        """One row of figures a row of X, whichever group it is of."""
        answers = self._predictives(X, groups)
        out = np.zeros((sum(len(rows) for rows, _ in answers), *columns))
        for rows, predictive in answers:
            out[rows] = np.asarray(of(predictive))[: len(rows)]
        if lost := sum(not np.isfinite(out[rows]).all() for rows, _ in answers):
            warnings.warn(
                f"{self.learner} diverged on {lost} of {len(answers)} groups, whose predictions are not finite; fit "
                f"with fewer or smaller inner steps, e.g. options={{'rate': ...}}, or another learner",
                RuntimeWarning,
                stacklevel=3,
            )
        return out


class MetaRegressor(RegressorMixin, _MetaEstimator):
    """Regression on many small groups of rows, with intervals.

    Args:
        learner: any of `metaprior.LEARNERS` that does regression.
        options: the learner's options, e.g. {"steps": 5}.
        hidden: widths of the network; () is a linear model.
        shot: rows that a group shows in training; groups with fewer rows are padded.
        query: rows that a group is judged by in training.
        split: shares of the groups that train the prior, choose among its checkpoints, and fit noise and temperature.
        training: the outer loop (default: 3,000 meta-steps).
    """

    _classes = False

    def predict(self, X: Any, groups: Any = None, *, return_std: bool = False) -> Any:
        """The predictive mean [N] of each row, and with return_std its standard deviation, noise included."""
        mean = self._collect(X, groups, lambda p: self.scaling_.targets(p.mean())[:, 0], ())
        if not return_std:
            return mean
        return mean, np.sqrt(self._collect(X, groups, lambda p: self.scaling_.variances(p.variance())[:, 0], ()))

    def predict_interval(self, X: Any, groups: Any = None, *, coverage: float = 0.9) -> np.ndarray:
        """[N, 2]: the central predictive interval of each row that should hold `coverage` of the outcomes."""
        if not 0 < coverage < 1:
            raise ValueError(f"coverage: came {coverage}, needs a number between 0 and 1, e.g. 0.9")
        tail = (1 - coverage) / 2

        def ends(predictive: Any) -> np.ndarray:
            return np.stack([self.scaling_.targets(predictive.quantile(q))[:, 0] for q in (tail, 1 - tail)], -1)

        return self._collect(X, groups, ends, (2,))

class MetaClassifier(ClassifierMixin, _MetaEstimator):
    """Classification on many small groups of rows that share their classes; arguments as `MetaRegressor`."""

    _classes = True

    def fit(self, X: Any, y: Any, groups: Any) -> Self:
        self.classes_ = np.asarray(encode_labels(np.asarray(y))[1])
        return super().fit(X, y, groups)

    def predict_proba(self, X: Any, groups: Any = None) -> np.ndarray:
        """[N, classes]: the predictive probability of each class, in the order of `classes_`."""
        check_is_fitted(self)
        return self._collect(X, groups, lambda p: p.mean(), (len(self.classes_),))

    def predict(self, X: Any, groups: Any = None) -> np.ndarray:
        """The likeliest class [N] of each row."""
        likeliest = self.predict_proba(X, groups).argmax(-1)
        return self.classes_[likeliest]

    def _encode(self, y: Any) -> np.ndarray:
        place: dict[Hashable, int] = {label: i for i, label in enumerate(self.classes_.tolist())}
        unknown = [label for label in y.tolist() if label not in place]
        if unknown:
            raise DataError(f"y: came class {unknown[0]!r}, needs one of those that `fit` saw: {list(place)}")
        return np.asarray([place[label] for label in y.tolist()], np.int32)
