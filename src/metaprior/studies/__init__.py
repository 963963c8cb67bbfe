"""Studies of a trained learner's posterior: does it cover what is possible, is it useful, does it detect novel inputs?

Each study is a pure function of (learner, params, source, key) in its own file. The command `metaprior study` runs
them.
"""

from metaprior.studies.active import Acquisition, active
from metaprior.studies.ambiguity import Coverage, ambiguity, referee
from metaprior.studies.novelty import Novelty, novelty

__all__ = ["Acquisition", "Coverage", "Novelty", "active", "ambiguity", "novelty", "referee"]
