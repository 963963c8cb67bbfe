"""Studies of trained learners: what their posteriors cover and detect, and what their inner loops change.

Each study is a pure function of (learner, params, source, key) in its own file; `reuse` also makes the learner for
other networks. The command `metaprior study` runs them.
"""

from metaprior.studies.active import Acquisition, active
from metaprior.studies.ambiguity import Coverage, ambiguity, referee
from metaprior.studies.bound import Bound, kl_weight, pac_bayes
from metaprior.studies.families import Kinds, families
from metaprior.studies.novelty import Novelty, novelty
from metaprior.studies.reuse import Alike, Reuse, alike, reuse
from metaprior.studies.universality import Transfer, universality

__all__ = [
    "Acquisition",
    "Alike",
    "Bound",
    "Coverage",
    "Kinds",
    "Novelty",
    "Reuse",
    "Transfer",
    "active",
    "alike",
    "ambiguity",
    "families",
    "kl_weight",
    "novelty",
    "pac_bayes",
    "referee",
    "reuse",
    "universality",
]
