"""The algorithms, a file a family."""

from metaprior.learners.amortized_bml import amortized_bml
from metaprior.learners.anil import anil, nil
from metaprior.learners.bmaml import bmaml
from metaprior.learners.gem_bml import gem_bml, gem_bml_plus, kl_chaser
from metaprior.learners.imaml import imaml
from metaprior.learners.llama import llama
from metaprior.learners.maml import fomaml, maml
from metaprior.learners.mixture import gem_mixture
from metaprior.learners.platipus import maml_noise, platipus
from metaprior.learners.rates import lslr, meta_sgd, preconditioned
from metaprior.learners.registry import LEARNERS, make_learner
from metaprior.learners.reptile import reptile

__all__ = [
    "LEARNERS", "amortized_bml", "anil", "bmaml", "fomaml", "gem_bml", "gem_bml_plus", "gem_mixture", "imaml",
    "kl_chaser", "llama", "lslr", "make_learner", "maml", "maml_noise", "meta_sgd", "nil", "platipus",
    "preconditioned", "reptile",
]  # fmt: skip
