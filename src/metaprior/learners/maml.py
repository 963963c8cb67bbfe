"""MAML and first-order MAML (Finn, Abbeel & Levine 2017): an initialisation from which a few gradient steps suffice.

Algorithm 2 of the paper, line by line: for each task, phi = theta - a grad L_S(theta), k times (lines 5-7, `descend`).
The meta-loss is the query loss at phi (line 10, `query_loss`). Its gradient flows through the inner steps; first-order
MAML (sec. 5.2) stops it at each inner gradient.
"""

from typing import Any

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.types import Learner, Model
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, implicit, point
from metaprior.learners.builders.gradient import adapt_all, query_learner
from metaprior.learners.traits import five_steps, traits


@traits(on_table=five_steps, referees={"truth": {"steps": 5, "rate": 0.05, "posterior": implicit()}})
@passes_options_to(InnerLoop)
def maml(model: Model, likelihood: Likelihood, *, posterior: PosteriorRule = point(), **inner: Any) -> Learner:
    """Meta-learns an initialisation theta from which a few gradient steps suffice.

    Its params have the same form as the model's.

    Args:
        model: The network; all of its parameters are adapted.
        likelihood: Likelihood of the support and the query.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`.

    References:
        Finn, Abbeel & Levine (2017), Algorithm 2.
    """
    loop = InnerLoop(**inner)
    return query_learner(adapt_all(model, loop.transformation()), likelihood, loop, posterior)


@traits(estimates=True)
@passes_options_to(maml, without=("first_order",))
def fomaml(model: Model, likelihood: Likelihood, **options: Any) -> Learner:
    """First-order MAML: `maml` with the gradient stopped at each inner gradient.

    Args:
        model: As in `maml`.
        likelihood: As in `maml`.
        options: As in `maml`, without `first_order`.

    References:
        Finn, Abbeel & Levine (2017), sec. 5.2.
    """
    return maml(model, likelihood, first_order=True, **options)
