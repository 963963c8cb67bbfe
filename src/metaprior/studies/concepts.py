"""One-shot concept learning on Omniglot's official runs, with a hierarchy of types and tokens learned from pen strokes.

A concept is known from one drawing a. A new drawing b is of the concept with the highest

    log p(b | a) + log p(a | b) - log p(a)

(Lake, Salakhutdinov & Tenenbaum 2015), where p(b | a) is the evidence of a deformation of a into b (see
`studies.deformation`). p(a) is the mean of p(a | c) over drawings c of other concepts. New drawings of a concept are
a's points under deformations that are drawn from the prior.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar

from metaprior.core.drawings import fixed_features, modified_hausdorff
from metaprior.evaluation.figures import Figure, figure_of
from metaprior.studies.deformation import Deformation, Matching, deform, draw_deformations, register
from metaprior.tasks.images.omniglot import ARCHIVES, DRAWERS, load_omniglot
from metaprior.tasks.images.oneshot import one_shot_runs
from metaprior.tasks.images.pens import Pairs, drawn, spread_points
from metaprior.tasks.images.strokes import load_strokes
from metaprior.tasks.synthetic.linear_gaussian import Hierarchy

SIDE = 105
POINTS = 64


class Runs(NamedTuple):
    """One-shot classification: in each run, the class of each test drawing among the training drawings.

    Attributes:
        training: Points of the training drawings, in their own frames.
        test: Points of the test drawings, in their own frames.
        labels: The class of each test drawing.
    """

    training: Float[np.ndarray, "runs way n 2"]
    test: Float[np.ndarray, "runs m n 2"]
    labels: Int[np.ndarray, "runs m"]


class Scores(NamedTuple):
    """The terms of the score of each test drawing and class.

    Attributes:
        forward: p(b | a), of the test drawing b given the training drawing a.
        backward: p(a | b).
        alone: p(a), the same for all test drawings of a run.
    """

    forward: Deformation
    backward: Deformation
    alone: Float[Array, "runs way"]


def official_runs(points: int = POINTS) -> Runs:
    """Returns the 20 official runs.

    Args:
        points: Points per drawing.

    Raises:
        DataError: As in `one_shot_runs`.
    """
    runs = one_shot_runs(size=SIDE)
    training, test = (_points(np.asarray(batch.x)[..., 0], points) for batch in (runs.support, runs.query))
    return Runs(training, test, np.asarray(runs.query.y))


def background_runs(runs: int = 10, way: int = 20, points: int = POINTS, seed: int = 0) -> Runs:
    """Makes runs of background characters without pen strokes, to choose settings on.

    The characters of a run have consecutive official numbers, so most are of one alphabet. Two drawers draw each of
    them.

    Args:
        runs: The number of runs.
        way: Characters per run.
        points: Points per drawing.
        seed: The seed of characters and drawers.

    Raises:
        ValueError: There are not enough characters.
    """
    random = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(ARCHIVES["images_background"][0]), np.array(sorted(load_strokes())) - 1)
    blocks = others[: len(others) // way * way].reshape(-1, way)
    if runs > len(blocks):
        raise ValueError(f"runs must be at most {len(blocks)}, the number of blocks of {way} characters, got {runs}.")
    images = load_omniglot(SIDE).reshape(-1, DRAWERS, SIDE, SIDE)
    parts: tuple[list, list] = ([], [])
    for block in blocks[random.permutation(len(blocks))[:runs]]:
        drawers = np.stack([random.choice(DRAWERS, 2, replace=False) for _ in block], 1)
        for part, drawer in zip(parts, drawers, strict=True):
            part.append(images[block, drawer] / 255)
    training, test = (_points(np.stack(part), points) for part in parts)
    return Runs(training, test, np.broadcast_to(np.arange(way), (runs, way)))


def background_drawings(n: int, points: int = POINTS, seed: int = 0) -> Float[np.ndarray, "n p 2"]:
    """Returns drawings of other concepts than those of `official_runs` and `background_runs`.

    Args:
        n: Their number, at most 242, each of another character.
        points: Points per drawing.
        seed: The seed of characters and drawers.
    """
    random, characters = np.random.default_rng(seed), np.array(sorted(load_strokes())) - 1
    chosen = random.choice(characters, n, replace=False)
    images = load_omniglot(SIDE).reshape(-1, DRAWERS, SIDE, SIDE)[chosen, random.integers(DRAWERS, size=n)]
    return spread_points(images / 255, points)[0]


def _points(images: np.ndarray, points: int) -> np.ndarray:
    found, _ = spread_points(images.reshape(-1, SIDE, SIDE), points)
    return found.reshape(*images.shape[:2], points, 2)


def compare(
    runs: Runs,
    background: Float[np.ndarray, "n p 2"],
    prior: Hierarchy,
    centres: Float[np.ndarray, "g 2"],
    matching: Matching = Matching(),
) -> Scores:
    """Computes the terms of the score for all test drawings and classes.

    Args:
        runs: The runs.
        background: Drawings of other concepts.
        prior: The prior of deformations.
        centres: The centres of their kernels.
        matching: How points are compared.
    """
    others = jnp.asarray(background)
    each = [
        _of_run(training, test, others, prior, centres, matching)
        for training, test in zip(runs.training, runs.test, strict=True)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@partial(jax.jit, static_argnames="matching")
def _of_run(
    training: Array, test: Array, background: Array, prior: Hierarchy, centres: Array, matching: Matching
) -> Scores:
    def deformed(u: Array, v: Array) -> Deformation:
        return register(u, v, prior, centres, matching)

    def of_item(item: Array) -> tuple[Deformation, Deformation]:
        return jax.vmap(lambda a: deformed(a, item))(training), jax.vmap(lambda a: deformed(item, a))(training)

    forward, backward = jax.lax.map(of_item, test)
    alone = jax.lax.map(lambda c: jax.vmap(lambda a: deformed(c, a).log_evidence)(training), background)
    return Scores(forward, backward, jax.nn.logsumexp(alone, 0) - jnp.log(len(background)))


def rules(scores: Scores) -> dict[str, Float[Array, "runs m way"]]:
    """Returns the scores by which a class can be chosen, by name.

    Args:
        scores: The terms.
    """
    forward, backward, alone = scores.forward, scores.backward, scores.alone[:, None]
    return {
        "one way, p(b | a)": forward.log_evidence,
        "the other way, p(a | b)": backward.log_evidence,
        "the other way, p(a | b) / p(a)": backward.log_evidence - alone,
        "both ways": forward.log_evidence + backward.log_evidence,
        "both ways / p(a)": forward.log_evidence + backward.log_evidence - alone,
        "both ways / p(a), at the mode": forward.log_joint + backward.log_joint - alone,
    }


def errors(score: Float[Array, "runs m way"], labels: Int[np.ndarray, "runs m"]) -> Figure:
    """Returns the share of wrong choices, with a 95 % interval over runs.

    Args:
        score: The score of each test drawing and class.
        labels: The class of each test drawing.
    """
    return figure_of((np.asarray(score).argmax(-1) != labels).mean(-1))


class Generation(NamedTuple):
    """New drawings of concepts that are known from one drawing, beside other drawers' real ones.

    Attributes:
        example: The one drawing of each concept, True for ink.
        real: Drawings of other drawers.
        generated: Drawings from the model.
        spread: The modified Hausdorff distance, in the drawings' own frames, from the example to "real" and to
            "generated" drawings, with 95 % intervals over runs.
    """

    example: Bool[np.ndarray, "runs way h h"]
    real: Bool[np.ndarray, "runs way each h h"]
    generated: Bool[np.ndarray, "runs way each h h"]
    spread: dict[str, Figure]


def generate(
    key: PRNGKeyArray,
    pairs: Pairs,
    prior: Hierarchy,
    centres: Float[np.ndarray, "g 2"],
    *,
    runs: int = 10,
    way: int = 20,
    each: int = 9,
    seed: int = 0,
) -> Generation:
    """Generates drawings of characters of the evaluation set.

    The deformation is drawn from the prior, and the position and size from a Gaussian with the moments of the pairs'.

    Args:
        key: Random key.
        pairs: Pairs of pen drawings, for positions and sizes.
        prior: The prior of deformations.
        centres: The centres of their kernels.
        runs: The number of runs of `way` characters with consecutive official numbers.
        way: Characters per run.
        each: New drawings per character, at most 19.
        seed: The seed of characters and drawers.

    Raises:
        ValueError: There are not enough characters or drawers.
    """
    first, total = ARCHIVES["images_background"][0], sum(n for n, _ in ARCHIVES.values())
    blocks = np.arange(first, total)[: (total - first) // way * way].reshape(-1, way)
    if not 1 <= runs <= len(blocks) or not 2 <= each < DRAWERS:
        raise ValueError(
            f"runs must be 1 to {len(blocks)} and each 2 to {DRAWERS - 1} for {way} characters per run, got {runs} and "
            f"{each}."
        )
    random = np.random.default_rng(seed)
    ink = load_omniglot(SIDE).reshape(-1, DRAWERS, SIDE, SIDE)
    chosen = blocks[np.sort(random.permutation(len(blocks))[:runs])]
    drawers = np.stack([random.permutation(DRAWERS)[: each + 1] for _ in range(chosen.size)])
    found = (ink[chosen.reshape(-1, 1), drawers] > 127).reshape(runs, way, each + 1, SIDE, SIDE)
    key_phi, key_pose = jax.random.split(key)
    phi = np.asarray(draw_deformations(key_phi, prior, chosen.size * each)).reshape(runs, way, each, -1)
    moments = pairs.pose.mean(0), np.cov(pairs.pose.T)
    poses = jax.random.multivariate_normal(
        key_pose, jnp.asarray(moments[0]), jnp.asarray(moments[1]), (runs, way, each)
    )
    new = np.zeros((runs, way, each, SIDE, SIDE), bool)
    for at in np.ndindex(runs, way, each):
        new[at] = drawn(found[at[:2]][0], partial(deform, phi=phi[at], centres=centres), np.asarray(poses[at]))
    drawings = {"real": found[:, :, 1:], "generated": new}
    points = {name: _points(part.reshape(runs, -1, SIDE, SIDE), POINTS) for name, part in drawings.items()}
    points = {name: part.reshape(runs, way, each, POINTS, 2) for name, part in points.items()}
    first = _points(found[:, :, 0], POINTS)
    apart = jax.jit(jax.vmap(jax.vmap(jax.vmap(_apart, (None, 0)))))
    spread = {name: figure_of(np.asarray(apart(first, part)).mean((1, 2))) for name, part in points.items()}
    return Generation(found[:, :, 0], found[:, :, 1:], new, spread)


def _apart(u: Float[Array, "n 2"], v: Float[Array, "n 2"]) -> Scalar:
    weighted = [jnp.concatenate([points, jnp.ones((len(points), 1))], 1)[None] for points in (u, v)]
    return modified_hausdorff(*weighted)[0, 0]


def by_orientation(examples: Float[np.ndarray, "way h h"], drawings: Float[np.ndarray, "n h h"]) -> Int[Array, " n"]:
    """Classifies drawings by the nearest example, in fixed features: the orientation of ink after normalisation.

    Args:
        examples: One drawing of each concept, 1 for ink.
        drawings: New drawings, 1 for ink.

    Returns:
        The classes.
    """
    a, b = (fixed_features("normalised_orientation", jnp.asarray(part)[..., None]) for part in (examples, drawings))
    return ((b[:, None] - a) ** 2).sum(-1).argmin(1)


def recognised(
    generation: Generation, classify: Callable[[np.ndarray, np.ndarray], Any] = by_orientation
) -> dict[str, Figure]:
    """Returns the share of real and of generated drawings that a classifier assigns to their own concept.

    Args:
        generation: The drawings.
        classify: Maps the examples [way, h, h] of a run and new drawings [n, h, h], all 1 for ink, to classes [n].
            The default uses neither the model nor any learning.

    Returns:
        The shares of "real" and "generated", with 95 % intervals over runs.
    """
    shares: dict[str, list[float]] = {"real": [], "generated": []}
    for example, real, generated in zip(generation.example, generation.real, generation.generated, strict=True):
        way, each, side = real.shape[0], real.shape[1], real.shape[-1]
        for name, drawings in (("real", real), ("generated", generated)):
            classes = classify(example.astype(np.float32), drawings.reshape(-1, side, side).astype(np.float32))
            shares[name].append(float((np.asarray(classes) == np.repeat(np.arange(way), each)).mean()))
    return {name: figure_of(np.array(values)) for name, values in shares.items()}
