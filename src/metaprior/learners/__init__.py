"""The algorithms, a file a family."""

from metaprior.learners.anil import anil, nil
from metaprior.learners.imaml import imaml
from metaprior.learners.l2l import l2l, learned_optimizer
from metaprior.learners.llama import llama
from metaprior.learners.maml import fomaml, maml
from metaprior.learners.meta_lstm import meta_lstm
from metaprior.learners.rates import lslr, meta_sgd, preconditioned
from metaprior.learners.registry import LEARNERS, make_learner
from metaprior.learners.reptile import reptile

__all__ = [
    "LEARNERS", "anil", "fomaml", "imaml", "l2l", "learned_optimizer", "llama", "lslr", "make_learner", "maml",
    "meta_lstm", "meta_sgd", "nil", "preconditioned", "reptile",
]  # fmt: skip
