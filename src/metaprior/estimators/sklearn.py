"""scikit-learn estimators: `fit` on rows with groups, then `predict` with uncertainty for known and new groups.

A group (a county, a patient, a school) is a task. `fit` learns the prior that groups share. `predict(X, groups)` uses
the posterior of a known group's own rows, and the prior for an unknown group. `adapt(X, y)` is for a new group with
some rows.
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

TOGETHER = 32  # the number of groups per compiled call, if there are several
CROSS_VALIDATION = (
    "cross_val_score and GridSearchCV pass groups on with metadata routing, but cross_val_predict never passes them to "
    "predict: see docs/estimators.md"
)


class Group(NamedTuple):
    """A group's support, and the rows to predict.

    Attributes:
        x: Features of the support [n, d].
        y: Targets of the support [n].
        asked: The indices of the rows to predict [m].
    """

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
        """Learns the prior that groups share, and stores each group's rows for `predict`.

        The supports of training tasks have from 0 to `shot` rows, so that a new group may have few or none. Groups with
        a single row are not used for training, but can be predicted.

        Args:
            X: Features [N, d], an array or a DataFrame.
            y: Targets [N].
            groups: The group of each row [N], any hashable values. They are required. In cross-validation, request
                them by metadata routing (`set_fit_request(groups=True)`).

        Returns:
            The estimator itself.

        Raises:
            ValueError: The input is not valid for scikit-learn's estimators, `groups` is missing, or there are too few
                groups.
        """
        self.__dict__.pop("group_", None)  # if an adapted estimator is fitted again
        for name, parameter in parameters_of(type(self)).items():
            accept(parameter.annotation, getattr(self, name), name)
        X, targets = self._checked(X, y, ensure_min_samples=2)
        targets = self._encode(targets)
        ids, names = self._ids(groups, len(X))
        if np.bincount(ids).max() < 2:
            raise DataError("groups must have a group with at least 2 rows to learn a prior from, got one row each.")
        splits = array_tasks(
            X, targets, ids, shot=self.shot, query=self.query, split=self.split, seed=self.seed, small="drop",
            standardise=True, classification=self._classes, shots="uniform",
            columns=getattr(self, "feature_names_in_", None),
        )  # fmt: skip
        assert isinstance(splits.train, ArrayTasks)
        assert splits.train.preparation is not None
        self.preparation_ = splits.train.preparation
        # Compiled programs are shared between fits, so they must not depend on this table's scaling.
        splits = splits._make(replace(source, preparation=None) for source in splits)  # type: ignore[type-var]
        outputs = len(self.classes_) if self._classes else 1
        given, default = self.options or {}, traits_of(self.learner).on_table(X.shape[1])
        chosen = given if default.keys() & given.keys() else {**default, **given}
        options = tuple(sorted((name, frozen(name, value)) for name, value in chosen.items()))
        self.setting_ = kept(Setting(self.learner, tuple(self.hidden), options, outputs, self._classes))
        training = self.training or Training(steps=3000, clip_norm=1.0, chunk=500, validate_every=500, seed=self.seed)
        # Prior and noise are learned from different groups, as the prior fits its own groups too well.
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
        """The scaling that standardises features and targets, from the training groups."""
        return self.preparation_.scaling

    def adapt(self, X: Any, y: Any) -> Self:
        """Returns an estimator for a new group with these rows. Its `predict(X)` without groups predicts this group.

        The prior does not change, nor does this estimator.

        Args:
            X: Features of the group's rows [n, d].
            y: Their targets [n].

        Returns:
            A new estimator.
        """
        check_is_fitted(self)
        X, targets = self._checked(X, y, reset=False)
        adapted = type(self)(**self.get_params(deep=False))
        adapted.__dict__.update(self.__dict__)
        adapted.group_ = (X, self._encode(targets))
        return adapted

    def _scored(self, X: Any, y: Any, groups: Any, support_rows: int | None) -> tuple[np.ndarray, ...]:
        """The rows that `score` evaluates, their targets and their predictions."""
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
        """Checks X and, if given, y as scikit-learn does, in float64, and warns of values far from training's."""
        given = not (isinstance(y, str) and y == "no_validation")
        try:
            numeric = {"y_numeric": not self._classes} if given else {}
            checked: Any = validate_data(self, X, y, dtype=float, **numeric, **options)
        except TypeError as error:
            if "NAType" not in str(error):  # pandas' NA, which is not a number
                raise
            raise ValueError(f"X and y must be numbers without missing values ({error}).") from error
        if not options.get("reset", True):
            self.preparation_.warn_of_strange(*(checked if given else (checked,)), stacklevel=4)
        return checked

    def _encode(self, y: Any) -> np.ndarray:
        return y

    def _ids(self, groups: Any, rows: int) -> tuple[np.ndarray, list[Hashable]]:
        """A number for each row's group, and the groups in the order of these numbers."""
        values = groups if isinstance(groups, list | tuple) else np.asarray(groups)
        if isinstance(values, np.ndarray) and values.dtype.kind == "M":
            values = dates_as_text(values)
        if isinstance(values, np.ndarray) and values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if groups is None:
            raise ValueError(f"groups must have one value per row, got None. {CROSS_VALIDATION}.")
        if isinstance(values, np.ndarray) and values.ndim != 1:
            raise ValueError(f"groups must have one value per row, got shape {np.shape(values)}.")
        if len(values) != rows:
            raise DataError(f"groups must have one value for each of the {rows} rows of X, got {len(values)}.")
        if lost := _missing(values):
            raise DataError(
                f"groups must have no missing value, got one in row {lost[0]}. Fill it in, or leave the row out."
            )
        return encode_labels(values)

    def _asked(self, X: np.ndarray, groups: Any) -> list[Group]:
        """The support and the rows to predict of each group."""
        shown, targets = self.rows_
        if groups is None:
            if not hasattr(self, "group_"):
                warnings.warn(
                    "no groups were given, so every row is predicted from the prior. Pass groups, or call adapt(X, y) "
                    "first. For a group without any rows, pass a new name, e.g. groups=['new'] * len(X). Note that "
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
                f"none of the {len(names)} groups is known, so they are predicted from the prior. `fit` got groups of "
                f"type {was}, but these are of type {now}.",
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
        """Properties of the predictive of each row of X, in standardised units."""
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
                f"{self.learner} diverged on {len(lost)} of {len(groups)} groups, whose predictions are not finite. "
                "Fit with fewer or smaller inner steps, e.g. options={'rate': ...}, or another learner.",
                RuntimeWarning,
                stacklevel=3,
            )
        return out

    def _batches(self, X: np.ndarray, groups: list[Group]) -> Iterator[tuple[tuple[Batch, Any], list, list]]:
        """Yields padded supports and queries of TOGETHER groups, the rows of X that they predict, and their groups."""
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
        """A group's rows in standardised units, padded with rows of weight 0."""
        y = group.y if self._classes else self.scaling_.standardised(group.y[:, None])
        x = _padded(self.scaling_.features(group.x), size)
        return x, _padded(y, size), (np.arange(size) < len(group.x)).astype(float)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Pads rows to `size` with the last one, or with zeros if there is none."""
    last = rows[-1:] if len(rows) else np.zeros((1, *rows.shape[1:]), rows.dtype)
    return np.concatenate([rows, np.repeat(last, size - len(rows), 0)])


def _parts(ids: np.ndarray) -> list[np.ndarray]:
    """The rows of each group."""
    return np.split(np.argsort(ids, kind="stable"), np.cumsum(np.bincount(ids))[:-1])


def _weights(sample_weight: Any, X: Any, rows: np.ndarray) -> np.ndarray | None:
    """The weights of the given rows."""
    if sample_weight is None:
        return None
    return _check_sample_weight(sample_weight, X, ensure_non_negative=True)[rows]


def _missing(values: Any) -> list[int]:
    """The places of values that are None, NaN or pandas' NA."""
    return [i for i, v in enumerate(values) if v is None or type(v).__name__ in ("NAType", "NaTType") or v != v]


