"""The registry of learners by name. A new algorithm is one file in this folder and one line here."""

from collections.abc import Callable, Mapping
from typing import Any

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import Registry, construct, lookup
from metaprior.core.options import accept
from metaprior.core.types import Learner, Model
from metaprior.learners.amortized_bml import amortized_bml
from metaprior.learners.anil import anil, nil
from metaprior.learners.arml import arml
from metaprior.learners.bmaml import bmaml
from metaprior.learners.builders.normalised import of_support, of_training, shown_alone
from metaprior.learners.cavia import cavia
from metaprior.learners.cnp import anp, cnp
from metaprior.learners.fine_tune import fine_tune
from metaprior.learners.gem_bml import gem_bml, gem_bml_plus, kl_chaser
from metaprior.learners.gnn import gnn
from metaprior.learners.hsml import hsml
from metaprior.learners.imaml import imaml
from metaprior.learners.l2l import l2l
from metaprior.learners.llama import llama
from metaprior.learners.maml import fomaml, maml
from metaprior.learners.mann import lstm, mann, ntm
from metaprior.learners.map_dlm import map_dlm
from metaprior.learners.matching import matching
from metaprior.learners.memory_module import memory_module
from metaprior.learners.meta_lstm import meta_lstm
from metaprior.learners.meta_networks import meta_networks
from metaprior.learners.meta_regularised import mr_cnp, mr_maml
from metaprior.learners.mixture import gem_mixture
from metaprior.learners.mmaml import mmaml
from metaprior.learners.mt_net import mt_net
from metaprior.learners.nearest_neighbour import nearest_neighbour
from metaprior.learners.neural_statistician import neural_statistician
from metaprior.learners.platipus import maml_noise, platipus
from metaprior.learners.protonet import protonet
from metaprior.learners.rates import lslr, meta_sgd, preconditioned
from metaprior.learners.reptile import reptile
from metaprior.learners.siamese import siamese
from metaprior.learners.sib import sib
from metaprior.learners.snail import snail
from metaprior.learners.tadam import tadam
from metaprior.learners.taml import taml
from metaprior.learners.tapnet import tapnet
from metaprior.learners.traits import Traits, stated
from metaprior.learners.versa import versa
from metaprior.learners.zero_shot import zero_shot
from metaprior.networks.statistics import beside

LEARNERS = Registry("learner", {
    "maml": maml,
    "fomaml": fomaml,
    "taml": taml,
    "anil": anil,
    "nil": nil,
    "cavia": cavia,
    "hsml": hsml,
    "arml": arml,
    "meta_sgd": meta_sgd,
    "lslr": lslr,
    "preconditioned": preconditioned,
    "mt_net": mt_net,
    "mmaml": mmaml,
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
    "tapnet": tapnet,
    "tadam": tadam,
    "zero_shot": zero_shot,
    "matching": matching,
    "siamese": siamese,
    "map_dlm": map_dlm,
    "memory_module": memory_module,
    "meta_networks": meta_networks,
    "versa": versa,
    "sib": sib,
    "nearest_neighbour": nearest_neighbour,
    "fine_tune": fine_tune,
    "mr_maml": mr_maml,
    "mr_cnp": mr_cnp,
    "cnp": cnp,
    "anp": anp,
    "neural_statistician": neural_statistician,
    "snail": snail,
    "mann": mann,
    "lstm": lstm,
    "ntm": ntm,
    "gnn": gnn,
    "l2l": l2l,
    "meta_lstm": meta_lstm,
}, ("model", "likelihood"))  # fmt: skip


def traits_of(name: str) -> Traits:
    """Returns the traits of the learner of this name."""
    return stated(lookup("learner", name, LEARNERS))


def learners_having(trait: str) -> list[str]:
    """Returns the names of the learners for which a trait is true or not empty."""
    return [name for name in LEARNERS if getattr(traits_of(name), trait)]


def learners_before(referee: str) -> dict[str, Mapping[str, Any]]:
    """Returns the learners that a referee judges, with the options under which each converges.

    Args:
        referee: Name of the referee, a key of `Traits.referees`.
    """
    return {name: traits_of(name).referees[referee] for name in LEARNERS if referee in traits_of(name).referees}


def make_learner(
    name: str, model: Model, likelihood: Likelihood, *, shown_classes: bool = False, **options: Any
) -> Learner:
    """Makes a learner by its registered name.

    A model with norm="task" receives the support in every function of the learner. A model with norm="running" makes a
    learner whose statistics are gathered after training, see `of_training`.

    Args:
        name: Name in the registry.
        model: The network.
        likelihood: Likelihood of the support and the query.
        shown_classes: Whether outputs of classes that a support does not show are ruled out, in the inner loop too. A
            network trained with 20 outputs then solves a task of 5 classes with 5 of them. Other learners than those
            with an inner loop on the model's outputs have `way` for this.
        options: Keyword options of the learner's factory.

    Raises:
        ValueError: A name or an option is unknown (the message suggests the nearest), or an option is out of range.
    """
    accept(Model, model, "model")

    def make(network: Model) -> Learner:
        return construct("learner", name, LEARNERS, network, likelihood, **options)

    if shown_classes:
        return _of_shown_classes(make, model)
    told = {"task": of_support, "running": of_training}.get(model.statistics)
    return make(model) if told is None else told(make, model)


def _of_shown_classes(make: Callable[[Model], Learner], model: Model) -> Learner:
    if model.statistics == "running":
        return of_training(lambda network: of_support(make, network, shown_alone), model)
    if model.statistics == "task":
        return of_support(make, model, lambda network, support: shown_alone(beside(network, support), support))
    return of_support(make, model, shown_alone)
