"""Likelihoods p(y | outputs) of a network's outputs, and their predictive mixtures.

A likelihood has `nll` (which is minimised), `hessian_root` (its curvature in the outputs, for Gauss-Newton) and
`predictive` (an equally weighted mixture with one component per posterior draw).

Impossible targets (a label that is not a class, a negative count, NaN) raise a ValueError if they are concrete values.
In compiled code, which cannot raise, their nll, log probability and gradients are NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log, pi, sqrt
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.scipy.special import gammainc, gammaincc, gammaln, logsumexp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

from metaprior.core.integrals import log_normal_slices, log_sigmoid_mean, log_softmax_mean
from metaprior.core.options import Range, Scale, accept
from metaprior.core.types import Predictive, check_numbers

Share = Annotated[float, Range(above=0, below=1)]


def _possible(y: Any, fine: Callable[[Any], Any], fault: Callable[[Any], str]) -> Array | float:
    """Returns 1 where a target is `fine`, else NaN. Raises a ValueError with the first `fault` if y is concrete."""
    check_numbers("y", y)
    if isinstance(y, Tracer):
        return jnp.where(fine(y), 1.0, jnp.nan)
    values = np.asarray(y)
    bad = values[~np.asarray(fine(values), bool)]
    if bad.size:
        raise ValueError(fault(bad[0]))
    return 1.0


def check_labels(y: Any, classes: int, rows: int | None = None) -> Array | float:
    """Checks that y holds the labels 0..classes-1.

    Args:
        y: Labels [n].
        classes: Number of classes.
        rows: The n that is needed, or None for any shape.

    Returns:
        1, or for traced labels an array with 1 where a label is possible, else NaN.

    Raises:
        ValueError: A concrete label is impossible, or the shape is not [rows].
    """
    if rows is not None and np.shape(y) != (rows,):
        raise ValueError(f"y must be labels of shape {(rows,)}, got shape {tuple(np.shape(y))}.")
    return _possible(
        y,
        lambda v: (v >= 0) & (v < classes) & (v == v // 1),
        lambda v: (
            f"y must hold labels of the {classes} classes 0..{classes - 1}, got {v}. Number the classes from 0 (see "
            "metaprior.tasks.encode_labels), or give the network as many outputs as there are classes."
        ),
    )


def one_hot(y: Any, classes: int, dtype: Any = None) -> Float[Array, "... classes"]:
    """Returns labels as rows of indicators.

    Args:
        y: Labels of any numeric type; False and True are 0 and 1.
        classes: Number of classes.
        dtype: Type of the result; None is the default float.

    Returns:
        A row per label: 1 at the label, else 0. A label below 0 has a row of zeros.
    """
    return jax.nn.one_hot(jnp.asarray(y).astype(int), classes, dtype=dtype)


def check_counts(y: Any) -> Array | float:
    """Checks that y holds integers of at least 0.

    Args:
        y: Targets of any shape.

    Returns:
        1, or for traced targets an array with 1 where a target is possible, else NaN.

    Raises:
        ValueError: A concrete target is impossible.
    """
    return _possible(
        y,
        lambda v: (v >= 0) & (v == v // 1),
        lambda v: f"y must hold counts, integers of at least 0, got {v}. Do not standardise the targets of Poisson.",
    )


def check_real(y: Any) -> Array | float:
    """Checks that y holds finite numbers.

    Args:
        y: Targets of any shape.

    Returns:
        1, or for traced targets an array with 1 where a target is finite, else NaN.

    Raises:
        ValueError: A concrete target is not finite.
    """
    return _possible(
        y, lambda v: abs(v) < float("inf"), lambda v: f"y must hold finite numbers, got {v}. Leave such rows out."
    )


def _same_shape(y: Any, shape: tuple[int, ...]) -> None:
    if tuple(np.shape(y)) != tuple(shape):
        raise ValueError(
            f"y must have shape {tuple(shape)} like the predictions, got {tuple(np.shape(y))}. Give the targets one "
            "column per output, e.g. y[:, None]."
        )


def _bisect(cdf: Callable, survival: Callable, q: float, low: Array, high: Array, middle: Callable) -> Array:
    """Bisects for quantile q 40 times and returns the bracket. Above the median it uses the more precise upper tail."""

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        at = middle((low + high) / 2)
        left = cdf(at) < q if q <= 0.5 else survival(at) > 1 - q
        return jnp.where(left, at, low), jnp.where(left, high, at)

    return jax.lax.fori_loop(0, 40, halve, (low, high))


class Normals(NamedTuple):
    """An equally weighted mixture of s normal densities at n inputs of d independent targets.

    Attributes:
        means: The components' means [s, n, d].
        variances: The components' variances [s, n, d].
    """

    means: Float[Array, "s n d"]
    variances: Float[Array, "s n d"]

    def mean(self) -> Float[Array, "n d"]:
        """Returns the mean of each target."""
        return self.means.mean(0)

    def variance(self) -> Float[Array, "n d"]:
        """Returns the mean of the variances plus the variance of the means (the law of total variance)."""
        return self.variances.mean(0) + self.means.var(0)

    def log_prob(self, y: Float[Array, "n d"]) -> Float[Array, " n"]:
        """Returns the log density of each example's d targets.

        Args:
            y: Targets [n, d].
        """
        _same_shape(y, self.means.shape[1:])
        possible = check_real(y)
        logs = norm.logpdf(y, self.means, jnp.sqrt(self.variances)) * possible
        return logsumexp(logs.sum(-1), axis=0) - log(self.means.shape[0])

    def cdf(self, y: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Returns the marginal distribution function of each target.

        Args:
            y: Targets [n, d].
        """
        _same_shape(y, self.means.shape[1:])
        return norm.cdf(y, self.means, jnp.sqrt(self.variances)).mean(0)

    def quantile(self, q: float) -> Float[Array, "n d"]:
        """Computes the marginal quantile of each target by bisection of the mixture's distribution function.

        Args:
            q: Probability, 0 < q < 1.

        Raises:
            ValueError: q is not between 0 and 1.
        """
        q = accept(Share, q, "q")
        sd = jnp.sqrt(self.variances)
        # Uses the smaller of the two tails: 1 - 1e-9 is 1 in float32.
        edges = self.means + sd * (norm.ppf(q) if q <= 0.5 else -norm.ppf(1 - q))

        def survival(y: Array) -> Array:
            return norm.cdf((self.means - y) / sd).mean(0)

        low, high = _bisect(self.cdf, survival, q, edges.min(0), edges.max(0), lambda y: y)
        return (low + high) / 2


