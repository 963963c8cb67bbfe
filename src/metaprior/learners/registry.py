"""Every learner by name. A new algorithm is one file in this folder and one line here."""

from collections.abc import Callable
from typing import Any

from metaprior.inference.normalised import of_support, of_training
from metaprior.learners.amortized_bml import amortized_bml
from metaprior.learners.anil import anil, nil
from metaprior.learners.bmaml import bmaml
from metaprior.learners.cnp import anp, cnp
from metaprior.learners.fine_tune import fine_tune
from metaprior.learners.gem_bml import gem_bml, gem_bml_plus, kl_chaser
from metaprior.learners.gnn import gnn
from metaprior.learners.imaml import imaml
from metaprior.learners.l2l import l2l
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
from metaprior.learners.reptile import reptile
from metaprior.learners.siamese import siamese
from metaprior.learners.snail import snail
from metaprior.learners.zero_shot import zero_shot
from metaprior.likelihoods import Likelihood
from metaprior.named import construct
from metaprior.options import accept
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
    "amortized_bml": amortized_bml,
    "gem_bml": gem_bml,
    "gem_bml_plus": gem_bml_plus,
    "gem_mixture": gem_mixture,
    "kl_chaser": kl_chaser,
    "bmaml": bmaml,
    "platipus": platipus,
    "maml_noise": maml_noise,
    "protonet": protonet,
    "zero_shot": zero_shot,
    "matching": matching,
    "siamese": siamese,
    "nearest_neighbour": nearest_neighbour,
    "fine_tune": fine_tune,
    "cnp": cnp,
    "anp": anp,
    "snail": snail,
    "mann": mann,
    "lstm": lstm,
    "ntm": ntm,
    "gnn": gnn,
    "l2l": l2l,
    "meta_lstm": meta_lstm,
}

# To which an unlabelled example of the support is news (gnn) or nothing (the others); to the rest it is an error.
READ_UNLABELLED = ("gnn", "protonet", "matching", "siamese", "nearest_neighbour")
# That rule out classes without support examples; see `inference.metric.with_unseen`.
RULE_OUT_UNSEEN = ("protonet", "matching", "siamese", "nearest_neighbour")
# To which a class may be its attributes.
READ_ATTRIBUTES = ("zero_shot",)


def make_learner(name: str, model: Model, likelihood: Likelihood, **options: Any) -> Learner:
    """A learner by its registered name; unknown names and options are ValueErrors that suggest the nearest.

    A model whose batch norm goes by the support (norm="task") is told the support in every function. One with
    norm="running" makes a learner to be `settled` after training.
    """

    accept(Model, model, "model")

    def make(network: Model) -> Learner:
        return construct("learner", name, LEARNERS, network, likelihood, **options)

    told = {"task": of_support, "running": of_training}.get(model.statistics)
    return make(model) if told is None else told(make, model)
