"""A recipe: everything an experiment is made of, as data. One TOML file a published experiment, in `recipes/`.

Tables: [tasks], [network], [likelihood] (a `name` and the factory's options), `learner` (the default one),
[learners.NAME] (options of each learner in this experiment), [augmentation] (of training images), [training],
[evaluation], [[published.NAME]] (papers' figures, see `results.published_in`). [tasks.NAME], [likelihood.NAME] and
[training.NAME] are what a learner has otherwise.
"""

import re
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from metaprior.core.likelihoods import LIKELIHOODS, Likelihood
from metaprior.core.named import construct, lookup, nearest, option_names
from metaprior.core.options import Count, OptionError, Seed, Whole, accept, accept_options, check_fields, parameters_of
from metaprior.core.types import Learner, Model, Splits
from metaprior.inference.posteriors import POSTERIORS
from metaprior.learners.builders.metric import with_unseen
from metaprior.learners.registry import LEARNERS, learners_having, make_learner, traits_of
from metaprior.networks import NETWORKS
from metaprior.tasks import DESCRIBED_SOURCES, SOURCES, Preparation, around, augmented, preparation_of
from metaprior.training.loop import Training

TABLES = ("tasks", "network", "likelihood", "augmentation", "training", "evaluation")  # whose options can be set

NUMBERS = ("number", "count")
TARGETS = {"categorical": ("class",), "bernoulli": ("class",), "poisson": ("count",)}  # of likelihoods not of numbers


RECIPES = "metaprior.experiments.recipes"


@dataclass(frozen=True)
class Evaluation:
    """How a run is judged: test tasks (None: each group once, or 600 where tasks have no groups), inner steps (None:
    the learner's own), the seed of the test tasks, metrics of the learner's loss to report besides, and whether to
    judge after each inner step too (as dear as each is)."""

    tasks: Count | None = None
    steps: Whole | None = None
    seed: Seed = 1234
    metrics: tuple[str, ...] = ()
    course: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "evaluation.")


@dataclass(frozen=True)
class Recipe:
    """An experiment as data; `build` makes its parts."""

    name: str
    description: str = ""
    learner: str = "maml"
    tasks: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    likelihood: dict[str, Any] = field(default_factory=dict)
    learners: dict[str, dict[str, Any]] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "recipe.")
        for learner, options in self.learners.items():
            accept(dict, options, f"learners.{learner}")


class Experiment(NamedTuple):
    """A recipe made real."""

    learner: Learner
    model: Model
    likelihood: Likelihood
    splits: Splits
    training: Training
    evaluation: Evaluation
    preparation: Preparation | None = None


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    found = [f.name for f in files(RECIPES).iterdir()]
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a TOML file by its path."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"recipe: no file {name}; give the path of a TOML file or a built-in name")
        return _from_file(path)
    lookup("recipe", name, dict.fromkeys(recipe_names()))
    return recipe_from_dict({"name": name} | tomllib.loads((files(RECIPES) / f"{name}.toml").read_text()))


