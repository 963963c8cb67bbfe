"""Reference posteriors by NUTS (NumPyro) where none is in closed form: hierarchies of logistic and Poisson regressions.

    phi_j ~ N(mu, sigma^2 I),   y_j ~ p(y | X_j phi_j)

Needs the extra `truth` (numpyro). A learner is given the true prior and asked for a new task's posterior, so that what
is judged is its inference alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.inference.assemble import Adapted
from metaprior.inference.gaussian import around
from metaprior.learners.llama import Prior
from metaprior.learners.registry import make_learner
from metaprior.likelihoods import Bernoulli, Likelihood, Poisson
from metaprior.named import lookup
from metaprior.truth import linear_model
from metaprior.types import Batch

FAMILIES: dict[str, Likelihood] = {"bernoulli": Bernoulli(), "poisson": Poisson()}
# Inner budgets at which each method has come to its own answer under a given prior.
INFERENCE: dict[str, dict[str, Any]] = {
    "llama": {"objective": "evidence", "steps": 1000, "rate": 0.1},
    "amortized_bml": {"steps": 1000, "rate": 0.01, "samples": 16, "optimizer": "adam"},
    "gem_bml": {"steps": 1000, "rate": 0.01, "samples": 16},
    "bmaml": {"particles": 20, "steps": 1000, "rate": 0.1, "weight_precision": 1.0},
}


class Agreement(NamedTuple):
    """A posterior against that of NUTS; for NUTS itself 0, 1 and its own coverage.

    bias: rms gap of the means, in NUTS sds. sd_ratio: sds over those of NUTS, geometric mean. coverage: share of the
    true phi inside the central 90 % intervals.
    """

    bias: float
    sd_ratio: float
    coverage: float


def hierarchy_tasks(
    family: str, key: PRNGKeyArray, tasks: int, shot: int, features: int = 2
) -> tuple[Batch, Float[Array, "tasks d"]]:
    """Tasks under the prior N(0, I), and the phi that made them."""
    lookup("family", family, FAMILIES)
    key_phi, key_x, key_y = jax.random.split(key, 3)
    phi = jax.random.normal(key_phi, (tasks, features))
    # Half as wide as usual, so that a Poisson rate rarely explodes.
    x = 0.5 * jax.random.normal(key_x, (tasks, shot, features))
    logits = jnp.einsum("tnd,td->tn", x, phi)
    if family == "bernoulli":
        return Batch(x, jax.random.bernoulli(key_y, jax.nn.sigmoid(logits)).astype(int)), phi
    return Batch(x, jax.random.poisson(key_y, jnp.exp(logits)).astype(float)[..., None]), phi


def nuts(family: str, batches: Batch, key: PRNGKeyArray, draws: int = 2000) -> Float[Array, "draws tasks d"]:
    """Draws of every task's phi under the prior N(0, I), all tasks in one chain. Raises ImportError without numpyro."""
    import numpyro
    from numpyro.distributions import Bernoulli, Normal, Poisson
    from numpyro.infer import MCMC, NUTS

    tasks, _, features = batches.x.shape

    def model() -> None:
        phi = numpyro.sample("phi", Normal(0, 1).expand([tasks, features]).to_event(2))
        logits = jnp.einsum("tnd,td->tn", batches.x, phi)
        y = batches.y.reshape(logits.shape)
        numpyro.sample("y", Bernoulli(logits=logits) if family == "bernoulli" else Poisson(jnp.exp(logits)), obs=y)

    chain = MCMC(NUTS(model), num_warmup=1000, num_samples=draws, progress_bar=False)
    chain.run(key)
    return chain.get_samples()["phi"]


def posterior_draws(
    name: str, family: str, batch: Batch, key: PRNGKeyArray, draws: int = 2000
) -> Float[Array, "draws d"]:
    """Draws of phi from a learner's posterior of one task, under the true prior N(0, I)."""
    lookup("learner", name, INFERENCE)
    features = batch.x.shape[-1]
    learner = make_learner(name, linear_model(features), FAMILIES[family], **INFERENCE[name])
    zero = {"head": jnp.zeros((features, 1))}
    params: PyTree = {"llama": Prior(zero, jnp.zeros(()))}.get(name, around(zero, 0.0))
    key_start, key_adapt, key_draw = jax.random.split(key, 3)
    if name == "bmaml":
        params = {"head": jax.random.normal(key_start, (INFERENCE[name]["particles"], features, 1))}
    posterior = learner.adapt(params, batch, key_adapt)
    if isinstance(posterior, Adapted):
        posterior = posterior.posterior
    return jax.vmap(lambda k: posterior.sample(k)["head"][:, 0])(jax.random.split(key_draw, draws))


def agreement(found: np.ndarray, reference: np.ndarray, truth: np.ndarray) -> Agreement:
    """Draws [draws, tasks, d] against the reference's, and against the true phi [tasks, d]."""
    sd = reference.std(0)
    low, high = np.quantile(found, [0.05, 0.95], axis=0)
    return Agreement(
        bias=float(np.sqrt((((found.mean(0) - reference.mean(0)) / sd) ** 2).mean())),
        sd_ratio=float(np.exp(np.log(found.std(0) / sd).mean())),
        coverage=float(((low <= truth) & (truth <= high)).mean()),
    )


def against_nuts(
    family: str, names: tuple[str, ...] = tuple(INFERENCE), *, tasks: int = 50, shot: int = 10, seed: int = 0
) -> dict[str, Agreement]:
    """Each learner's posteriors of `tasks` new tasks against NUTS, which comes first in the answer."""
    keys = jax.random.split(jax.random.key(seed), 3)
    batches, truth = hierarchy_tasks(family, keys[0], tasks, shot)
    reference, truth = np.asarray(nuts(family, batches, keys[1])), np.asarray(truth)
    found = {"nuts": agreement(reference, reference, truth)}
    for name in names:
        infer = jax.jit(lambda b, k, name=name: posterior_draws(name, family, b, k))
        split = jax.random.split(keys[2], tasks)
        draws = np.asarray(jax.lax.map(lambda a, infer=infer: infer(*a), (batches, split), batch_size=10))
        found[name] = agreement(np.moveaxis(draws, 1, 0), reference, truth)
    return found