class Categories(NamedTuple):
    """An equally weighted mixture of s categorical distributions over c classes at n inputs.

    Attributes:
        log_probs: The components' log probabilities [s, n, c].
    """

    log_probs: Float[Array, "s n c"]

    def mean(self) -> Float[Array, "n c"]:
        """Returns the class probabilities."""
        return jnp.exp(self.log_probs).mean(0)

    def log_prob(self, y: Int[Array, " n"]) -> Float[Array, " n"]:
        """Returns the log probability of each example's label.

        Args:
            y: Labels 0..c-1 [n].
        """
        _, n, classes = self.log_probs.shape
        possible = check_labels(y, classes, n)
        place = jnp.clip(jnp.asarray(y).astype(int), 0, classes - 1)
        logs = jnp.take_along_axis(self.log_probs, place[None, :, None], axis=-1)[..., 0]
        return (logsumexp(logs, axis=0) - log(self.log_probs.shape[0])) * possible

    def tempered(self, temperature: float | Scalar) -> "Categories":
        """Returns the predictive with class probabilities p ** (1 / temperature), normalised (Guo et al. 2017).

        Args:
            temperature: Above 1 the probabilities become less confident.
        """
        mixed = logsumexp(self.log_probs, axis=0, keepdims=True)
        return Categories(jax.nn.log_softmax(mixed / temperature))


