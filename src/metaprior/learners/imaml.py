"""iMAML (Rajeswaran, Finn, Kakade & Levine 2019): the meta-gradient by the implicit function theorem.

phi* = argmin L_S(phi) + s/2 |phi - theta|^2 (eq. 3); the meta-gradient solves (I + H/s) g = grad L_Q(phi*) by a few
conjugate-gradient steps (Algorithm 2), so that neither its memory nor its value depends on the path to phi*.
The paper's operator: its public code solves ((1 + damping) I + H/(s + 10)) g = grad L_Q instead.
"""

import optax
from jaxtyping import PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.options import Count, InnerOptimizer, NonNegative, Positive, Whole, checked
from metaprior.core.types import Learner, Model, Task
from metaprior.inference.descent import count, half_square, make_optimizer, mean_nll
from metaprior.inference.posteriors import PosteriorRule, implicit, point
from metaprior.inference.proximal import proximal
from metaprior.learners.builders.gradient import adapt_all, fit_metrics, gradient_learner, support_loss
from metaprior.learners.traits import traits


@traits(
    estimates=True,
    small={"strength": 0.1, "steps": 16, "rate": 0.05},
    referees={"truth": {"strength": 0.2, "steps": 100, "rate": 0.05, "posterior": implicit()}},
)
@checked
def imaml(
    model: Model,
    likelihood: Likelihood,
    *,
    strength: Positive = 2.0,
    steps: Whole = 16,
    rate: NonNegative = 0.1,
    optimizer: InnerOptimizer | optax.GradientTransformation = "line_search",
    cg_steps: Count = 5,
    damping: NonNegative = 0.0,
    test_steps: Whole | None = None,
    transductive: bool = True,
    posterior: PosteriorRule = point(),
) -> Learner:
    """Meta-learn the centre theta of a proximal prior; params are the model's own.

    strength: s, the prior's precision in units of the mean support nll (must exceed the most negative curvature).
    steps, rate, optimizer: of the descent on the proximal objective. Meta-training raises its curvature, and at a fixed
    rate ("sgd") the descent diverges some day. cg_steps: of the implicit solve, with optional damping.
    """
    inner = make_optimizer(optimizer, rate, differentiated=False) if isinstance(optimizer, str) else optimizer
    free = adapt_all(model, inner)
    adaptation = free._replace(penalty=lambda theta, phi, support: strength * half_square(phi, theta))

    def loss(theta: PyTree, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        fit = support_loss(free, likelihood, theta, task.support)
        phi = proximal(fit, theta, strength=strength, steps=steps, optimizer=inner, cg_steps=cg_steps, damping=damping)
        outputs = adaptation.outputs(theta, phi, task.query.x)
        return mean_nll(likelihood, outputs, task.query), fit_metrics(likelihood, outputs, task.query)

    return gradient_learner(
        adaptation,
        likelihood,
        loss,
        steps=steps if test_steps is None else test_steps,
        posterior=posterior,
        transductive=transductive,
        implied_precision=lambda theta, support: strength * count(support),
    )
