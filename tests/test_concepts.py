"""One-shot concepts: matched pen strokes, deformations with exact evidence where it exists, the runs, new drawings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.types import Batch
from metaprior.referees.conjugate import exact_log_marginal, exact_posterior
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
from metaprior.studies.deformation import (
    Matching,
    basis,
    deform,
    design,
    draw_deformations,
    fit_prior,
    kernels,
    register,
)
from metaprior.tasks.images.pens import Frame, Pairs, along, drawn, matched, pen_pairs, relative, spread_points
from metaprior.tasks.synthetic.linear_gaussian import Hierarchy
from scenarios import run_cli

RANDOM = np.random.default_rng(0)
DRAWING = [
    np.array([[0.2, 0.2], [0.8, 0.3]]),
    np.array([[0.3, 0.9], [0.4, 0.5], [0.9, 0.6]]),
    np.array([[0.5, 0.1], [0.5, 0.2]]),
]


def test_strokes_are_matched_whatever_their_order_direction_position_and_size():
    moved = [np.array([0.1, -0.05]) + 0.5 * stroke for stroke in DRAWING]
    other = [moved[2][::-1], moved[0], moved[1][::-1]]
    a, b, pose = matched(DRAWING, other, 30)
    assert a.shape == b.shape == (30, 2)
    np.testing.assert_allclose(a, b, atol=0.03)  # the frames are of points at rounded distances
    np.testing.assert_allclose(np.exp(pose[2:]), 0.5, rtol=0.02)
    assert matched(DRAWING, DRAWING[:2], 30) is None
    assert matched(DRAWING, DRAWING, 2) is None


def test_points_along_a_stroke_are_at_equal_distances():
    np.testing.assert_allclose(along(DRAWING[0], 4), np.linspace([0.2, 0.2], [0.8, 0.3], 4))
    np.testing.assert_allclose(along(DRAWING[0], 1), [[0.5, 0.25]])


def test_a_pose_is_of_the_second_frame_relative_to_the_first():
    first, second = Frame(np.array([0.5, 0.4]), np.array([0.1, 0.2])), Frame(np.array([0.6, 0.4]), np.array([0.2, 0.1]))
    np.testing.assert_allclose(relative(first, second), [0.1, 0, np.log(2), -np.log(2)], atol=1e-12)


def test_points_of_ink_are_spread_and_framed():
    image = np.zeros((20, 20))
    image[5, 2:18] = 1
    points, frame = spread_points(image[None], 2)
    np.testing.assert_allclose(frame.centre[0], [0.5, 5.5 / 20])
    inside = points[0] * frame.deviation[0] + frame.centre[0]
    np.testing.assert_allclose(sorted(inside[:, 0]), [2.5 / 20, 17.5 / 20])  # its ends
    many, _ = spread_points(image[None], 16)
    assert len(np.unique(many[0], axis=0)) == 16
    with pytest.raises(ValueError, match="must have ink"):
        spread_points(np.zeros((1, 4, 4)), 2)


def test_an_image_that_is_drawn_again_unchanged_is_the_same():
    image = np.zeros((30, 30))
    image[4:20, 6:9] = image[18:20, 6:25] = 1
    np.testing.assert_array_equal(drawn(image, lambda points: points), image > 0.5)
    right = drawn(image, lambda points: points, np.array([0.1, 0, 0, 0]))
    np.testing.assert_array_equal(right[:, 3:], image[:, :-3] > 0.5)


def hierarchy(centres, noise=0.3):
    d = 2 * (3 + len(centres))
    root = RANDOM.normal(size=(d, d)) / d
    return Hierarchy(jnp.asarray(0.1 * RANDOM.normal(size=d)), jnp.asarray(root @ root.T + 0.05 * np.eye(d)), noise)


def test_the_evidence_is_exact_if_there_is_one_point_to_come_from():
    with jax.enable_x64(True):
        centres = kernels(2)
        prior, u, v = hierarchy(centres), jnp.asarray([[0.3, -0.5]]), jnp.asarray(RANDOM.normal(size=(6, 2)))
        matching = Matching(noise=0.3, weight=1.0, stray=0.0, steps=3)
        found = register(u, v, prior, centres, matching)
        x = jnp.tile(design(basis(u, centres)), (6, 1))
        batch = Batch(x, (v - u).reshape(-1, 1))
        # The prior's covariance has a small multiple of I added.
        exact = prior._replace(covariance=prior.covariance + 1e-6 * jnp.eye(len(prior.mean)))
        np.testing.assert_allclose(found.log_evidence, exact_log_marginal(exact, batch), rtol=1e-9)
        np.testing.assert_allclose(found.phi, exact_posterior(exact, batch).mean, atol=1e-9)


def test_a_known_deformation_is_found_without_correspondences():
    with jax.enable_x64(True):
        centres = kernels(2)
        prior = Hierarchy(jnp.zeros(14), 0.05 * jnp.eye(14), 0.1)
        u = jnp.asarray(RANDOM.normal(size=(40, 2)))
        phi = draw_deformations(jax.random.key(0), prior, 1)[0]
        v = deform(u, phi, centres)
        found = register(u, v[::-1], prior, centres, Matching(noise=0.02, weight=1.0, steps=40))
        np.testing.assert_allclose(deform(u, found.phi, centres), v, atol=0.02)
        other = register(u, jnp.asarray(RANDOM.normal(size=(40, 2))), prior, centres, Matching(noise=0.02, weight=1.0))
        assert found.log_evidence > other.log_evidence


def test_without_variance_the_deformation_is_the_mean():
    centres = kernels(0)
    prior = Hierarchy(jnp.zeros(6), jnp.zeros((6, 6)), 0.1)
    u = jnp.asarray(RANDOM.normal(size=(10, 2)), jnp.float32)
    found = register(u, 2 * u, prior, centres)
    np.testing.assert_allclose(found.phi, 0, atol=1e-3)


def test_the_prior_of_deformations_is_recovered():
    with jax.enable_x64(True):
        centres = kernels(0)
        root = np.diag([0.3, 0.1, 0.2, 0.1, 0.05, 0.4])
        prior = Hierarchy(jnp.array([0.2, 0, 0, 0, 0, -0.1]), jnp.asarray(root**2), 0.05)
        u = RANDOM.normal(size=(400, 20, 2))
        phi = draw_deformations(jax.random.key(1), prior, 400)
        v = np.asarray(jax.vmap(lambda a, b: deform(a, b, centres))(jnp.asarray(u), phi))
        pairs = Pairs(u, v + 0.05 * RANDOM.normal(size=v.shape), np.zeros((400, 4)), np.zeros(400), np.zeros(400, int))
        found = fit_prior(pairs, centres, steps=50)
        np.testing.assert_allclose(found.noise, 0.05, rtol=0.05)
        np.testing.assert_allclose(found.mean, prior.mean, atol=0.06)
        np.testing.assert_allclose(jnp.sqrt(jnp.diagonal(found.covariance)), np.diagonal(root), rtol=0.12)


@pytest.mark.parametrize("given", [{"noise": 0.0}, {"weight": -1.0}, {"steps": 0}, {"stray": -0.1}])
def test_settings_of_matching_are_checked(given):
    with pytest.raises(ValueError, match=f"matching.{next(iter(given))} must be"):
        Matching(**given)


@pytest.mark.slow
@pytest.mark.usefixtures("data_dir")
def test_drawings_of_the_official_runs_are_classified_from_one_example():
    pairs = pen_pairs(each=1)
    assert (np.diff(pairs.character) != 0).any()
    centres, matching = kernels(2), Matching(steps=10)
    prior = fit_prior(pairs, centres, steps=10)
    runs, way = official_runs(points=24), 8
    few = runs.labels[0] < way
    first = Runs(runs.training[:1, :way], runs.test[:1, few], runs.labels[:1, few])
    scores = compare(first, background_drawings(2, points=24), prior, centres, matching)
    found = {name: errors(score, first.labels).mean for name, score in rules(scores).items()}
    assert found["both ways / p(a)"] < 0.5  # 0.88 by chance
    # Both directions: exchanging the drawings exchanges the terms.
    swapped = Runs(first.test, first.training, first.labels)
    other = compare(swapped, background_drawings(2, points=24), prior, centres, matching)
    np.testing.assert_allclose(other.forward.phi, jnp.swapaxes(scores.backward.phi, 1, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("data_dir")
def test_new_drawings_vary_and_are_recognised_by_their_points():
    pairs = pen_pairs(each=2)
    prior = fit_prior(pairs, kernels(2), steps=10)
    found = generate(jax.random.key(0), pairs, prior, kernels(2), runs=2, way=4, each=2)
    assert found.generated.shape == found.real.shape == (2, 4, 2, 105, 105)
    assert found.generated.sum((-1, -2)).min() > 50
    assert found.spread["generated"].mean > 0.02
    shares = recognised(found)
    assert shares["generated"].mean > 0.5  # 0.25 by chance
    assert background_runs(1, points=10).training.shape == (1, 20, 10, 2)
    with pytest.raises(ValueError, match="each 2 to 19"):
        generate(jax.random.key(0), pairs, prior, kernels(2), each=20)


@pytest.mark.slow
@pytest.mark.usefixtures("data_dir")
def test_the_study_of_concepts_writes_its_table_and_picture(tmp_path, capsys):
    settings = (
        "--runs",
        "1",
        "--pairs",
        "1",
        "--kernels",
        "0",
        "--points",
        "12",
        "--background",
        "1",
        "--new",
        "1",
        "--each",
        "2",
    )
    run_cli("study", "concepts", "--out", str(tmp_path), *settings)
    out = capsys.readouterr().out
    assert "both ways / p(a)" in out
    found = json.loads((tmp_path / "concepts.json").read_text())
    assert 0 <= found["error"]["learned"]["both ways / p(a)"]["mean"] <= 1
    assert (tmp_path / "concepts.png").stat().st_size > 10_000
    run_cli("study", "concepts", "--runs", "21", "--out", str(tmp_path), code=2)
    assert "runs must be 1 to 20" in capsys.readouterr().err