class Counts(NamedTuple):
    """An equally weighted mixture of s Poisson distributions at n inputs of d independent counts.

    Attributes:
        log_rates: Logarithms of the components' rates [s, n, d]. A rate of exp(-120) is 0 in float32, but its logarithm
            is representable.
    """

    log_rates: Float[Array, "s n d"]

    def mean(self) -> Float[Array, "n d"]:
        """Returns the mean of each count."""
        return jnp.exp(self.log_rates).mean(0)

    def variance(self) -> Float[Array, "n d"]:
        """Returns the mean plus the variance of the rates (the law of total variance)."""
        rates = jnp.exp(self.log_rates)
        return rates.mean(0) + rates.var(0)

    def log_prob(self, y: Float[Array, "n d"]) -> Float[Array, " n"]:
        """Returns the log probability of each example's d counts.

        Args:
            y: Counts [n, d].
        """
        _same_shape(y, self.log_rates.shape[1:])
        return logsumexp(_log_poisson(self.log_rates, y).sum(-1), axis=0) - log(self.log_rates.shape[0])

    def cdf(self, y: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Returns P(count <= y) of each target.

        Args:
            y: Real numbers [n, d].
        """
        _same_shape(y, self.log_rates.shape[1:])
        return jnp.where(y < 0, 0.0, gammaincc(jnp.floor(jnp.maximum(y, 0)) + 1, jnp.exp(self.log_rates)).mean(0))

    def pit(self, y: Float[Array, "n d"], key: PRNGKeyArray) -> Float[Array, "n d"]:
        """Draws the randomised probability integral transform F(y - 1) + u p(y), with u uniform on (0, 1).

        It is uniform if the predictive is the true distribution.

        Args:
            y: Counts [n, d].
            key: Random key for u.

        References:
            Czado, Gneiting & Held 2009, Predictive model assessment for count data.
        """
        below, upto = self.cdf(y - 1), self.cdf(y)
        return below + jax.random.uniform(key, below.shape, below.dtype) * (upto - below)

    def quantile(self, q: float) -> Float[Array, "n d"]:
        """Computes the smallest count whose distribution function reaches q, by bisection over the integers.

        Args:
            q: Probability, 0 < q < 1.

        Raises:
            ValueError: q is not between 0 and 1.
        """
        q = accept(Share, q, "q")
        rates = jnp.exp(self.log_rates)
        # Beyond this a Poisson count has probability below 1e-30.
        top = jnp.ceil(rates.max(0) + 12 * jnp.sqrt(rates.max(0)) + 60)

        def survival(y: Array) -> Array:
            return jnp.where(y < 0, 1.0, gammainc(jnp.maximum(y, 0) + 1, rates).mean(0))

        return _bisect(self.cdf, survival, q, jnp.full_like(top, -1.0), top, jnp.floor)[1]


def _log_poisson(log_rates: Array, y: Array) -> Array:
    """Computes log p(y) of counts. A count of 0 at rate 0 has probability 1."""
    possible = check_counts(y)
    y = jnp.asarray(y, log_rates.dtype) * possible
    seen = jnp.where(y == 0, 0, y * jnp.where(y == 0, 0, log_rates))
    return seen - jnp.exp(log_rates) - jnp.where(y < 2, y * 0, gammaln(y + 1))  # log 0! and log 1! exactly


@runtime_checkable
class Likelihood(Protocol):
    """The interface of a likelihood. Your own class needs these three methods."""

    def nll(self, outputs: Float[Array, "n c"], y: Array) -> Float[Array, " n"]:
        """Computes each example's negative log likelihood, constants included.

        Args:
            outputs: The network's outputs [n, c].
            y: Targets, with a leading axis of n.
        """
        ...

    def hessian_root(self, outputs: Float[Array, "n c"]) -> Float[Array, "n c r"]:
        """Computes L [c, r] of each example, where L L' is the Fisher information of its outputs.

        Args:
            outputs: The network's outputs [n, c].
        """
        ...

    def predictive(self, outputs: Float[Array, "s n c"], variance: Float[Array, "s n c"] | None = None) -> Predictive:
        """Returns the equally weighted mixture over s draws of the outputs.

        Args:
            outputs: The network's outputs [s, n, c], one per posterior draw.
            variance: The outputs' posterior variance [s, n, c] in closed form, around each draw. None is 0.
        """
        ...


@dataclass(frozen=True)
class Gaussian:
    """Normal targets y [n, d] around the outputs.

    With the default sd of sqrt(1/2) the nll has the same gradient as the squared error without a factor, which is the
    loss of MAML's regression (Finn, Abbeel & Levine 2017).

    Attributes:
        scale: The noise's standard deviation, in the units of the targets. None reads means [n, d] from the first half
            of the outputs [n, 2 d] and log standard deviations from the second half.
    """

    scale: Scale | None = 0.5**0.5

    def __post_init__(self) -> None:
        accept(Scale | None, self.scale, "scale")

    def _split(self, outputs: Array) -> tuple[Array, Array]:
        """Returns means and log standard deviations."""
        if self.scale is not None:
            return outputs, jnp.broadcast_to(jnp.log(jnp.asarray(self.scale, outputs.dtype)), outputs.shape)
        if outputs.shape[-1] % 2:
            raise ValueError(
                "outputs must be an even number for Gaussian(scale=None), which reads means and log sds, got "
                f"{outputs.shape[-1]}. Give the network two outputs per target, or give a scale."
            )
        mean, log_scale = jnp.split(outputs, 2, axis=-1)
        return mean, log_scale

    def nll(self, outputs: Float[Array, "n c"], y: Float[Array, "n d"]) -> Float[Array, " n"]:
        """Computes each example's negative log likelihood; see `Likelihood`."""
        mean, log_scale = self._split(outputs)
        _same_shape(y, mean.shape)
        possible = check_real(y)
        squares = ((y - mean) * jnp.exp(-log_scale)) ** 2
        return 0.5 * ((squares + 2 * log_scale + log(2 * pi)) * possible).sum(-1)

    def hessian_root(self, outputs: Float[Array, "n c"]) -> Float[Array, "n c r"]:
        """Computes the root of the Fisher information in means (and log sds); see `Likelihood`."""
        mean, log_scale = self._split(outputs)
        root = jnp.exp(-log_scale)
        if self.scale is None:
            root = jnp.concatenate([root, jnp.full_like(mean, sqrt(2))], -1)
        return jax.vmap(jnp.diag)(root)

    def predictive(self, outputs: Float[Array, "s n c"], variance: Float[Array, "s n c"] | None = None) -> Normals:
        """Returns a mixture of normals.

        The variance of a mean is added to the noise variance. The variance of a log sd makes the noise variance
        log-normal. This log-normal is split into slices of equal probability, so the predictive has heavier tails than
        a normal, and the exact variance E exp(2 log sd) = exp(2 m + 2 v). The tails of each component are still those
        of a normal.

        Args:
            outputs: The network's outputs [s, n, c], one per posterior draw.
            variance: The outputs' posterior variance [s, n, c]. None is 0.
        """
        mean, log_scale = self._split(outputs)
        if variance is None:
            return Normals(mean, jnp.exp(2 * log_scale))
        if self.scale is not None:
            return Normals(mean, jnp.exp(2 * log_scale) + jnp.maximum(variance, 0))
        of_mean, of_log = jnp.split(jnp.maximum(variance, 0), 2, axis=-1)
        noise = jnp.exp(log_normal_slices(log_scale, of_log, 2.0))
        slices = noise.shape[0] // mean.shape[0]
        return Normals(jnp.tile(mean, (slices, 1, 1)), noise + jnp.tile(of_mean, (slices, 1, 1)))


@dataclass(frozen=True)
class Categorical:
    """Integer labels 0..c-1 [n] under a softmax of c outputs."""

    def nll(self, outputs: Float[Array, "n c"], y: Int[Array, " n"]) -> Float[Array, " n"]:
        """Computes each example's negative log likelihood; see `Likelihood`."""
        # A one-hot product instead of a gather: its derivatives of every order stay dense and cheap under vmap.
        possible = check_labels(y, outputs.shape[-1], outputs.shape[0])
        hot = one_hot(y, outputs.shape[-1], outputs.dtype)
        return (logsumexp(outputs, axis=-1) - (outputs * hot).sum(-1)) * possible

    def hessian_root(self, outputs: Float[Array, "n c"]) -> Float[Array, "n c c"]:
        """Computes the root of the Fisher information, diag(p) - p p', of the logits; see `Likelihood`."""
        # Uses logarithms, because sqrt has no derivative where a probability underflows to 0.
        root = jnp.exp(jax.nn.log_softmax(outputs) / 2)
        return jax.vmap(jnp.diag)(root) - (root**2)[:, :, None] * root[:, None, :]

    def predictive(self, outputs: Float[Array, "s n c"], variance: Float[Array, "s n c"] | None = None) -> Categories:
        """Returns a mixture of categorical distributions.

        Args:
            outputs: Logits [s, n, c], one per posterior draw.
            variance: The posterior variance [s, n, c] of logits that are independent normals. Their mean softmax is
                computed by quadrature (see `log_softmax_mean`). None is 0.
        """
        if variance is None:
            return Categories(jax.nn.log_softmax(outputs))
        return Categories(log_softmax_mean(outputs, variance))


@dataclass(frozen=True)
class Bernoulli:
    """Labels 0 or 1, of shape [n] or [n, 1], with one logit as output. The predictive has two classes."""

    def nll(self, outputs: Float[Array, "n 1"], y: Array) -> Float[Array, " n"]:
        """Computes each example's negative log likelihood; see `Likelihood`."""
        _one_logit(outputs)
        if np.shape(y) not in ((outputs.shape[0],), (outputs.shape[0], 1)):
            raise ValueError(f"y must be labels of shape {(outputs.shape[0],)}, got shape {tuple(np.shape(y))}.")
        logit = outputs[:, 0]
        possible = check_labels(y, 2) * jnp.ones(np.shape(y), outputs.dtype)
        label = jnp.asarray(y).reshape(-1).astype(outputs.dtype)
        return (jax.nn.softplus(logit) - logit * label) * possible.reshape(-1)

    def hessian_root(self, outputs: Float[Array, "n 1"]) -> Float[Array, "n 1 1"]:
        """Computes the root sqrt(p (1 - p)) of the Fisher information; see `Likelihood`."""
        return jnp.exp((jax.nn.log_sigmoid(outputs) + jax.nn.log_sigmoid(-outputs)) / 2)[..., None]

    def predictive(self, outputs: Float[Array, "s n 1"], variance: Float[Array, "s n 1"] | None = None) -> Categories:
        """Returns a mixture of distributions over the two classes.

        Args:
            outputs: Logits [s, n, 1], one per posterior draw.
            variance: The posterior variance [s, n, 1] of a normal logit. Its mean sigmoid is computed by quadrature
                (see `log_sigmoid_mean`). None is 0.
        """
        _one_logit(outputs)
        if variance is None:
            return Categories(jnp.concatenate([jax.nn.log_sigmoid(-outputs), jax.nn.log_sigmoid(outputs)], -1))
        both = [log_sigmoid_mean(sign * outputs, variance) for sign in (-1, 1)]
        return Categories(jnp.concatenate(both, -1))


def _one_logit(outputs: Array) -> None:
    if outputs.shape[-1] != 1:
        raise ValueError(f"outputs must be one logit for Bernoulli, got {outputs.shape[-1]}. Use Categorical for more.")


@dataclass(frozen=True)
class Poisson:
    """Counts [n, d], with the logarithms of their rates as outputs."""

    def nll(self, outputs: Float[Array, "n d"], y: Float[Array, "n d"]) -> Float[Array, " n"]:
        """Computes each example's negative log likelihood; see `Likelihood`."""
        _same_shape(y, outputs.shape)
        return -_log_poisson(outputs, y).sum(-1)

    def hessian_root(self, outputs: Float[Array, "n d"]) -> Float[Array, "n d d"]:
        """Computes the root of the Fisher information, the diagonal of sqrt(rate); see `Likelihood`."""
        return jax.vmap(jnp.diag)(jnp.exp(outputs / 2))

    def predictive(self, outputs: Float[Array, "s n d"], variance: Float[Array, "s n d"] | None = None) -> Counts:
        """Returns a mixture of Poisson distributions.

        Args:
            outputs: Log rates [s, n, d], one per posterior draw.
            variance: The posterior variance [s, n, d] of the log rates. The log-normal rate is split into slices of
                equal probability, with the exact mean. None is 0.
        """
        return Counts(outputs if variance is None else log_normal_slices(outputs, variance))


LIKELIHOODS = {
    "gaussian": Gaussian, "categorical": Categorical, "bernoulli": Bernoulli, "poisson": Poisson
}  # fmt: skip
