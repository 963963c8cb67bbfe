"""Matching networks (Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra 2016): attention over the support.

p(y | x, S) = sum_i a(x, x_i) y_i (eq. 1), where the attention a is a softmax of cos(f(x), g(x_i)) (sec. 2.1.1).

Full context embeddings (sec. 2.1.2 and appendix A): a bidirectional LSTM reads the support in its given order,
    g(x_i, S) = forward_i + backward_i + g'(x_i),
and each query attends to it K times, f(x, S) = h_K. It starts from a state of zeros, so the first r is a plain average:
    h_k = LSTM(f'(x), [h_k-1, r_k-1]) + f'(x),   r_k-1 = sum_i softmax_i(h_k-1' g(x_i, S)) g(x_i, S).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.options import Count, Positive, Way, Whole, checked
from metaprior.core.types import Batch, Learner, Model, Task, labelled, weights
from metaprior.inference.descent import descend, make_optimizer, mean_nll
from metaprior.learners.builders.amortised import embedding
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
from metaprior.networks.lstm import LSTMState, lstm, lstm_init, lstm_start, run_lstm


class Context(NamedTuple):
    """The LSTMs of the full context embeddings.

    Attributes:
        forward: Reads the support from first to last.
        backward: Reads the support from last to first.
        reader: Reads the support for a query.
    """

    forward: dict[str, Array]
    backward: dict[str, Array]
    reader: dict[str, Array]


class Matching(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of f' = g', the model.
        context: The LSTMs of the full context embeddings, or None.
        log_temperature: Logarithm of the learned temperature. None: the temperature is fixed.
    """

    embedding: PyTree
    context: Context | None
    log_temperature: Scalar | None


class Memory(NamedTuple):
    """The posterior: the support that queries attend to.

    Attributes:
        keys: Embeddings g of the support examples.
        log_weight: Logarithms of their weights.
        shares: Each example's weight, in the column of its class.
        beside: As in `protonet.Prototypes`.
        tuned: Parameters of the embedding after fitting it to the support (`tune_steps`), or None.
    """

    keys: Float[Array, "n d"]
    log_weight: Float[Array, " n"]
    shares: Float[Array, "n way"]
    beside: PyTree
    tuned: PyTree


def support_in_context(context: Context, g: Float[Array, "n d"], weight: Float[Array, " n"]) -> Float[Array, "n d"]:
    """Computes g(x_i, S): each embedding plus the states of both LSTMs at it."""
    there = weight > 0
    return g + run_lstm(context.forward, g, there) + run_lstm(context.backward, g, there, reverse=True)


def query_in_context(context: Context, f: Float[Array, "m d"], memory: Memory, reads: int) -> Float[Array, "m d"]:
    """Computes f(x, S) after `reads` steps of attention to the support."""

    def read(state: LSTMState, _: None) -> tuple[LSTMState, None]:
        attention = jax.nn.softmax(state.h @ memory.keys.T + memory.log_weight)
        after = lstm(context.reader, state, jnp.concatenate([f, attention @ memory.keys], -1))
        return LSTMState(after.h + f, after.c), None

    return jax.lax.scan(read, lstm_start(context.reader, f.shape[0]), length=reads)[0].h


@traits(of_classes=True, reads_unlabelled=True, rules_out_unseen=True, distance="cosine", small={"temperature": 0.1})
@checked
def matching(
    model: Model,
    likelihood: Likelihood,
    *,
    context: bool = False,
    reads: Count = 5,
    temperature: Positive = 1.0,
    learn_temperature: bool = False,
    tune_steps: Whole = 0,
    tune_rate: Positive = 0.01,
    way: Way | None = None,
    transductive: bool = True,
) -> Learner:
    """Meta-learns an embedding in which a query attends to the labels of the support by cosine similarity.

    Args:
        model: The network; its features are the embedding (its outputs where it has no features).
        likelihood: Must be `Categorical`.
        context: Whether to use full context embeddings. The order of the support then matters.
        reads: K, the number of times a query attends to the support. Used with `context`.
        temperature: Divides the cosines. A learned temperature starts from this value. The paper's is 1, with which
            class probabilities differ little.
        learn_temperature: Whether the temperature is meta-learned.
        tune_steps: Number of gradient steps that fit the embedding to a new task's support after training (sec. 4.1).
            They descend the mean nll of the support examples given the whole support, themselves included.
        tune_rate: Learning rate of these steps.
        way: The largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: Whether queries are embedded as one batch. False embeds each query in a separate batch with
            the support, which matters under batch norm.

    Raises:
        ValueError: The likelihood is not categorical, or an option is out of range.

    References:
        Vinyals et al. (2016), eq. 1, sec. 2.1 and 4.1, appendix A.
    """
    check_classification("matching", likelihood, way)
    if tune_steps < 0 or tune_rate <= 0:
        raise ValueError(f"tune_steps must be at least 0 and tune_rate above 0, got {tune_steps} and {tune_rate}.")
    embed = embedding(model)

    def init(key: PRNGKeyArray, task: Task) -> Matching:
        key_model, *keys = jax.random.split(key, 4)
        start = model.init(key_model, task.support.x)
        d = jax.eval_shape(embed, start, task.support.x).shape[-1]
        sizes = (d, d, 2 * d)
        lstms = Context(*(lstm_init(k, size, d) for k, size in zip(keys, sizes, strict=True))) if context else None
        return Matching(start, lstms, jnp.log(jnp.asarray(temperature, float)) if learn_temperature else None)

    def adapt(params: Matching, support: Batch, key: PRNGKeyArray) -> Memory:
        shares = memberships(support, number_of_classes(model, way, params.embedding, support.x))
        keys, weight = embed(params.embedding, support.x), weights(support)
        if params.context is not None:
            keys = support_in_context(params.context, keys, weight)
        log_weight = jnp.where(weight > 0, jnp.log(jnp.where(weight > 0, weight, 1)), ABSENT)
        return Memory(keys, log_weight, shares, None if transductive else support.x, None)

    def tune(params: Matching, support: Batch, key: PRNGKeyArray) -> Memory:
        """Fits the embedding to the support, then adapts."""

        def fit(tuned: PyTree) -> Scalar:
            moved = params._replace(embedding=tuned)
            return mean_nll(likelihood, logits(moved, adapt(moved, support, key), support.x), labelled(support))

        tuned = descend(fit, params.embedding, make_optimizer("sgd", tune_rate), tune_steps, first_order=True).phi
        return adapt(params._replace(embedding=tuned), support, key)._replace(tuned=tuned)

    def logits(params: Matching, memory: Memory, x: PyTree) -> Float[Array, "m way"]:
        theta = params.embedding if memory.tuned is None else memory.tuned
        f = embed_query(embed, theta, x, memory.beside)
        if params.context is not None:
            f = query_in_context(params.context, f, memory, reads)
        scale = temperature if params.log_temperature is None else jnp.exp(params.log_temperature)
        attention = jax.nn.softmax(unit(f) @ unit(memory.keys).T / scale + memory.log_weight)
        hot = memory.shares > 0
        return present(jnp.log(attention @ hot + jnp.finfo(f.dtype).tiny), memory.shares.sum(0))

    learner = scored_by_query(init, adapt, logits)
    return learner._replace(adapt=tune) if tune_steps else learner
