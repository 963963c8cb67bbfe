"""metaprior study: compare trained learners on one question, see docs/studies.md."""

from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

import jax
import tyro
from rich.table import Table

from metaprior.cli.concepts import study_concepts
from metaprior.cli.studied import cell, keep
from metaprior.core.files import check_output
from metaprior.core.named import option_names
from metaprior.core.options import parameters_of
from metaprior.core.types import Learner
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.evaluation.plots import check_plots
from metaprior.experiments.opened import load
from metaprior.experiments.recipe import (
    load_recipe,
    own_table,
    parse_overrides,
    recipe_of,
    task_sources,
    with_overrides,
)
from metaprior.experiments.runs import Run, told_apart
from metaprior.learners import LEARNERS
from metaprior.studies import active, alike, ambiguity, families, novelty, pac_bayes, referee, reuse, universality
from metaprior.studies.plots import (
    acquisitions,
    bounds,
    courses,
    explanations,
    family_kinds,
    novelty_bars,
    reuse_panels,
)
from metaprior.studies.reuse import Reuse
from metaprior.studies.reuse import Subject as Made
from metaprior.studies.universality import Course, Transfer, size_of
from metaprior.tasks.images.clusters import Clustering, embedding_accuracy, partitions

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional]
Posterior = Literal["point", "implicit", "laplace"] | None
MOST_SHOWN = 6  # learners in a plot of draws
TRUTH = "the truth"


def study_ambiguity(
    runs: Runs,
    /,
    out: Path = Path("study"),
    tasks: int = 600,
    near: float = 1 / 3,
    posterior: Posterior = None,
    draws: int | None = None,
    seed: int = 1234,
    set: tuple[str, ...] = (),
) -> int:
    """Does the posterior contain both explanations of a task? Needs runs of the recipes ambiguous or ambiguous-2d.

    Args:
        runs: The folders that `train` wrote.
        out: The folder for ambiguity.json and ambiguity.png.
        tasks: The number of new tasks.
        near: A draw is close to an explanation if it is within this share of the explanations' distance. Must be below
            1/2.
        posterior: The posterior around the adapted parameters phi_k. None means each learner's own.
        draws: How many networks to draw from that posterior.
        seed: The seed of tasks and draws.
        set: Options of the tasks or the learners by name, e.g. --set tasks.noise=0.1
    """
    check_plots(out, "--out")
    opened, key = _open(runs, set, posterior, draws), jax.random.key(seed)
    source = next(iter(opened.values())).source
    found = {TRUTH: referee(source, key, tasks=tasks, near=near)}
    for name, it in opened.items():
        found[name] = ambiguity(it.learner, it.params, it.source, key, tasks=tasks, near=near)
    table = _table(f"two explanations, {tasks} tasks", "covered", "explaining", "NLL", "joint NLL", "draws")
    for name, row in found.items():
        table.add_row(name, *map(cell, row))
    shown = {name: (it.learner, it.params) for name, it in list(opened.items())[:MOST_SHOWN]}
    plot = explanations(source, shown, key)
    return keep(out, "ambiguity", {n: row._asdict() for n, row in found.items()}, plot, table)


def study_active(
    runs: Runs,
    /,
    out: Path = Path("study"),
    tasks: int = 200,
    start: int = 2,
    pool: int = 50,
    points: int = 8,
    posterior: Posterior = None,
    draws: int | None = None,
    steps: int | None = None,
    seed: int = 1234,
    set: tuple[str, ...] = (),
) -> int:
    """Is choosing the next point by predictive variance better than at random? Needs runs on regression tasks.

    Args:
        runs: The folders that `train` wrote.
        out: The folder for active.json and active.png.
        tasks: The number of new tasks.
        start: The number of labelled points at the start.
        pool: The number of candidates, taken from the task's query. The other points of the query are for testing.
        points: The number of points to choose, one by one.
        posterior: The posterior around the adapted parameters phi_k. None means each learner's own. A point
            has no variance to choose by.
        draws: How many networks to draw from that posterior; 0 gives the linearised predictive in closed form.
        steps: The number of inner steps on a new task.
        seed: The seed of tasks and choices.
        set: Options of the tasks or the learners by name, e.g. --set tasks.noise=0.1
    """
    check_plots(out, "--out")
    opened, key = _open(runs, set, posterior, draws, steps), jax.random.key(seed)
    found = {
        name: active(it.learner, it.params, it.source, key, tasks=tasks, start=start, pool=pool, points=points)
        for name, it in opened.items()
    }
    table = _table(f"MSE by points seen, {tasks} tasks", "points", "at random", "by variance", "difference")
    for name, result in found.items():
        for row in zip(*result._asdict().values(), strict=True):
            seen, informed, random, difference = map(cell, row)
            table.add_row(name, seen, random, informed, difference)
    return keep(out, "active", {n: row._asdict() for n, row in found.items()}, acquisitions(found), table)


