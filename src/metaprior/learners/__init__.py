"""The algorithms, a file a family."""

from metaprior.learners.anil import anil, nil
from metaprior.learners.cnp import anp, cnp
from metaprior.learners.gnn import gnn
from metaprior.learners.imaml import imaml
from metaprior.learners.llama import llama
from metaprior.learners.maml import fomaml, maml
from metaprior.learners.mann import lstm, mann
from metaprior.learners.rates import lslr, meta_sgd, preconditioned
from metaprior.learners.registry import LEARNERS, make_learner
from metaprior.learners.reptile import reptile
from metaprior.learners.snail import snail

__all__ = [
    "LEARNERS", "anil", "anp", "cnp", "fomaml", "gnn", "imaml", "llama", "lslr", "lstm", "make_learner", "maml", "mann",
    "meta_sgd", "nil", "preconditioned", "reptile", "snail",
]  # fmt: skip
