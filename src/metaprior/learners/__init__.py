"""The algorithms, a file a family."""

from metaprior.learners.anil import anil, nil
from metaprior.learners.fine_tune import fine_tune
from metaprior.learners.imaml import imaml
from metaprior.learners.llama import llama
from metaprior.learners.maml import fomaml, maml
from metaprior.learners.matching import matching
from metaprior.learners.nearest_neighbour import nearest_neighbour
from metaprior.learners.protonet import protonet
from metaprior.learners.rates import lslr, meta_sgd, preconditioned
from metaprior.learners.registry import LEARNERS, make_learner
from metaprior.learners.reptile import reptile

__all__ = [
    "LEARNERS", "anil", "fine_tune", "fomaml", "imaml", "llama", "lslr", "make_learner", "maml", "matching", "meta_sgd",
    "nearest_neighbour", "nil", "preconditioned", "protonet", "reptile",
]  # fmt: skip
