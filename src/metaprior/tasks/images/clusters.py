"""Tasks without labels: clusters of an embedding take the place of classes (CACTUs, Hsu, Levine & Finn 2019)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from metaprior.core.extras import extra
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count, NonNegative
from metaprior.core.types import Splits, Task, WrappedSource
from metaprior.tasks.checks import DataError
from metaprior.tasks.drawing import as_task, draw_rows
from metaprior.tasks.images.embedding import Embedding, digest, embedded
from metaprior.tasks.pool import ClassPool
from metaprior.tasks.store import cached

TRIES = 10  # clusterings of one partition before giving up
OUTSIDE = -1  # the label of an image that is in no cluster


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClusterTasks:
    """Training tasks whose classes are clusters of one of several partitions of the same images.

    Attributes:
        source: The pool of the images. Its true classes are not used.
        members: The rows of the images, cluster after cluster, partition after partition.
        starts: The first member of each cluster.
        counts: The number of members of each cluster; 0 after the last one of a partition.
        left: The number of clusters of each partition.
        shot: Support examples per cluster.
        made: The number of clusters of a partition before small ones were dropped.
    """

    source: ClassPool
    members: Int[Array, " members"]
    starts: Int[Array, "partitions clusters"]
    counts: Int[Array, "partitions clusters"]
    left: Int[Array, " partitions"]
    shot: int = field(metadata={"static": True})
    made: int = field(default=0, metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks: a partition, then clusters of it, then images of each cluster, all uniformly.

        Returns:
            Tasks as those of `ClassPool.sample`. A label is the place of the cluster in the task, which is random.
        """
        return jax.vmap(self._one)(jax.random.split(key, n))

    def _one(self, key: PRNGKeyArray) -> Task:
        # Clusters and images are drawn from the same key as classes in `ClassPool`.
        place = jax.random.randint(jax.random.fold_in(key, 0), (), 0, self.left.shape[0])
        size = self.shot + self.source.query
        drawn, _, labels = draw_rows(
            key, self.starts[place], self.counts[place], self.source.way, size, among=self.left[place]
        )
        images = self.source.images[self.members[drawn]].astype(jnp.float32) / 255
        return as_task(self.source.normalised(images), labels, self.shot)

    def __str__(self) -> str:
        left, fewest = np.asarray(self.left), self.shot + self.source.query
        range_ = f"{left.min()}" if left.min() == left.max() else f"{left.min()} to {left.max()}"
        return f"{len(left)} partitions, with {range_} of {self.made} clusters left, of at least {fewest} images"


def clusters_of(source: Any) -> ClusterTasks | None:
    """Returns the cluster tasks of a source or of a source that it wraps, or None.

    Args:
        source: A task source.
    """
    while not isinstance(source, ClusterTasks) and isinstance(source, WrappedSource):
        source = source.source
    return source if isinstance(source, ClusterTasks) else None


@dataclass(frozen=True, kw_only=True)
class Clustering(Embedding):
    """How images become partitions.

    Attributes:
        embedding: As in `Embedding`, as are all options up to `seed`.
        pca: As in `Embedding`.
        blur: As in `Embedding`.
        ink: As in `Embedding`.
        code: As in `Embedding`.
        steps: As in `Embedding`.
        seed: The seed of the embedding and of the partitions.
        partition: "kmeans"; "hyperplanes" (regions between random hyperplanes); "random" (labels at random: the
            baseline at which nothing can be learned); or "classes" (the true classes: the oracle).
        clusters: The number of clusters of a partition.
        partitions: The number of partitions. "classes" has one.
        restarts: The number of k-means runs of which the best is kept. None means 10 for one partition, 1 for several.
        hyperplanes: The number of splits by a hyperplane from which partitions are made.
        margin: The distance from a hyperplane up to which images are in no region.
        offset: The largest coordinate of the random point through which a hyperplane passes.
        shot: Support examples per cluster in training. None means `tasks.shot`.
        validation: Whether the images of the validation classes are training images too.
    """

    partition: Literal["kmeans", "hyperplanes", "random", "classes"] = "kmeans"
    clusters: Count = 500
    partitions: Count = 4
    restarts: Count | None = None
    hyperplanes: Count = 1000
    margin: NonNegative = 0.0
    offset: NonNegative = 0.8
    shot: Count | None = None
    validation: bool = False


