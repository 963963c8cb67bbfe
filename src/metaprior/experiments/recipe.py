"""Recipes: a complete experiment as data. There is one TOML file per published experiment in `recipes/`.

A recipe has `learner` (the default one) and the tables [tasks], [network] and [likelihood] (a `name` and the factory's
options), [learners.NAME] (the options of each learner in this experiment), [clusters] (in place of the training
classes, see `tasks.clustered`), [augmentation] (of training images), [start] (the run whose network training starts
from), [training], [evaluation] and [[published.NAME]] (papers' figures, see `results.published_in`). [tasks.NAME],
[likelihood.NAME], [start.NAME] and [training.NAME] hold the options that differ for the learner NAME.
"""

import re
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, get_args

from metaprior.core.likelihoods import LIKELIHOODS, Likelihood
from metaprior.core.named import construct, lookup, nearest, option_names
from metaprior.core.options import Count, OptionError, Seed, Whole, accept, accept_options, check_fields, parameters_of
from metaprior.core.types import Learner, Model, Splits
from metaprior.inference.posteriors import POSTERIORS
from metaprior.learners.builders.metric import with_unseen
from metaprior.learners.registry import LEARNERS, learners_having, make_learner, traits_of
from metaprior.networks import NETWORKS
from metaprior.tasks import (
    DESCRIBED_SOURCES,
    SOURCES,
    Preparation,
    augmented,
    clustered,
    preparation_of,
    with_hidden_labels,
)
from metaprior.training.loop import Training

TABLES = (
    "tasks",
    "network",
    "likelihood",
    "clusters",
    "augmentation",
    "start",
    "training",
    "evaluation",
)  # options of these can be set

NUMBERS = ("number", "count")
# The kinds of target that a likelihood accepts, for likelihoods that do not accept all numbers.
TARGETS = {"categorical": ("class",), "bernoulli": ("class",), "poisson": ("count",)}


RECIPES = "metaprior.experiments.recipes"


@dataclass(frozen=True)
class Evaluation:
    """How a run is evaluated.

    Attributes:
        tasks: The number of test tasks. None means one per group, or 600 if tasks have no groups.
        steps: The number of inner steps. None means the learner's default.
        seed: The seed of the test tasks.
        metrics: Names of metrics of the learner's loss to report in addition.
        course: Whether to evaluate after each inner step too, which takes time for each of them.
        together: The number of queries that are predicted together. None means all of a task.
    """

    tasks: Count | None = None
    steps: Whole | None = None
    seed: Seed = 1234
    metrics: tuple[str, ...] = ()
    course: bool = True
    together: Count | None = None

    def __post_init__(self) -> None:
        check_fields(self, "evaluation.")


@dataclass(frozen=True)
class Start:
    """Where the parameters of the network come from before training.

    Attributes:
        run: The folder of a run with the same network, except perhaps for its head. None draws the parameters.
        freeze: Whether training leaves the network as it is, and trains what the learner has besides.
    """

    run: str | None = None
    freeze: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "start.")


@dataclass(frozen=True)
class Recipe:
    """An experiment as data. `build` makes its parts.

    Attributes:
        name: Its name.
        description: One sentence about it.
        learner: The name of the default learner.
        tasks: The task source's `name` and options.
        network: The network's `name` and options.
        likelihood: The likelihood's `name` and options.
        learners: The options of each learner, by its name.
        clusters: The options of `clustered`, if training tasks are of clusters instead of classes.
        augmentation: The options of `augmented`.
        start: The fields of `Start`.
        training: The fields of `Training`.
        evaluation: The fields of `Evaluation`.
        published: Papers' figures by the learner's name (see `results.published_in`).
    """

    name: str
    description: str = ""
    learner: str = "maml"
    tasks: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    likelihood: dict[str, Any] = field(default_factory=dict)
    learners: dict[str, dict[str, Any]] = field(default_factory=dict)
    clusters: dict[str, Any] = field(default_factory=dict)
    augmentation: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "recipe.")
        for learner, options in self.learners.items():
            accept(dict, options, f"learners.{learner}")


