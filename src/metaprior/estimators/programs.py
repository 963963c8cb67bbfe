"""Learners by their settings, and the compiled programs of the estimators, which are cached between calls and fits."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax

from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.core.named import construct, lookup, option_names
from metaprior.core.types import Batch, Learner
from metaprior.inference.posteriors import POSTERIORS, PosteriorRule
from metaprior.learners.builders.knobs import turned
from metaprior.learners.builders.metric import with_unseen
from metaprior.learners.registry import LEARNERS, make_learner, traits_of
from metaprior.networks import mlp

SIZES = (1, 4, 16, 64, 256, 1024)  # sizes of supports and queries; a few shapes need only a few compiled programs
NOISE = 0.5  # the starting value of the fit of the noise, a standard deviation of standardised targets


@dataclass(frozen=True)
class Setting:
    """The settings of a learner, hashable, so that equal settings share one compiled program.

    Attributes:
        learner: The learner's name.
        hidden: The widths of the network's hidden layers.
        options: The learner's options as sorted pairs.
        outputs: The number of outputs of the network.
        classes: Whether it is a classifier.
    """

    learner: str
    hidden: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    outputs: int
    classes: bool

    def made(self) -> Learner:
        """Makes the learner, with the requested or the default posterior if it can have one."""
        options, likelihood = dict(self.options), Categorical() if self.classes else Gaussian()
        if self._has_posterior():
            # The noise is only in the predictions. In the likelihood it would change the inner steps.
            options["posterior"] = self._posterior()
        elif not self.classes:
            likelihood = Gaussian(NOISE)
        learner = make_learner(self.learner, mlp(self.outputs, self.hidden), likelihood, **options)
        if learner.transduce is not None:
            raise ValueError(
                f"learner must predict each row by itself, but {self.learner} is transductive: its predictions depend "
                "on the other rows. Use `mp.fit` and `mp.evaluate`."
            )
        rules_out = self.classes and traits_of(self.learner).rules_out_unseen
        return with_unseen(learner, self.outputs) if rules_out else learner

    def held(self) -> set[str]:
        """Returns the names of scalars that the user's options state, which are not fitted."""
        if not self._has_posterior():
            return set()
        rule = self._rule()
        if isinstance(rule, PosteriorRule):
            return {*dict(rule.knobs), *(["noise"] if _noise_of(rule) is not None else [])}
        return set(_named(rule)[1])

    def _has_posterior(self) -> bool:
        return "posterior" in option_names(lookup("learner", self.learner, LEARNERS))

    def _rule(self) -> Any:
        """The requested posterior. The default is the implicit one, or Laplace's if inner steps imply no prior."""
        return dict(self.options).get("posterior", "implicit" if traits_of(self.learner).descends else "laplace")

    def _posterior(self) -> PosteriorRule:
        rule = self._rule()
        if not isinstance(rule, PosteriorRule):
            name, stated = _named(rule)
            rule = construct("posterior", name or "", POSTERIORS, **stated)
        takes_noise = not self.classes and "noise" in option_names(rule.predict)
        return rule.turned({"noise": NOISE}) if takes_noise and _noise_of(rule) is None else rule


def _noise_of(rule: PosteriorRule) -> Any:
    """The noise that a rule states, or None for the likelihood's."""
    return rule.predict.keywords.get("noise") if isinstance(rule.predict, partial) else None


def _named(rule: Any) -> tuple[str | None, dict[str, Any]]:
    """The name and options of a posterior given by its name, alone or in a table."""
    if isinstance(rule, str):
        return rule, {}
    table = dict(rule)
    return table.pop("name", None), table


@lru_cache(maxsize=32)
def kept(setting: Setting) -> Setting:
    """Returns the same object for equal settings, since compiled programs are cached by identity.

    Args:
        setting: The settings.
    """
    return setting


@lru_cache(maxsize=32)
def untuned(setting: Setting) -> Learner:
    """Makes the learner to train, whose scalars are not yet fitted.

    Args:
        setting: The settings.
    """
    return setting.made()


@lru_cache(maxsize=64)
def compiled(setting: Setting, asked: tuple[str, ...], quantiles: tuple[float, ...] = ()) -> Any:
    """Returns a compiled function (params, scalars, supports, x) -> properties of each group's predictive.

    Args:
        setting: The settings.
        asked: The properties, of 'mean' and 'variance'.
        quantiles: The levels of quantiles, which are returned as 'quantile_0', 'quantile_1', ...
    """

    @jax.jit
    def answer(params: Any, knobs: dict[str, Any], supports: Batch, x: jax.Array) -> dict[str, jax.Array]:
        learner, (key_adapt, key_predict) = turned(untuned(setting), knobs), jax.random.split(jax.random.key(0))

        def one(group: tuple[Batch, jax.Array]) -> dict[str, jax.Array]:
            predictive = learner.predict(params, learner.adapt(params, group[0], key_adapt), group[1], key_predict)
            found = {name: getattr(predictive, name)() for name in asked}
            return found | {f"quantile_{i}": predictive.quantile(q) for i, q in enumerate(quantiles)}

        return jax.lax.map(one, (supports, x))

    return answer


def size_of(rows: int) -> int:
    """Returns the smallest of SIZES that is at least `rows`, or else the next multiple of the largest.

    Args:
        rows: The number of rows.
    """
    return next((size for size in SIZES if size >= rows), -(-rows // SIZES[-1]) * SIZES[-1])


def frozen(name: str, value: Any) -> Any:
    """Returns a hashable copy of an option: a table becomes its sorted pairs, a list a tuple.

    Args:
        name: The option's name, for the error message.
        value: Its value.

    Raises:
        ValueError: The value is not hashable.
    """
    if isinstance(value, dict):
        return tuple(sorted((key, frozen(f"{name}.{key}", v)) for key, v in value.items()))
    if isinstance(value, list) or type(value) is tuple:
        return tuple(frozen(name, v) for v in value)
    try:
        hash(value)
    except TypeError:
        needed = "hashable (a number, text, a tuple, a rule)"
        raise ValueError(f"options: {name} must be {needed}, got {value!r}.") from None
    return value
