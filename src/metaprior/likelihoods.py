"""Likelihoods p(y | outputs) of a network's outputs, and the predictive mixtures they make.

A likelihood has `nll` (what is fitted), `hessian_root` (its curvature in the outputs, for Gauss-Newton) and
`predictive` (an equally weighted mixture with one component a posterior draw).
"""

from dataclasses import dataclass
from math import log, pi, sqrt
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaincc, gammaln, logsumexp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Int, Scalar

from metaprior.types import Predictive


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
        logs = norm.logpdf(y, self.means, jnp.sqrt(self.variances)).sum(-1)
        return logsumexp(logs, axis=0) - log(self.means.shape[0])

    def cdf(self, y: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """Marginal distribution function of each target."""
        return norm.cdf(y, self.means, jnp.sqrt(self.variances)).mean(0)

    def quantile(self, q: float) -> Float[Array, "n d"]:
        """Marginal quantile of each target, by bisection of the mixture's distribution function."""
        edges = self.means + jnp.sqrt(self.variances) * norm.ppf(q)

        def halve(_, bracket):
            low, high = bracket
            middle = (low + high) / 2
            left = self.cdf(middle) < q
            return jnp.where(left, middle, low), jnp.where(left, high, middle)

        low, high = jax.lax.fori_loop(0, 40, halve, (edges.min(0), edges.max(0)))
        return (low + high) / 2


class Categories(NamedTuple):
    """An equally weighted mixture of s categorical distributions over c classes at n inputs."""

    log_probs: Float[Array, "s n c"]

    def mean(self) -> Float[Array, "n c"]:
        """Class probabilities."""
        return jnp.exp(self.log_probs).mean(0)

    def log_prob(self, y: Int[Array, " n"]) -> Float[Array, " n"]:
        logs = jnp.take_along_axis(self.log_probs, y.astype(int)[None, :, None], axis=-1)[..., 0]
        return logsumexp(logs, axis=0) - log(self.log_probs.shape[0])

    def tempered(self, temperature: float | Scalar) -> "Categories":
        """Class probabilities p ** (1 / temperature), normalised: above 1 they are less sure (Guo et al. 2017)."""
        mixed = logsumexp(self.log_probs, axis=0, keepdims=True)
        return Categories(jax.nn.log_softmax(mixed / temperature))


class Counts(NamedTuple):
    """An equally weighted mixture of s Poisson distributions at n inputs of d independent counts."""

    rates: Float[Array, "s n d"]

    def mean(self) -> Float[Array, "n d"]:
        return self.rates.mean(0)

    def variance(self) -> Float[Array, "n d"]:
        return self.rates.mean(0) + self.rates.var(0)

    def log_prob(self, y: Float[Array, "n d"]) -> Float[Array, " n"]:
        logs = (y * jnp.log(self.rates) - self.rates - gammaln(y + 1)).sum(-1)
        return logsumexp(logs, axis=0) - log(self.rates.shape[0])

    def cdf(self, y: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """P(count <= y) of each target."""
        return jnp.where(y < 0, 0.0, gammaincc(jnp.floor(jnp.maximum(y, 0)) + 1, self.rates).mean(0))

    def quantile(self, q: float) -> Float[Array, "n d"]:
        """The smallest count whose distribution function reaches q, by bisection over the integers."""
        top = jnp.ceil(self.rates.max(0) + 12 * jnp.sqrt(self.rates.max(0)) + 24)

        def halve(_, bracket):
            low, high = bracket
            middle = jnp.floor((low + high) / 2)
            left = self.cdf(middle) < q
            return jnp.where(left, middle, low), jnp.where(left, high, middle)

        return jax.lax.fori_loop(0, 40, halve, (jnp.full_like(top, -1.0), top))[1]


class Likelihood(Protocol):
    """What a learner asks of a likelihood; bring your own by writing these three."""

    def nll(self, outputs: Float[Array, "n c"], y: Array) -> Float[Array, " n"]:
        """Each example's negative log likelihood, constants included."""
        ...

    def hessian_root(self, outputs: Float[Array, "n c"]) -> Float[Array, "n c r"]:
        """L with L L' the Fisher information of one example in its outputs."""
        ...

    def predictive(
        self, outputs: Float[Array, "s n c"], variance: Float[Array, "s n c"] | None = None
    ) -> Predictive:
        """The mixture over s draws of outputs; `variance` is the outputs' posterior variance in closed form."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Normal targets with noise sd `scale`; scale=None reads a log sd from the second half of the outputs.

    The default sd sqrt(1/2) makes the gradient of the nll that of the plain squared error, the loss of MAML's
    regression (Finn, Abbeel & Levine 2017).
    """

    scale: float | Array | None = 0.5**0.5

    def _split(self, outputs: Array) -> tuple[Array, Array]:
        if self.scale is not None:
            return outputs, jnp.broadcast_to(jnp.asarray(self.scale, outputs.dtype), outputs.shape)
        if outputs.shape[-1] % 2:
            raise ValueError(
                f"outputs: Gaussian(scale=None) reads means and log sds, so it needs an even number of outputs, but "
                f"came {outputs.shape[-1]}; give the network two outputs a target or state a scale"
            )
        mean, log_scale = jnp.split(outputs, 2, axis=-1)
        return mean, jnp.exp(log_scale)

    def nll(self, outputs: Float[Array, "n c"], y: Float[Array, "n d"]) -> Float[Array, " n"]:
        mean, scale = self._split(outputs)
        if mean.shape != y.shape:
            raise ValueError(
                f"y: the outputs predict targets of shape {mean.shape}, but y has shape {y.shape}; give targets one "
                "column an output, e.g. y[:, None]"
            )
        return 0.5 * (((y - mean) / scale) ** 2 + 2 * jnp.log(scale) + log(2 * pi)).sum(-1)

    def hessian_root(self, outputs: Float[Array, "n c"]) -> Float[Array, "n c r"]:
        mean, scale = self._split(outputs)
        root = 1 / scale
        if self.scale is None:
            root = jnp.concatenate([root, jnp.full_like(mean, sqrt(2))], -1)
        return jax.vmap(jnp.diag)(root)

    def predictive(self, outputs: Float[Array, "s n c"], variance: Float[Array, "s n c"] | None = None) -> Normals:
        mean, scale = self._split(outputs)
        spread = 0.0 if variance is None else variance[..., : mean.shape[-1]]
        return Normals(mean, scale**2 + spread)


@dataclass(frozen=True)
class Categorical:
    """Integer labels 0..c-1 under a softmax of c outputs."""

    def nll(self, outputs: Float[Array, "n c"], y: Int[Array, " n"]) -> Float[Array, " n"]:
        # A one-hot product, not a gather: its derivatives of every order stay dense and cheap under vmap.
        hot = jax.nn.one_hot(y, outputs.shape[-1], dtype=outputs.dtype)
        return logsumexp(outputs, axis=-1) - (outputs * hot).sum(-1)

    def hessian_root(self, outputs: Float[Array, "n c"]) -> Float[Array, "n c c"]:
        # By logarithms: a sqrt has no derivative where a probability underflows to 0.
        root = jnp.exp(jax.nn.log_softmax(outputs) / 2)
        return jax.vmap(jnp.diag)(root) - (root**2)[:, :, None] * root[:, None, :]

    def predictive(
        self, outputs: Float[Array, "s n c"], variance: Float[Array, "s n c"] | None = None
    ) -> Categories:
        """With `variance`, each logit is shrunk by sqrt(1 + pi/8 variance) (MacKay 1992, eq. 31)."""
        if variance is not None:
            centred = outputs - outputs.mean(-1, keepdims=True)
            outputs = centred / jnp.sqrt(1 + pi / 8 * variance)
        return Categories(jax.nn.log_softmax(outputs))


@dataclass(frozen=True)
class Bernoulli:
    """Labels 0 or 1 with one logit as output; the predictive has the two classes' probabilities."""

    def nll(self, outputs: Float[Array, "n 1"], y: Array) -> Float[Array, " n"]:
        logit = outputs[:, 0]
        return jax.nn.softplus(logit) - logit * y.reshape(-1).astype(outputs.dtype)

    def hessian_root(self, outputs: Float[Array, "n 1"]) -> Float[Array, "n 1 1"]:
        return jnp.exp((jax.nn.log_sigmoid(outputs) + jax.nn.log_sigmoid(-outputs)) / 2)[..., None]

    def predictive(
        self, outputs: Float[Array, "s n 1"], variance: Float[Array, "s n 1"] | None = None
    ) -> Categories:
        if variance is not None:
            outputs = outputs / jnp.sqrt(1 + pi / 8 * variance)
        return Categories(jnp.concatenate([jax.nn.log_sigmoid(-outputs), jax.nn.log_sigmoid(outputs)], -1))


@dataclass(frozen=True)
class Poisson:
    """Counts with a log rate as output."""

    def nll(self, outputs: Float[Array, "n d"], y: Float[Array, "n d"]) -> Float[Array, " n"]:
        return (jnp.exp(outputs) - y * outputs + gammaln(y + 1.0)).sum(-1)

    def hessian_root(self, outputs: Float[Array, "n d"]) -> Float[Array, "n d d"]:
        return jax.vmap(jnp.diag)(jnp.exp(outputs / 2))

    def predictive(self, outputs: Float[Array, "s n d"], variance: Float[Array, "s n d"] | None = None) -> Counts:
        """With `variance` v of the log rate the normal is split into three Gauss-Hermite points."""
        if variance is not None:
            nodes = jnp.asarray([-sqrt(3), 0.0, 0.0, 0.0, 0.0, sqrt(3)])  # weights 1/6, 4/6, 1/6 as equal shares
            outputs = (outputs[None] + nodes[:, None, None, None] * jnp.sqrt(variance)[None]).reshape(
                -1, *outputs.shape[1:]
            )
        return Counts(jnp.exp(outputs))


LIKELIHOODS = {
    "gaussian": Gaussian, "categorical": Categorical, "bernoulli": Bernoulli, "poisson": Poisson
}  # fmt: skip
