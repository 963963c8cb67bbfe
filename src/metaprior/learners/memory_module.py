"""The memory module of Kaiser, Nachum, Roy & Bengio (2017): keys that are written by rule and read by their neighbour.

A memory has slots with a key K of unit length, a value (a class) and an age. An example x with label y has the query
q = A f(x) / |A f(x)|, and the slot of the largest q'K is its nearest.

1. Prediction: the value of the nearest slot.
2. Loss: max(0, max_{value != y} q'K - max_{value = y} q'K + margin). A maximum over no slot is 0. Keys are constant, so
   gradients flow through q alone.
3. Write, without a gradient: if the nearest slot has the value y, its key becomes (q + K) / |q + K|. Otherwise an empty
   slot, or the one of the largest age + U(-noise, noise) if there is none, gets the key q and the value y. The written
   slot has age 0, and all others become older by 1.
4. In an episode every class is shown once before any is shown twice, in random order.

The published code makes an optimiser's step at each time step, and 16 episodes with different classes share a memory.
Here each task has its own memory, and the loss is the mean over the time steps of its episode, support and
query. All slots are compared; the published code compares the 256 nearest, and the slot last written for y.
"""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Likelihood, one_hot
from metaprior.core.options import Count, NonNegative, Positive, Range, Way, checked
from metaprior.core.types import Batch, Learner, Model, Task, joined, labelled, weighted_mean, weights
from metaprior.learners.builders.amortised import by_instance, embedding
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.metric import (
    ABSENT,
    check_classification,
    embed_query,
    memberships,
    number_of_classes,
    present,
    scored_by_query,
    unit,
)
from metaprior.learners.traits import traits

EMPTY = -1  # the value of a slot that was never written


