"""Augmentation of training images: where pixels go, what stays, and who is left alone."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.types import Batch, Splits, Task
from metaprior.experiments.recipe import build, recipe_from_dict, with_overrides
from metaprior.tasks import augmented, sinusoid
from metaprior.tasks.images.augment import recoloured, shifted

KEY = jax.random.key(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Numbered:
    """The same images in every task, no two pixels of one alike and none 0."""

    tasks: Task

    def sample(self, key, n):
        return jax.tree.map(lambda leaf: jnp.tile(leaf, (n, *[1] * (leaf.ndim - 1))), self.tasks)


IMAGES = 1 + jnp.arange(3 * 4 * 5 * 3, dtype=float).reshape(1, 3, 4, 5, 3)
TASKS = Numbered(Task(Batch(IMAGES[:, :2], jnp.array([[0, 1]])), Batch(IMAGES[:, 2:], jnp.array([[1]]))))
SPLITS = Splits(TASKS, TASKS, TASKS)


def sample(key=KEY, n=40, **options):
    return jax.jit(lambda k: augmented(SPLITS, **options).train.sample(k, n))(key)


def test_a_crop_is_a_window_of_the_image_with_a_border():
    image = IMAGES[0, 0]
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    np.testing.assert_array_equal(shifted(image, jnp.array([3, 0]), 2), padded[3:7, 0:5])
    np.testing.assert_array_equal(shifted(image, jnp.array([2, 2]), 2), image)
    cut = sample(crop=1).support.x
    assert cut.shape == (40, 2, 4, 5, 3)
    # Nine windows, each with its own rows and columns of border.
    assert len({tuple((x[..., 0] > 0).ravel().tolist()) for x in np.asarray(cut[:, 0])}) == 9


def test_mirrored_every_other_time_and_each_image_by_itself():
    task = sample(flip=True)
    plain = TASKS.sample(KEY, 40)
    for side, before in zip(task, plain, strict=True):
        same = (side.x == before.x).all((2, 3, 4))
        assert (same | (side.x == before.x[:, :, :, ::-1]).all((2, 3, 4))).all()
        assert 0.2 < same.mean() < 0.8
    assert (task.support.y == plain.support.y).all()
    turned = (task.support.x == plain.support.x).all((2, 3, 4))
    assert (turned[:, 0] != turned[:, 1]).any()


def test_colours_change_by_their_factors():
    image = jax.random.uniform(KEY, (4, 4, 3))
    np.testing.assert_allclose(recoloured(image, 1.5, 1, 1), 1.5 * image, rtol=1e-5)
    np.testing.assert_allclose(recoloured(image, 1, 0, 1), jnp.full_like(image, image.mean()), rtol=1e-5)
    np.testing.assert_allclose(recoloured(image, 1, 1, 0), jnp.repeat(image.mean(-1, keepdims=True), 3, -1), rtol=1e-5)
    plain = TASKS.sample(KEY, 40).support.x
    ratio = sample(jitter=0.2).support.x.mean((2, 3, 4)) / plain.mean((2, 3, 4))
    assert 0.8 <= ratio.min() < 0.85
    assert 1.15 < ratio.max() <= 1.2


@pytest.mark.slow
def test_only_training_is_augmented_and_the_same_key_gives_the_same_bits():
    changed = augmented(SPLITS, crop=1, flip=True, jitter=0.1)
    assert changed.validation is TASKS
    assert changed.test is TASKS
    options = {"crop": 1, "flip": True, "jitter": 0.1}
    assert (sample(**options).query.x == sample(**options).query.x).all()
    assert (sample(**options).query.x != sample(jax.random.key(1), **options).query.x).any()
    assert (sample().support.x == TASKS.sample(KEY, 40).support.x).all()


def test_a_recipe_sets_it():
    recipe = recipe_from_dict({
        "name": "augmented", "learner": "protonet", "tasks": {"name": "images", "way": 2},
        "network": {"name": "mlp", "hidden": [4]}, "likelihood": {"name": "categorical"},
        "augmentation": {"flip": True},
    })  # fmt: skip
    made = build(with_overrides(recipe, None, {"augmentation.crop": 1}), splits=SPLITS)
    assert (made.splits.train.crop, made.splits.train.flip) == (1, True)
    assert made.splits.test is TASKS
    with pytest.raises(ValueError, match="did you mean 'jitter'"):
        build(with_overrides(recipe, None, {"augmentation.jiter": 0.1}), splits=SPLITS)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="crop must be"):
        augmented(SPLITS, crop=-1)
    with pytest.raises(ValueError, match=r"jitter must be"):
        augmented(SPLITS, jitter=1.5)
    with pytest.raises(ValueError, match="augmentation needs tasks of images"):
        augmented(sinusoid(), flip=True)
