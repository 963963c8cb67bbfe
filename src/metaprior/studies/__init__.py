"""Studies of a trained learner's posterior: does it cover what is possible, is it of use, does it see what is strange?

Pure functions of (learner, params, source, key), one file a study; `metaprior study` runs them on the command line.
"""

from metaprior.studies.active import Acquisition, active
from metaprior.studies.ambiguity import Coverage, ambiguity, referee
from metaprior.studies.novelty import Novelty, novelty

__all__ = ["Acquisition", "Coverage", "Novelty", "active", "ambiguity", "novelty", "referee"]