@passes_options_to(Clustering)
def clustered(splits: Splits, **options: Any) -> Splits:
    """Makes training tasks from clusters of the training images, without their labels.

    Validation and test tasks keep their true labels. The published protocol chooses nothing by validation labels.

    1. An embedding z of the training images is clustered by k-means into `clusters` clusters. Partitions after the
       first cluster z diag(w), with w uniform in [0, 1]^d for each partition.
    2. A clustering is drawn again unless more than 75 % of its clusters have more than R = shot + query members. Then
       clusters with fewer than R members are dropped.
    3. A task draws a partition, `way` of its clusters and R members of each, uniformly and without replacement.

    Args:
        splits: Tasks of a pool of images, such as those of `omniglot`, without rotations in training.
        options: The fields of `Clustering`.

    Returns:
        The splits, with `ClusterTasks` for training.

    Raises:
        DataError: Another source; rotated or numbered training classes; fewer clusters than a task needs; a file that
            does not fit.
        ValueError: Options out of range.

    References:
        Hsu, Levine & Finn (2019), Algorithm 1.
    """
    how = Clustering(**options)
    pool = check_pool(splits.train)
    shot = pool.shot if how.shot is None else how.shot
    rows, _, labels = _labelled(splits, how)
    members, starts, counts, left = cluster_table(labels, rows, shot + pool.query)
    if left.min() < pool.way:
        raise DataError(
            f"way must be at most {left.min()}, the number of clusters of a partition with at least "
            f"{shot + pool.query} members (shot + query), got {pool.way} in training. Lower tasks.train_way or "
            "tasks.query, or change clusters.clusters."
        )
    made = int(labels.max()) + 1
    tasks = ClusterTasks(pool, *map(jnp.asarray, (members, starts, counts, left)), shot=shot, made=made)
    return splits._replace(train=tasks)


def _labelled(splits: Splits, how: Clustering) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pool = check_pool(splits.train)
    rows, truth = training_images(splits, how)
    least = (pool.shot if how.shot is None else how.shot) + pool.query
    return rows, truth, partitions_of(pool, how, rows, truth, least, pool.way)


def partitions(splits: Splits, how: Clustering) -> list[dict[str, float]]:
    """Compares the partitions of the training images with their true classes.

    Args:
        splits: The splits before `clustered`.
        how: The options of the clusters.

    Returns:
        For each partition, `agreement`, and "left": its number of clusters that are large enough for a task.
    """
    rows, truth, labels = _labelled(splits, how)
    pool = check_pool(splits.train)
    least = (pool.shot if how.shot is None else how.shot) + pool.query
    left = cluster_table(labels, rows, least)[3]
    return [{"left": int(n)} | agreement(part, truth) for n, part in zip(left, labels, strict=True)]


def check_pool(source: Any) -> ClassPool:
    """Returns the pool of training images.

    Raises:
        DataError: Another source, rotated classes, or classes with fixed numbers.
    """
    if not isinstance(source, ClassPool):
        raise DataError(f"clusters need a pool of images, such as omniglot or images, got {type(source).__name__}.")
    if source.rotations > 1:
        raise DataError("tasks.rotations must be false with [clusters], since rotations would be labels, got true.")
    if source.labels != "task":
        raise DataError(f"tasks.train_labels must be 'task' with [clusters], got {source.labels!r}. Leave it out.")
    return source


