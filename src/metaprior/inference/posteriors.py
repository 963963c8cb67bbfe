"""Posteriors around phi_k, the end of an inner loop: a point, a Laplace Gaussian, or the Gaussian of the loop itself.

A `PosteriorRule` has two pure functions of one task's phi, any pytree (the head alone for ANIL): `infer` makes the
posterior from the support, and `predict` makes the predictive from the posterior.
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

    Attributes:
        scale: A root of the constant inner rates, shaped as phi or a `Root`. A rate a on a mean over N examples is a/N
            here. None if the steps follow no gradient at any rate.
        steps: Number of steps k, which may be traced.
        precision: Precision of an explicit prior N(theta, 1/precision) that the loop optimises instead (iMAML), or
            None.
        optimizer: The optimiser of the steps, if its rates are not constant or not known to be constant. `scale` then
            has the rates of the last step.
        most: A static upper bound of steps.
        unit: N^(-1/2).
        by_tensor: Whether the optimiser is known to be linear and to treat the elements of each tensor alike. If not,
            this is found out (`alike`).
    """

    scale: PyTree
    steps: int | Array
    precision: float | Array | None = None
    optimizer: optax.GradientTransformation | None = None
    most: int = 0
    unit: float | Array = 1.0
    by_tensor: bool = False


class PosteriorRule(NamedTuple):
    """Defines how a posterior around phi is inferred from the support, and how it predicts.

    Attributes:
        infer: Function (outputs, likelihood, phi, support, implied) -> posterior, a pytree with `mean`, `sample(key)`
            and `quadratic(row)`.
        predict: Function (outputs, likelihood, posterior, x, key) -> `Predictive`.
        knobs: Pairs (name, value) of its positive scalars that can be fitted on validation tasks.
        turn: Function (knobs) -> the rule with these values, a mapping by name.
    """

    infer: Callable[[Callable[..., Array], Likelihood, PyTree, Batch, Implied], Any]
    predict: Callable[[Callable[..., Array], Likelihood, Any, PyTree, PRNGKeyArray], Any]
    knobs: tuple[tuple[str, Any], ...] = ()
    turn: Callable[[Mapping[str, Any]], "PosteriorRule"] | None = None

    def scalars(self, likelihood: Likelihood) -> tuple[tuple[str, Any], ...]:
        """Returns pairs (name, value) of its knobs, and of the noise if the likelihood has one.

        The noise is that of predictions only: inner steps keep the likelihood that they were trained with.

        Args:
            likelihood: The likelihood.
        """
        own = dict(self.knobs)
        if isinstance(likelihood, Gaussian) and likelihood.scale is not None and self._takes_noise():
            stated = self.predict.keywords.get("noise") if isinstance(self.predict, partial) else None
            own["noise"] = likelihood.scale if stated is None else stated
        return as_knobs(own)

    def turned(self, knobs: Mapping[str, Any]) -> "PosteriorRule":
        """Returns the rule with new values of some knobs.

        Args:
            knobs: The new values by name. Other knobs keep theirs.
        """
        own = {name: value for name, value in knobs.items() if name != "noise"}
        rule = self.turn(own) if own and self.turn is not None else self
        if "noise" not in knobs:
            return rule
        predict: Callable[..., Any] = rule.predict
        return rule._replace(predict=partial(predict, noise=knobs["noise"]))

    def _takes_noise(self) -> bool:
        return "noise" in option_names(self.predict)


