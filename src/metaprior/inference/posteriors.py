"""What is put around phi_k: a point, a Laplace Gaussian, or the Gaussian that the inner loop itself implies.

A `PosteriorRule` is a pair of pure functions over one task's phi, any pytree (the head alone for ANIL):
    infer(outputs, likelihood, phi, support, implied)      -> posterior, a pytree with `mean` and `sample(key)`
    predict(outputs, likelihood, posterior, x, key)        -> Predictive
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Gaussian, Likelihood
from metaprior.core.options import Scale, Whole, checked, option_names
from metaprior.core.types import Batch, as_knobs
from metaprior.inference.curvature import (
    CURVATURES,
    Curvature,
    Dual,
    Lanczos,
    Primal,
    SpectralGaussian,
    as_scale,
    by_size,
    descent_spectrum,
    dual,
    lanczos,
    laplace_spectrum,
    output_variance,
)
from metaprior.inference.linear_descent import (
    Root,
    RootedGaussian,
    TensorGaussian,
    alike,
    optimizer_spectrum,
    tensor_gaussian,
)

DRAWS_AT_ONCE = 8


class Implied(NamedTuple):
    """The prior that an inner loop implies, in units of the *summed* support nll.

    scale: a root of the constant inner rates, shaped as phi or a `Root` (rate a on a mean over N examples is a/N); None
    where the steps follow no gradient at any rate.
    steps: k. precision: of an explicit prior N(theta, 1/precision) that the loop optimises instead (iMAML), or None.
    optimizer: that takes the steps, where its rates are not constant or not known to be (`scale` then has those of the
    last step); most: a static bound of steps; unit: N^(-1/2); by_tensor: it is linear and treats the elements of a
    tensor alike (otherwise this is found out).
    """

    scale: PyTree
    steps: int | Array
    precision: float | Array | None = None
    optimizer: optax.GradientTransformation | None = None
    most: int = 0
    unit: float | Array = 1.0
    by_tensor: bool = False


class PosteriorRule(NamedTuple):
    """How a posterior around phi is inferred from the support, and how it predicts."""

    infer: Callable[[Callable[..., Array], Likelihood, PyTree, Batch, Implied], Any]
    predict: Callable[[Callable[..., Array], Likelihood, Any, PyTree, PRNGKeyArray], Any]
    knobs: tuple[tuple[str, Any], ...] = ()
    turn: Callable[[Mapping[str, Any]], "PosteriorRule"] | None = None

    def scalars(self, likelihood: Likelihood) -> tuple[tuple[str, Any], ...]:
        """Its knobs, and the noise where the likelihood has one: (name, value) of each.

        The noise is that of predictions alone: inner steps keep the likelihood that they were trained with.
        """
        own = dict(self.knobs)
        if isinstance(likelihood, Gaussian) and likelihood.scale is not None and self._takes_noise():
            stated = self.predict.keywords.get("noise") if isinstance(self.predict, partial) else None
            own["noise"] = likelihood.scale if stated is None else stated
        return as_knobs(own)

    def turned(self, knobs: Mapping[str, Any]) -> "PosteriorRule":
        """The rule with these values; those of other knobs stay."""
        own = {name: value for name, value in knobs.items() if name != "noise"}
        rule = self.turn(own) if own and self.turn is not None else self
        if "noise" not in knobs:
            return rule
        predict: Callable[..., Any] = rule.predict
        return rule._replace(predict=partial(predict, noise=knobs["noise"]))

    def _takes_noise(self) -> bool:
        return "noise" in option_names(self.predict)


class Point(NamedTuple):
    """All mass on one phi."""

    mean: PyTree

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """phi itself."""
        return self.mean

    def quadratic(self, row: PyTree) -> Scalar:
        """No variance."""
        return jnp.zeros(())


class CurvatureGaussian(NamedTuple):
    """N(mean, temperature C) with C as a curvature has it."""

    mean: PyTree
    curvature: Any
    temperature: float | Array

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """One draw of phi."""
        root = jnp.sqrt(self.temperature)
        return jax.tree.map(lambda m, d: m + root * d, self.mean, self.curvature.sample(key))

    def quadratic(self, row: PyTree) -> Scalar:
        """row C row' for a row shaped as phi."""
        return self.temperature * self.curvature.quadratic(row)