class MetaRegressor(RegressorMixin, _MetaEstimator):
    """Regression on many small groups of rows, with intervals.

    Args:
        learner: The name of a learner for regression (see `metaprior list`).
        hidden: The widths of the network's hidden layers; () is a linear model.
        options: The learner's options, e.g. {"steps": 5, "rate": 0.1}. If neither of these is given, `maml`, `lslr` and
            `preconditioned` take 5 inner steps with rate 0.1, or 0.5 / d for d > 5 features (their trait `on_table`).
        shot: The largest number of support rows of a group in training. Groups with fewer rows are padded.
        query: The number of query rows of a group in training.
        split: The shares of the groups that train the prior, select its checkpoint, and fit noise and temperature.
        training: The settings of the outer loop. The default has 3,000 meta-steps.
        seed: The seed of everything random.
    """

    _classes = False

    def predict(self, X: Any, groups: Any = None, *, return_std: bool = False) -> Any:
        """Predicts the mean of each row's predictive distribution.

        Args:
            X: Features [N, d].
            groups: The group of each row [N]. Without groups, the adapted group or the prior predicts all rows.
            return_std: Whether to return standard deviations too, which include the noise.

        Returns:
            The means [N], or the means and the standard deviations [N], in the units of the targets.
        """
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        found = self._answers(X, self._asked(X, groups), ("mean", "variance") if return_std else ("mean",))
        mean = self.scaling_.targets(found["mean"])[:, 0]
        return (mean, np.sqrt(found["variance"][:, 0]) * self.scaling_.y_deviation[0]) if return_std else mean

    def predict_interval(self, X: Any, groups: Any = None, *, coverage: float = 0.9) -> np.ndarray:
        """Predicts the central interval of each row that contains its outcome with a given probability.

        Args:
            X: Features [N, d].
            groups: The group of each row [N]. Without groups, the adapted group or the prior predicts all rows.
            coverage: The probability, between 0 and 1.

        Returns:
            The lower and upper ends [N, 2], in the units of the targets.

        Raises:
            ValueError: `coverage` is not between 0 and 1.
        """
        check_is_fitted(self)
        if isinstance(coverage, bool) or not isinstance(coverage, float | np.floating) or not 0 < coverage < 1:
            raise ValueError(f"coverage must be a number between 0 and 1, e.g. 0.9, got {coverage!r}.")
        X, tail = self._checked(X, reset=False), (1 - float(coverage)) / 2
        found = self._answers(X, self._asked(X, groups), (), (tail, 1 - tail))
        return np.concatenate([self.scaling_.targets(found[f"quantile_{i}"]) for i in range(2)], 1)

    def score(  # pyright: ignore[reportIncompatibleMethodOverride] (a third positional argument would be mistaken)
        self, X: Any, y: Any, *, groups: Any = None, support_rows: int | None = None, sample_weight: Any = None
    ) -> float:
        """Computes R^2 of the predictive means.

        With groups, each group is treated as new, even if `fit` saw it: its first rows are the support, and the others
        are scored. The rows that `fit` stored are not used, since they may be the ones to be scored. Without groups,
        the adapted group or the prior predicts all rows.

        Args:
            X: Features [N, d].
            y: Targets [N].
            groups: The group of each row [N].
            support_rows: The number of support rows of a group, at most half of its rows. The default is `shot`.
            sample_weight: The weight of each row [N].

        Returns:
            R^2 over the scored rows.

        Raises:
            ValueError: `support_rows` is not an integer of at least 0, or the input is not valid.
        """
        rows, targets, mean = self._scored(X, y, groups, support_rows)
        weight = _weights(sample_weight, X, rows)
        return float(r2_score(targets, self.scaling_.targets(mean)[:, 0], sample_weight=weight))


