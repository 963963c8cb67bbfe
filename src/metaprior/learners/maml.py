"""MAML and first-order MAML (Finn, Abbeel & Levine 2017): an initialisation from which a few gradient steps suffice.

Algorithm 2 of the paper, line by line: for each task, phi = theta - a grad L_S(theta), k times (lines 5-7, `descend`);
the meta-loss is the query loss at phi (line 10, `query_loss`); its gradient flows through the inner steps.
First-order MAML (sec. 5.2) stops it at each inner gradient.
"""

from functools import partial
from typing import Any

import optax

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import InnerOptimizer, NonNegative, Whole, checked
from metaprior.core.types import Learner, Model
from metaprior.inference.descent import make_optimizer
from metaprior.inference.posteriors import PosteriorRule, implicit, point
from metaprior.learners.builders.gradient import adapt_all, query_learner
from metaprior.learners.traits import five_steps, traits


@traits(on_table=five_steps, referees={"truth": {"steps": 5, "rate": 0.05, "posterior": implicit()}})
@checked
def maml(
    model: Model,
    likelihood: Likelihood,
    *,
    steps: Whole = 1,
    rate: NonNegative = 0.01,
    optimizer: InnerOptimizer | optax.GradientTransformation = "sgd",
    test_steps: Whole | None = None,
    first_order: bool = False,
    remat: bool = False,
    transductive: bool = True,
    posterior: PosteriorRule = point(),
) -> Learner:
    """Meta-learn an initialisation theta; params are the model's own.

    steps, rate: inner steps k in training and their rate a on the *mean* support nll. test_steps: k when adapting to a
    new task (default: steps). optimizer: the inner optimiser, an optax name or transformation. remat: backward memory
    grows with log(k). posterior: what is put around phi_k.
    """
    build = partial(make_optimizer, differentiated=not first_order)
    inner = build(optimizer, rate) if isinstance(optimizer, str) else optimizer
    return query_learner(
        adapt_all(model, inner),
        likelihood,
        steps=steps,
        test_steps=test_steps,
        first_order=first_order,
        remat=remat,
        transductive=transductive,
        posterior=posterior,
    )


@traits(estimates=True)
@passes_options_to(maml)
def fomaml(model: Model, likelihood: Likelihood, **options: Any) -> Learner:
    """First-order MAML: `maml` with the gradient stopped at each inner gradient; same options."""
    options["first_order"] = True
    return maml(model, likelihood, **options)
