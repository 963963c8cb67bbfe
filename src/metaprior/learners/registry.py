"""Every learner by name. A new algorithm is one file in this folder and one line here."""

from collections.abc import Callable
from typing import Any

from metaprior.learners.anil import anil, nil
from metaprior.learners.imaml import imaml
from metaprior.learners.l2l import l2l
from metaprior.learners.llama import llama
from metaprior.learners.maml import fomaml, maml
from metaprior.learners.meta_lstm import meta_lstm
from metaprior.learners.rates import lslr, meta_sgd, preconditioned
from metaprior.learners.reptile import reptile
from metaprior.likelihoods import Likelihood
from metaprior.named import construct
from metaprior.types import Learner, Model

LEARNERS: dict[str, Callable[..., Learner]] = {
    "maml": maml,
    "fomaml": fomaml,
    "anil": anil,
    "nil": nil,
    "meta_sgd": meta_sgd,
    "lslr": lslr,
    "preconditioned": preconditioned,
    "reptile": reptile,
    "imaml": imaml,
    "llama": llama,
    "l2l": l2l,
    "meta_lstm": meta_lstm,
}


def make_learner(name: str, model: Model, likelihood: Likelihood, **options: Any) -> Learner:
    """A learner by its registered name; unknown names and options are ValueErrors that suggest the nearest."""
    return construct("learner", name, LEARNERS, model, likelihood, **options)
