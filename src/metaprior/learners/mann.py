"""Memory-augmented networks (Santoro, Bartunov, Botvinick, Wierstra & Lillicrap 2016) and the paper's two ablations.

At time t of an episode the network sees (x_t, y_{t-1}), the label one step late, and must say y_t: it has to store what
it saw until the label comes, and find it again (sec. 2). An LSTM controller writes to and reads from an external memory
(sec. 3); its state and what was read give the outputs. `ntm` has the neural Turing machine's memory instead, `lstm`
none. The loss is the nll at every time step of the episode, support and query in random order, here its mean. The
posterior is the state after the support; each query goes on from it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Likelihood
from metaprior.core.options import Count, Fraction, checked
from metaprior.core.types import Batch, Learner, Model, Task, counted, examples, weights
from metaprior.inference.descent import mean_nll
from metaprior.learners.builders.amortised import as_inputs, by_instance, embedding, output_width
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.builders.knobs import with_noise
from metaprior.learners.traits import traits
from metaprior.networks.layers import dense, dense_init
from metaprior.networks.lstm import gated, lstm_init
from metaprior.networks.memory import Access, found, least_used, turing


class Mann(NamedTuple):
    """theta.

    Attributes:
        embedding: parameters of the embedding of x (the given model).
        inputs: from the embedding to the controller.
        recurrent: from state, label and what was read to the controller.
        address: from the controller to what it asks of the memory; None without a memory.
        head: the linear layer on top.
    """

    embedding: PyTree
    inputs: dict[str, Array]
    recurrent: dict[str, Array]
    address: dict[str, Array] | None
    head: dict[str, Array]


class State(NamedTuple):
    """The posterior.

    Attributes:
        hidden: output of the controller.
        cell: cell of the controller.
        memory: contents and addresses of the memory.
        label: the label that is shown with the next example.
    """

    hidden: Float[Array, " h"]
    cell: Float[Array, " h"]
    memory: PyTree
    label: Float[Array, " t"]


@traits(reads_names=True, ordered=True, small={"hidden": 16, "slots": 16, "width": 8, "heads": 2})
@checked
def mann(
    model: Model,
    likelihood: Likelihood,
    *,
    hidden: Count = 200,
    slots: Count = 128,
    width: Count = 40,
    heads: Count = 4,
    decay: Fraction = 0.95,
    sharpen: bool = True,
    shuffle: bool = True,
) -> Learner:
    """Meta-learns to store labelled examples in an external memory and to find them again.

    The order of the support matters. The answer depends on how classes are named, as far as training has not taught
    otherwise. A weight above 0 counts as 1. After an empty support nothing is remembered.

    Args:
        model: the network, whose features are the embedding.
        likelihood: of the support and the query.
        hidden: number of units of the controller.
        slots: number of rows of the memory.
        width: length of a row of the memory.
        heads: number of heads that read and write.
        decay: factor by which the usage of a row decays per step.
        sharpen: whether the controller sets how sharply each head reads. False is the paper's softmax of bare cosines,
            which is nearly even.
        shuffle: whether training shows episodes in random order.

    References:
        Santoro, Bartunov, Botvinick, Wierstra & Lillicrap 2016, sections 2 and 3.
    """
    memory = least_used(slots, width, heads, decay, sharpen)
    return remembering(model, likelihood, memory, hidden=hidden, shuffle=shuffle)


@traits(reads_names=True, ordered=True, small={"hidden": 32, "slots": 16, "width": 8, "heads": 1})
@checked
def ntm(
    model: Model, likelihood: Likelihood, *, hidden: Count = 200, slots: Count = 128, width: Count = 40,
    heads: Count = 4, shuffle: bool = True,
) -> Learner:  # fmt: skip
    """Meta-learns to remember with the memory of a neural Turing machine, otherwise as `mann`.

    Heads address rows by content, by where they were before, and by shifts.

    Args:
        model: as in `mann`.
        likelihood: as in `mann`.
        hidden: as in `mann`.
        slots: as in `mann`.
        width: as in `mann`.
        heads: as in `mann`.
        shuffle: as in `mann`.
    """
    return remembering(model, likelihood, turing(slots, width, heads), hidden=hidden, shuffle=shuffle)


@traits(reads_names=True, ordered=True, small={"hidden": 16})
@checked
def lstm(model: Model, likelihood: Likelihood, *, hidden: Count = 200, shuffle: bool = True) -> Learner:
    """Meta-learns to remember in the state of an LSTM alone: `mann` without its memory, the paper's baseline.

    Args:
        model: as in `mann`.
        likelihood: as in `mann`.
        hidden: number of units of the LSTM.
        shuffle: as in `mann`.
    """
    return remembering(model, likelihood, least_used(0, 0, 0), hidden=hidden, shuffle=shuffle)


def remembering(model: Model, likelihood: Likelihood, memory: Access, *, hidden: int, shuffle: bool) -> Learner:
    """Builds a learner whose controller of `hidden` units walks through an episode with a memory of this kind."""
    embed, reads = embedding(model), memory.heads * memory.width

    def init(key: PRNGKeyArray, task: Task) -> Mann:
        keys, x = jax.random.split(key, 5), task.support.x
        theta = model.init(keys[0], x)
        outputs = output_width(model, theta, x)
        t = as_inputs(likelihood, counted(task.support).y, outputs).shape[1]
        return Mann(
            theta,
            dense_init(keys[1], embed(theta, x).shape[1], 4 * hidden),
            lstm_init(keys[2], t + reads, hidden),
            dense_init(keys[3], hidden, memory.heads * memory.numbers) if memory.heads else None,
            dense_init(keys[4], hidden + reads, outputs),
        )

    def step(params: Mann, state: State, drive: Float[Array, " g"]) -> tuple[State, Float[Array, " c"]]:
        """One time step on a projected x: the controller, the memory, the outputs."""
        before = jnp.concatenate([state.label, found(state.memory), state.hidden])
        h, cell = gated(drive + dense("recurrent", params.recurrent, before[None])[0], state.cell)
        after = state.memory
        if params.address is not None:
            after = memory.step(after, dense("address", params.address, h[None]).reshape(memory.heads, -1))
        out = dense("head", params.head, jnp.concatenate([h, found(after)])[None])[0]
        return State(h, cell, after, state.label), out

    def project(params: Mann, x: PyTree) -> Float[Array, "n g"]:
        return dense("inputs", params.inputs, embed(params.embedding, x))

    def sequence(params: Mann, data: Batch) -> tuple[Array, Array, Array]:
        """Returns for each time the projected x, the label, and False for padding."""
        y = as_inputs(likelihood, counted(data).y, output_width(model, params.embedding, data.x))
        return project(params, data.x), y, weights(data) > 0

    def run(params: Mann, shown: tuple[Array, Array, Array]) -> tuple[State, Float[Array, "n c"]]:
        """Runs through a sequence; returns the state at its end and the outputs at each time. Padding is skipped."""
        nothing = State(jnp.zeros(hidden), jnp.zeros(hidden), memory.start(), jnp.zeros(shown[1].shape[1]))

        def see(state: State, now: tuple[Array, Array, Array]) -> tuple[State, Array]:
            drive, label, there = now
            after, out = step(params, state, drive)
            return jax.tree.map(lambda new, old: jnp.where(there, new, old), after._replace(label=label), state), out

        # Recomputing a time step costs less than keeping all that it computed, which leaves the processor's cache.
        return jax.lax.scan(jax.checkpoint(see), nothing, shown)

    def adapt(params: Mann, support: Batch, key: PRNGKeyArray) -> State:
        return run(params, sequence(params, support))[0]

    def read(params: Mann, state: State, x: PyTree) -> Float[Array, "n c"]:
        return jax.vmap(lambda drive: step(params, state, drive)[1])(project(params, x))

    def loss(params: Mann, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        times = jnp.arange(examples(task.support) + examples(task.query))
        order = jax.random.permutation(key, times) if shuffle else times
        parts = [(batch._replace(weight=weights(batch)), sequence(params, batch)) for batch in task]
        episode, shown = jax.tree.map(lambda s, q: jnp.concatenate([s, q])[order], *parts)
        outputs = run(params, shown)[1]
        metrics = fit_metrics(likelihood, outputs, episode)
        if isinstance(likelihood, Categorical):
            metrics |= by_instance(outputs, episode.y, weights(episode))
        return mean_nll(likelihood, outputs, episode), metrics

    def predicting(shown: Likelihood) -> Learner:
        def predict(params: Mann, state: State, x: PyTree, key: PRNGKeyArray) -> Any:
            return shown.predictive(read(params, state, x)[None])

        return Learner(init, adapt, predict, loss)

    return with_noise(predicting, likelihood)
