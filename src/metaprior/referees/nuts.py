"""Reference posteriors by NUTS (NumPyro), for hierarchies of logistic and Poisson regressions without closed forms.

    mu ~ N(0, 5^2),  sigma ~ |N(0, 2^2)|   for each of d coefficients: weak hyper-priors
    phi_j ~ N(mu, diag(sigma^2)),   y_j ~ p(y | X_j phi_j)

Needs the extra `truth` (numpyro). `against_nuts` gives each learner the true prior and compares its posteriors of new
tasks, so it judges inference alone. `learned_against_nuts` has each learner learn the prior from the tasks that NUTS
sees for the whole hierarchy, and compares the prior and the posteriors of new tasks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.extras import extra
from metaprior.core.likelihoods import Bernoulli, Gaussian, Likelihood, Poisson
from metaprior.core.named import lookup
from metaprior.core.types import Batch, Learner, Splits, Task
from metaprior.inference.particles import systematic
from metaprior.learners.builders.gradient import Adapted
from metaprior.learners.registry import learners_before, make_learner, traits_of
from metaprior.referees.truth import linear_model
from metaprior.tasks.checks import check_count
from metaprior.tasks.fixed import FixedTasks
from metaprior.training.loop import Training, fit

with extra("truth", "NUTS"):
    import numpyro
    import numpyro.distributions as given
    from numpyro.infer import MCMC, NUTS

NOISE = 0.5  # standard deviation of Gaussian observations
FAMILIES: dict[str, Likelihood] = {"gaussian": Gaussian(NOISE), "bernoulli": Bernoulli(), "poisson": Poisson()}


class Agreement(NamedTuple):
    """A comparison of posteriors with those of NUTS. For NUTS itself, `bias` is 0 and `sd_ratio` is 1.

    Attributes:
        bias: Root mean square difference of the posterior means, in standard deviations of NUTS.
        sd_ratio: Standard deviations divided by those of NUTS, geometric mean.
        coverage: Share of the true phi inside the central 90 % intervals.
    """

    bias: float
    sd_ratio: float
    coverage: float


class Learned(NamedTuple):
    """A comparison of a learned prior N(mean, sd^2) with the posterior of the prior by NUTS.

    Attributes:
        bias: Root mean square difference of the prior means, in NUTS' posterior means of the prior's standard
            deviations.
        sd_ratio: The learned standard deviations divided by NUTS' posterior means of them, geometric mean; NaN if the
            learned prior is a point.
        coverage: Share of the learned means (and standard deviations, if any) inside the central 90 % intervals of
            NUTS.
    """

    bias: float
    sd_ratio: float
    coverage: float


class Draws(NamedTuple):
    """Draws of a whole hierarchy, along the leading axis of each field.

    Attributes:
        mean: The prior's means.
        sd: The prior's standard deviations.
        phi: The coefficients of each task.
    """

    mean: Float[Array, "draws d"]
    sd: Float[Array, "draws d"]
    phi: Float[Array, "draws tasks d"]


def hierarchy_tasks(
    family: str, key: PRNGKeyArray, tasks: int, shot: int, features: int = 2, mean: Any = 0.0, sd: Any = 1.0
) -> tuple[Batch, Float[Array, "tasks d"]]:
    """Draws tasks from the prior N(mean, sd^2).

    Args:
        family: "gaussian", "bernoulli" or "poisson".
        key: The random key.
        tasks: The number of tasks.
        shot: The number of observations of each task.
        features: The number of coefficients, d.
        mean: The prior's mean, a number or [d].
        sd: The prior's standard deviation, a number or [d].

    Returns:
        The observations, with a leading axis of tasks, and the true phi.
    """
    lookup("family", family, FAMILIES)
    check_count("tasks", tasks)
    check_count("shot", shot)
    key_phi, key_x, key_y = jax.random.split(key, 3)
    phi = jnp.asarray(mean) + jnp.asarray(sd) * jax.random.normal(key_phi, (tasks, features))
    # Inputs have standard deviation 0.5, so that Poisson rates are rarely huge.
    x = 0.5 * jax.random.normal(key_x, (tasks, shot, features))
    outputs = jnp.einsum("tnd,td->tn", x, phi)
    if family == "bernoulli":
        return Batch(x, jax.random.bernoulli(key_y, jax.nn.sigmoid(outputs)).astype(int)), phi
    if family == "poisson":
        return Batch(x, jax.random.poisson(key_y, jnp.exp(outputs)).astype(float)[..., None]), phi
    return Batch(x, (outputs + NOISE * jax.random.normal(key_y, outputs.shape))[..., None]), phi


def nuts(family: str, batches: Batch, key: PRNGKeyArray, draws: int = 2000) -> Float[Array, "draws tasks d"]:
    """Draws every task's phi from its posterior under the prior N(0, I), in one chain for all tasks.

    Args:
        family: "gaussian", "bernoulli" or "poisson".
        batches: The observations, with a leading axis of tasks.
        key: The random key.
        draws: The number of draws after a warm-up of 1000 steps.
    """
    tasks, _, features = batches.x.shape

    def model() -> None:
        phi = numpyro.sample("phi", given.Normal(0, 1).expand([tasks, features]).to_event(2))
        _observe(family, batches, phi)

    return _chain(model, key, draws)["phi"]


def nuts_hierarchy(family: str, batches: Batch, key: PRNGKeyArray, draws: int = 2000) -> Draws:
    """Draws the prior's mean and standard deviation and every task's phi from their posterior, non-centred.

    Args:
        family: "gaussian", "bernoulli" or "poisson".
        batches: The observations, with a leading axis of tasks.
        key: The random key.
        draws: The number of draws after a warm-up of 1000 steps.
    """
    lookup("family", family, FAMILIES)
    tasks, _, features = batches.x.shape

    def model() -> None:
        mean = numpyro.sample("mean", given.Normal(0, 5).expand([features]).to_event(1))
        sd = numpyro.sample("sd", given.HalfNormal(2).expand([features]).to_event(1))
        z = numpyro.sample("z", given.Normal(0, 1).expand([tasks, features]).to_event(2))
        _observe(family, batches, numpyro.deterministic("phi", mean + sd * z))

    found = _chain(model, key, draws)
    return Draws(found["mean"], found["sd"], found["phi"])


def _observe(family: str, batches: Batch, phi: Any) -> None:
    outputs = jnp.einsum("tnd,td->tn", batches.x, phi)
    likelihoods = {
        "gaussian": lambda: given.Normal(outputs, NOISE),
        "bernoulli": lambda: given.Bernoulli(logits=outputs),
        "poisson": lambda: given.Poisson(jnp.exp(outputs)),
    }
    numpyro.sample("y", likelihoods[family](), obs=batches.y.reshape(outputs.shape))


def _chain(model: Callable[[], None], key: PRNGKeyArray, draws: int) -> dict[str, Array]:
    chain = MCMC(NUTS(model), num_warmup=1000, num_samples=draws, progress_bar=False)
    chain.run(key)
    return chain.get_samples()


def new_task(
    family: str, hierarchy: Draws, support: Batch, key: PRNGKeyArray, draws: int = 2000, each: int = 50
) -> Float[Array, "draws d"]:
    """Draws a new task's phi given its support and the data of the hierarchy, without a second chain.

    For each draw of (mean, sd), `each` values of phi are drawn from the prior. All of them are weighted by the
    support's likelihood and resampled. This is consistent, since the weights contain the support's evidence on the
    prior too.

    Args:
        family: "gaussian", "bernoulli" or "poisson".
        hierarchy: Draws of the hierarchy.
        support: The task's observations.
        key: The random key.
        draws: The number of draws.
        each: The number of values of phi per draw of the prior.
    """
    key_phi, key_pick = jax.random.split(key)
    noise = jax.random.normal(key_phi, (each, *hierarchy.mean.shape))
    phi = (hierarchy.mean + hierarchy.sd * noise).reshape(-1, hierarchy.mean.shape[1])

    def log_likelihood(value: Float[Array, " d"]) -> Scalar:
        return -FAMILIES[family].nll(support.x @ value[:, None], support.y).sum()

    weights = jax.nn.softmax(jax.vmap(log_likelihood)(phi))
    return phi[systematic(key_pick, weights, draws)]


def given_prior(name: str, family: str, features: int, key: PRNGKeyArray) -> tuple[Learner, PyTree]:
    """Returns a learner and parameters with which its prior is N(0, I).

    Args:
        name: The learner's name.
        family: "gaussian", "bernoulli" or "poisson".
        features: The number of coefficients.
        key: The random key of parameters that do not belong to the prior.
    """
    options = lookup("learner", name, learners_before("nuts"))
    learner = make_learner(name, linear_model(features), FAMILIES[family], **options)
    standard = traits_of(name).standard
    assert standard is not None, f"{name}: its traits need `standard` beside the referee 'nuts'"
    return learner, standard({"head": jnp.zeros((features, 1))}, options, key)


def posterior_draws(
    learner: Learner, params: PyTree, batch: Batch, key: PRNGKeyArray, draws: int = 2000
) -> Float[Array, "draws d"]:
    """Draws phi from a learner's posterior of one task, which is its prior if the task has no observations.

    Args:
        learner: A learner whose posterior has `sample`.
        params: Its meta-learned parameters.
        batch: The task's observations.
        key: The random key.
        draws: The number of draws.
    """
    key_adapt, key_draw = jax.random.split(key)
    posterior = learner.adapt(params, batch, key_adapt)
    if isinstance(posterior, Adapted):
        posterior = posterior.posterior
    return jax.vmap(lambda k: posterior.sample(k)["head"][:, 0])(jax.random.split(key_draw, draws))


def agreement(found: np.ndarray, reference: np.ndarray, truth: np.ndarray) -> Agreement:
    """Compares posterior draws with those of a reference and with the true phi.

    Args:
        found: The draws to judge [draws, tasks, d].
        reference: Draws of the reference [draws, tasks, d].
        truth: The true phi [tasks, d].
    """
    sd = reference.std(0)
    low, high = np.quantile(found, [0.05, 0.95], axis=0)
    return Agreement(
        bias=float(np.sqrt((((found.mean(0) - reference.mean(0)) / sd) ** 2).mean())),
        sd_ratio=float(np.exp(np.log(np.maximum(found.std(0), 1e-12) / sd).mean())),
        coverage=float(((low <= truth) & (truth <= high)).mean()),
    )


def prior_agreement(mean: np.ndarray, sd: np.ndarray | None, hierarchy: Draws) -> Learned:
    """Compares a learned prior with the draws of NUTS.

    Args:
        mean: The prior's means [d].
        sd: The prior's standard deviations [d], or None if it is a point.
        hierarchy: The draws of NUTS.
    """
    reference = np.asarray(hierarchy.sd).mean(0)
    numbers = [(mean, hierarchy.mean)] + ([] if sd is None else [(sd, hierarchy.sd)])
    inside = []
    for value, draws in numbers:
        low, high = np.quantile(np.asarray(draws), [0.05, 0.95], axis=0)
        inside.append((low <= value) & (value <= high))
    return Learned(
        bias=float(np.sqrt((((mean - np.asarray(hierarchy.mean).mean(0)) / reference) ** 2).mean())),
        sd_ratio=float("nan") if sd is None else float(np.exp(np.log(sd / reference).mean())),
        coverage=float(np.mean(inside)),
    )


def posteriors(learner: Learner, params: PyTree, batches: Batch, key: PRNGKeyArray) -> np.ndarray:
    """Draws phi from a learner's posteriors of many tasks.

    Args:
        learner: A learner whose posterior has `sample`.
        params: Its meta-learned parameters.
        batches: The observations, with a leading axis of tasks.
        key: The random key.

    Returns:
        The draws [draws, tasks, d].
    """
    keys = jax.random.split(key, batches.x.shape[0])

    @jax.jit
    def all_tasks(params: PyTree, batches: Batch, keys: PRNGKeyArray) -> Array:
        return jax.lax.map(lambda a: posterior_draws(learner, params, *a), (batches, keys), batch_size=10)

    return np.moveaxis(np.asarray(all_tasks(params, batches, keys)), 1, 0)


def against_nuts(
    family: str, names: tuple[str, ...] | None = None, *, tasks: int = 50, shot: int = 10, seed: int = 0
) -> dict[str, Agreement]:
    """Compares learners' posteriors of new tasks, under the true prior, with those of NUTS.

    Args:
        family: "gaussian", "bernoulli" or "poisson".
        names: The learners. The default is every learner with options for the referee "nuts" (`Traits.referees`).
        tasks: The number of tasks.
        shot: The number of observations of each task.
        seed: The seed of everything random.

    Returns:
        The results by name. The first is "nuts", for NUTS itself.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    batches, truth = hierarchy_tasks(family, keys[0], tasks, shot)
    reference, truth = np.asarray(nuts(family, batches, keys[1])), np.asarray(truth)
    found = {"nuts": agreement(reference, reference, truth)}
    for name in tuple(learners_before("nuts")) if names is None else names:
        learner, params = given_prior(name, family, truth.shape[1], keys[3])
        found[name] = agreement(posteriors(learner, params, batches, keys[2]), reference, truth)
    return found


