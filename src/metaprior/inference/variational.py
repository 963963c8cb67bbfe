"""phi by variational inference: a diagonal Gaussian fitted to a task's data under a Gaussian prior, step by step.

The fit starts at its prior, and descends E_q[mean nll] + weight KL(q || prior) / n with any optax optimiser (Ravi &
Beatson 2019; Zou & Lu 2020). Whether the meta-gradient flows through its steps is the learner's choice.
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
    """How a task's Gaussian is fitted.

    steps, test_steps (None: as many): optimiser steps in training and on a new task. optimizer, rate: any of optax, or
    "natural" (see `natural_descent`), whose rate is the share of the way to its target that a step takes the precision.
    samples: reparametrised draws a step, one or mirrored pairs. kl_weight: 1 is Bayes' rule, less trusts the data more.
    local: draw each linear map's outputs in place of its weights (Kingma, Salimans & Welling 2015), for networks that
    take a `Call`: less noise, but noise that depends on the order of the examples. remat: backward memory grows as
    log(steps).
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
            raise ValueError(f"optimizer: came 'natural' with {came}, needs a rate of (0, 1] and a kl_weight above 0")
        if self.samples > 1 and self.samples % 2:
            raise ValueError(f"samples: came {self.samples}, needs 1 or an even number: draws are mirrored in pairs")

    def on(self, batch: Batch, differentiated: bool = True) -> Any:
        """The inner optimiser; "natural" is told how many examples the mean loss is of, and so what a share is.

        Without examples nothing moves, as the posterior is the prior. It has to be said: where gradients are exactly 0,
        as the KL's are at the prior, Adam answers the least change of theta with a step of its full rate.
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
    """Shortens a mean's steps where the KL term alone would overshoot the prior.

    KL / n pulls a mean by `rate` / sd^2 of the way to the prior's, rate being a / n: from 2 on that diverges, as for a
    narrow prior and few examples. There the step is shortened to the whole way; elsewhere nothing changes.
    """

    def init(q: DiagonalGaussian) -> PyTree:
        return jax.tree.map(lambda log_sd: jnp.minimum(1, jnp.exp(2 * log_sd) / jnp.maximum(rate, 1e-30)), q.log_sd)

    def update(step: DiagonalGaussian, share: PyTree, q: DiagonalGaussian | None = None) -> tuple[Any, PyTree]:
        return DiagonalGaussian(jax.tree.map(jnp.multiply, step.mean, share), step.log_sd), share

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def natural_descent(rate: float, scale: float | Scalar = 1.0, guarded: bool = True) -> optax.GradientTransformation:
    """Steps of a diagonal Gaussian along its natural gradient: precision first, then the mean over the new precision.

    For a loss that is minus the ELBO over `scale`. rate is the share of the way that the precision goes to its target
    in a step, however far that is (Khan & Rue 2023, the Bayesian learning rule). Where it falls, the second-order term
    of Lin, Schmidt & Khan 2020 keeps it positive.

    Weights that share the data's curvature overshoot together, most where the prior is wide. If guarded, the mean's
    step is over the target where that is above the new precision, and, in the d sds of the start, no longer than
    1 + sqrt(d) / 10. One draw tells the target too badly for that, and steps shrink by its noise.
    """

    def init(q: DiagonalGaussian) -> PyTree:
        return q.log_sd

    def update(g: DiagonalGaussian, start: PyTree, q: DiagonalGaussian | None = None) -> tuple[Any, PyTree]:
        assert q is not None
        # d loss / d log sd is the precision's relative distance from its target.
        farther = jax.tree.map(lambda g: rate * scale * g, g.log_sd)
        growth = jax.tree.map(lambda f: 1 + f + 0.5 * jnp.minimum(f, 0) ** 2, farther)
        over = jax.tree.map(lambda grown, f: jnp.maximum(grown, 1 + f / rate) if guarded else grown, growth, farther)
        step = jax.tree.map(lambda g, s, o: -rate * scale * jnp.exp(2 * s) * g / o, g.mean, q.log_sd, over)
        if guarded:
            # Squared, as a norm has no derivative where nothing moves.
            length = optax.tree.norm(jax.tree.map(lambda leaf, s: leaf * jnp.exp(-s), step, start), squared=True)
            longest = 1 + 0.1 * sum(leaf.size for leaf in jax.tree.leaves(step)) ** 0.5
            step = jax.tree.map(lambda leaf: leaf * (longest / jnp.sqrt(jnp.maximum(length, longest**2))), step)
        return DiagonalGaussian(step, jax.tree.map(lambda grown: -0.5 * jnp.log(grown), growth)), start

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def expected_nll(
    model: Model, likelihood: Likelihood, q: DiagonalGaussian, batch: Batch, key: PRNGKeyArray, how: Variational
) -> Scalar:
    """E_q of the batch's mean nll, by `how.samples` reparametrised draws."""

    def one(key: PRNGKeyArray, sign: Scalar | float) -> Scalar:
        local = how.local
        outputs = local_outputs(model, q, batch.x, key, sign) if local else model.apply(q.sample(key, sign), batch.x)
        return mean_nll(likelihood, outputs, batch)

    if how.samples == 1:
        return one(key, 1.0)
    # Mirrored pairs share their noise: half the random numbers, and no noise in the mean's slope of a quadratic loss.
    both = jax.vmap(one, (None, 0))
    return jax.vmap(both, (0, None))(jax.random.split(key, how.samples // 2), jnp.array([1.0, -1.0])).mean()


def local_outputs(model: Model, q: DiagonalGaussian, x: PyTree, key: PRNGKeyArray, sign: Scalar | float = 1.0) -> Array:
    """The outputs of a network whose dense layers' outputs are drawn, each example's its own (Kingma et al. 2015).

    All other weights, of convolutions and norms, are drawn once for all examples: their draws are shared between
    pixels, which outputs drawn one by one would not be. sign: -1 mirrors the draw. Raises ValueError for a network
    that takes no `Call`.
    """
    if not model.calls:
        raise ValueError("local: needs a network that takes a `Call`, as those of metaprior.networks do; leave it out")
    drawn, seen = q.sample(key, sign), count_from(1)

    def dense(name: str) -> bool:
        return "w" in q.mean[name] and q.mean[name]["w"].ndim == 2

    def tap(name: str, x: Array, s: Array) -> Array:
        if not dense(name):
            return s
        sd = jax.tree.map(jnp.exp, q.log_sd[name])
        variance = x**2 @ sd["w"] ** 2 + (sd["b"] ** 2 if "b" in sd else 0.0)
        noise = sign * jax.random.normal(jax.random.fold_in(key, next(seen)), s.shape, s.dtype)
        # The layer's own weights are at their means; + tiny, as a square root has no derivative at 0.
        return s + jnp.sqrt(variance + 1e-20) * noise

    layers = {
        name: {k: q.mean[name][k] if dense(name) and k in ("w", "b") else v for k, v in layer.items()}
        for name, layer in drawn.items()
    }
    return model.outputs(layers, x, Call(tap))


def free_energy(
    model: Model, likelihood: Likelihood, prior: DiagonalGaussian, batch: Batch, how: Variational
) -> Callable[[DiagonalGaussian, PRNGKeyArray], Scalar]:
    """(q, key) -> E_q[mean nll] + weight KL(q || prior) / n: minus the ELBO, per example."""

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
    """q(phi) ~ p(phi | batch) under the prior, from the prior; without data the prior itself.

    differentiated: whether these are the steps of a learner whose meta-gradient flows through them (default: unless
    first_order), here or elsewhere; see `make_optimizer`.
    """
    steps = how.steps if steps is None else steps
    first_order = how.first_order if first_order is None else first_order
    energy = free_energy(model, likelihood, prior, batch, how)
    keys = jax.random.split(key, steps)
    inner = how.on(batch, not first_order if differentiated is None else differentiated)
    return descend(energy, prior, inner, steps, first_order=first_order, remat=how.remat, data=keys).phi