class Experiment(NamedTuple):
    """The parts of an experiment, made from its recipe.

    Attributes:
        learner: The learner.
        model: The network.
        likelihood: The likelihood.
        splits: The task sources.
        training: The settings of the outer loop.
        evaluation: The settings of the evaluation.
        preparation: The preparation of a table, or None if tasks do not come from a table.
    """

    learner: Learner
    model: Model
    likelihood: Likelihood
    splits: Splits
    training: Training
    evaluation: Evaluation
    preparation: Preparation | None = None


def recipe_names() -> list[str]:
    """Returns the names of the library's recipes, sorted."""
    found = [f.name for f in files(RECIPES).iterdir()]
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """Loads a recipe.

    Args:
        name: The name of one of the library's recipes, or the path of a TOML file.

    Raises:
        ValueError: There is no such recipe or file, the file is not valid TOML, or an option is unknown or not valid.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"recipe must be the path of a TOML file or a built-in name, got {name}: no such file.")
        return _from_file(path)
    lookup("recipe", name, dict.fromkeys(recipe_names()))
    return recipe_from_dict({"name": name} | tomllib.loads((files(RECIPES) / f"{name}.toml").read_text()))


def _from_file(path: Path) -> Recipe:
    """Loads the recipe of a TOML file. Errors name the file and the line."""
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
    """Returns ', line n', where a TOML text sets the option of a dotted name or, failing that, opens its table."""
    *tables, key = option.split(".")
    lines = text.splitlines()
    for pattern in (rf"\s*{re.escape(key)}\s*=", rf"\s*\[.*\b{re.escape(key)}\b", *(rf"\s*\[.*{t}" for t in tables)):
        for n, line in enumerate(lines, 1):
            if re.match(pattern, line):
                return f", line {n}"
    return ""


def check_options(recipe: Recipe, *, tasks: bool = True) -> None:
    """Checks a recipe's options without building anything.

    Args:
        recipe: The recipe.
        tasks: Whether to check [tasks] too. A caller that gives its own task sources does not need this table.

    Raises:
        OptionError: An option is unknown, or has a wrong type or range.
    """
    start_of(recipe)
    training_of(recipe)
    evaluation_of(recipe)
    accept_options(clustered, recipe.clusters, "clusters.", taken=1)
    lookup("learner", recipe.learner, LEARNERS)
    for learner, options in recipe.learners.items():
        given = {name: value for name, value in options.items() if name != "posterior"}
        for option in network_options(learner) & given.keys():
            named(f"learner.{option}", accept(dict, given.pop(option), f"learner.{option}"), NETWORKS)
        accept_options(lookup("learner", learner, LEARNERS), given, "learner.", taken=2)
    parts = {"network": NETWORKS, "likelihood": LIKELIHOODS} | ({"tasks": SOURCES} if tasks else {})
    for kind, registry in parts.items():
        table = dict(getattr(recipe, kind)) if kind == "network" else own_table(getattr(recipe, kind), recipe.learner)
        if kind == "tasks":
            table = {name: value for name, value in table.items() if name not in option_names(with_hidden_labels)}
        named(kind, table, registry)


def recipe_from_dict(table: dict[str, Any]) -> Recipe:
    """Makes a recipe from its tables.

    Args:
        table: The tables by name.

    Raises:
        ValueError: A table is unknown, or a value has a wrong type.
    """
    accept(dict, table, "recipe")
    _check("recipe", table, [f.name for f in fields(Recipe)])
    return Recipe(**table)


def recipe_of(run: Any) -> Recipe:
    """Returns the recipe of a run.

    Args:
        run: The run, a `runs.Run`.

    Raises:
        ValueError: The recipe is not valid in this version. The message names the run's folder.
    """
    try:
        return recipe_from_dict(run.recipe)
    except OptionError as error:
        raise ValueError(f"{run.folder}: recipe.json is not valid in this version: {error}") from None


def with_overrides(recipe: Recipe, learner: str | None = None, overrides: dict[str, Any] | None = None) -> Recipe:
    """Returns a recipe with another learner or other options.

    Args:
        recipe: The recipe.
        learner: The learner's name, or None to keep the recipe's.
        overrides: Options by dotted name, e.g. {"training.steps": 100}. "learner.rate" sets an option of the learner
            that the recipe trains.

    Raises:
        ValueError: The learner or a table is unknown.
    """
    learner = recipe.learner if learner is None else learner
    lookup("learner", learner, LEARNERS)
    tables: dict[str, Any] = asdict(recipe) | {"learner": learner}
    for table in ("tasks", "likelihood", "start", "training"):
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
                f"--set must be TABLE.OPTION=VALUE with TABLE one of {', '.join(known)}, got {name}"
                f"{nearest(table, known) or '.'}"
            )
    return recipe_from_dict(tables)


def parse_value(text: str) -> Any:
    """Reads a TOML value, such as 3, 0.1, true or [40, 40].

    Args:
        text: The text. If it is not a TOML value, it is returned unchanged.
    """
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return found["value"] if len(found) == 1 else text  # a second line would be lost


def parse_overrides(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Reads options from the command line.

    Args:
        pairs: Such as ("training.steps=100",).

    Returns:
        The options by dotted name, such as {"training.steps": 100}.

    Raises:
        ValueError: An element has no '='.
    """
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set must be TABLE.OPTION=VALUE, e.g. training.steps=100, got {pair}.")
    return {name: parse_value(value) for name, _, value in (pair.partition("=") for pair in pairs)}