def study_novelty(
    runs: Runs,
    /,
    out: Path = Path("study"),
    tasks: int = 200,
    posterior: Posterior = None,
    draws: int | None = None,
    transductive: bool = False,
    seed: int = 1234,
    set: tuple[str, ...] = (),
) -> int:
    """Does uncertainty tell known classes from other classes, rotated images and noise? Needs runs on images.

    Args:
        runs: The folders that `train` wrote.
        out: The folder for novelty.json and novelty.png.
        tasks: The number of new tasks.
        posterior: The posterior around the adapted parameters phi_k. None means each learner's own.
        draws: How many networks to draw from that posterior.
        transductive: Normalise queries together (and inputs of no known class together). The default is to normalise
            each one alone.
        seed: The seed of tasks and draws.
        set: Options of the tasks or the learners by name, e.g. --set tasks.test_query=5
    """
    check_plots(out, "--out")
    opened = _open(runs, set, posterior, draws, transductive=None if transductive else False)
    found = {
        name: novelty(it.learner, it.params, it.source, jax.random.key(seed), tasks=tasks)
        for name, it in opened.items()
    }
    kinds = list(next(iter(next(iter(found.values())).auroc.values())))
    table = _table(f"AUROC of uncertainty, {tasks} tasks", "accuracy", "score", *kinds)
    for name, result in found.items():
        for score, row in result.auroc.items():
            table.add_row(name, cell(result.accuracy), score, *map(cell, row.values()))
    return keep(out, "novelty", {n: row._asdict() for n, row in found.items()}, novelty_bars(found), table)


def study_reuse(
    runs: Runs,
    /,
    out: Path = Path("study"),
    tasks: int = 200,
    steps: int | None = None,
    seed: int = 1234,
    set: tuple[str, ...] = (),
) -> int:
    """Does the inner loop learn new features, or reuse those of theta? Needs runs of learners with inner steps.

    Several runs are also compared with each other, layer by layer, on the test tasks of the first.

    Args:
        runs: The folders that `train` wrote.
        out: The folder for reuse.json and reuse.png.
        tasks: The number of new tasks.
        steps: The number of inner steps on a new task.
        seed: The seed of tasks and adaptation.
        set: Options of the tasks or the learners by name, e.g. --set tasks.test_query=50
    """
    check_plots(out, "--out")
    key, found, made = jax.random.key(seed), {}, {}
    for name, run in _runs(runs).items():
        opened = load(run.folder, steps=steps, settings=set)
        made[name] = Made(lambda model, opened=opened: opened.made(model=model), opened.experiment.model, opened.params)
        source = opened.splits.test
        untrained = opened.recipe.network.get("norm") != "running"  # its statistics are those of the trained network
        found[name] = reuse(made[name], source, key, tasks=tasks, untrained=untrained)
        made[name] = made[name], source
    pairs = {
        f"{a} | {b}": alike(made[a][0], made[b][0], made[a][1], key, tasks=tasks) for a, b in combinations(made, 2)
    }
    tables = [_similarities(found, tasks), _controls(found), _with_frozen(found, tasks)]
    if pairs:
        table = _table(f"debiased CKA of two networks, {tasks} tasks", "layer", "before", "after")
        for name, both in pairs.items():
            for layer in both.before:
                table.add_row(name, layer, cell(both.before[layer]), cell(both.after[layer]))
        tables.append(table)
    return keep(out, "reuse", {n: row._asdict() for n, row in (found | pairs).items()}, reuse_panels(found), *tables)


def _similarities(found: dict[str, Reuse], tasks: int) -> Table:
    title = f"layers before and after the inner loop, {tasks} tasks"
    table = _table(title, "layer", "CKA", "CCA", "change", "cosine")
    for name, result in found.items():
        for layer, it in result.layers.items():
            cca = cell(it.cca) + ("" if it.enough else " *")
            table.add_row(name, layer, cell(it.cka), cca, cell(it.change), cell(it.cosine))
    if not all(it.enough for result in found.values() for it in result.layers.values()):
        table.caption = "* fewer than ten rows per column: near 1 for unrelated layers, too"
    return table