class Queries(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of the model.
        projection: A.
    """

    embedding: PyTree
    projection: Float[Array, "d width"]


class Memory(NamedTuple):
    """Slots of a memory.

    Attributes:
        keys: K, of unit length.
        values: Their classes, or EMPTY.
        ages: Time steps since each slot was written.
    """

    keys: Float[Array, "slots width"]
    values: Int[Array, " slots"]
    ages: Float[Array, " slots"]


class Remembered(NamedTuple):
    """The posterior.

    Attributes:
        memory: The memory after the support.
        shots: Weight of each class's support examples; 0 marks a class without examples.
        beside: As in `protonet.Prototypes`.
    """

    memory: Memory
    shots: Float[Array, " way"]
    beside: PyTree


def blank(slots: int, width: int, dtype: jnp.dtype) -> Memory:
    """Returns an empty memory of at least one slot."""
    slots = max(slots, 1)
    return Memory(jnp.zeros((slots, width), dtype), jnp.full(slots, EMPTY), jnp.zeros(slots))


def nearest(memory: Memory, q: Float[Array, "n width"], way: int) -> Float[Array, "n way"]:
    """Returns the largest q'K among each class's slots; ABSENT for a class without a slot."""
    mine = memory.values[:, None] == jnp.arange(way)
    similarity = jnp.matmul(q, memory.keys.T, precision="highest")
    return jnp.where(mine, similarity[..., None], ABSENT).max(-2)


def margin_loss(memory: Memory, q: Float[Array, " width"], y: Int[Array, ""], margin: float) -> Scalar:
    """Computes step 2."""
    similarity = jnp.matmul(memory.keys, q, precision="highest")

    def most(slots: Array) -> Scalar:
        return jnp.where(slots.any(), jnp.where(slots, similarity, -jnp.inf).max(initial=-2), 0)

    wrong = most((memory.values != EMPTY) & (memory.values != y))
    return jax.nn.relu(wrong - most(memory.values == y) + margin)


def write(memory: Memory, q: Float[Array, " width"], y: Int[Array, ""], noise: Float[Array, " slots"]) -> Memory:
    """Makes step 3; `noise` is added to the ages."""
    filled = memory.values != EMPTY
    near = jnp.where(filled, jnp.matmul(memory.keys, q, precision="highest"), -jnp.inf).argmax()
    right = memory.values[near] == y
    slot = jnp.where(right, near, jnp.where(filled, memory.ages + noise, jnp.inf).argmax())
    key = jnp.where(right, unit((q + memory.keys[near])[None])[0], q)
    return Memory(
        memory.keys.at[slot].set(key),
        memory.values.at[slot].set(y),
        jnp.where(filled, memory.ages + 1, 0).at[slot].set(0),
    )


@traits(of_classes=True, ordered=True, reads_unlabelled=True, rules_out_unseen=True, distance="cosine", estimates=True)
@checked
def memory_module(
    model: Model,
    likelihood: Likelihood,
    *,
    slots: Count | None = None,
    width: Count = 128,
    margin: NonNegative = 0.1,
    noise: NonNegative = 8.0,
    keep: Annotated[float, Range(above=0, most=1)] = 1.0,
    temperature: Positive = 0.1,
    way: Way | None = None,
    transductive: bool = True,
) -> Learner:
    """Meta-learns keys for a memory that a rule writes, in which an example finds the class of its nearest key.

    A support is read in its given order, and examples of weight 0 are left out; any other weight counts as 1. The
    metrics are of the time steps at which the class was shown before; `instance_k` is the accuracy at a class's k-th
    showing.

    Args:
        model: The network; its features are the embedding f (its outputs where it has no features).
        likelihood: Must be `Categorical`.
        slots: Number of slots. None: one for each example, so that no slot is overwritten.
        width: Numbers of a key.
        margin: The margin of the loss.
        noise: Range of the random numbers that are added to ages.
        keep: Probability with which dropout keeps each number of the embedding in training. The paper has 0.3.
        temperature: Divides the cosines. The most probable class does not depend on it.
        way: The largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: Whether queries are embedded as one batch. False embeds each query in a separate batch with
            the support, which matters under batch norm. In training, support and query are two batches.

    Raises:
        ValueError: The likelihood is not categorical, or an option is out of range.

    References:
        Kaiser, Nachum, Roy & Bengio (2017), sec. 2.
    """
    check_classification("memory_module", likelihood, way)
    embed = embedding(model)

    def init(key: PRNGKeyArray, task: Task) -> Queries:
        key_model, key_projection = jax.random.split(key)
        start = model.init(key_model, task.support.x)
        d = jax.eval_shape(embed, start, task.support.x).shape[-1]
        return Queries(start, 0.01 * jax.random.normal(key_projection, (d, width)))

    def classes_of(params: Queries, x: PyTree) -> int:
        return number_of_classes(model, way, params.embedding, x)

    def asked(params: Queries, f: Float[Array, "n d"]) -> Float[Array, "n width"]:
        return unit(jnp.matmul(f, params.projection, precision="highest"))

    def run(memory: Memory, q: Array, y: Array, there: Array, key: PRNGKeyArray, classes: int) -> tuple[Memory, tuple]:
        """Reads a sequence and skips what is not there; returns the memory, and the scores and losses of each step."""

        def see(memory: Memory, now: tuple[Array, Array, Array, Array]) -> tuple[Memory, tuple[Array, Scalar]]:
            i, q, y, there = now
            shift = jax.random.uniform(jax.random.fold_in(key, i), memory.ages.shape, minval=-noise, maxval=noise)
            after = write(memory, jax.lax.stop_gradient(q), y, shift)
            after = jax.tree.map(lambda new, old: jnp.where(there, new, old), after, memory)
            return after, (nearest(memory, q[None], classes)[0], margin_loss(memory, q, y, margin))

        return jax.lax.scan(see, memory, (jnp.arange(y.shape[0]), q, y, there))

    def adapt(params: Queries, support: Batch, key: PRNGKeyArray) -> Remembered:
        classes = classes_of(params, support.x)
        shares = memberships(support, classes)
        q, y = asked(params, embed(params.embedding, support.x)), jnp.asarray(support.y).astype(int)
        memory = blank(y.shape[0] if slots is None else slots, width, q.dtype)
        memory = run(memory, q, y, (shares > 0).any(-1), key, classes)[0]
        return Remembered(memory, shares.sum(0), None if transductive else support.x)

    def logits(params: Queries, found: Remembered, x: PyTree) -> Float[Array, "q way"]:
        q = asked(params, embed_query(embed, params.embedding, x, found.beside))
        near = nearest(found.memory, q, found.shots.shape[0])
        return present(jnp.where(near > ABSENT, near / temperature, ABSENT), found.shots)

    def loss(params: Queries, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        key_drop, key_order, key_noise = jax.random.split(key, 3)
        classes = classes_of(params, task.support.x)
        shares = jnp.concatenate([memberships(batch, classes) for batch in task])  # NaN if a label is impossible
        data = joined(task._replace(support=labelled(task.support)))
        f = jnp.concatenate([embed(params.embedding, batch.x) for batch in task])
        if keep < 1:
            f = jnp.where(jax.random.bernoulli(key_drop, keep, f.shape), f / keep, 0)
        order = jax.random.permutation(key_order, f.shape[0])
        w, y = weights(data)[order], jnp.maximum(jnp.asarray(data.y).astype(int), 0)[order]
        w = w * (shares > 0).any(-1)[order]
        hot = one_hot(y, classes) * (w > 0)[:, None]
        showing = (jnp.cumsum(hot, 0) * hot).sum(-1)
        turn = jnp.argsort(showing, stable=True)  # every class once before any is shown twice
        order, w, y, showing = order[turn], w[turn], y[turn], showing[turn]
        memory = blank(y.shape[0] if slots is None else slots, width, f.dtype)
        near, values = run(memory, asked(params, f)[order], y, w > 0, key_noise, classes)[1]
        episode = Batch(y, y, w)
        metrics = fit_metrics(Categorical(), near / temperature, episode._replace(weight=w * (showing > 1)))
        return weighted_mean(values, episode) + 0 * shares.sum(), metrics | by_instance(near, y, w)

    return scored_by_query(init, adapt, logits)._replace(loss=loss)