def own_table(table: dict[str, Any], learner: str) -> dict[str, Any]:
    """Returns a table's common options, overridden by those of its subtable for a learner.

    Args:
        table: The table.
        learner: The learner's name.
    """
    own = accept(dict, table.get(learner, {}), f"the subtable of {learner}")
    return {k: v for k, v in table.items() if not (isinstance(v, dict) and k in LEARNERS)} | own


def start_of(recipe: Recipe) -> Start:
    """Returns where the parameters of the network come from before training.

    Args:
        recipe: The recipe.
    """
    table = own_table(recipe.start, recipe.learner)
    _check("start", table, [f.name for f in fields(Start)])
    return Start(**table)


def training_of(recipe: Recipe) -> Training:
    """Returns the settings of the outer loop.

    Args:
        recipe: The recipe.
    """
    table = own_table(recipe.training, recipe.learner)
    _check("training", table, [f.name for f in fields(Training)])
    return Training(**table)


def evaluation_of(recipe: Recipe) -> Evaluation:
    """Returns the settings of the evaluation.

    Args:
        recipe: The recipe.
    """
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
    """Makes the learner, network, likelihood and task sources of a recipe.

    Args:
        recipe: The recipe.
        posterior: "point", "implicit" or "laplace", or None for the learner's own.
        steps: The number of inner steps on a new task, or None for the recipe's.
        splits: Task sources to use instead of the recipe's.
        preparation: The table's preparation from an earlier run, to use instead of fitting a new one.
        **posterior_options: The options of `posterior`.

    Raises:
        ValueError: The recipe's options are not valid, or its parts do not fit together.
    """
    check_options(recipe, tasks=splits is None)
    check_support(recipe)
    kind = recipe.likelihood.get("name")
    sources = task_sources(own_table(recipe.tasks, recipe.learner), kind, preparation) if splits is None else splits
    preparation = preparation_of(sources.train) or preparation
    likelihood = component("likelihood", own_table(recipe.likelihood, recipe.learner), LIKELIHOODS)
    if preparation is not None and (target := preparation.target).kind not in TARGETS.get(str(kind), NUMBERS):
        raise ValueError(
            f"likelihood must fit target {target.name!r}, which was prepared as a {target.kind}, got {kind}. Use the "
            "likelihood that the run was trained with."
        )
    network = dict(recipe.network)
    way = most_ways(recipe, preparation)
    if preparation is not None and kind == "bernoulli":
        if way != 2:
            raise ValueError(f"likelihood must be categorical for a target with {way} classes, got bernoulli.")
    elif way is not None and "outputs" in option_names(lookup("network", network["name"], NETWORKS)):
        network.setdefault("outputs", way)
        if preparation is not None and "way" not in option_names(LEARNERS[recipe.learner]) and network["outputs"] < way:
            raise ValueError(
                f"network.outputs must be at least {way}, the number of classes of {preparation.target.name!r}, got "
                f"{network['outputs']}."
            )
    model = component("network", network, NETWORKS)
    learner = recipe_learner(recipe, model, likelihood, posterior=posterior, steps=steps, way=way, **posterior_options)
    if recipe.clusters:
        sources = clustered(sources, **recipe.clusters)
    if recipe.augmentation:
        _check("augmentation", recipe.augmentation, option_names(augmented)[1:])
        sources = augmented(sources, **recipe.augmentation)
    return Experiment(learner, model, likelihood, sources, training_of(recipe), evaluation_of(recipe), preparation)