def predict(
    outputs: Callable[..., Array],
    likelihood: Likelihood,
    posterior: Any,
    x: PyTree,
    key: PRNGKeyArray,
    *,
    draws: int = 0,
    linear: bool = False,
    noise: float | Array | None = None,
) -> Any:
    """The predictive at x under a posterior with `mean`, `sample` and `quadratic`.

    draws = 0: the linearised predictive in closed form (exact for Gaussian likelihoods of a linear network; softmax by
    quadrature over logits that are independent beside a shift common to all classes, which changes nothing). It costs
    one vector-Jacobian product through all of x an output, n c in all.
    draws > 0: a mixture of so many networks drawn from the posterior; with linear=True of draws of the network
    linearised at its mean, which is the network that Gauss-Newton describes (Immer, Korzepa & Bauer 2021): one
    Jacobian-vector product a draw, the cheap choice for convolutional networks.
    noise: replaces the Gaussian likelihood's scale.
    """
    if noise is not None:
        if not isinstance(likelihood, Gaussian):
            raise ValueError(
                f"noise: {type(likelihood).__name__} has no noise scale to replace, only Gaussian has; leave noise out"
            )
        likelihood = replace(likelihood, scale=noise)
    if draws:
        keys = jax.random.split(key, draws)
        return likelihood.predictive(jax.lax.map(_drawn(outputs, posterior, x, linear), keys, batch_size=DRAWS_AT_ONCE))
    means = outputs(posterior.mean, x)[None]
    if isinstance(posterior, Point):
        return likelihood.predictive(means)
    variance = output_variance(_felt(outputs, likelihood), posterior, x)[None]
    return likelihood.predictive(means, _apart(variance) if isinstance(likelihood, Categorical) else variance)


def _drawn(outputs: Callable[..., Array], posterior: Any, x: PyTree, linear: bool) -> Callable[[PRNGKeyArray], Array]:
    """key -> the outputs at x of one draw of phi."""
    if not linear:
        return lambda key: outputs(posterior.sample(key), x)
    f, push = jax.linearize(lambda phi: outputs(phi, x), posterior.mean)
    return lambda key: f + push(jax.tree.map(jnp.subtract, posterior.sample(key), posterior.mean))


def _felt(outputs: Callable[..., Array], likelihood: Likelihood) -> Callable[..., Array]:
    """The outputs as the likelihood feels them: a softmax does not see what all its logits share."""
    if not isinstance(likelihood, Categorical):
        return outputs

    def centred(phi: PyTree, x: PyTree) -> Float[Array, "n c"]:
        f = outputs(phi, x)
        return f - f.mean(-1, keepdims=True)

    return centred


def _apart(centred: Float[Array, "s n c"]) -> Float[Array, "s n c"]:
    """Variances u of independent logits whose variances about their mean over the c classes are `centred`, w.

    w_j = (1 - 2/c) u_j + sum(u)/c^2, so sum(u) = sum(w) c/(c - 1). Two classes share one w: either gets half the sum.
    """
    c = centred.shape[-1]
    total = centred.sum(-1, keepdims=True) * c / max(c - 1, 1)
    if c < 3:
        return jnp.broadcast_to(total / c, centred.shape)
    return jnp.maximum((centred - total / c**2) / (1 - 2 / c), 0)


def _rule(
    infer: Callable[..., Any],
    draws: int,
    linear: bool,
    noise: float | Array | None,
    knobs: Mapping[str, Any] = MappingProxyType({}),
    turn: Callable[[Mapping[str, Any]], PosteriorRule] | None = None,
) -> PosteriorRule:
    return PosteriorRule(infer, partial(predict, draws=draws, linear=linear, noise=noise), as_knobs(knobs), turn)


@checked
def point(noise: Scale | None = None) -> PosteriorRule:
    """phi_k alone. noise: the Gaussian likelihood's scale in the predictive, if not its own."""

    def infer(outputs, likelihood: Likelihood, phi: PyTree, support: Batch, implied: Implied) -> Point:
        return Point(phi)

    return _rule(infer, 0, False, noise)


@checked
def laplace(
    precision: Scale | None = 1.0,
    temperature: Scale = 1.0,
    noise: Scale | None = None,
    draws: Whole = 0,
    linear: bool = False,
    curvature: str | Callable[..., Curvature] = "auto",
) -> PosteriorRule:
    """N(phi_k, temperature (H + precision I)^-1) with H the support's Gauss-Newton matrix (Grant et al. 2018, sec. 4).

    curvature: "auto" (exact, see `by_size`), one of CURVATURES, or a function with their arguments, e.g.
    partial(lanczos, order=64).
    precision: tau of the prior N(theta, I / tau); None takes the explicit prior of the inner loop, if it has one.
    draws, linear: see `predict`. temperature, noise and precision may be traced, to be fitted on validation tasks by
    their gradient.
    """
    known = {"auto": by_size, **CURVATURES}
    fit = known.get(curvature) if isinstance(curvature, str) else curvature
    if fit is None:
        raise ValueError(f"curvature: came {curvature!r}, needs one of {', '.join(known)}")

    def infer(
        outputs, likelihood: Likelihood, phi: PyTree, support: Batch, implied: Implied
    ) -> SpectralGaussian | CurvatureGaussian:
        tau = implied.precision if precision is None else precision
        if tau is None:
            raise ValueError(
                "precision: came None, but this learner's inner loop has no explicit prior; give a number, e.g. 1.0"
            )
        unit = fit(outputs, likelihood, phi, support, 1.0)
        if isinstance(unit, (Dual, Primal, Lanczos)):
            # tau enters after the eigenvectors, whose own derivative does not exist where eigenvalues repeat.
            return unit.gaussian(phi, partial(laplace_spectrum, precision=tau), temperature)
        fitted = fit(outputs, likelihood, phi, support, jnp.asarray(tau) ** -0.5)
        return CurvatureGaussian(phi, fitted, temperature)

    own: dict[str, Any] = {} if precision is None else {"precision": precision}
    given: dict[str, Any] = {
        "temperature": temperature,
        "noise": noise,
        "draws": draws,
        "linear": linear,
        "curvature": curvature,
    }
    return _rule(infer, draws, linear, noise, own, lambda knobs: laplace(**given | own | dict(knobs)))


