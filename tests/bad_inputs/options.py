"""Each option of each component, with values of the wrong type or out of range; all by the path that a recipe takes."""

import inspect
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np

from bad_inputs.judging import Case
from metaprior.core.likelihoods import LIKELIHOODS, Categorical, Gaussian
from metaprior.core.named import construct
from metaprior.experiments.recipe import Evaluation
from metaprior.inference.posteriors import POSTERIORS
from metaprior.learners import LEARNERS
from metaprior.learners.registry import traits_of
from metaprior.networks import NETWORKS, mlp
from metaprior.tasks import SOURCES
from metaprior.training.loop import Training

NAN = float("nan")
WRONG: dict[Any, list[Any]] = {
    int: [2.5, "3", [1, 2], NAN, True, 10**12],
    float: ["abc", [0.1, 0.2], NAN, float("inf"), True, 1e300],
    bool: ["yes", 2, [True]],
    str: [3, ["sgd"], "no such thing"],
}
NEGATIVE = {  # options that a negative number is wrong for, whatever the factory
    "steps", "test_steps", "draws", "shot", "query", "test_query", "seed", "way", "hidden", "filters", "samples",
    "units", "temperature", "noise", "meta_batch", "chunk", "rate", "kl_weight", "particles", "precision", "tasks",
    "warmup",
}  # fmt: skip


def base_types(annotation: Any) -> set[Any]:
    """The plain types that an annotation is made of."""
    if get_origin(annotation) in (None, Literal):
        return {str} if get_origin(annotation) is Literal else {annotation}
    inner = get_args(annotation)
    return set().union(*(base_types(a) for a in inner if not hasattr(a, "holds")))


def wrong_values(name: str, annotation: Any) -> list[Any]:
    """What this option must refuse."""
    if any(word in str(annotation) for word in ("Sequence", "tuple", "Mapping")):
        return []
    kinds = base_types(annotation)
    if len(kinds & set(WRONG)) != 1 or not kinds <= {*WRONG, type(None)}:
        return []
    kind = (kinds & set(WRONG)).pop()
    free = name in ("path", "target", "group", "text", "label", "outside", "head", "layer")  # any text may be one
    values = [v for v in WRONG[kind] if not (free and isinstance(v, str))]
    if name in NEGATIVE and kind in (int, float):
        values.append(-1)
    return values


def build(kind: str, name: str, registry: dict[str, Any], option: str, value: Any, _: Path) -> Any:
    likelihood = Categorical() if name in LEARNERS and traits_of(name).of_classes else Gaussian()
    arguments = (mlp(3), likelihood) if registry is LEARNERS else ()
    needed = {"path": "no-such-file"} if name in ("images", "table", "texts") and option != "path" else {}
    needed |= {"families": {"a": {"name": "sinusoid"}, "b": {"name": "sinusoid"}}} if name == "mixture" else {}
    return construct(kind, name, registry, *arguments, **needed, **{option: value})


def cases() -> list[Case]:
    """Every component's options."""
    found = []
    tables = {"learner": LEARNERS, "network": NETWORKS, "likelihood": LIKELIHOODS, "posterior": POSTERIORS,
              "tasks": SOURCES}  # fmt: skip
    for kind, registry in tables.items():
        for name, factory in registry.items():
            for p in inspect.signature(factory).parameters.values():
                if p.kind is not p.KEYWORD_ONLY and registry in (LEARNERS,):
                    continue
                if p.annotation in (inspect.Parameter.empty, Any):
                    continue
                for value in wrong_values(p.name, p.annotation):
                    run = partial(build, kind, name, registry, p.name, value)
                    found.append(Case(f"{kind} {name} {p.name}={value!r}", run, (p.name,)))
            run = partial(build, kind, name, registry, "no_such_option", 1)
            found.append(Case(f"{kind} {name} no_such_option", run, ("no_such_option", f"{kind}.")))
    for settings in (Training, Evaluation):
        for p in inspect.signature(settings).parameters.values():
            for value in wrong_values(p.name, p.annotation):
                run = partial(lambda settings, option, value, _: settings(**{option: value}), settings, p.name, value)
                says = f"{settings.__name__.lower()}.{p.name}"
                found.append(Case(f"{settings.__name__} {p.name}={value!r}", run, (says,)))
    for value, right in ((np.int64(3), 3), (np.float32(3), 3), (1e4, 10000), (np.asarray(2), 2)):
        run = partial(lambda value, _: Training(steps=value), value)
        found.append(Case(f"Training steps={value!r}", run, right=lambda t, right=right: t.steps == right))
    return found