def task_sources(
    table: dict[str, Any], likelihood: str | None = None, preparation: Preparation | None = None
) -> Splits:
    """Makes the task sources of a [tasks] table, with hidden labels if it has `labelled` or `unlabelled`.

    Args:
        table: The table.
        likelihood: The likelihood's name. It determines whether the target of a data file is read as classes, counts
            (which are not standardised) or numbers.
        preparation: The data file's preparation from an earlier run, to use instead of fitting a new one.
    """
    outer = {name: value for name, value in table.items() if name in option_names(with_hidden_labels)}
    inner = {k: v for k, v in table.items() if k not in outer}
    if "name" in inner and "preparation" in option_names(lookup("tasks", inner["name"], SOURCES)):
        kinds = {"classification": likelihood in ("categorical", "bernoulli"), "counts": likelihood == "poisson"}
        inner = (kinds if likelihood in LIKELIHOODS else {}) | inner
        inner |= {} if preparation is None else {"preparation": preparation}
    return with_hidden_labels(component("tasks", inner, SOURCES), **outer)


def check_support(recipe: Recipe) -> None:
    """Checks that the recipe's learner can read the supports of its tasks.

    Args:
        recipe: The recipe.

    Raises:
        ValueError: The supports hold class attributes or unlabelled examples, which the learner cannot read.
    """
    tasks, name = own_table(recipe.tasks, recipe.learner), recipe.learner
    if tasks.get("name") in DESCRIBED_SOURCES and not traits_of(name).reads_attributes:
        raise ValueError(
            f"learner must be one of {', '.join(learners_having('reads_attributes'))}, as the supports of "
            f"{tasks['name']} hold class attributes instead of examples, got {name}."
        )
    shown = tasks.get("labelled", 1) < 1 and tasks.get("unlabelled", "shown") != "left_out"
    if shown and not traits_of(name).reads_unlabelled:
        raise ValueError(
            f"tasks.labelled must be 1 for {name}, which cannot read unlabelled examples, got {tasks['labelled']}. Use "
            f"one of {', '.join(learners_having('reads_unlabelled'))}, or tasks.unlabelled = 'left_out'."
        )


def most_ways(recipe: Recipe, preparation: Preparation | None = None) -> int | None:
    """Returns the largest number of classes in a task of the recipe, in training or evaluation.

    Args:
        recipe: The recipe.
        preparation: The preparation of a table, which lists the table's classes.

    Returns:
        The number, or None if tasks have no classes.
    """
    tasks = own_table(recipe.tasks, recipe.learner)
    families = tasks.get("families")  # a mixture has a table for each of its families
    tables = [tasks, *(families.values() if isinstance(families, dict) else ())]
    ways = [
        table[name] for table in tables for name in ("way", "train_way") if isinstance(table, dict) and name in table
    ]
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
    """Makes the recipe's learner for a given network and likelihood.

    With the classes of a table, classes that are not in a support keep their prior probability, which the temperature
    does not change.

    Args:
        recipe: The recipe.
        model: The network.
        likelihood: The likelihood.
        posterior: "point", "implicit" or "laplace", or None for the learner's own.
        steps: The number of inner steps on a new task, or None for the recipe's.
        way: The largest number of classes. The default is `most_ways(recipe)`.
        **posterior_options: The options of `posterior`.

    Raises:
        ValueError: The learner has no inner steps, or no parameters of a task for a posterior.
    """
    options = dict(recipe.learners.get(recipe.learner, {}))
    known = option_names(LEARNERS[recipe.learner])
    way = most_ways(recipe) if way is None else way
    if "way" in known and way is not None:
        options.setdefault("way", way)
    if steps is not None:
        if "test_steps" not in known:
            raise ValueError(f"--steps must be left out: {recipe.learner} has no inner steps.")
        options["test_steps"] = steps
    if posterior is not None and "posterior" in known:
        options["posterior"] = construct("posterior", posterior, POSTERIORS, **posterior_options)
    elif posterior is not None:
        raise ValueError(
            f"--posterior must be left out: {recipe.learner} infers no parameters of a task, got {posterior}."
        )
    elif "posterior" in options:
        options["posterior"] = posterior_rule(options["posterior"])
    for option in network_options(recipe.learner) & options.keys():
        options[option] = component(f"learner.{option}", options[option], NETWORKS)
    # With other ways in training than at test, some tasks leave outputs without a class.
    tasks = own_table(recipe.tasks, recipe.learner)
    fewer = (
        tasks.get("train_way", way_of := tasks.get("way")) != way_of and "way" not in known and "test_steps" in known
    )
    learner = make_learner(recipe.learner, model, likelihood, shown_classes=fewer, **options)
    return with_unseen(learner, way) if way is not None and keeps_unseen(recipe) else learner


