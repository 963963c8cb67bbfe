"""Likelihoods p(y | outputs) of a network's outputs, and the predictive mixtures they make.

A likelihood has `nll` (what is fitted), `hessian_root` (its curvature in the outputs, for Gauss-Newton) and
`predictive` (an equally weighted mixture with one component a posterior draw).

Targets that cannot be (a label that is no class, a negative count, NaN) are a ValueError where they are concrete
values. In compiled code, which cannot raise, their nll, log probability and gradients are NaN.
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
    """1 where a target is `fine`, else NaN; a ValueError with `fault` of the first that is not, if y is concrete."""
    check_numbers("y", y)
    if isinstance(y, Tracer):
        return jnp.where(fine(y), 1.0, jnp.nan)
    values = np.asarray(y)
    bad = values[~np.asarray(fine(values), bool)]
    if bad.size:
        raise ValueError(f"y: {fault(bad[0])}")
    return 1.0


def check_labels(y: Any, classes: int, rows: int | None = None) -> Array | float:
    """1 where y is one of the labels 0..classes-1, else NaN; a ValueError that names the label, if y is concrete.

    rows: how many labels there must be, one a row.
    """
    if rows is not None and np.shape(y) != (rows,):
        raise ValueError(f"y must be labels of shape {(rows,)}, got shape {tuple(np.shape(y))}.")
    return _possible(
        y,
        lambda v: (v >= 0) & (v < classes) & (v == v // 1),
        lambda v: (
            f"label {v} is not one of the {classes} classes 0..{classes - 1}. Number the classes from 0 (see "
            "metaprior.tasks.encode_labels), or give the network as many outputs as there are classes."
        ),
    )


def one_hot(y: Any, classes: int, dtype: Any = None) -> Float[Array, "... classes"]:
    """Labels of any type of number (False and True are 0 and 1) as indicators; a row of zeros for one below 0."""
    return jax.nn.one_hot(jnp.asarray(y).astype(int), classes, dtype=dtype)


def check_counts(y: Any) -> Array | float:
    """1 where y is a whole number of at least 0, else NaN; a ValueError that names the value, if y is concrete."""
    return _possible(
        y,
        lambda v: (v >= 0) & (v == v // 1),
        lambda v: f"{v} is not a count. Poisson needs whole numbers of at least 0: do not standardise counts.",
    )


def check_real(y: Any) -> Array | float:
    """1 where y is finite, else NaN; a ValueError, if y is concrete."""
    return _possible(y, lambda v: abs(v) < float("inf"), lambda v: f"{v} is not a finite number. Leave such rows out.")


def _same_shape(y: Any, shape: tuple[int, ...]) -> None:
    if tuple(np.shape(y)) != tuple(shape):
        raise ValueError(
            f"y: the outputs predict targets of shape {tuple(shape)}, but y has shape {tuple(np.shape(y))}; give "
            "targets one column an output, e.g. y[:, None]"
        )


def _bisect(cdf: Callable, survival: Callable, q: float, low: Array, high: Array, middle: Callable) -> Array:
    """The bracket around quantile q after 40 halvings; above the median by the upper tail, which keeps its digits."""

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        at = middle((low + high) / 2)
        left = cdf(at) < q if q <= 0.5 else survival(at) > 1 - q
        return jnp.where(left, at, low), jnp.where(left, high, at)

    return jax.lax.fori_loop(0, 40, halve, (low, high))


class Normals(NamedTuple):
    """An equally weighted mixture of s normal densities at n inputs of d independent targets."""

    means: Float[Array, "s n d"]
    variances: Float[Array, "s n d"]

    def mean(self) -> Float[Array, "n d"]:
        return self.means.mean(0)

    def variance(self) -> Float[Array, "n d"]:
        """Mean of the variances plus variance of the means (the law of total variance)."""
        return self.variances.mean(0) + self.means.var(0)

    def log_prob(self, y: Float[Array, "n d"]) -> Float[Array, " n"]:
        _same_shape(y, self.means.shape[1:])
        possible = check_real(y)
        logs = norm.logpdf(y, self.means, jnp.sqrt(self.variances)) * possible
        return logsumexp(logs.sum(-1), axis=0) - log(self.means.shape[0])

    def cdf(self, y: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Marginal distribution function of each target."""
        _same_shape(y, self.means.shape[1:])
        return norm.cdf(y, self.means, jnp.sqrt(self.variances)).mean(0)

    def quantile(self, q: float) -> Float[Array, "n d"]:
        """Marginal quantile of each target, 0 < q < 1, by bisection of the mixture's distribution function."""
        q = accept(Share, q, "q")
        sd = jnp.sqrt(self.variances)
        # By whichever tail is thinner: 1 - 1e-9 is 1 in float32.
        edges = self.means + sd * (norm.ppf(q) if q <= 0.5 else -norm.ppf(1 - q))

        def survival(y: Array) -> Array:
            return norm.cdf((self.means - y) / sd).mean(0)

        low, high = _bisect(self.cdf, survival, q, edges.min(0), edges.max(0), lambda y: y)
        return (low + high) / 2