def _controls(found: dict[str, Reuse]) -> Table:
    table = _table("controls: debiased CKA", "layer", *next(iter(found.values())).controls)
    for name, result in found.items():
        for layer in result.layers:
            table.add_row(name, layer, *(cell(of[layer]) for of in result.controls.values()))
    return table


def _with_frozen(found: dict[str, Reuse], tasks: int) -> Table:
    metric = next(iter(found.values())).metric
    table = _table(f"{metric} with the first layers frozen, {tasks} tasks", "layer", metric)
    table.columns[1].header = "frozen"
    for name, result in found.items():
        for n, figure in enumerate(result.frozen):
            table.add_row(name, ", ".join(list(result.layers)[:n]) or "none", cell(figure))
        for end, figure in result.nil.items():
            table.add_row(name, "NIL" if end == "theta" else "NIL, adapted features", cell(figure))
    return table


def study_universality(
    runs: Runs,
    /,
    out: Path = Path("study"),
    tasks: int = 600,
    steps: tuple[int, ...] = (0, 1, 5, 10, 50, 100),
    elsewhere: tuple[str, ...] = (),
    seed: int = 1234,
    set: tuple[str, ...] = (),
) -> int:
    """Errors after further inner steps, on other tasks, and by the depth of the network.

    Runs whose inputs contain the parameters of their tasks (tasks.given) are oracles: the error of each other run is
    divided by that of the oracle with as many hidden layers.

    Args:
        runs: The folders that `train` wrote.
        out: The folder for universality.json and universality.png.
        tasks: The number of new tasks.
        steps: The numbers of inner steps on a new task. The number of training is added.
        elsewhere: Options of other tasks to test on, one option each, e.g. --elsewhere tasks.amplitude=[5,10]
            tasks.phase=[3.14,6.28]
        seed: The seed of tasks and adaptation.
        set: Options of the tasks or the learners by name, e.g. --set tasks.shot=5
    """
    check_plots(out, "--out")
    key, found = jax.random.key(seed), {}
    for name, run in _runs(runs).items():
        own = _own_steps(run, set)
        at = sorted({*steps, own}) if own else [0]
        kept: dict[str, Any] = {"steps": own}
        transfers = {}
        for other in ("", *elsewhere):
            settings = (*set, other) if other else set
            opened = load(run.folder, steps=at[-1] if own else None, settings=settings)
            source = opened.splits.test
            if not other:
                kept |= size_of(opened.experiment.model, opened.params, source)._asdict()
                kept["oracle"] = bool(own_table(opened.recipe.tasks, opened.recipe.learner).get("given"))
            chunk = 10 if opened.experiment.training.at_once is None else opened.experiment.training.at_once
            transfers[other or TRAINED] = universality(
                opened.learner, opened.params, source, key, steps=at, tasks=tasks, chunk=chunk
            )
        found[name] = kept | {"tasks": transfers}
    tables = [*(_courses(found, kind, tasks) for kind in (TRAINED, *elsewhere)), _by_depth(found, tasks)]
    return keep(out, "universality", found, courses(found), *tables)


def study_bound(
    runs: Runs,
    /,
    out: Path = Path("study"),
    tasks: int = 1000,
    scale: float = 1.0,
    delta: float = 0.05,
    seed: int = 1234,
) -> int:
    """How far may the error on new training tasks exceed that on the old? Needs runs of mr_maml or mr_cnp, on weights.

    Args:
        runs: The folders that `train` wrote.
        out: The folder for bound.json and bound.png.
        tasks: The number of training tasks to compute the mean loss on.
        scale: For regression, the squared error from which on the loss is 1.
        delta: The probability that the bound does not hold.
        seed: The seed of the drawn encoders.
    """
    check_plots(out, "--out")
    key, found = jax.random.key(seed), {}
    for name, run in _runs(runs).items():
        opened = load(run.folder)
        training = opened.experiment.training
        found[name] = pac_bayes(
            opened.learner, opened.params, opened.splits.train, key, training, steps=opened.run.newest, tasks=tasks,
            scale=scale, delta=delta, chunk=training.at_once or 20,
        )  # fmt: skip
    title = f"PAC-Bayes bounds of the loss on new tasks of the training distribution, with probability {1 - delta:g}"
    table = _table(title, "loss", "on training tasks", "KL", "bound", "tasks", "queries each", "weight of the KL")
    for name, it in found.items():
        numbers = f"{it.divergence:.4g}", f"{it.bound:.3f}", f"{it.tasks:,}", str(it.queries), f"{it.weight:.3g}"
        table.add_row(name, it.loss, cell(it.risk), *numbers)
    if any(it.bound >= 1 for it in found.values()):
        table.caption = "A bound of 1 or more says nothing, because no loss is above 1."
    return keep(out, "bound", found, bounds(found), table)


