"""metaprior study concepts: classify and draw characters that are known from one drawing."""

from pathlib import Path

import jax
from rich.table import Table

from metaprior.cli.screen import screen
from metaprior.cli.studied import cell, keep
from metaprior.evaluation.plots import check_plots
from metaprior.studies.concepts import (
    Runs,
    background_drawings,
    background_runs,
    compare,
    errors,
    generate,
    official_runs,
    recognised,
    rules,
)
from metaprior.studies.deformation import Matching, by_hand, fit_prior
from metaprior.studies.deformation import kernels as grid
from metaprior.studies.plots import new_drawings
from metaprior.tasks.images.pens import pen_pairs


def study_concepts(
    out: Path = Path("study"),
    runs: int = 20,
    pairs: int = 12,
    kernels: int = 4,
    noise: float = Matching.noise,
    weight: float = Matching.weight,
    points: int = 64,
    background: int = 20,
    validate: bool = False,
    new: int = 10,
    each: int = 9,
    seed: int = 0,
) -> int:
    """One-shot concepts on Omniglot's official runs: a model of deformations learned from pen strokes. Needs no run.

    Args:
        out: The folder for concepts.json and concepts.png.
        runs: The number of official runs (at most 20), or of background runs with --validate.
        pairs: Random pairs of drawers per character whose pen drawings are matched.
        kernels: Kernels of the deformations per direction; 0 leaves affine deformations.
        noise: The deviation of points, in deviations of a drawing.
        weight: Each point counts as this many independent ones.
        points: Points per drawing.
        background: Drawings of other concepts, for p(a).
        validate: Classify runs of background characters instead, to choose the settings above.
        new: New drawings are made of the characters of this many runs of 20.
        each: New drawings per character.
        seed: The seed of pairs, background drawings and new drawings.
    """
    check_plots(out, "--out")
    if not validate and not 1 <= runs <= 20:
        raise ValueError(f"runs must be 1 to 20, the number of official runs, got {runs}.")
    console, matching = screen(), Matching(noise=noise, weight=weight)
    matched, centres = pen_pairs(each=pairs, seed=seed), grid(kernels)
    prior = fit_prior(matched, centres)
    console.print(
        f"{len(matched.source):,} pairs of pen drawings, noise {float(prior.noise):.3f} deviations", soft_wrap=True
    )
    every = background_runs(runs, points=points, seed=seed) if validate else official_runs(points)
    chosen = Runs(*(part[:runs] for part in every))
    others = background_drawings(background, points=points, seed=seed)
    found = {}
    for name, it in {"learned": prior, "by hand": by_hand(prior)}.items():
        scores = compare(chosen, others, it, centres, matching)
        found[name] = {rule: errors(score, chosen.labels) for rule, score in rules(scores).items()}
    test = int(chosen.labels.size)
    table = Table(title=f"error, {runs} runs, {test} drawings", title_justify="left", header_style="bold")
    for column in ("score", *(f"prior {name}" for name in found)):
        table.add_column(column, justify="left" if column == "score" else "right")
    for rule in found["learned"]:
        table.add_row(rule, *(cell(found[name][rule]) for name in found))
    made = generate(jax.random.key(seed), matched, prior, centres, runs=new, each=each, seed=seed)
    shares = recognised(made)
    drawings = Table(title="new drawings from one example", title_justify="left", header_style="bold")
    for column in ("drawings", "recognised among 20", "from the example"):
        drawings.add_column(column, justify="left" if column == "drawings" else "right")
    for name, spread in made.spread.items():
        drawings.add_row(name, cell(shares[name]) if name in shares else "", cell(spread))
    record = {"error": found, "recognised": shares, "from_example": made.spread, "runs": runs, "validation": validate}
    return keep(out, "concepts", record, new_drawings(made), table, drawings)