class Categories(NamedTuple):
    """An equally weighted mixture of s categorical distributions over c classes at n inputs."""

    log_probs: Float[Array, "s n c"]

    def mean(self) -> Float[Array, "n c"]:
        """Class probabilities."""
        return jnp.exp(self.log_probs).mean(0)

    def log_prob(self, y: Int[Array, " n"]) -> Float[Array, " n"]:
        _, n, classes = self.log_probs.shape
        possible = check_labels(y, classes, n)
        place = jnp.clip(jnp.asarray(y).astype(int), 0, classes - 1)
        logs = jnp.take_along_axis(self.log_probs, place[None, :, None], axis=-1)[..., 0]
        return (logsumexp(logs, axis=0) - log(self.log_probs.shape[0])) * possible

    def tempered(self, temperature: float | Scalar) -> "Categories":
        """Class probabilities p ** (1 / temperature), normalised: above 1 they are less sure (Guo et al. 2017)."""
        mixed = logsumexp(self.log_probs, axis=0, keepdims=True)
        return Categories(jax.nn.log_softmax(mixed / temperature))


class Counts(NamedTuple):
    """An equally weighted mixture of s Poisson distributions at n inputs of d independent counts.

    Rates are kept by their logarithms: a rate of exp(-120) is 0 in float32, its logarithm is not.
    """

    log_rates: Float[Array, "s n d"]

    def mean(self) -> Float[Array, "n d"]:
        return jnp.exp(self.log_rates).mean(0)

    def variance(self) -> Float[Array, "n d"]:
        rates = jnp.exp(self.log_rates)
        return rates.mean(0) + rates.var(0)

    def log_prob(self, y: Float[Array, "n d"]) -> Float[Array, " n"]:
        _same_shape(y, self.log_rates.shape[1:])
        return logsumexp(_log_poisson(self.log_rates, y).sum(-1), axis=0) - log(self.log_rates.shape[0])

    def cdf(self, y: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """P(count <= y) of each target."""
        _same_shape(y, self.log_rates.shape[1:])
        return jnp.where(y < 0, 0.0, gammaincc(jnp.floor(jnp.maximum(y, 0)) + 1, jnp.exp(self.log_rates)).mean(0))

    def pit(self, y: Float[Array, "n d"], key: PRNGKeyArray) -> Float[Array, "n d"]:
        """Randomised probability integral transform F(y - 1) + u p(y), u uniform: uniform where the predictive is true.

        References: Czado, Gneiting & Held 2009, Predictive model assessment for count data.
        """
        below, upto = self.cdf(y - 1), self.cdf(y)
        return below + jax.random.uniform(key, below.shape, below.dtype) * (upto - below)

    def quantile(self, q: float) -> Float[Array, "n d"]:
        """The smallest count whose distribution function reaches q, 0 < q < 1, by bisection over the integers."""
        q = accept(Share, q, "q")
        rates = jnp.exp(self.log_rates)
        # Beyond this a Poisson count has probability below 1e-30.
        top = jnp.ceil(rates.max(0) + 12 * jnp.sqrt(rates.max(0)) + 60)

        def survival(y: Array) -> Array:
            return jnp.where(y < 0, 1.0, gammainc(jnp.maximum(y, 0) + 1, rates).mean(0))

        return _bisect(self.cdf, survival, q, jnp.full_like(top, -1.0), top, jnp.floor)[1]


def _log_poisson(log_rates: Array, y: Array) -> Array:
    """log p(y) of counts; 0 counts at rate 0 have probability 1."""
    possible = check_counts(y)
    y = jnp.asarray(y, log_rates.dtype) * possible
    seen = jnp.where(y == 0, 0, y * jnp.where(y == 0, 0, log_rates))
    return seen - jnp.exp(log_rates) - jnp.where(y < 2, y * 0, gammaln(y + 1))  # log 0! and log 1! exactly


@runtime_checkable
class Likelihood(Protocol):
    """What a learner asks of a likelihood; bring your own by writing these three."""

    def nll(self, outputs: Float[Array, "n c"], y: Array) -> Float[Array, " n"]:
        """Each example's negative log likelihood, constants included."""
        ...

    def hessian_root(self, outputs: Float[Array, "n c"]) -> Float[Array, "n c r"]:
        """L with L L' the Fisher information of one example in its outputs."""
        ...

    def predictive(self, outputs: Float[Array, "s n c"], variance: Float[Array, "s n c"] | None = None) -> Predictive:
        """The mixture over s draws of outputs; `variance` is the outputs' posterior variance in closed form."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Normal targets with noise sd `scale`; scale=None reads a log sd from the second half of the outputs.

    The default sd sqrt(1/2) makes the gradient of the nll that of the plain squared error, the loss of MAML's
    regression (Finn, Abbeel & Levine 2017).
    """

    scale: Scale | None = 0.5**0.5

    def __post_init__(self) -> None:
        accept(Scale | None, self.scale, "scale")

    def _split(self, outputs: Array) -> tuple[Array, Array]:
        """Means and log sds."""
        if self.scale is not None:
            return outputs, jnp.broadcast_to(jnp.log(jnp.asarray(self.scale, outputs.dtype)), outputs.shape)
        if outputs.shape[-1] % 2:
            raise ValueError(
                f"outputs: Gaussian(scale=None) reads means and log sds, so it needs an even number of outputs, but "
                f"came {outputs.shape[-1]}; give the network two outputs a target or state a scale"
            )
        mean, log_scale = jnp.split(outputs, 2, axis=-1)
        return mean, log_scale

    def nll(self, outputs: Float[Array, "n c"], y: Float[Array, "n d"]) -> Float[Array, " n"]:
        mean, log_scale = self._split(outputs)
        _same_shape(y, mean.shape)
        possible = check_real(y)
        squares = ((y - mean) * jnp.exp(-log_scale)) ** 2
        return 0.5 * ((squares + 2 * log_scale + log(2 * pi)) * possible).sum(-1)

    def hessian_root(self, outputs: Float[Array, "n c"]) -> Float[Array, "n c r"]:
        mean, log_scale = self._split(outputs)
        root = jnp.exp(-log_scale)
        if self.scale is None:
            root = jnp.concatenate([root, jnp.full_like(mean, sqrt(2))], -1)
        return jax.vmap(jnp.diag)(root)

    def predictive(self, outputs: Float[Array, "s n c"], variance: Float[Array, "s n c"] | None = None) -> Normals:
        """With `variance`, that of the mean adds to the noise; a log sd's makes the noise variance log-normal.

        The log-normal is split into slices of equal probability, so the predictive has heavier tails than a normal and
        the exact variance E exp(2 log sd) = exp(2 m + 2 v). A component's own density still falls off as a normal's.
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
    """Integer labels 0..c-1 under a softmax of c outputs."""

    def nll(self, outputs: Float[Array, "n c"], y: Int[Array, " n"]) -> Float[Array, " n"]:
        # A one-hot product, not a gather: its derivatives of every order stay dense and cheap under vmap.
        possible = check_labels(y, outputs.shape[-1], outputs.shape[0])
        hot = one_hot(y, outputs.shape[-1], outputs.dtype)
        return (logsumexp(outputs, axis=-1) - (outputs * hot).sum(-1)) * possible

    def hessian_root(self, outputs: Float[Array, "n c"]) -> Float[Array, "n c c"]:
        # By logarithms: a sqrt has no derivative where a probability underflows to 0.
        root = jnp.exp(jax.nn.log_softmax(outputs) / 2)
        return jax.vmap(jnp.diag)(root) - (root**2)[:, :, None] * root[:, None, :]

    def predictive(self, outputs: Float[Array, "s n c"], variance: Float[Array, "s n c"] | None = None) -> Categories:
        """With `variance`, E softmax of independent normal logits by quadrature (see `log_softmax_mean`)."""
        if variance is None:
            return Categories(jax.nn.log_softmax(outputs))
        return Categories(log_softmax_mean(outputs, variance))


@dataclass(frozen=True)
class Bernoulli:
    """Labels 0 or 1 with one logit as output; the predictive has the two classes' probabilities."""

    def nll(self, outputs: Float[Array, "n 1"], y: Array) -> Float[Array, " n"]:
        _one_logit(outputs)
        if np.shape(y) not in ((outputs.shape[0],), (outputs.shape[0], 1)):
            raise ValueError(f"y must be labels of shape {(outputs.shape[0],)}, got shape {tuple(np.shape(y))}.")
        logit = outputs[:, 0]
        possible = check_labels(y, 2) * jnp.ones(np.shape(y), outputs.dtype)
        label = jnp.asarray(y).reshape(-1).astype(outputs.dtype)
        return (jax.nn.softplus(logit) - logit * label) * possible.reshape(-1)

    def hessian_root(self, outputs: Float[Array, "n 1"]) -> Float[Array, "n 1 1"]:
        return jnp.exp((jax.nn.log_sigmoid(outputs) + jax.nn.log_sigmoid(-outputs)) / 2)[..., None]

    def predictive(self, outputs: Float[Array, "s n 1"], variance: Float[Array, "s n 1"] | None = None) -> Categories:
        """With `variance`, E sigmoid of a normal logit by quadrature (see `log_sigmoid_mean`)."""
        _one_logit(outputs)
        if variance is None:
            return Categories(jnp.concatenate([jax.nn.log_sigmoid(-outputs), jax.nn.log_sigmoid(outputs)], -1))
        both = [log_sigmoid_mean(sign * outputs, variance) for sign in (-1, 1)]
        return Categories(jnp.concatenate(both, -1))


def _one_logit(outputs: Array) -> None:
    if outputs.shape[-1] != 1:
        raise ValueError(f"outputs: Bernoulli reads one logit, got {outputs.shape[-1]}; use Categorical for more.")


@dataclass(frozen=True)
class Poisson:
    """Counts with a log rate as output."""

    def nll(self, outputs: Float[Array, "n d"], y: Float[Array, "n d"]) -> Float[Array, " n"]:
        _same_shape(y, outputs.shape)
        return -_log_poisson(outputs, y).sum(-1)

    def hessian_root(self, outputs: Float[Array, "n d"]) -> Float[Array, "n d d"]:
        return jax.vmap(jnp.diag)(jnp.exp(outputs / 2))

    def predictive(self, outputs: Float[Array, "s n d"], variance: Float[Array, "s n d"] | None = None) -> Counts:
        """With `variance`, the log-normal rate in slices of equal probability; its mean is exact."""
        return Counts(outputs if variance is None else log_normal_slices(outputs, variance))


LIKELIHOODS = {
    "gaussian": Gaussian, "categorical": Categorical, "bernoulli": Bernoulli, "poisson": Poisson
}  # fmt: skip
