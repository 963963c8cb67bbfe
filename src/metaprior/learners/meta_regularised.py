"""Meta-regularisation (Yin, Tucker, Zhou, Levine & Finn 2020): limits what a learner knows without its support.

If an input shows which training task it comes from, a network can learn all of these tasks without their supports. So
an encoder with random weights w ~ q(w) = N(mu, sigma^2), or with random activations z ~ N(mu(x), sigma(x)^2), stands
before the network that is adapted, and costs beta KL(q || N(0, I)). In a task: draw w (or the noise of z), z = enc(x)
for support and query, adapt on the support's z, and add beta KL to the query's loss. `mr_maml` adapts by the inner loop
of MAML, and `mr_cnp` by a conditional neural process.
"""

from functools import partial
from typing import Any

from jaxtyping import Array, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import NonNegative, Whole
from metaprior.core.types import Batch, Call, Learner, Model, Task
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.learners.builders.bottleneck import Bottleneck, Code, Coded, LogSd, On, behind, regularised
from metaprior.learners.builders.gradient import Adaptation, query_learner
from metaprior.learners.cnp import Process, cnp
from metaprior.learners.traits import traits

BETA = {"weights": 5e-5, "activations": 5.0}  # of the paper's sinusoids, for the mean of the squared errors
BETA_CNP = {"weights": 0.015, "activations": 0.5}  # a tenth of the code's, which sums the nll of ten queries


@traits(small={"rate": 0.1, "log_sd": -6.0, "draws": 2})
@passes_options_to(InnerLoop)
def mr_maml(
    model: Model,
    likelihood: Likelihood,
    *,
    on: On = "weights",
    beta: NonNegative | None = None,
    bottleneck: Model | None = None,
    code: Code = None,
    log_sd: LogSd = -3.0,
    draws: Whole = 16,
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns an initialisation behind a random encoder that is not adapted and whose information costs a KL.

    The loss is the query's mean nll + beta KL. On weights, KL is the sum over all weights of KL(q(w) || N(0, I)). On
    activations it is the mean over the code's numbers and the queries of KL(q(z | x) || N(0, I)).

    Args:
        model: The network, which reads codes in place of inputs; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        on: What is random and regularised: the encoder's "weights", or its "activations", the codes.
        beta: Weight of the KL. None: 5e-5 on weights and 5 on activations, as in the paper's code for sinusoids.
        bottleneck: The encoder, with one output for each number of the code, or two (mean and deviation) on
            activations. None: one hidden layer of 100 units, or three convolutions for images.
        code: Shape of a code. None: what the encoder returns, or without one (5,), and (16, 16, 1) for images.
        log_sd: Logarithm of the random weights' standard deviation before training.
        draws: Number of encoders that a prediction averages, each with its own inner steps. 0: the mean weights, or
            the mean codes.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`.

    Raises:
        ValueError: The encoder's outputs do not fit the code, or the inputs have no default encoder.

    References:
        Yin et al. (2020), MR-MAML (W) and (A).
    """
    loop, coder = InnerLoop(**inner), Bottleneck(on, bottleneck, code, log_sd)
    whole, optimizer = behind(model, coder), loop.transformation()
    weight = BETA[on] if beta is None else beta

    def network(params: Coded, phi: PyTree, x: PyTree, call: Call) -> Array:
        return whole.outputs(params._replace(theta=phi), x, call)

    def penalty(params: Coded, task: Task) -> tuple[Scalar, Scalar]:
        divergence = coder.divergence(params.bottleneck, task.query)
        if on == "activations":
            divergence /= coder.size(params.bottleneck, task.query.x)
        return weight * divergence, divergence

    adaptation = Adaptation(
        whole, lambda key, task: whole.init(key, task.support.x), lambda p: p.theta, network, lambda params: optimizer
    )
    return regularised(
        query_learner(adaptation, likelihood, loop, posterior),
        lambda params, key: coder.draw(params.bottleneck, key),
        lambda params, drawn: params._replace(bottleneck=drawn),
        penalty,
        draws,
    )


@traits(reads_names=True, small={"width": 32, "encoder": (32,), "decoder": (32,), "log_sd": -6.0, "draws": 2})
@passes_options_to(cnp)
def mr_cnp(
    model: Model,
    likelihood: Likelihood,
    *,
    on: On = "weights",
    beta: NonNegative | None = None,
    bottleneck: Model | None = None,
    code: Code = None,
    log_sd: LogSd = -3.0,
    draws: Whole = 16,
    **options: Any,
) -> Learner:
    """Meta-learns a conditional neural process of inputs that pass a random encoder, whose information costs a KL.

    The loss is the query's mean nll + beta KL. On weights, KL is the sum over all weights of KL(q(w) || N(0, I)). On
    activations it is KL(q(z | x) || N(0, I)), summed over the code's numbers, as a mean over the support. The paper's
    code adds its beta KL to the nll *summed* over n queries, so its beta is n times ours.

    Args:
        model: As in `cnp`; it reads codes in place of inputs.
        likelihood: Likelihood of the query.
        on: As in `mr_maml`.
        beta: Weight of the KL. None: 0.015 on weights and 0.5 on activations, as in the paper's code for ten queries.
        bottleneck: As in `mr_maml`.
        code: As in `mr_maml`.
        log_sd: As in `mr_maml`.
        draws: Number of encoders that a prediction averages, or 0 as in `mr_maml`.
        options: Options of `cnp`.

    Raises:
        ValueError: As in `mr_maml` and `cnp`.

    References:
        Yin et al. (2020), MR-CNP (W) and (A).
    """
    coder = Bottleneck(on, bottleneck, code, log_sd)
    whole = behind(model, coder)
    weight = BETA_CNP[on] if beta is None else beta

    def network(params: Process, support: Batch, key: PRNGKeyArray) -> Any:
        return partial(whole.outputs, params.embedding)

    def penalty(params: Process, task: Task) -> tuple[Scalar, Scalar]:
        divergence = coder.divergence(params.embedding.bottleneck, task.support)
        return weight * divergence, divergence

    def put(params: Process, drawn: PyTree) -> Process:
        return params._replace(embedding=params.embedding._replace(bottleneck=drawn))

    return regularised(
        cnp(whole, likelihood, **options)._replace(network=network),
        lambda params, key: coder.draw(params.embedding.bottleneck, key),
        put,
        penalty,
        draws,
    )