@checked
def implicit(
    temperature: Scale = 1.0,
    noise: Scale | None = None,
    draws: Whole = 0,
    linear: bool = False,
    curvature: str | Callable[..., Dual | Primal | Lanczos] = "auto",
) -> PosteriorRule:
    """The posterior that the inner loop's own steps imply, with nothing to choose (see `inference.linear_descent`).

    Exact for a quadratic loss and every optimiser that is linear in its gradients: SGD with any schedule, momentum,
    Nesterov, weight decay, and the learned rates of `meta_sgd`, `lslr` and `preconditioned`. Where a step overshoots no
    prior explains the steps: the likelihood alone counts there, and the posterior's `clipped` says what share of
    directions that is. Learned rates below 0 count as 0. Rates that differ by tensor and step imply a slightly
    unsymmetric matrix: its symmetric part is taken, and `asymmetry` says how much was left out.

    An approximation for other optimisers (Adam, RMSProp, clipped gradients, a line search): k steps at the rates of the
    last step, 0 for a parameter whose gradient is exactly zero there. A loop that optimises an explicit prior (iMAML)
    implies that prior's Laplace posterior.

    curvature: "auto" (exact, see `by_size`), "dual", "lanczos" or a function with their arguments. draws, linear: see
    `predict`. temperature 1 is the pure value; fit it on validation tasks, as wide networks have very broad flat
    directions.
    """

    spectral = {"auto": by_size, "dual": dual, "lanczos": lanczos}
    fit = spectral.get(curvature) if isinstance(curvature, str) else curvature
    if fit is None:
        raise ValueError(f"curvature: came {curvature!r}, needs one with a spectrum: {', '.join(spectral)}")

    def infer(
        outputs, likelihood: Likelihood, phi: PyTree, support: Batch, implied: Implied
    ) -> SpectralGaussian | RootedGaussian | TensorGaussian:
        if implied.scale is None:
            raise ValueError(
                "posterior must be 'laplace' or 'point' for this learner, got 'implicit': its steps are a network's, "
                "and imply no prior."
            )
        if implied.precision is not None:
            scale, spectrum = implied.scale, laplace_spectrum
        else:
            scale, spectrum = implied.scale, partial(descent_spectrum, steps=implied.steps)
            if (run := implied.optimizer) is not None:
                like = "tensor" if implied.by_tensor else alike(run, phi, implied.most)
                if like == "tensor":
                    rows = fit(outputs, likelihood, phi, support, implied.unit).gaussian(phi, laplace_spectrum).rows
                    spread = temperature * jnp.square(implied.unit)
                    return tensor_gaussian(phi, rows, run, implied.steps, implied.most, spread)
                if like == "all":
                    scale = implied.unit
                    spectrum = partial(
                        optimizer_spectrum, optimizer=run, like=phi, steps=implied.steps, most=implied.most
                    )
        if not isinstance(scale, Root):
            return fit(outputs, likelihood, phi, support, as_scale(scale, phi)).gaussian(phi, spectrum, temperature)
        origin = scale.origin()

        def white(z: PyTree, x: PyTree) -> Array:
            return outputs(jax.tree.map(jnp.add, phi, scale.push(z)), x)

        around = fit(white, likelihood, origin, support, 1.0).gaussian(origin, spectrum, temperature)
        return RootedGaussian(phi, scale, around)

    own: dict[str, Any] = {"temperature": temperature}
    given: dict[str, Any] = {"noise": noise, "draws": draws, "linear": linear, "curvature": curvature}
    return _rule(infer, draws, linear, noise, own, lambda knobs: implicit(**given | own | dict(knobs)))


POSTERIORS = {"point": point, "laplace": laplace, "implicit": implicit}
