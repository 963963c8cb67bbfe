"""Tasks of images in several styles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter

import metaprior as mp
from metaprior.core.types import families_of, innermost
from metaprior.experiments.recipe import load_recipe
from metaprior.experiments.results import published_for
from metaprior.tasks import class_pool, filtered, sinusoid
from metaprior.tasks.images.filters import blurred, pencilled
from metaprior.tasks.pool import ClassPool

RNG = np.random.default_rng(0)


def picture(size=24) -> Any:
    """A smooth picture with an edge, uint8 [h, w, 3]."""
    noise = gaussian_filter(RNG.normal(size=(size, size, 3)), (2, 2, 0))
    noise[:, size // 2 :] += 0.5
    return np.uint8(255 * (noise - noise.min()) / np.ptp(noise))


def pool(**options):
    images = np.stack([picture(12) for _ in range(12)])
    source = class_pool(images, [3] * 4, way=2, shot=1, query=1, **options)
    return mp.Splits(source, source, source)


def test_the_blur_is_a_gaussian():
    drawn = picture()
    image = drawn / 255.0
    found = np.asarray(blurred(jnp.asarray(image[None]), 2.0)[0])
    expected = gaussian_filter(image, (2.0, 2.0, 0.0), mode="nearest")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    boxes = np.asarray(Image.fromarray(drawn).filter(ImageFilter.GaussianBlur(2)), float)  # PIL's approximation
    assert np.abs(255 * found - boxes).mean() < 2


def test_the_pencil_divides_grey_by_its_blur():
    """255 g / (255 - blur(255 - g)), at most 255."""
    image = np.asarray(picture(), float)
    grey = image @ np.array([0.299, 0.587, 0.114])
    expected = np.minimum(255 * grey / (255 - gaussian_filter(255 - grey, 4.0, mode="nearest")), 255)
    found = 255 * pencilled(jnp.asarray(image[None] / 255), 4.0)[0]
    for channel in range(3):
        np.testing.assert_allclose(found[..., channel], expected, atol=0.1)
    black = pencilled(jnp.zeros((1, 6, 6, 3)), 4.0)
    np.testing.assert_array_equal(black, 0)
    np.testing.assert_allclose(pencilled(jnp.full((1, 6, 6, 1), 0.3), 4.0), 1, atol=1e-5)


@pytest.mark.parametrize("scaling", [{}, {"mean": 0.4, "deviation": 0.2}])
def test_a_task_has_one_filter_and_the_labels_of_the_other_source(scaling):
    splits = pool(**scaling)
    source = filtered(splits, blur=1.0, pencil=1.5).test
    key = jax.random.key(3)
    plain = jax.tree.map(lambda leaf: leaf[0], splits.test.sample(key, 1))
    mean, deviation = scaling.get("mean", 0.0), scaling.get("deviation", 1.0)
    shown = plain.query.x * deviation + mean
    expected = {"original": shown, "blur": blurred(shown, 1.0), "pencil": pencilled(shown, 1.5)}
    for i, name in enumerate(families_of(source)):
        task = source.of_family(key, i)  # pyright: ignore
        np.testing.assert_allclose(task.query.x, (expected[name] - mean) / deviation, atol=1e-5)
        np.testing.assert_array_equal(task.support.y, plain.support.y)
    several = source.sample(jax.random.key(0), 4)
    assert several.support.x.shape == (4, 2, 12, 12, 3)
    inner = innermost(source)
    assert isinstance(inner, ClassPool)
    assert [leaf.shape for leaf in jax.tree.leaves(source)].count(inner.images.shape) == 1  # one copy of the pictures


def test_the_oracle_names_the_filter_in_constant_channels():
    source = filtered(pool(), families=("pencil", "blur"), oracle=True).test
    for i, place in enumerate((2, 1)):
        x = source.of_family(jax.random.key(0), i).support.x  # pyright: ignore
        np.testing.assert_array_equal(x[..., 3:], np.broadcast_to(np.eye(3)[place], (2, 12, 12, 3)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: filtered(pool(), families=("blurr",)), "did you mean 'blur'"),
        (lambda: filtered(pool(), families=()), "at least one filter"),
        (lambda: filtered(pool(), blur=0.0), "blur must be"),
        (lambda: filtered(sinusoid()), "splits must be tasks of images"),
        (lambda: filtered(filtered(pool())), "no groups or families"),
        (lambda: filtered(pool()).test.of_family(jax.random.key(0), 3), "0 original, 1 blur, 2 pencil.*got 3"),  # pyright: ignore
    ],
)  # fmt: skip
def test_bad_filters(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_art_multi_is_another_data_set():
    recipe = load_recipe("miniimagenet-art-5way-1shot")
    assert "the published figure is for 'art_multi'" in str(published_for(recipe, recipe))
