"""Functions to be optimised, as tasks: what learned optimisers train on (Andrychowicz et al. 2016, sec. 3.1, 3.2)."""

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
    """f(theta) = |W theta - y|^2 with W and y standard normal; x holds the rows of W.

    The query is the support: a function is judged by its own value. `stream` keeps the splits apart.
    """

    dimension: int = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """n tasks: x [n, d, d] and y [n, d, 1], support and query alike."""
        key_w, key_y = jax.random.split(jax.random.fold_in(key, self.stream))
        d = self.dimension
        rows = Batch(jax.random.normal(key_w, (n, d, d)), jax.random.normal(key_y, (n, d, 1)))
        return Task(rows, rows)


@checked
def quadratics(*, dimension: Count = 10) -> Splits:
    """Random quadratics |W theta - y|^2: linear regression of `dimension` rows without a bias (network `linear`).

    Under a Gaussian likelihood of sd sqrt(1 / (2 dimension)) the mean nll is the function itself, up to a constant.

    Source: Andrychowicz et al. 2016, sec. 3.1 (dimension 10).
    """
    return Splits(*(Quadratics(dimension, stream) for stream in range(3)))


def digits(
    *, shot: int = 400, query: int = 128, test_query: int = 128, split: tuple[float, float, float] = (0.4, 0.3, 0.3),
    seed: Seed = 0,
) -> Splits:  # fmt: skip
    """Fits of a network to real handwritten digits, 8 x 8: x [n, 64] in 0..1 and y [n] in 0..9.

    A task is a random `shot` of its split's images to fit and `query` others to be judged by; the three splits share
    no image. scikit-learn's 1,797 images of the UCI test set; nothing is downloaded.

    Raises:
        DataError: shot + query above the images of a split.
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