def network_options(learner: str) -> set[str]:
    """Returns the names of a learner's options that take a network.

    A recipe gives a table for each, with the network's name and options, e.g. {name = "mlp", outputs = 5}.

    Args:
        learner: The learner's name.
    """
    parameters = parameters_of(lookup("learner", learner, LEARNERS))
    return {name for name, parameter in parameters.items() if Model in get_args(parameter.annotation)}


def keeps_unseen(recipe: Recipe) -> bool:
    """Whether unseen classes must keep their prior probability.

    This is so if the learner rules out classes that are not in a support, although queries may have them. The support
    of an episode shows all of its classes. The support of a table's group may show only some of the table's classes.

    Args:
        recipe: The recipe.
    """
    return traits_of(recipe.learner).rules_out_unseen and most_ways(recipe) is None


def distance_of(recipe: Recipe) -> str:
    """Returns the distance by which the recipe's learner compares embeddings.

    Args:
        recipe: The recipe.
    """
    parameters = parameters_of(LEARNERS[recipe.learner])
    default = parameters["distance"].default if "distance" in parameters else traits_of(recipe.learner).distance
    return recipe.learners.get(recipe.learner, {}).get("distance", default)


def posterior_rule(given: Any) -> Any:
    """Makes the posterior that a recipe states.

    Args:
        given: A name, such as "laplace", or a table, such as {name = "laplace", draws = 8}.
    """
    table = {"name": given} if isinstance(given, str) else accept(dict, given, "learner.posterior")
    return component("learner.posterior", table, POSTERIORS)


KINDS = {"learner": LEARNERS, "network": NETWORKS, "tasks": SOURCES}


def register(kind: str, name: str, factory: Callable[..., Any]) -> None:
    """Registers your learner, network or task source under a name for recipes and `make_learner`.

    A package can declare an entry point instead, in the group `metaprior.learners`, `metaprior.networks` or
    `metaprior.tasks`. It is then available on the command line too.

    Args:
        kind: "learner", "network" or "tasks".
        name: The name in recipes.
        factory: (model, likelihood, *, ...) -> Learner, with traits from `@metaprior.learners.traits(...)` if needed;
            (*, ...) -> Model; or (*, ...) -> Splits.

    Raises:
        ValueError: The kind is unknown, the name is taken, or a learner's factory takes other arguments.
    """
    lookup("kind", kind, KINDS).register(name, factory)


def component(kind: str, table: dict[str, Any], registry: dict[str, Any]) -> Any:
    """Calls registry[table["name"]] with the table's other entries.

    Args:
        kind: The name of the table, for error messages.
        table: The table.
        registry: The factories by name.
    """
    factory, options = named(kind, table, registry)
    return factory(**options)


def named(kind: str, table: dict[str, Any], registry: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the factory that a table names, and its checked options.

    Args:
        kind: The name of the table, for error messages.
        table: The table.
        registry: The factories by name.

    Raises:
        OptionError: The table has no `name`, or an option is unknown or not valid.
    """
    if "name" not in table:
        raise OptionError(f"{kind}.name is missing: [{kind}] needs one of {', '.join(sorted(registry))}.")
    factory = lookup(f"{kind}.name", table["name"], registry)
    return factory, accept_options(factory, {k: v for k, v in table.items() if k != "name"}, f"{kind}.")


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Returns a recipe as plain tables, which can be written as JSON.

    Args:
        recipe: The recipe.
    """
    return asdict(recipe)


def _check(kind: str, table: dict[str, Any], known: list[str]) -> None:
    for key in table:
        if key not in known:
            raise OptionError(f"{kind}.{key} is not an option; [{kind}] has {', '.join(known)}{nearest(key, known)}")
