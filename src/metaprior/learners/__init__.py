"""The algorithms, a file a family; `registry.py` names them."""

from metaprior.learners.l2l import learned_optimizer
from metaprior.learners.registry import *  # noqa: F403
from metaprior.learners.registry import LEARNERS, make_learner
from metaprior.learners.traits import Traits, traits

__all__ = ["LEARNERS", "Traits", "learned_optimizer", "make_learner", "traits"]
__all__.extend(LEARNERS)  # pyright: ignore[reportUnsupportedDunderAll]
