"""metaprior: learn a prior from many small tasks; get an honest posterior on the next one."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from metaprior.moved import install as _install

if TYPE_CHECKING:
    from metaprior import inference, learners, networks, tasks
    from metaprior.core.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
    from metaprior.core.likelihoods import Likelihood as Likelihood
    from metaprior.core.types import Attributes as Attributes
    from metaprior.core.types import Batch, Learner, Model, Splits, Task, settled
    from metaprior.core.types import Predictive as Predictive
    from metaprior.core.types import TaskSource as TaskSource
    from metaprior.estimators.sklearn import MetaClassifier, MetaRegressor
    from metaprior.evaluation.calibration import calibrate
    from metaprior.evaluation.calibration import calibrate_softmax as calibrate_softmax
    from metaprior.evaluation.calibration import temperature_scaled as temperature_scaled
    from metaprior.evaluation.protocol import evaluate
    from metaprior.evaluation.report import Report as Report
    from metaprior.experiments.opened import load
    from metaprior.experiments.recipe import register
    from metaprior.inference.learned_optimizers import optimise as optimise
    from metaprior.inference.posteriors import implicit, laplace, point
    from metaprior.learners import LEARNERS as LEARNERS
    from metaprior.learners import learned_optimizer as learned_optimizer
    from metaprior.learners import make_learner
    from metaprior.networks import conv4, from_equinox, from_flax, mlp
    from metaprior.training.loop import Fitted as Fitted
    from metaprior.training.loop import NonFiniteLoss as NonFiniteLoss
    from metaprior.training.loop import Training, fit
    from metaprior.training.loop import TrainState as TrainState

    __version__: str

_install()

# The module of each name above, which is imported at the first access: `import metaprior` itself imports nothing.
_FROM = {
    "core.likelihoods": ("Bernoulli", "Categorical", "Gaussian", "Likelihood", "Poisson"),
    "core.types": ("Attributes", "Batch", "Learner", "Model", "Predictive", "Splits", "Task", "TaskSource", "settled"),
    "estimators": ("MetaClassifier", "MetaRegressor"),
    "evaluation": ("Report", "evaluate"),
    "evaluation.calibration": ("calibrate", "calibrate_softmax", "temperature_scaled"),
    "experiments.opened": ("load",),
    "experiments.recipe": ("register",),
    "inference.learned_optimizers": ("optimise",),
    "inference.posteriors": ("implicit", "laplace", "point"),
    "learners": ("LEARNERS", "learned_optimizer", "make_learner"),
    "networks": ("conv4", "from_equinox", "from_flax", "mlp"),
    "training": ("Fitted", "NonFiniteLoss", "TrainState", "Training", "fit"),
}
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names}

# What most programs need. The other names above are found here, too, and in their namespaces.
__all__ = [
    "Batch",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Learner",
    "MetaClassifier",
    "MetaRegressor",
    "Model",
    "Poisson",
    "Splits",
    "Task",
    "Training",
    "calibrate",
    "conv4",
    "evaluate",
    "fit",
    "from_equinox",
    "from_flax",
    "implicit",
    "inference",
    "laplace",
    "learners",
    "load",
    "make_learner",
    "mlp",
    "networks",
    "point",
    "register",
    "settled",
    "tasks",
]


def __getattr__(name: str) -> Any:
    """Imports a public name or a module of the package at its first access."""
    if name == "__version__":
        from importlib.metadata import version

        value = version("metaprior")
    elif name in _MODULE_OF:
        value = getattr(import_module(f"metaprior.{_MODULE_OF[name]}"), name)
    elif not name.startswith("_") and find_spec(f"metaprior.{name}"):
        return import_module(f"metaprior.{name}")
    else:
        raise AttributeError(f"module 'metaprior' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULE_OF, "__version__"})
