"""The scikit-learn face: `fit` on rows with a group column, then `predict` with error bars for old and new groups.

A group (county, patient, school) is a task. `fit` learns the prior that groups share; `predict(X, groups)` gives each
known group the posterior of its own rows, an unknown one the prior; `adapt(X, y)` is for a new group with some rows.
"""

import warnings
from collections.abc import Hashable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from metaprior.core.extras import extra
from metaprior.core.options import Count, Seed, accept, parameters_of
from metaprior.core.types import Batch
from metaprior.estimators.programs import SIZES, Setting, compiled, frozen, kept, size_of, untuned
from metaprior.evaluation.calibration import calibration
from metaprior.learners.registry import traits_of
from metaprior.tasks.checks import DataError
from metaprior.tasks.tables.arrays import ArrayTasks, array_tasks
from metaprior.tasks.tables.classes import encode_labels
from metaprior.tasks.tables.columns import dates_as_text
from metaprior.tasks.tables.preparation import Preparation
from metaprior.tasks.tables.scaling import Scaling
from metaprior.training.loop import Training, fit

with extra("sklearn", "A scikit-learn estimator"):
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

TOGETHER = 32  # groups a compiled call answers for, where there are several
CROSS_VALIDATION = (
    "cross_val_score and GridSearchCV pass groups on with metadata routing, cross_val_predict never passes them to "
    "predict: see docs/estimators.md"
)


class Group(NamedTuple):
    """What a group has shown, and which rows are asked for."""

    x: np.ndarray
    y: np.ndarray
    asked: np.ndarray