def training_images(splits: Splits, how: Clustering) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Returns the sorted rows of the training images in the pool, and the true class of each, for later comparison."""
    sources = [splits.train, *([splits.validation] if how.validation else [])]
    parts = [source for source in sources if isinstance(source, ClassPool)]
    rows = np.concatenate([_rows_in(part) for part in parts])
    truth = np.concatenate([np.repeat(np.asarray(part.classes), np.asarray(part.counts)) for part in parts])
    order = np.argsort(rows)
    return rows[order], truth[order]


def _rows_in(pool: ClassPool) -> Int[np.ndarray, " n"]:
    ends = zip(np.asarray(pool.starts), np.asarray(pool.counts), strict=True)
    return np.concatenate([np.arange(start, start + count) for start, count in ends])


def partitions_of(
    pool: ClassPool, how: Clustering, rows: np.ndarray, truth: np.ndarray, least: int, way: int
) -> Int[np.ndarray, "partitions n"]:
    """Returns the label of each training image in each partition. Partitions are cached on disk.

    Args:
        pool: The pool of the images.
        how: The options.
        rows: The rows of the training images.
        truth: Their true classes, which only the oracle uses.
        least: The number of images that a task draws from a cluster.
        way: The number of clusters that a task draws.
    """
    rng = np.random.default_rng(how.seed)
    if how.partition == "classes":
        return np.unique(truth, return_inverse=True)[1][None].astype(np.int32)
    if how.clusters > len(rows):
        raise DataError(f"clusters.clusters must be at most {len(rows)}, the number of images, got {how.clusters}.")
    if how.partition == "random":
        return rng.integers(how.clusters, size=(how.partitions, len(rows)), dtype=np.int32)
    z = embedded(pool, how, rows, rows)

    def build() -> dict[str, np.ndarray]:
        make = kmeans_partitions if how.partition == "kmeans" else hyperplane_partitions
        return {"labels": make(z, how, least, way, rng)}

    names = ("partition", "clusters", "partitions", "restarts", "hyperplanes", "margin", "offset", "seed")
    identity = {"version": 1, "z": digest(z), "how": [getattr(how, name) for name in names], "least": least}
    identity |= {"way": way} if how.partition == "hyperplanes" else {}
    return np.asarray(cached("partitions", identity, build)["labels"])


def kmeans_labels(
    z: Float[np.ndarray, "n d"], clusters: int, scale: Float[np.ndarray, " d"], restarts: int, seed: int
) -> Int[np.ndarray, " n"]:
    """Clusters z diag(scale) by k-means with k-means++ starts.

    Args:
        z: The embedding.
        clusters: The number of clusters.
        scale: The factor of each coordinate.
        restarts: The number of runs of which the best is kept.
        seed: The seed.
    """
    with extra("sklearn", "Clustering"):
        from sklearn.cluster import KMeans
    model: Any = KMeans(clusters, n_init=restarts, max_iter=3000, random_state=seed)  # type: ignore[arg-type]
    return model.fit_predict(z * scale.astype(z.dtype)).astype(np.int32)


def kmeans_partitions(
    z: Float[np.ndarray, "n d"], how: Clustering, least: int, way: int, rng: np.random.Generator
) -> Int[np.ndarray, "partitions n"]:
    """Returns partitions by k-means; the first has no scaling of the coordinates, the others a random one.

    Raises:
        DataError: Too many small clusters in every attempt.
    """
    restarts = how.restarts or (10 if how.partitions == 1 else 1)
    found, large = [], 0
    for place in range(how.partitions):
        for _ in range(TRIES):
            scale = rng.uniform(size=z.shape[1]) if place else np.ones(z.shape[1])
            labels = kmeans_labels(z, how.clusters, scale, restarts, int(rng.integers(2**31)))
            large = int((np.bincount(labels, minlength=how.clusters) > least).sum())
            if large > 0.75 * how.clusters:
                break
        else:
            raise DataError(
                f"clusters.clusters must leave more than 75 % of the clusters with more than {least} images (shot + "
                f"query), got {large} of {how.clusters} in {TRIES} attempts. Lower clusters.clusters or tasks.query."
            )
        found.append(labels)
    return np.stack(found)


def hyperplane_partitions(
    z: Float[np.ndarray, "n d"], how: Clustering, least: int, way: int, rng: np.random.Generator
) -> Int[np.ndarray, "partitions n"]:
    """Returns partitions into the regions between ceil(log2 way) random hyperplanes.

    A split is kept if both of its sides, at least `margin` from the hyperplane, have 10 `least` images, and a partition
    if at least `way` regions have `least` images.

    Raises:
        DataError: Too few such splits or partitions.
    """
    splits: list[np.ndarray] = []
    for _ in range(20 * how.hyperplanes):
        normal = rng.uniform(-1, 1, z.shape[1])
        point = rng.uniform(-how.offset, how.offset, z.shape[1])
        distance = (z - point) @ (normal / np.linalg.norm(normal))
        below, above = distance <= -how.margin, distance >= how.margin
        if min(below.sum(), above.sum()) >= 10 * least:
            splits.append(np.where(above, 1, np.where(below, 0, OUTSIDE)).astype(np.int32))
        if len(splits) == how.hyperplanes:
            break
    needed, found = int(np.ceil(np.log2(way))), []
    for _ in range(20 * how.partitions if len(splits) >= needed else 0):
        chosen = np.stack([splits[i] for i in rng.choice(len(splits), needed, replace=False)])
        region = (chosen * 2 ** np.arange(needed)[:, None]).sum(0)
        labels = np.where((chosen == OUTSIDE).any(0), OUTSIDE, region).astype(np.int32)
        if (np.bincount(labels[labels >= 0], minlength=1) >= least).sum() >= way:
            found.append(labels)
        if len(found) == how.partitions:
            return np.stack(found)
    raise DataError(
        f"clusters.margin and clusters.offset must suit the scale of the embedding (its coordinates have standard "
        f"deviation {z.std():.3g}), got {how.margin} and {how.offset}: {len(splits)} splits with {10 * least} images "
        f"on both sides, and {len(found)} of {how.partitions} partitions. Lower them."
    )


def cluster_table(
    labels: Int[np.ndarray, "partitions n"], rows: Int[np.ndarray, " n"], least: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sorts images by partition and cluster, without clusters of fewer than `least` images.

    Args:
        labels: The label of each image in each partition; -1 is no cluster.
        rows: The row of each image in the pool.
        least: The smallest number of images of a cluster.

    Returns:
        The members, the first member and the number of members of each cluster, and the number of clusters of each
            partition, as in `ClusterTasks`.
    """
    members, sizes = [], []
    for partition in labels:
        count = np.bincount(partition[partition >= 0], minlength=1)
        kept = np.flatnonzero(count >= least)
        order = np.argsort(partition, kind="stable")
        members.append(rows[order[np.isin(partition[order], kept)]])
        sizes.append(count[kept])
    left = np.asarray([len(size) for size in sizes], np.int32)
    counts = np.stack([np.pad(size, (0, max(left.max(), 1) - len(size))) for size in sizes])
    starts = (np.cumsum(counts) - counts.reshape(-1)).reshape(counts.shape)
    return np.concatenate(members).astype(np.int32), starts.astype(np.int32), counts.astype(np.int32), left


