"""iMAML (Rajeswaran, Finn, Kakade & Levine 2019): the meta-gradient by the implicit function theorem.

phi* = argmin L_S(phi) + s/2 |phi - theta|^2 (eq. 3). The meta-gradient g solves (I + H/s) g = grad L_Q(phi*) by a few
conjugate-gradient steps (Algorithm 2), so neither its memory nor its value depends on the path to phi*. This is the
paper's operator; its public code solves ((1 + damping) I + H/(s + 10)) g = grad L_Q instead.
"""

from typing import Any

from jaxtyping import PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count, NonNegative, Positive
from metaprior.core.types import Learner, Model, Task
from metaprior.inference.descent import count, half_square, mean_nll
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, implicit, point
from metaprior.inference.proximal import proximal
from metaprior.learners.builders.gradient import adapt_all, fit_metrics, gradient_learner, support_loss
from metaprior.learners.traits import traits


@traits(
    estimates=True,
    small={"strength": 0.1, "steps": 16, "rate": 0.05},
    referees={"truth": {"strength": 0.2, "steps": 100, "rate": 0.05, "posterior": implicit()}},
)
@passes_options_to(InnerLoop, without=("first_order", "remat"), steps=16, rate=0.1, optimizer="line_search")
def imaml(
    model: Model,
    likelihood: Likelihood,
    *,
    strength: Positive = 2.0,
    cg_steps: Count = 5,
    damping: NonNegative = 0.0,
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns the centre theta of a proximal prior, by implicit differentiation.

    Its params have the same form as the model's.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        strength: The prior's precision s, in units of the mean support nll. It must exceed the most negative curvature.
        cg_steps: Conjugate-gradient steps of the implicit solve.
        damping: Added to the diagonal of the implicit solve.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the descent on the proximal objective, see `InnerLoop`. Meta-training raises the objective's
            curvature, so that descent at a fixed rate ("sgd") diverges in the end; "line_search" does not.

    References:
        Rajeswaran, Finn, Kakade & Levine (2019), eq. 3 and Algorithm 2.
    """
    loop = InnerLoop(**inner)
    optimizer = loop.transformation(differentiated=False)
    free = adapt_all(model, optimizer)
    adaptation = free._replace(penalty=lambda theta, phi, support: strength * half_square(phi, theta))

    def loss(theta: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        fit = support_loss(free, likelihood, theta, task.support)
        phi = proximal(
            fit, theta, strength=strength, steps=loop.steps, optimizer=optimizer, cg_steps=cg_steps, damping=damping
        )
        outputs = adaptation.outputs(theta, phi, task.query.x)
        return mean_nll(likelihood, outputs, task.query), fit_metrics(likelihood, outputs, task.query)

    return gradient_learner(
        adaptation,
        likelihood,
        loss,
        loop,
        posterior=posterior,
        implied_precision=lambda theta, support: strength * count(support),
    )
