"""Variational inference of phi: fits a diagonal Gaussian q to a task's data under a Gaussian prior.

The fit starts at the prior, and minimises E_q[mean nll] + weight KL(q || prior) / n with any optax optimiser (Ravi &
Beatson 2019; Zou & Lu 2020). The learner decides whether the meta-gradient flows through its steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count as count_from
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.options import Count, InnerOptimizer, NonNegative, Whole
from metaprior.core.types import Batch, Call, Model, weights
from metaprior.inference.descent import count, descend, mean_nll
from metaprior.inference.gaussian import DiagonalGaussian, kl
from metaprior.inference.inner_loop import InnerLoop


@dataclass(frozen=True, kw_only=True)
class Variational(InnerLoop):
    """The options of fitting a task's Gaussian.

    Attributes:
        steps: Number of optimiser steps in training.
        optimizer: As in `InnerLoop`, or "natural" (see `natural_descent`). The rate of "natural" is the fraction of the
            way to its target by which a step changes the precision, in (0, 1].
        samples: Number of reparametrised draws per step: 1, or an even number for mirrored pairs.
        kl_weight: Weight of the KL term. 1 is Bayes' rule; a smaller weight trusts the data more.
        local: Draw the outputs of each linear map instead of its weights (Kingma, Salimans & Welling 2015). The network
            must take a `Call`. There is less noise, but it depends on the order of the examples.
    """

    steps: Whole = 5
    optimizer: InnerOptimizer | optax.GradientTransformation = "adam"
    samples: Count = 1
    kl_weight: NonNegative = 1.0
    local: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer == "natural" and not (0 < self.rate <= 1 and self.kl_weight > 0):
            came = f"rate {self.rate} and kl_weight {self.kl_weight}"
            raise ValueError(
                f"rate must be in (0, 1] and kl_weight above 0 for optimizer='natural', got {came}. Change them, or "
                "use another optimizer."
            )
        if self.samples > 1 and self.samples % 2:
            raise ValueError(f"samples must be 1 or even, as draws are mirrored in pairs, got {self.samples}.")

    def on(self, batch: Batch, differentiated: bool = True) -> Any:
        """Makes the inner optimiser for a batch.

        Without examples its steps are 0, because the posterior is the prior. This is not automatic: where gradients are
        exactly 0, as those of the KL are at the prior, the smallest change of theta makes Adam take a full step.

        Args:
            batch: The examples. Their number sets the step size of "natural" and limits that of "sgd".
            differentiated: Whether the meta-gradient flows through the steps.
        """
        inner = self._moving(batch, differentiated)
        return inner if batch.weight is None else optax.chain(inner, optax.scale((weights(batch).sum() > 0) * 1.0))

    def _moving(self, batch: Batch, differentiated: bool) -> Any:
        if self.optimizer == "natural":
            return natural_descent(self.rate, count(batch) / self.kl_weight, guarded=self.samples > 1)
        if self.optimizer == "sgd":
            pull = self.rate * self.kl_weight / count(batch)
            return optax.chain(optax.sgd(self.rate), no_further_than_the_prior(pull))
        return self.transformation(differentiated=differentiated)


def no_further_than_the_prior(rate: float | Scalar) -> optax.GradientTransformation:
    """Returns a transformation that shortens steps of a mean if the KL term alone would overshoot the prior's mean.

    A step on KL / n with learning rate a moves a mean by the fraction (a / n) / sd^2 of the way to the prior's mean. A
    fraction of 2 or more diverges, which happens for a narrow prior and few examples. A fraction above 1 is reduced to
    1; other steps do not change.

    Args:
        rate: a / n.
    """

    def init(q: DiagonalGaussian) -> PyTree:
        return jax.tree.map(lambda log_sd: jnp.minimum(1, jnp.exp(2 * log_sd) / jnp.maximum(rate, 1e-30)), q.log_sd)

    def update(step: DiagonalGaussian, share: PyTree, q: DiagonalGaussian | None = None) -> tuple[Any, PyTree]:
        return DiagonalGaussian(jax.tree.map(jnp.multiply, step.mean, share), step.log_sd), share

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def natural_descent(rate: float, scale: float | Scalar = 1.0, guarded: bool = True) -> optax.GradientTransformation:
    """Returns natural gradient descent for a diagonal Gaussian.

    A step first updates the precision, then the mean with the new precision (Khan & Rue 2023, the Bayesian learning
    rule). If the precision decreases, the second-order term of Lin, Schmidt & Khan 2020 keeps it positive.

    The weights that share the data's curvature overshoot together, most of all under a wide prior. With `guarded`, the
    mean's step is divided by the precision's target if that is above the new precision. Its length, in units of the d
    initial standard deviations, is at most 1 + sqrt(d) / 10. With one draw per step the estimate of the target is too
    noisy for this guard, and the noise would shorten the steps.

    Args:
        rate: Fraction of the way to its target by which a step changes the precision.
        scale: The loss is minus the ELBO divided by this number.
        guarded: Whether to limit the mean's steps.
    """

    def init(q: DiagonalGaussian) -> PyTree:
        return q.log_sd

    def update(g: DiagonalGaussian, start: PyTree, q: DiagonalGaussian | None = None) -> tuple[Any, PyTree]:
        assert q is not None
        # d loss / d log sd is the relative distance of the precision from its target.
        farther = jax.tree.map(lambda g: rate * scale * g, g.log_sd)
        growth = jax.tree.map(lambda f: 1 + f + 0.5 * jnp.minimum(f, 0) ** 2, farther)
        over = jax.tree.map(lambda grown, f: jnp.maximum(grown, 1 + f / rate) if guarded else grown, growth, farther)
        step = jax.tree.map(lambda g, s, o: -rate * scale * jnp.exp(2 * s) * g / o, g.mean, q.log_sd, over)
        if guarded:
            # Squared, because a norm has no derivative at 0.
            length = optax.tree.norm(jax.tree.map(lambda leaf, s: leaf * jnp.exp(-s), step, start), squared=True)
            longest = 1 + 0.1 * sum(leaf.size for leaf in jax.tree.leaves(step)) ** 0.5
            step = jax.tree.map(lambda leaf: leaf * (longest / jnp.sqrt(jnp.maximum(length, longest**2))), step)
        return DiagonalGaussian(step, jax.tree.map(lambda grown: -0.5 * jnp.log(grown), growth)), start

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def expected_nll(
    model: Model, likelihood: Likelihood, q: DiagonalGaussian, batch: Batch, key: PRNGKeyArray, how: Variational
) -> Scalar:
    """Estimates E_q of the batch's mean nll by `how.samples` reparametrised draws.

    Args:
        model: The model.
        likelihood: The likelihood.
        q: The Gaussian of phi.
        batch: The examples.
        key: Random key for the draws.
        how: The options of the fit.
    """

    def one(key: PRNGKeyArray, sign: Scalar | float) -> Scalar:
        local = how.local
        outputs = local_outputs(model, q, batch.x, key, sign) if local else model.apply(q.sample(key, sign), batch.x)
        return mean_nll(likelihood, outputs, batch)

    if how.samples == 1:
        return one(key, 1.0)
    # Mirrored pairs share their noise: half the random numbers, and no noise in the gradient of the mean for a
    # quadratic loss.
    both = jax.vmap(one, (None, 0))
    return jax.vmap(both, (0, None))(jax.random.split(key, how.samples // 2), jnp.array([1.0, -1.0])).mean()


def local_outputs(model: Model, q: DiagonalGaussian, x: PyTree, key: PRNGKeyArray, sign: Scalar | float = 1.0) -> Array:
    """Computes outputs of a network, where each example has its own draw of the dense layers' outputs.

    All other weights, those of convolutions and norms, are drawn once for all examples: pixels share them, so separate
    draws of the outputs would have the wrong correlation.

    Args:
        model: The model.
        q: The Gaussian of the weights.
        x: Inputs.
        key: Random key for the draws.
        sign: 1, or -1 for the mirrored draw.

    Raises:
        ValueError: The model takes no `Call`.

    References:
        Kingma, Salimans & Welling 2015, Variational dropout and the local reparameterization trick.
    """
    if not model.calls:
        raise ValueError(
            "local must be False for a network that takes no `Call`, got True. Leave it out, or use a network of "
            "metaprior.networks."
        )
    drawn, seen = q.sample(key, sign), count_from(1)

    def dense(name: str) -> bool:
        return "w" in q.mean[name] and q.mean[name]["w"].ndim == 2

    def tap(name: str, x: Array, s: Array) -> Array:
        if not dense(name):
            return s
        sd = jax.tree.map(jnp.exp, q.log_sd[name])
        variance = x**2 @ sd["w"] ** 2 + (sd["b"] ** 2 if "b" in sd else 0.0)
        noise = sign * jax.random.normal(jax.random.fold_in(key, next(seen)), s.shape, s.dtype)
        # The layer's weights are at their means. The small number is added because sqrt has no derivative at 0.
        return s + jnp.sqrt(variance + 1e-20) * noise

    layers = {
        name: {k: q.mean[name][k] if dense(name) and k in ("w", "b") else v for k, v in layer.items()}
        for name, layer in drawn.items()
    }
    return model.outputs(layers, x, Call(tap))


def free_energy(
    model: Model, likelihood: Likelihood, prior: DiagonalGaussian, batch: Batch, how: Variational
) -> Callable[[DiagonalGaussian, PRNGKeyArray], Scalar]:
    """Returns the function (q, key) -> E_q[mean nll] + weight KL(q || prior) / n: minus the ELBO per example.

    Args:
        model: The model.
        likelihood: The likelihood.
        prior: The prior of phi.
        batch: The n examples.
        how: The options of the fit, with the weight.
    """

    def energy(q: DiagonalGaussian, key: PRNGKeyArray) -> Scalar:
        fit = expected_nll(model, likelihood, q, batch, key, how)
        return fit + how.kl_weight * kl(q, prior) / count(batch)

    return energy


def infer(
    model: Model,
    likelihood: Likelihood,
    prior: DiagonalGaussian,
    batch: Batch,
    key: PRNGKeyArray,
    how: Variational,
    *,
    steps: int | None = None,
    first_order: bool | None = None,
    differentiated: bool | None = None,
) -> DiagonalGaussian:
    """Fits q(phi) ~ p(phi | batch), starting at the prior. Without data q is the prior.

    Args:
        model: The model.
        likelihood: The likelihood.
        prior: The prior of phi.
        batch: The examples.
        key: Random key for the draws.
        how: The options of the fit.
        steps: Number of steps. None is that of the options.
        first_order: Stop the meta-gradient at each inner gradient. None is that of the options.
        differentiated: Whether the learner's meta-gradient flows through such steps, here or in another call; see
            `make_optimizer`. None means unless `first_order`.
    """
    steps = how.steps if steps is None else steps
    first_order = how.first_order if first_order is None else first_order
    energy = free_energy(model, likelihood, prior, batch, how)
    keys = jax.random.split(key, steps)
    inner = how.on(batch, not first_order if differentiated is None else differentiated)
    return descend(energy, prior, inner, steps, first_order=first_order, remat=how.remat, data=keys).phi