class MetaClassifier(ClassifierMixin, _MetaEstimator):
    """Classification on many small groups of rows that share their classes.

    The arguments are those of `MetaRegressor`.

    Attributes:
        classes_: The classes, sorted if they can be compared.
    """

    _classes = True

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Learns the prior that groups share, and stores each group's rows for `predict`, as `MetaRegressor.fit`.

        Args:
            X: Features [N, d], an array or a DataFrame.
            y: Classes [N].
            groups: The group of each row [N], any hashable values. They are required.

        Returns:
            The estimator itself.

        Raises:
            ValueError: The input is not valid for scikit-learn's estimators, `groups` is missing, or there are too few
                groups or classes.
        """
        labels = np.asarray(y)
        if labels.ndim != 1:
            raise ValueError(f"y must have one class per row, got shape {labels.shape}.")
        if lost := _missing(labels.tolist()):
            raise DataError(
                f"y must have no missing value, got one in row {lost[0]}. Fill it in, or leave the row out."
            )
        check_classification_targets(labels)
        self.classes_ = np.asarray(encode_labels(labels)[1])
        if len(self.classes_) < 2:
            raise ValueError(f"y must have at least 2 classes, got one: {self.classes_.tolist()[0]!r}.")
        return super().fit(X, y, groups)

    def predict_proba(self, X: Any, groups: Any = None) -> np.ndarray:
        """Predicts the probability of each class.

        Args:
            X: Features [N, d].
            groups: The group of each row [N]. Without groups, the adapted group or the prior predicts all rows.

        Returns:
            The probabilities [N, classes], in the order of `classes_`.
        """
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        return self._answers(X, self._asked(X, groups), ("mean",))["mean"]

    def predict(self, X: Any, groups: Any = None) -> np.ndarray:
        """Predicts the most likely class of each row.

        Args:
            X: Features [N, d].
            groups: The group of each row [N]. Without groups, the adapted group or the prior predicts all rows.

        Returns:
            The classes [N].
        """
        likeliest = self.predict_proba(X, groups).argmax(-1)
        return self.classes_[likeliest]

    def _encode(self, y: Any) -> np.ndarray:
        place: dict[Hashable, int] = {label: i for i, label in enumerate(self.classes_.tolist())}
        unknown = [label for label in y.tolist() if label not in place]
        if unknown:
            raise DataError(f"y must hold classes that `fit` saw, {list(place)}, got {unknown[0]!r}.")
        return np.asarray([place[label] for label in y.tolist()], np.int32)

    def score(  # pyright: ignore[reportIncompatibleMethodOverride] (a third positional argument would be mistaken)
        self, X: Any, y: Any, *, groups: Any = None, support_rows: int | None = None, sample_weight: Any = None
    ) -> float:
        """Computes the accuracy, on the rows that `MetaRegressor.score` would score.

        Args:
            X: Features [N, d].
            y: Classes [N].
            groups: The group of each row [N].
            support_rows: The number of support rows of a group, at most half of its rows. The default is `shot`.
            sample_weight: The weight of each row [N].

        Returns:
            The accuracy over the scored rows.
        """
        rows, targets, p = self._scored(X, y, groups, support_rows)
        weight = _weights(sample_weight, X, rows)
        return float(accuracy_score(targets, p.argmax(-1), sample_weight=weight))