TRAINED = "as trained"


def _own_steps(run: Run, settings: tuple[str, ...]) -> int | None:
    """Returns the inner steps of a run's training, or None if its learner takes none."""
    recipe = with_overrides(recipe_of(run), None, parse_overrides(settings))
    options = parameters_of(LEARNERS[recipe.learner])
    if "steps" not in options:
        return None
    return recipe.learners.get(recipe.learner, {}).get("steps", options["steps"].default) or None


def _courses(found: dict[str, dict[str, Any]], kind: str, tasks: int) -> Table:
    transfers: dict[str, Transfer] = {name: it["tasks"][kind] for name, it in found.items()}
    metric = next(iter(transfers.values())).metric
    table = _table(f"{kind}, {tasks} tasks", "start", "inner steps", metric, "median")
    for name, transfer in transfers.items():
        descends = found[name]["steps"] is not None
        starts = {"learned": transfer.trained, "random": transfer.random if descends else None}
        for start, course in starts.items():
            for i, k in enumerate(course.steps if course is not None else ()):
                assert course is not None
                shown = cell(course.query[i]), f"{course.median[i]:.3f}"
                table.add_row(name, start if descends else "", str(k) if descends else "", *shown)
    return table


def _by_depth(found: dict[str, dict[str, Any]], tasks: int) -> Table:
    """Shows the error after the steps of training, and how many times the oracle's it is."""

    def error(it: dict[str, Any]) -> tuple[Figure, float]:
        course: Course = it["tasks"][TRAINED].trained
        i = course.steps.index(it["steps"]) if it["steps"] else 0
        return course.query[i], course.median[i]

    oracles = {it["hidden"]: error(it)[0].mean for it in found.values() if it["oracle"]}
    metric = next(iter(found.values()))["tasks"][TRAINED].metric
    table = _table(f"by depth, {tasks} tasks", "hidden", "parameters", "steps", metric, "median", "over oracle")
    for name, it in found.items():
        figure, median = error(it)
        ratio = figure.mean / oracles[it["hidden"]] if it["hidden"] in oracles and metric == "mse" else None
        shown = "oracle" if it["oracle"] else "" if ratio is None else f"{ratio:.3g}"
        table.add_row(
            name,
            str(it["hidden"]),
            str(it["parameters"]),
            str(it["steps"] or 0),
            cell(figure),
            f"{median:.3f}",
            shown,
        )
    return table


def study_clusters(
    recipe: Annotated[str, tyro.conf.Positional],
    /,
    out: Path = Path("study"),
    tasks: int = 600,
    seed: int = 1234,
    set: tuple[str, ...] = (),
) -> int:
    """How good are the clusters that a recipe trains on, and what does their embedding reach without meta-learning?

    True labels are used here for the comparison, never in training.

    Args:
        recipe: A recipe with [clusters], such as omniglot-cactus.
        out: The folder for clusters.json.
        tasks: The number of test tasks for the embedding itself.
        seed: The seed of these tasks.
        set: Options of the recipe by name, e.g. --set clusters.embedding=orientation tasks.shot=5
    """
    check_output(out, "--out")
    chosen = with_overrides(load_recipe(recipe), None, parse_overrides(set))
    if not chosen.clusters:
        raise ValueError(f"recipe must have [clusters], such as omniglot-cactus, got {recipe}.")
    splits = task_sources(own_table(chosen.tasks, chosen.learner))
    how = Clustering(**chosen.clusters)
    parts = partitions(splits, how)
    table = _table(f"{recipe}: partitions", "clusters left", "purity", "pair precision", "NMI", "ARI")
    table.columns[0].header = "partition"
    for place, row in enumerate(parts, 1):
        shares = (f"{row[name]:.3f}" for name in ("purity", "pair_precision", "nmi", "ari"))
        table.add_row(str(place), str(row["left"]), *shares)
    found: dict[str, Any] = {"partitions": parts}
    tables = [table]
    if how.partition not in ("random", "classes"):
        hits = embedding_accuracy(splits, how, jax.random.key(seed), tasks)
        found["embedding"] = {rule: figure_of(values) for rule, values in hits.items()}
        own = _table(f"the embedding itself, {tasks} test tasks", "accuracy")
        own.columns[0].header = "rule"
        for rule, figure in found["embedding"].items():
            own.add_row(rule, cell(figure))
        tables.append(own)
    return keep(out, "clusters", found, None, *tables)


