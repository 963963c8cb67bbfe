"""Matching networks (Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra 2016): attention over the support.

p(y | x, S) = sum_i a(x, x_i) y_i (eq. 1) with a a softmax of cos(f(x), g(x_i)) (sec. 2.1.1). Full context embeddings
(sec. 2.1.2 and appendix A): a bidirectional LSTM reads the support in the order it comes in,
    g(x_i, S) = forward_i + backward_i + g'(x_i),
and a query reads that K times, f(x, S) = h_K from a state of zeros, so that its first reading is the plain average:
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
        forward: reads the support from its beginning.
        backward: reads the support from its end.
        reader: reads the support for a query.
    """

    forward: dict[str, Array]
    backward: dict[str, Array]
    reader: dict[str, Array]


class Matching(NamedTuple):
    """theta.

    Attributes:
        embedding: parameters of the embedding f' = g'.
        context: the LSTMs of the full context embeddings; None without them.
        log_temperature: logarithm of a learned temperature; None for a fixed one.
    """

    embedding: PyTree
    context: Context | None
    log_temperature: Scalar | None


class Memory(NamedTuple):
    """The posterior: the support as queries see it.

    Attributes:
        keys: embeddings g.
        log_weight: logarithms of the examples' weights.
        shares: each example's weight in the column of its class.
        beside: inputs of the support, where each query is embedded beside them; else None.
        tuned: parameters of the embedding after it was fitted to the support; else None.
    """

    keys: Float[Array, "n d"]
    log_weight: Float[Array, " n"]
    shares: Float[Array, "n way"]
    beside: PyTree
    tuned: PyTree


def support_in_context(context: Context, g: Float[Array, "n d"], weight: Float[Array, " n"]) -> Float[Array, "n d"]:
    """Returns g(x_i, S): each embedding plus what the LSTMs have read up to it, from either end."""
    there = weight > 0
    return g + run_lstm(context.forward, g, there) + run_lstm(context.backward, g, there, reverse=True)


def query_in_context(context: Context, f: Float[Array, "m d"], memory: Memory, reads: int) -> Float[Array, "m d"]:
    """Returns f(x, S) after `reads` looks at the support."""

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

    Classification only.

    Args:
        model: the network, whose features are the embedding.
        likelihood: `Categorical()`.
        context: whether to use full context embeddings. The order of the support then matters.
        reads: number K of times that a query reads the support, with `context`.
        temperature: what cosines are divided by; a learned temperature starts there. The paper's is 1, which keeps
            probabilities close to each other.
        learn_temperature: whether the temperature is meta-learned.
        tune_steps: number of steps of gradient descent on the embedding for each new task, after training (section
            4.1). They descend the mean nll of the support examples under the support, themselves included.
        tune_rate: learning rate of these steps.
        way: the largest number of classes in a task, in training or later. None: the number of the model's outputs.
        transductive: whether all queries are embedded in one batch. False embeds each query beside the support alone,
            which matters under batch norm.

    References:
        Vinyals, Blundell, Lillicrap, Kavukcuoglu & Wierstra 2016, equation 1, sections 2.1 and 4.1, appendix A.
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
        """`adapt`, after the embedding was fitted to the support."""

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