class Point(NamedTuple):
    """All mass on one phi.

    Attributes:
        mean: The value of phi.
    """

    mean: PyTree

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Returns phi."""
        return self.mean

    def quadratic(self, row: PyTree) -> Scalar:
        """Returns 0, as there is no variance."""
        return jnp.zeros(())


class CurvatureGaussian(NamedTuple):
    """N(mean, temperature C), where C is the covariance of a curvature.

    Attributes:
        mean: The mean of phi.
        curvature: The curvature.
        temperature: Factor of the covariance.
    """

    mean: PyTree
    curvature: Any
    temperature: float | Array

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws one phi.

        Args:
            key: Random key.
        """
        root = jnp.sqrt(self.temperature)
        return jax.tree.map(lambda m, d: m + root * d, self.mean, self.curvature.sample(key))

    def quadratic(self, row: PyTree) -> Scalar:
        """Computes row C row', where C is the covariance.

        Args:
            row: A row, shaped as phi.
        """
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
    """Computes the predictive at x under a posterior.

    Without draws it is the linearised predictive in closed form. This is exact for Gaussian likelihoods of a linear
    network. For a softmax it uses quadrature over logits that are independent, apart from a shift common to all
    classes, which does not change the probabilities. It costs one vector-Jacobian product through all of x per output,
    n c in all.

    With draws it is a mixture of networks that are drawn from the posterior.

    Args:
        outputs: Function (phi, x) -> outputs [n, c].
        likelihood: The likelihood.
        posterior: A posterior with `mean`, `sample` and `quadratic`.
        x: Inputs.
        key: Random key for the draws.
        draws: Number of draws; 0 uses the closed form.
        linear: Linearise each drawn network at the posterior's mean. This is the network that Gauss-Newton describes
            (Immer, Korzepa & Bauer 2021). A draw costs one Jacobian-vector product, which is the cheap choice for
            convolutional networks.
        noise: Replaces the scale of the Gaussian likelihood. None keeps it.

    Raises:
        ValueError: There is a noise, and the likelihood is not Gaussian.
    """
    if noise is not None:
        if not isinstance(likelihood, Gaussian):
            raise ValueError(
                f"noise must be None for {type(likelihood).__name__}, which has no noise scale, got {noise!r}. Leave "
                "it out, or use the Gaussian likelihood."
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
    """Returns the function key -> outputs at x of one draw of phi."""
    if not linear:
        return lambda key: outputs(posterior.sample(key), x)
    f, push = jax.linearize(lambda phi: outputs(phi, x), posterior.mean)
    return lambda key: f + push(jax.tree.map(jnp.subtract, posterior.sample(key), posterior.mean))


def _felt(outputs: Callable[..., Array], likelihood: Likelihood) -> Callable[..., Array]:
    """Returns the outputs that matter to the likelihood: centred logits, as a softmax ignores a common shift."""
    if not isinstance(likelihood, Categorical):
        return outputs

    def centred(phi: PyTree, x: PyTree) -> Float[Array, "n c"]:
        f = outputs(phi, x)
        return f - f.mean(-1, keepdims=True)

    return centred


def _apart(centred: Float[Array, "s n c"]) -> Float[Array, "s n c"]:
    """Computes variances u of independent logits from the variances w (`centred`) about their mean over c classes.

    w_j = (1 - 2/c) u_j + sum(u)/c^2, so sum(u) = sum(w) c/(c - 1). Two classes have the same w, and each gets half the
    sum.
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
    """Uses phi_k alone, without a variance.

    Args:
        noise: Scale of the Gaussian likelihood in the predictive. None is the likelihood's own.
    """

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
    """Uses Laplace's approximation N(phi_k, temperature (H + precision I)^-1).

    H is the Gauss-Newton matrix of the support's summed nll.

    precision, temperature and noise may be traced, so that they can be fitted on validation tasks by their gradient.

    Args:
        precision: tau of the prior N(theta, I / tau). None uses the explicit prior of the inner loop, if it has one.
        temperature: Factor of the covariance.
        noise: Scale of the Gaussian likelihood in the predictive. None is the likelihood's own.
        draws: Number of draws in the predictive; 0 uses the closed form. See `predict`.
        linear: Whether to linearise the drawn networks. See `predict`.
        curvature: "auto" (exact, see `by_size`), a name in CURVATURES, or a function with their arguments, e.g.
            partial(lanczos, order=64).

    Raises:
        ValueError: The curvature is unknown, or there is no explicit prior for precision=None.

    References:
        Grant et al. 2018, Recasting gradient-based meta-learning as hierarchical Bayes, sec. 4.
    """
    known = {"auto": by_size, **CURVATURES}
    fit = known.get(curvature) if isinstance(curvature, str) else curvature
    if fit is None:
        raise ValueError(f"curvature must be one of {', '.join(known)}, got {curvature!r}.")

    def infer(
        outputs, likelihood: Likelihood, phi: PyTree, support: Batch, implied: Implied
    ) -> SpectralGaussian | CurvatureGaussian:
        tau = implied.precision if precision is None else precision
        if tau is None:
            raise ValueError(
                "precision must be a number for this learner, whose inner loop has no explicit prior, got None. Use "
                "e.g. precision=1.0."
            )
        unit = fit(outputs, likelihood, phi, support, 1.0)
        if isinstance(unit, (Dual, Primal, Lanczos)):
            # tau is applied after the eigenvectors, which are not differentiable where eigenvalues repeat.
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
    """Uses the posterior that the steps of the inner loop imply, without a prior to choose.

    It is exact for a quadratic loss and every optimiser that is linear in its gradients: SGD with any schedule,
    momentum, Nesterov, weight decay, and the learned rates of `meta_sgd`, `lslr` and `preconditioned`; see
    `inference.linear_descent`. If a step overshoots in a direction, no prior explains the steps there. Only the
    likelihood is used in such directions, and the posterior's `clipped` is their fraction. Learned rates below 0 count
    as 0. Rates that differ by tensor and step imply a slightly asymmetric matrix: its symmetric part is used, and
    `asymmetry` measures the rest.

    For other optimisers (Adam, RMSProp, clipped gradients, a line search) it is an approximation: k steps at the rates
    of the last step, with rate 0 for a parameter whose gradient is exactly zero there. A loop that optimises an
    explicit prior (iMAML) implies the Laplace posterior of that prior.

    Args:
        temperature: Factor of the covariance. 1 is the value that the steps imply. Fit it on validation tasks, because
            wide networks have very broad flat directions.
        noise: Scale of the Gaussian likelihood in the predictive. None is the likelihood's own.
        draws: Number of draws in the predictive; 0 uses the closed form. See `predict`.
        linear: Whether to linearise the drawn networks. See `predict`.
        curvature: "auto" (exact, see `by_size`), "dual", "lanczos", or a function with their arguments.

    Raises:
        ValueError: The curvature is unknown or has no spectrum, or the learner's steps imply no prior.
    """
    spectral = {"auto": by_size, "dual": dual, "lanczos": lanczos}
    fit = spectral.get(curvature) if isinstance(curvature, str) else curvature
    if fit is None:
        raise ValueError(f"curvature must have a spectrum ({', '.join(spectral)}), got {curvature!r}.")

    def infer(
        outputs, likelihood: Likelihood, phi: PyTree, support: Batch, implied: Implied
    ) -> SpectralGaussian | RootedGaussian | TensorGaussian:
        if implied.scale is None:
            raise ValueError(
                "posterior must be 'laplace' or 'point' for this learner, got 'implicit'. Its steps are the outputs of "
                "a network, and imply no prior."
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
