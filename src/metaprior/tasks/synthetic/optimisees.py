"""Functions to minimise, as tasks for training learned optimisers (Andrychowicz et al. 2016, sec. 3.1, 3.2)."""

from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from metaprior.core.extras import extra
from metaprior.core.options import Count, Seed, checked
from metaprior.core.types import Batch, Splits, Task
from metaprior.tasks.tables.arrays import array_tasks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quadratics:
    """Functions f(theta) = |W theta - y|^2 with standard normal W and y; x holds the rows of W.

    The query is the support, because a function is judged by its own value.

    Attributes:
        dimension: D, the number of rows and columns of W.
        stream: A number that is folded into every key, so that the splits differ.
    """

    dimension: int = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks.

        Returns:
            x [n, d, d] and y [n, d, 1], the same for support and query.
        """
        key_w, key_y = jax.random.split(jax.random.fold_in(key, self.stream))
        d = self.dimension
        rows = Batch(jax.random.normal(key_w, (n, d, d)), jax.random.normal(key_y, (n, d, 1)))
        return Task(rows, rows)


@checked
def quadratics(*, dimension: Count = 10) -> Splits:
    """Makes tasks of random quadratics |W theta - y|^2, which are linear regressions without a bias (network `linear`).

    Under a Gaussian likelihood with standard deviation sqrt(1 / (2 dimension)), the mean nll is the function itself, up
    to a constant.

    Args:
        dimension: The number of rows and columns of W.

    Returns:
        Three sources of the same distribution, with disjoint random keys.

    References:
        Andrychowicz et al. 2016, sec. 3.1 (dimension 10).
    """
    return Splits(*(Quadratics(dimension, stream) for stream in range(3)))


def digits(
    *, shot: int = 400, query: int = 128, test_query: int = 128, split: tuple[float, float, float] = (0.4, 0.3, 0.3),
    seed: Seed = 0,
) -> Splits:  # fmt: skip
    """Makes tasks of fitting a network to real handwritten digits, 8 x 8 pixels: x [n, 64] in 0..1, y [n] in 0..9.

    The images are the 1,797 images of the UCI test set in scikit-learn; nothing is downloaded. The three splits share
    no image.

    Args:
        shot: Random images of the split to fit.
        query: Other images to evaluate on in training.
        test_query: The same in validation and test.
        split: The fractions of the images for training, validation and test.
        seed: The seed of the random assignment.

    Returns:
        Tasks of the training, validation and test images.

    Raises:
        DataError: Shot + query above the number of images of a split.
        MissingExtra: Scikit-learn is not installed.
    """
    with extra("sklearn", "The task source 'digits'"):
        from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    part = np.searchsorted(np.cumsum(split)[:2] * len(y), order, side="right")
    return array_tasks(
        x / 16, y, part, shot=shot, query=query, test_query=test_query, split=[[0], [1], [2]], ragged="exact",
        classification=True,
    )  # fmt: skip