def _from_file(path: Path) -> Recipe:
    """The recipe of a TOML file; what is wrong in it is said with the file and the line."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8-sig")
        recipe = recipe_from_dict({"name": path.stem} | tomllib.loads(text))
        check_options(recipe)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: not a readable text file ({error})") from None
    except OptionError as error:
        raise ValueError(f"{path}{_line(text, str(error).split(' ')[0])}: {error}") from None
    return recipe


def _line(text: str, option: str) -> str:
    """', line n' where the option of a dotted name is set in a TOML text, or else its table opened."""
    *tables, key = option.split(".")
    lines = text.splitlines()
    for pattern in (rf"\s*{re.escape(key)}\s*=", rf"\s*\[.*\b{re.escape(key)}\b", *(rf"\s*\[.*{t}" for t in tables)):
        for n, line in enumerate(lines, 1):
            if re.match(pattern, line):
                return f", line {n}"
    return ""


def check_options(recipe: Recipe, *, tasks: bool = True) -> None:
    """An OptionError if an option is unknown, or of the wrong type or range; nothing is built.

    tasks: look at [tasks] too, which a caller with sources of its own need not have.
    """
    training_of(recipe)
    evaluation_of(recipe)
    lookup("learner", recipe.learner, LEARNERS)
    for learner, options in recipe.learners.items():
        given = {name: value for name, value in options.items() if name != "posterior"}
        accept_options(lookup("learner", learner, LEARNERS), given, "learner.", taken=2)
    parts = {"network": NETWORKS, "likelihood": LIKELIHOODS} | ({"tasks": SOURCES} if tasks else {})
    for kind, registry in parts.items():
        table = dict(getattr(recipe, kind)) if kind == "network" else own_table(getattr(recipe, kind), recipe.learner)
        if kind == "tasks":
            table = {name: value for name, value in table.items() if name not in option_names(around)}
        named(kind, table, registry)


def recipe_from_dict(table: dict[str, Any]) -> Recipe:
    """A recipe from its tables; an unknown table is a ValueError."""
    accept(dict, table, "recipe")
    _check("recipe", table, [f.name for f in fields(Recipe)])
    return Recipe(**table)


def recipe_of(run: Any) -> Recipe:
    """The recipe of a run (see `runs.Run`); an error in it names the run's folder."""
    try:
        return recipe_from_dict(run.recipe)
    except OptionError as error:
        raise ValueError(f"{run.folder}: recipe.json is not one of this version: {error}") from None


