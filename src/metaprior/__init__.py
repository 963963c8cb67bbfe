"""metaprior: learn a prior from many small tasks; get an honest posterior on the next one."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from metaprior import learners, networks, tasks
from metaprior.calibration import calibrate, calibrate_softmax, temperature_scaled
from metaprior.evaluation import Report, evaluate
from metaprior.inference.learned import optimise
from metaprior.inference.posteriors import implicit, laplace, point
from metaprior.learners import LEARNERS, learned_optimizer, make_learner
from metaprior.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from metaprior.networks import conv4, from_equinox, from_flax, mlp
from metaprior.recipe import register
from metaprior.training import Fitted, NonFiniteLoss, Training, TrainState, fit
from metaprior.types import Attributes, Batch, Learner, Model, Predictive, Splits, Task, TaskSource, settled

if TYPE_CHECKING:
    from metaprior.estimators import MetaClassifier, MetaRegressor

__version__ = version("metaprior")

__all__ = [
    "LEARNERS",
    "Attributes",
    "Batch",
    "Bernoulli",
    "Categorical",
    "Fitted",
    "Gaussian",
    "Learner",
    "Likelihood",
    "MetaClassifier",
    "MetaRegressor",
    "Model",
    "NonFiniteLoss",
    "Poisson",
    "Predictive",
    "Report",
    "Splits",
    "Task",
    "TaskSource",
    "TrainState",
    "Training",
    "calibrate",
    "calibrate_softmax",
    "conv4",
    "evaluate",
    "fit",
    "from_equinox",
    "from_flax",
    "implicit",
    "laplace",
    "learned_optimizer",
    "learners",
    "make_learner",
    "mlp",
    "networks",
    "optimise",
    "point",
    "register",
    "settled",
    "tasks",
    "temperature_scaled",
]


def __getattr__(name: str) -> Any:
    """The estimators when first asked for: scikit-learn takes as long to import as JAX."""
    if name in ("MetaClassifier", "MetaRegressor"):
        from metaprior import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module 'metaprior' has no attribute {name!r}")