def study_families(
    runs: Runs,
    /,
    out: Path = Path("study"),
    tasks: int = 600,
    seed: int = 1234,
    set: tuple[str, ...] = (),
) -> int:
    """Do the kinds of tasks that a learner found agree with the families of tasks? Needs hsml, arml or gem_mixture.

    Args:
        runs: The folders that `train` wrote, of a recipe with families such as families-2d.
        out: The folder for families.json and families.png.
        tasks: The number of new tasks, at least ten per family.
        seed: The seed of tasks and adaptation.
        set: Options of the tasks or the learners by name, e.g. --set tasks.shot=5
    """
    check_plots(out, "--out")
    opened, key = _open(runs, set, None, None), jax.random.key(seed)
    found = {name: families(it.learner, it.params, it.source, key, tasks=tasks) for name, it in opened.items()}
    columns = ("information", "by chance", "adjusted", "recognised")
    table = _table(f"what the kinds of tasks say of the families, {tasks} tasks", *columns)
    for name, result in found.items():
        shares = (f"{share:.3f}" for share in (result.information, result.by_chance, result.adjusted))
        table.add_row(name, *shares, cell(result.recognised))
    return keep(out, "families", {n: row._asdict() for n, row in found.items()}, family_kinds(found), table)


Study = Union[  # noqa: UP007 (a union of subcommands, which tyro reads at run time)
    Annotated[Any, tyro.conf.subcommand(name="ambiguity", constructor=study_ambiguity)],
    Annotated[Any, tyro.conf.subcommand(name="active", constructor=study_active)],
    Annotated[Any, tyro.conf.subcommand(name="novelty", constructor=study_novelty)],
    Annotated[Any, tyro.conf.subcommand(name="reuse", constructor=study_reuse)],
    Annotated[Any, tyro.conf.subcommand(name="bound", constructor=study_bound)],
    Annotated[Any, tyro.conf.subcommand(name="universality", constructor=study_universality)],
    Annotated[Any, tyro.conf.subcommand(name="clusters", constructor=study_clusters)],
    Annotated[Any, tyro.conf.subcommand(name="concepts", constructor=study_concepts)],
    Annotated[Any, tyro.conf.subcommand(name="families", constructor=study_families)],
]


def study(status: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[Study]]) -> int:
    """Compare trained learners on one question."""
    return status


class Subject(NamedTuple):
    """A trained learner as the studies need it.

    Attributes:
        learner: The learner.
        params: Its meta-learned parameters.
        source: The test tasks.
    """

    learner: Learner
    params: Any
    source: Any


def _runs(folders: tuple[Path, ...]) -> dict[str, Run]:
    return told_apart([Run.open(folder) for folder in folders])


def _open(
    runs: tuple[Path, ...],
    overrides: tuple[str, ...],
    posterior: str | None,
    draws: int | None,
    steps: int | None = None,
    transductive: bool | None = None,
) -> dict[str, Subject]:
    options: dict[str, Any] = {} if posterior is None else {"posterior": posterior}
    if draws is not None and posterior not in (None, "point"):
        options["draws"] = draws
    opened = {}
    for name, run in _runs(runs).items():
        learner = recipe_of(run).learner
        alone = transductive is not None and "transductive" in option_names(LEARNERS[learner])
        settings = (*overrides, f"learner.transductive={str(transductive).lower()}") if alone else overrides
        subject = load(run.folder, steps=steps, settings=settings, **options)
        opened[name] = Subject(subject.learner, subject.params, subject.splits.test)
    return opened


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("learner")
    for column in columns:
        table.add_column(column, justify="left" if column in ("score", "layer", "start") else "right")
    return table