def learned_against_nuts(
    family: str,
    names: tuple[str, ...] | None = None,
    *,
    steps: int = 2000,
    seen: int = 400,
    tasks: int = 50,
    shot: int = 10,
    seed: int = 0,
    mean: Any = (0.5, -0.5),
    sd: Any = 0.8,
) -> dict[str, tuple[Learned, Agreement]]:
    """Compares learned priors, and posteriors of new tasks under them, with NUTS on the whole hierarchy.

    The learners and NUTS see the same tasks, drawn from the prior N(mean, sd^2).

    Args:
        family: "gaussian", "bernoulli" or "poisson".
        names: The learners. The default is every learner with options for the referee "nuts prior" (`Traits.referees`).
        steps: The meta-steps of each learner's training.
        seen: The number of tasks to learn from.
        tasks: The number of new tasks.
        shot: The number of observations of each task, at least 2.
        seed: The seed of everything random.
        mean: The true prior's mean, a number or one per coefficient.
        sd: The true prior's standard deviation, a number or one per coefficient.

    Returns:
        The results by name. The first is "truth": the true prior with the posteriors of NUTS. Its `bias` is not 0,
        since the tasks are a sample; a perfect learner would have a similar one.

    Raises:
        ValueError: A learner has no options for this referee, or `shot` is below 2.
    """
    judged = learners_before("nuts prior")
    names = tuple(judged) if names is None else names
    for name in names:
        lookup("learner", name, judged)
    check_count("seen", seen)
    if shot < 2:
        raise ValueError(f"shot must be at least 2, so that a task has a support and a query, got {shot}.")
    keys = jax.random.split(jax.random.key(seed), 5)
    prior_mean, prior_sd = np.broadcast_to(mean, 2).astype(float), np.broadcast_to(sd, 2).astype(float)
    batches, _ = hierarchy_tasks(family, keys[0], seen, shot, mean=prior_mean, sd=prior_sd)
    hierarchy = nuts_hierarchy(family, batches, keys[1])
    new, truth = hierarchy_tasks(family, keys[2], tasks, shot, mean=prior_mean, sd=prior_sd)
    infer = jax.jit(lambda b, k: jax.lax.map(lambda a: new_task(family, hierarchy, *a), (b, k)))
    reference = np.moveaxis(np.asarray(infer(new, jax.random.split(keys[3], tasks))), 1, 0)
    truth = np.asarray(truth)
    found = {"truth": (prior_agreement(prior_mean, prior_sd, hierarchy), agreement(reference, reference, truth))}
    half = shot // 2
    support, query = (Batch(batches.x[:, part], batches.y[:, part]) for part in (slice(half), slice(half, None)))
    source = FixedTasks(Task(support, query))
    nothing = Batch(new.x[0][:0], new.y[0][:0])
    for name in names:
        learner = make_learner(name, linear_model(2), FAMILIES[family], **judged[name])
        training = Training(
            steps=steps, meta_batch=min(25, seen), rate=1e-2, schedule="cosine", chunk=min(500, steps), seed=seed,
            validate_every=steps, validation_tasks=1,
        )  # fmt: skip
        params = fit(learner, Splits(source, source, source), training, name=name).params
        prior = np.asarray(posterior_draws(learner, params, nothing, keys[4], 20_000))
        spread = prior.std(0) if prior.std(0).min() > 1e-6 else None
        learned = prior_agreement(prior.mean(0), spread, hierarchy)
        found[name] = learned, agreement(posteriors(learner, params, new, keys[4]), reference, truth)
    return found