def agreement(labels: Int[np.ndarray, " n"], truth: Int[np.ndarray, " n"]) -> dict[str, float]:
    """Compares a partition with true classes. Images in no cluster do not count.

    Args:
        labels: The cluster of each image; -1 is none.
        truth: The class of each image.

    Returns:
        "purity": the share of images whose class is the most frequent one of their cluster. "pair_precision": the share
            of pairs within a cluster that are of one class. "nmi" and "ari": normalised mutual information, and the
            adjusted Rand index.
    """
    with extra("sklearn", "Comparing partitions"):
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
        from sklearn.metrics.cluster import contingency_matrix, pair_confusion_matrix
    labels, truth = labels[labels >= 0], truth[labels >= 0]
    table, pairs = contingency_matrix(truth, labels), pair_confusion_matrix(truth, labels)
    return {
        "purity": float(table.max(0).sum() / table.sum()),
        "pair_precision": float(pairs[1, 1] / max(pairs[1, 1] + pairs[0, 1], 1)),
        "nmi": float(normalized_mutual_info_score(truth, labels)),
        "ari": float(adjusted_rand_score(truth, labels)),
    }


Rule = Callable[..., Int[np.ndarray, " m"]]


def _nearest(z: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    z, query = (part.astype(np.float64) for part in (z, query))
    return y[((z**2).sum(1) - 2 * query @ z.T).argmin(1)]


def _centroid(z: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    way = np.unique(y)
    return _nearest(np.stack([z[y == label].mean(0) for label in way]), way, query)


def _logistic(z: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    with extra("sklearn", "The accuracy of an embedding"):
        from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1.0, max_iter=1000).fit(z, y).predict(query)


RULES: dict[str, Rule] = {"nearest centroid": _centroid, "nearest example": _nearest, "logistic regression": _logistic}


def embedding_accuracy(
    splits: Splits, how: Clustering, key: PRNGKeyArray, tasks: int = 600
) -> dict[str, Float[np.ndarray, " tasks"]]:
    """Computes what the embedding itself reaches on test tasks, without meta-learning: the rows to compare with.

    Args:
        splits: The splits before `clustered`.
        how: The options of the clusters.
        key: Random key of the tasks.
        tasks: The number of tasks.

    Returns:
        The accuracy of each task, by rule: the nearest centroid, the nearest example, and logistic regression with
            C = 1, on the embedding of the task's support.

    Raises:
        DataError: Test classes are rotated.
    """
    pool = splits.test
    if not isinstance(pool, ClassPool) or pool.rotations > 1:
        raise DataError("tasks.test_rotations must be false here, as embeddings are of upright images, got true.")
    check_pool(splits.train)
    rows, _ = training_images(splits, how)
    test = np.sort(_rows_in(pool))
    z = embedded(pool, how, rows, test)
    drawn = np.asarray(jax.vmap(lambda k: draw_rows(k, pool.starts, pool.counts, pool.way, pool.shot + pool.query)[0])(
        jax.random.split(key, tasks)))  # fmt: skip
    place = np.searchsorted(test, drawn)
    hits: dict[str, list[float]] = {name: [] for name in RULES}
    for one in z[place]:
        support, query = (part.reshape(-1, z.shape[1]) for part in (one[:, : pool.shot], one[:, pool.shot :]))
        y, asked = np.repeat(np.arange(pool.way), pool.shot), np.repeat(np.arange(pool.way), pool.query)
        for name, rule in RULES.items():
            hits[name].append(float((rule(support, y, query) == asked).mean()))
    return {name: np.asarray(values) for name, values in hits.items()}
