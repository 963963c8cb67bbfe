"""Former names of modules: `import metaprior.types` still works, and warns that it is now `metaprior.core.types`."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

# Former public modules, and the modules that have their names today. Without those that share a name with a function of
# their package (`tasks.sinusoid`): importing them would hide the function.
MOVED: dict[str, tuple[str, ...]] = {
    "calibration": ("evaluation.calibration",),
    "checkpoint": ("training.checkpoint",),
    "devices": ("core.devices",),
    "extras": ("core.extras",),
    "grouped": ("referees.grouped",),
    "inference.amortised": ("learners.builders.amortised",),
    "inference.assemble": ("learners.builders.gradient",),
    "inference.gradient": ("inference.descent", "learners.builders.gradient", "core.types"),
    "inference.implicit": ("inference.proximal",),
    "inference.laplace": ("inference.evidence",),
    "inference.learned": ("inference.learned_optimizers",),
    "inference.metric": ("learners.builders.metric",),
    "inference.normalised": ("learners.builders.normalised",),
    "inference.steps": ("inference.linear_descent",),
    "likelihoods": ("core.likelihoods",),
    "mixed": ("referees.mixed",),
    "named": ("core.named",),
    "networks.conv": ("kernels.conv",),
    "networks.product": ("kernels.product",),
    "nuts": ("referees.nuts",),
    "opened": ("experiments.opened",),
    "options": ("core.options",),
    "plots": ("evaluation.plots",),
    "recipe": ("experiments.recipe",),
    "rejection": ("evaluation.rejection",),
    "reports": ("experiments.reports",),
    "results": ("experiments.results",),
    "runs": ("experiments.runs",),
    "runtime": ("core.runtime",),
    "studies.pictures": ("studies.plots",),
    "suite": ("experiments.suite",),
    "tasks.arrays": ("tasks.tables.arrays",),
    "tasks.augment": ("tasks.images.augment",),
    "tasks.columns": ("tasks.tables.columns",),
    "tasks.explained": ("tasks.synthetic.explained",),
    "tasks.labelled": ("tasks.texts.reading",),
    "tasks.labels": ("tasks.tables.classes",),
    "tasks.pictures": ("tasks.images.decoding",),
    "tasks.preparation": ("tasks.tables.preparation",),
    "tasks.reading": ("tasks.examples",),
    "tasks.scaling": ("tasks.tables.scaling",),
    "truth": ("referees.truth", "referees.conjugate"),
    "types": ("core.types",),
    "units": ("core.units",),
}


class _Former(MetaPathFinder, Loader):
    """Finds a module by its former name, and fills it with the names of its successors."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname.removeprefix("metaprior.") in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        today = [f"metaprior.{name}" for name in MOVED[module.__name__.removeprefix("metaprior.")]]
        warnings.warn(f"{module.__name__} is now {' and '.join(today)}.", DeprecationWarning, stacklevel=2)
        for name in reversed(today):
            held = vars(import_module(name))
            vars(module).update({k: v for k, v in held.items() if not k.startswith("__")})


def install() -> None:
    """Lets Python find modules by their former names, after all other ways to find them."""
    if not any(isinstance(finder, _Former) for finder in sys.meta_path):
        sys.meta_path.append(_Former())