def with_overrides(recipe: Recipe, learner: str | None = None, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe with another learner and with options set by dotted name, e.g. {"training.steps": 100}.

    "learner.rate" is an option of whichever learner the recipe trains.
    """
    learner = recipe.learner if learner is None else learner
    lookup("learner", learner, LEARNERS)
    tables: dict[str, Any] = asdict(recipe) | {"learner": learner}
    for table in ("tasks", "likelihood", "training"):
        tables[table] = own_table(tables[table], learner)
    for name, value in (overrides or {}).items():
        table, _, option = name.partition(".")
        if table == "learner" and option:
            tables["learners"].setdefault(learner, {})[option] = value
        elif table in TABLES and option:
            tables[table][option] = value
        else:
            known = ["learner", *TABLES]
            raise ValueError(
                f"--set {name}: needs TABLE.OPTION=VALUE with TABLE one of {', '.join(known)}{nearest(table, known)}"
            )
    return recipe_from_dict(tables)


def parse_value(text: str) -> Any:
    """A TOML value: 3, 0.1, true, [40, 40]; anything else is a word."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return found["value"] if len(found) == 1 else text  # a second line would be lost


def parse_overrides(pairs: tuple[str, ...]) -> dict[str, Any]:
    """{"training.steps": 100} from ("training.steps=100",)."""
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set {pair}: needs TABLE.OPTION=VALUE, e.g. training.steps=100")
    return {name: parse_value(value) for name, _, value in (pair.partition("=") for pair in pairs)}


def own_table(table: dict[str, Any], learner: str) -> dict[str, Any]:
    """A table's common entries, and over them what its subtable of the learner's name says."""
    own = accept(dict, table.get(learner, {}), f"the subtable of {learner}")
    return {k: v for k, v in table.items() if not (isinstance(v, dict) and k in LEARNERS)} | own


def training_of(recipe: Recipe) -> Training:
    """The outer loop's settings."""
    table = own_table(recipe.training, recipe.learner)
    _check("training", table, [f.name for f in fields(Training)])
    return Training(**table)


def evaluation_of(recipe: Recipe) -> Evaluation:
    _check("evaluation", recipe.evaluation, [f.name for f in fields(Evaluation)])
    return Evaluation(**recipe.evaluation)


def build(
    recipe: Recipe,
    *,
    posterior: str | None = None,
    steps: int | None = None,
    splits: Splits | None = None,
    preparation: Preparation | None = None,
    **posterior_options: Any,
) -> Experiment:
    """The learner, model, likelihood and task sources of a recipe.

    posterior: "point", "implicit" or "laplace", with its options (None: the learner's own). steps: inner steps when
    adapting to a new task. splits: task sources to use in place of the recipe's. preparation: that of an earlier run on
    the same table, in place of one fitted here.
    """
    check_options(recipe, tasks=splits is None)
    check_support(recipe)
    kind = recipe.likelihood.get("name")
    sources = task_sources(own_table(recipe.tasks, recipe.learner), kind, preparation) if splits is None else splits
    preparation = preparation_of(sources.train) or preparation
    likelihood = component("likelihood", own_table(recipe.likelihood, recipe.learner), LIKELIHOODS)
    if preparation is not None and (target := preparation.target).kind not in TARGETS.get(str(kind), NUMBERS):
        raise ValueError(
            f"likelihood: {kind} does not fit target {target.name!r}, which was prepared as a {target.kind}; set the "
            "likelihood that the run was trained with"
        )
    network = dict(recipe.network)
    way = most_ways(recipe, preparation)
    if preparation is not None and kind == "bernoulli":
        if way != 2:
            raise ValueError(f"likelihood: bernoulli needs 2 classes, but the target has {way}; use categorical")
    elif way is not None and "outputs" in option_names(lookup("network", network["name"], NETWORKS)):
        network.setdefault("outputs", way)
        if preparation is not None and "way" not in option_names(LEARNERS[recipe.learner]) and network["outputs"] < way:
            raise ValueError(
                f"network.outputs must be at least {way}, the number of classes of {preparation.target.name!r}, got "
                f"{network['outputs']}."
            )
    model = component("network", network, NETWORKS)
    learner = recipe_learner(recipe, model, likelihood, posterior=posterior, steps=steps, way=way, **posterior_options)
    if recipe.augmentation:
        _check("augmentation", recipe.augmentation, option_names(augmented)[1:])
        sources = augmented(sources, **recipe.augmentation)
    return Experiment(learner, model, likelihood, sources, training_of(recipe), evaluation_of(recipe), preparation)


def task_sources(
    table: dict[str, Any], likelihood: str | None = None, preparation: Preparation | None = None
) -> Splits:
    """The sources of a [tasks] table: the named one, inside what its `labelled` and `unlabelled` ask for.

    likelihood: its name says what a table's target holds: classes, counts (which are not standardised) or numbers.
    """
    outer = {name: value for name, value in table.items() if name in option_names(around)}
    inner = {k: v for k, v in table.items() if k not in outer}
    if "name" in inner and "preparation" in option_names(lookup("tasks", inner["name"], SOURCES)):
        kinds = {"classification": likelihood in ("categorical", "bernoulli"), "counts": likelihood == "poisson"}
        inner = (kinds if likelihood in LIKELIHOODS else {}) | inner
        inner |= {} if preparation is None else {"preparation": preparation}
    return around(component("tasks", inner, SOURCES), **outer)


def check_support(recipe: Recipe) -> None:
    """A ValueError where the recipe's tasks show a support that its learner cannot read."""
    tasks, name = own_table(recipe.tasks, recipe.learner), recipe.learner
    if tasks.get("name") in DESCRIBED_SOURCES and not traits_of(name).reads_attributes:
        raise ValueError(
            f"learner: came {name}, but the tasks of {tasks['name']} show class attributes in place of examples; needs "
            f"one of {', '.join(learners_having('reads_attributes'))}"
        )
    shown = tasks.get("labelled", 1) < 1 and tasks.get("unlabelled", "shown") != "left_out"
    if shown and not traits_of(name).reads_unlabelled:
        raise ValueError(
            f"tasks.labelled: came {tasks['labelled']}, but {name} would take an unknown label for a class; needs one "
            f"of {', '.join(learners_having('reads_unlabelled'))}, or tasks.unlabelled = 'left_out'"
        )


def most_ways(recipe: Recipe, preparation: Preparation | None = None) -> int | None:
    """The largest number of classes in a task of the recipe, in training or later; None where tasks have no classes.

    The classes of a table are those of its preparation.
    """
    tasks = own_table(recipe.tasks, recipe.learner)
    ways = [tasks[name] for name in ("way", "train_way") if name in tasks]
    ways += [len(preparation.target.classes)] if preparation is not None and preparation.target.classes else []
    return max(ways, default=None)


def recipe_learner(
    recipe: Recipe,
    model: Model,
    likelihood: Likelihood,
    *,
    posterior: str | None = None,
    steps: int | None = None,
    way: int | None = None,
    **posterior_options: Any,
) -> Learner:
    """The recipe's learner over a given model and likelihood.

    way: the largest number of classes, see `most_ways`. softmax_temperature: of its probabilities. Where a table says
    what classes there are, those that a support does not show keep their prior mass, which no temperature changes.
    """
    options = dict(recipe.learners.get(recipe.learner, {}))
    known = option_names(LEARNERS[recipe.learner])
    way = most_ways(recipe) if way is None else way
    if "way" in known and way is not None:
        options.setdefault("way", way)
    if steps is not None:
        if "test_steps" not in known:
            raise ValueError(f"--steps: {recipe.learner} takes no inner steps, so there is no number of them to set")
        options["test_steps"] = steps
    if posterior is not None and "posterior" in known:
        options["posterior"] = construct("posterior", posterior, POSTERIORS, **posterior_options)
    elif posterior is not None:
        raise ValueError(f"--posterior {posterior}: {recipe.learner} infers no task parameters to put a posterior on")
    elif "posterior" in options:
        options["posterior"] = posterior_rule(options["posterior"])
    learner = make_learner(recipe.learner, model, likelihood, **options)
    return with_unseen(learner, way) if way is not None and keeps_unseen(recipe) else learner


def keeps_unseen(recipe: Recipe) -> bool:
    """Whether its learner rules out classes that a support does not show, although the tasks may ask for them.

    Episodes have a number of ways, all of which are shown; the classes of a table are the table's.
    """
    return traits_of(recipe.learner).rules_out_unseen and most_ways(recipe) is None


def distance_of(recipe: Recipe) -> str:
    """The distance by which its learner compares embeddings."""
    parameters = parameters_of(LEARNERS[recipe.learner])
    default = parameters["distance"].default if "distance" in parameters else traits_of(recipe.learner).distance
    return recipe.learners.get(recipe.learner, {}).get("distance", default)


def posterior_rule(given: Any) -> Any:
    """The posterior that a recipe says as a name, "laplace", or as a table, {name = "laplace", draws = 8}."""
    table = {"name": given} if isinstance(given, str) else accept(dict, given, "learner.posterior")
    return component("learner.posterior", table, POSTERIORS)


KINDS = {"learner": LEARNERS, "network": NETWORKS, "tasks": SOURCES}


def register(kind: str, name: str, factory: Callable[..., Any]) -> None:
    """Make a learner, a network or a source of tasks of your own known by name to recipes and to `make_learner`.

    A package may declare an entry point instead, in the group `metaprior.learners`, `metaprior.networks` or
    `metaprior.tasks`; the command line then knows it too.

    Args:
        kind: "learner", "network" or "tasks".
        name: as recipes call it.
        factory: (model, likelihood, *, ...) -> Learner, whose traits `@metaprior.learners.traits(...)` may state;
            (*, ...) -> Model; or (*, ...) -> Splits.

    Raises:
        ValueError: another kind, a name that is taken, or a learner that takes other arguments.
    """
    lookup("kind", kind, KINDS).register(name, factory)


def component(kind: str, table: dict[str, Any], registry: dict[str, Any]) -> Any:
    """registry[table["name"]] called with the table's other entries."""
    factory, options = named(kind, table, registry)
    return factory(**options)


def named(kind: str, table: dict[str, Any], registry: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The factory that a table names, and its options as that wants them."""
    if "name" not in table:
        raise OptionError(f"{kind}.name is missing: [{kind}] needs one of {', '.join(sorted(registry))}.")
    factory = lookup(f"{kind}.name", table["name"], registry)
    return factory, accept_options(factory, {k: v for k, v in table.items() if k != "name"}, f"{kind}.")


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain tables, to be written beside a run's results."""
    return asdict(recipe)


def _check(kind: str, table: dict[str, Any], known: list[str]) -> None:
    for key in table:
        if key not in known:
            raise OptionError(f"{kind}.{key} is not an option; [{kind}] has {', '.join(known)}{nearest(key, known)}")
