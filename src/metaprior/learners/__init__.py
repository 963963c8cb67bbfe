"""The algorithms, a file a family."""

from metaprior.learners.amortized_bml import amortized_bml
from metaprior.learners.anil import anil, nil
from metaprior.learners.bmaml import bmaml
from metaprior.learners.cnp import anp, cnp
from metaprior.learners.fine_tune import fine_tune
from metaprior.learners.gem_bml import gem_bml, gem_bml_plus, kl_chaser
from metaprior.learners.gnn import gnn
from metaprior.learners.imaml import imaml
from metaprior.learners.l2l import l2l, learned_optimizer
from metaprior.learners.llama import llama
from metaprior.learners.maml import fomaml, maml
from metaprior.learners.mann import lstm, mann, ntm
from metaprior.learners.matching import matching
from metaprior.learners.meta_lstm import meta_lstm
from metaprior.learners.mixture import gem_mixture
from metaprior.learners.nearest_neighbour import nearest_neighbour
from metaprior.learners.platipus import maml_noise, platipus
from metaprior.learners.protonet import protonet
from metaprior.learners.rates import lslr, meta_sgd, preconditioned
from metaprior.learners.registry import LEARNERS, make_learner
from metaprior.learners.reptile import reptile
from metaprior.learners.siamese import siamese
from metaprior.learners.snail import snail
from metaprior.learners.zero_shot import zero_shot

__all__ = [
    "LEARNERS", "amortized_bml", "anil", "anp", "bmaml", "cnp", "fine_tune", "fomaml", "gem_bml", "gem_bml_plus",
    "gem_mixture", "gnn", "imaml", "kl_chaser", "l2l", "learned_optimizer", "llama", "lslr", "lstm", "make_learner",
    "maml", "maml_noise", "mann", "matching", "meta_lstm", "meta_sgd", "nearest_neighbour", "nil", "ntm",
    "platipus", "preconditioned", "protonet", "reptile", "siamese", "snail", "zero_shot",
]  # fmt: skip