class _MetaEstimator(BaseEstimator):
    _classes: bool
    classes_: np.ndarray
    preparation_: Preparation
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

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Learn the prior that groups share, and keep each group's rows for `predict`.

        Training tasks show any number of rows from 0 to `shot`, so that a new group may have few or none. Groups of one
        row train nothing, but are predicted.

        Args:
            X: features [N, d], an array or a DataFrame. y: targets [N]. groups: [N], any hashable values; needed, so
                ask for them by metadata routing (`set_fit_request(groups=True)`) in cross-validation.

        Raises:
            ValueError: what scikit-learn's estimators raise; too few groups; missing groups.
        """
        self.__dict__.pop("group_", None)  # of an adapted estimator that is fitted anew
        for name, parameter in parameters_of(type(self)).items():
            accept(parameter.annotation, getattr(self, name), name)
        X, targets = self._checked(X, y, ensure_min_samples=2)
        targets = self._encode(targets)
        ids, names = self._ids(groups, len(X))
        if np.bincount(ids).max() < 2:
            raise DataError("groups: every group has one row; a prior is learned from groups of 2 rows or more")
        splits = array_tasks(
            X, targets, ids, shot=self.shot, query=self.query, split=self.split, seed=self.seed, small="drop",
            standardise=True, classification=self._classes, shots="uniform",
            columns=getattr(self, "feature_names_in_", None),
        )  # fmt: skip
        assert isinstance(splits.train, ArrayTasks)
        assert splits.train.preparation is not None
        self.preparation_ = splits.train.preparation
        # Programs are shared between fits: what they are compiled for must not hold this table's scaling.
        splits = splits._make(replace(source, preparation=None) for source in splits)  # type: ignore[type-var]
        outputs = len(self.classes_) if self._classes else 1
        given, default = self.options or {}, traits_of(self.learner).on_table(X.shape[1])
        chosen = given if default.keys() & given.keys() else {**default, **given}
        options = tuple(sorted((name, frozen(name, value)) for name, value in chosen.items()))
        self.setting_ = kept(Setting(self.learner, tuple(self.hidden), options, outputs, self._classes))
        training = self.training or Training(steps=3000, clip_norm=1.0, chunk=500, validate_every=500, seed=self.seed)
        # Prior and noise are learned from different groups, as a prior looks too good on those it was fitted to.
        fitted = fit(untuned(self.setting_), splits, training, name=self.learner)
        if fitted.interrupted:
            raise KeyboardInterrupt(f"training stopped at meta-step {int(fitted.state.step)} of {training.steps}")
        self.params_ = fitted.best
        key = jax.random.key(self.seed)
        learner, held = untuned(self.setting_), self.setting_.held()
        self.knobs_ = calibration(learner, self.params_, splits.test, key, held=held).knobs
        order = np.argsort(ids, kind="stable")
        ends = np.cumsum(np.bincount(ids)).tolist()
        self.rows_ = X[order], targets[order]
        self.groups_ = dict(zip(names, pairwise([0, *ends]), strict=True))
        return self

    @property
    def scaling_(self) -> Scaling:
        """How features and targets are standardised, by the groups that trained."""
        return self.preparation_.scaling

    def adapt(self, X: Any, y: Any) -> Self:
        """This estimator for one more group, of these rows: `predict(X)` without groups then answers for it.

        The prior stays as it was fitted, and so does this estimator: a new one is returned.
        """
        check_is_fitted(self)
        X, targets = self._checked(X, y, reset=False)
        adapted = type(self)(**self.get_params(deep=False))
        adapted.__dict__.update(self.__dict__)
        adapted.group_ = (X, self._encode(targets))
        return adapted

    def _scored(self, X: Any, y: Any, groups: Any, support_rows: int | None) -> tuple[np.ndarray, ...]:
        """The rows that `score` judges, their targets, and what is predicted of them."""
        check_is_fitted(self)
        X, given = self._checked(X, y, reset=False)
        targets = self._encode(given)
        if groups is None:
            return np.arange(len(X)), targets, self._answers(X, self._asked(X, None), ("mean",))["mean"]
        shown = self.shot if support_rows is None else support_rows
        if isinstance(shown, bool) or not isinstance(shown, int | np.integer) or shown < 0:
            raise ValueError(f"support_rows must be an integer of at least 0, got {shown!r}.")
        asked = []
        for rows in _parts(self._ids(groups, len(X))[0]):
            cut = min(int(shown), len(rows) // 2)
            asked.append(Group(X[rows[:cut]], targets[rows[:cut]], rows[cut:]))
        scored = np.sort(np.concatenate([group.asked for group in asked]))
        return scored, targets[scored], self._answers(X, asked, ("mean",))["mean"][scored]

    def _checked(self, X: Any, y: Any = "no_validation", **options: Any) -> Any:
        """scikit-learn's checks of X and, if given, of y, in float64; then warns of what is far from training."""
        given = not (isinstance(y, str) and y == "no_validation")
        try:
            numeric = {"y_numeric": not self._classes} if given else {}
            checked: Any = validate_data(self, X, y, dtype=float, **numeric, **options)
        except TypeError as error:
            if "NAType" not in str(error):  # pandas' NA is no number
                raise
            raise ValueError(f"X and y must be numbers without missing values ({error}).") from error
        if not options.get("reset", True):
            self.preparation_.warn_of_strange(*(checked if given else (checked,)), stacklevel=4)
        return checked

    def _encode(self, y: Any) -> np.ndarray:
        return y

    def _ids(self, groups: Any, rows: int) -> tuple[np.ndarray, list[Hashable]]:
        """A number a row, and what the numbers stand for."""
        values = groups if isinstance(groups, list | tuple) else np.asarray(groups)
        if isinstance(values, np.ndarray) and values.dtype.kind == "M":
            values = dates_as_text(values)
        if isinstance(values, np.ndarray) and values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if groups is None:
            raise ValueError(f"groups must be one value a row, got None; {CROSS_VALIDATION}.")
        if isinstance(values, np.ndarray) and values.ndim != 1:
            raise ValueError(f"groups must be one value a row, got shape {np.shape(values)}.")
        if len(values) != rows:
            raise DataError(f"groups must have one value for each of the {rows} rows of X, got {len(values)}.")
        if lost := _missing(values):
            raise DataError(f"groups: came a missing value in row {lost[0]}; fill it in or leave the row out")
        return encode_labels(values)

    def _asked(self, X: np.ndarray, groups: Any) -> list[Group]:
        """The rows of each group in turn, and what it has shown."""
        shown, targets = self.rows_
        if groups is None:
            if not hasattr(self, "group_"):
                warnings.warn(
                    "no groups were given, so the prior answers for every row. Pass groups, or adapt(X, y) first; for "
                    "a group that has shown nothing, pass a new name, e.g. groups=['new'] * len(X). Note that "
                    f"{CROSS_VALIDATION}.",
                    RuntimeWarning,
                    stacklevel=3,
                )
            own, known = getattr(self, "group_", (shown[:0], targets[:0]))
            return [Group(own, known, np.arange(len(X)))]
        ids, names = self._ids(groups, len(X))
        places = [self.groups_.get(name, (0, 0)) for name in names]
        if not any(end for _, end in places) and {str(name) for name in names} & {str(name) for name in self.groups_}:
            was, now = (type(next(iter(given))).__name__ for given in (self.groups_, names))
            warnings.warn(
                f"none of the {len(names)} groups is known, so the prior answers; `fit` saw groups of type {was}, now "
                f"they are of type {now}",
                RuntimeWarning,
                stacklevel=3,
            )
        return [
            Group(shown[start:end], targets[start:end], rows)
            for (start, end), rows in zip(places, _parts(ids), strict=True)
        ]

    def _answers(
        self, X: np.ndarray, groups: list[Group], asked: tuple[str, ...], quantiles: tuple[float, ...] = ()
    ) -> dict[str, Float[np.ndarray, "n c"]]:
        """What is asked of the predictive of each row of X, whichever group it is of, in a learner's units."""
        knobs = {name: jnp.asarray(value, float) for name, value in self.knobs_.items()}
        answer, out, lost = compiled(self.setting_, asked, quantiles), {}, set()
        for batch, rows, owners in self._batches(X, groups):
            found = jax.device_get(answer(self.params_, knobs, *batch))
            for name, values in found.items():
                whole = out.setdefault(name, np.zeros((len(X), values.shape[-1])))
                for group, (place, owner) in enumerate(zip(rows, owners, strict=True)):
                    whole[place] = values[group, : len(place)]
                    if not np.isfinite(values[group, : len(place)]).all():
                        lost.add(owner)
        if lost:
            warnings.warn(
                f"{self.learner} diverged on {len(lost)} of {len(groups)} groups, whose predictions are not finite; "
                "fit with fewer or smaller inner steps, e.g. options={'rate': ...}, or another learner",
                RuntimeWarning,
                stacklevel=3,
            )
        return out

    def _batches(self, X: np.ndarray, groups: list[Group]) -> Iterator[tuple[tuple[Batch, Any], list, list]]:
        """Supports and queries of equal sizes, padded, TOGETHER groups at a time; the rows they answer, and whose."""
        pieces: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
        for i, group in enumerate(groups):
            size = min(size_of(len(group.asked)), SIZES[-1])
            for start in range(0, len(group.asked), size):
                pieces.setdefault((size_of(len(group.x)), size), []).append((i, group.asked[start : start + size]))
        scaling = self.scaling_
        features = scaling.features(X)
        for (shown, size), members in pieces.items():
            together = TOGETHER if len(members) > 1 else 1
            for start in range(0, len(members), together):
                part = members[start : start + together]
                full = part + part[-1:] * (together - len(part))
                xs, ys, ws = zip(*(self._support(groups[i], shown) for i, _ in full), strict=True)
                support = Batch(*(jnp.asarray(np.stack(v)) for v in (xs, ys, ws)))
                query = np.stack([_padded(features[rows], size) for _, rows in full])
                yield (support, jnp.asarray(query)), [rows for _, rows in part], [i for i, _ in part]

    def _support(self, group: Group, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A group's rows in a learner's units, padded with weight 0."""
        y = group.y if self._classes else self.scaling_.standardised(group.y[:, None])
        x = _padded(self.scaling_.features(group.x), size)
        return x, _padded(y, size), (np.arange(size) < len(group.x)).astype(float)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    """`size` rows: the last is repeated, or zeros where there is none."""
    last = rows[-1:] if len(rows) else np.zeros((1, *rows.shape[1:]), rows.dtype)
    return np.concatenate([rows, np.repeat(last, size - len(rows), 0)])


def _parts(ids: np.ndarray) -> list[np.ndarray]:
    """The rows of each group."""
    return np.split(np.argsort(ids, kind="stable"), np.cumsum(np.bincount(ids))[:-1])


def _weights(sample_weight: Any, X: Any, rows: np.ndarray) -> np.ndarray | None:
    """The weights of the rows that are scored."""
    if sample_weight is None:
        return None
    return _check_sample_weight(sample_weight, X, ensure_non_negative=True)[rows]


def _missing(values: Any) -> list[int]:
    """Which values are None, NaN or pandas' NA."""
    return [i for i, v in enumerate(values) if v is None or type(v).__name__ in ("NAType", "NaTType") or v != v]


class MetaRegressor(RegressorMixin, _MetaEstimator):
    """Regression on many small groups of rows, with intervals.

    Args:
        learner: any of `metaprior.LEARNERS` that does regression.
        options: the learner's options, e.g. {"steps": 5, "rate": 0.1}. Where none of them is
            said, `maml`, `lslr` and `preconditioned` take 5 inner steps of rate 0.1, or 0.5 / d for d > 5 features
            (their trait `on_table`).
        hidden: widths of the network; () is a linear model.
        shot: rows that a group shows in training; groups with fewer rows are padded.
        query: rows that a group is judged by in training.
        split: shares of the groups that train the prior, choose among its checkpoints, and fit noise and temperature.
        training: the outer loop (default: 3,000 meta-steps).
    """

    _classes = False

    def predict(self, X: Any, groups: Any = None, *, return_std: bool = False) -> Any:
        """The predictive mean [N] of each row, and with return_std its standard deviation, noise included."""
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        found = self._answers(X, self._asked(X, groups), ("mean", "variance") if return_std else ("mean",))
        mean = self.scaling_.targets(found["mean"])[:, 0]
        return (mean, np.sqrt(found["variance"][:, 0]) * self.scaling_.y_deviation[0]) if return_std else mean

    def predict_interval(self, X: Any, groups: Any = None, *, coverage: float = 0.9) -> np.ndarray:
        """[N, 2]: the central predictive interval of each row that should hold `coverage` of the outcomes."""
        check_is_fitted(self)
        if isinstance(coverage, bool) or not isinstance(coverage, float | np.floating) or not 0 < coverage < 1:
            raise ValueError(f"coverage must be a number between 0 and 1, e.g. 0.9, got {coverage!r}.")
        X, tail = self._checked(X, reset=False), (1 - float(coverage)) / 2
        found = self._answers(X, self._asked(X, groups), (), (tail, 1 - tail))
        return np.concatenate([self.scaling_.targets(found[f"quantile_{i}"]) for i in range(2)], 1)

    def score(  # pyright: ignore[reportIncompatibleMethodOverride] (a third positional argument would be mistaken)
        self, X: Any, y: Any, *, groups: Any = None, support_rows: int | None = None, sample_weight: Any = None
    ) -> float:
        """R^2 of the predictive means of rows that were not shown.

        With groups, each one is taken as new, whether `fit` saw it or not: its first `support_rows` rows are shown (by
        default `shot`; at most half of its rows), the others are scored. What `fit` kept of a known group is not used:
        it may be the very rows to be scored. Without groups, the adapted group or the prior predicts all rows.
        """
        rows, targets, mean = self._scored(X, y, groups, support_rows)
        weight = _weights(sample_weight, X, rows)
        return float(r2_score(targets, self.scaling_.targets(mean)[:, 0], sample_weight=weight))


class MetaClassifier(ClassifierMixin, _MetaEstimator):
    """Classification on many small groups of rows that share their classes; arguments as `MetaRegressor`."""

    _classes = True

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        labels = np.asarray(y)
        if labels.ndim != 1:
            raise ValueError(f"y must have one class a row, got shape {labels.shape}.")
        if lost := _missing(labels.tolist()):
            raise DataError(f"y: came a missing value in row {lost[0]}; fill it in or leave the row out")
        check_classification_targets(labels)
        self.classes_ = np.asarray(encode_labels(labels)[1])
        if len(self.classes_) < 2:
            raise ValueError(f"y must have at least 2 classes, got one: {self.classes_.tolist()[0]!r}.")
        return super().fit(X, y, groups)

    def predict_proba(self, X: Any, groups: Any = None) -> np.ndarray:
        """[N, classes]: the predictive probability of each class, in the order of `classes_`."""
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        return self._answers(X, self._asked(X, groups), ("mean",))["mean"]

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

    def score(  # pyright: ignore[reportIncompatibleMethodOverride] (a third positional argument would be mistaken)
        self, X: Any, y: Any, *, groups: Any = None, support_rows: int | None = None, sample_weight: Any = None
    ) -> float:
        """The accuracy on rows that were not shown; arguments as `MetaRegressor.score`."""
        rows, targets, p = self._scored(X, y, groups, support_rows)
        weight = _weights(sample_weight, X, rows)
        return float(accuracy_score(targets, p.argmax(-1), sample_weight=weight))
