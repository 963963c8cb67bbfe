"""Few-shot learning with a graph neural network (Garcia & Bruna 2018): labels spread along learned edges.

The nodes are the support and one query; each query has a separate graph. A node is an example's embedding concatenated
with its label: one-hot, or uniform where it is unknown. Each layer (sec. 4) first computes edges from the nodes,
A_ij = MLP(|z_i - z_j|) with a softmax over each row, then new nodes z' = rho([z, A z] w), which it concatenates to z.
The last layer gives the query's class. We leave out the authors' batch norm over edges and nodes, so that a task does
not depend on the other tasks of its batch.

Active learning (sec. 5.3): after the first layer, an MLP scores each node with a hidden label, and a softmax of the
scores selects one: drawn in training, the largest at test. Its label times its attention is added to its node,
so that the choice is learned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Categorical, Categories, Likelihood, one_hot
from metaprior.core.options import Count, Fraction, checked
from metaprior.core.types import Batch, Learner, Model, Task, counted, known_labels, weights
from metaprior.inference.descent import count, mean_nll
from metaprior.learners.builders.amortised import as_inputs, embedding, output_width
from metaprior.learners.builders.gradient import fit_metrics
from metaprior.learners.traits import traits
from metaprior.networks.attention import shares
from metaprior.networks.layers import dense, dense_init
from metaprior.networks.mlp import mlp

EDGES = 2**16  # edges in memory at once; more queries are processed in chunks


class Graph(NamedTuple):
    """theta.

    Attributes:
        embedding: Parameters of the model, whose features of x are the inputs.
        edges: Each layer's MLP of edges.
        nodes: Each layer's linear map of nodes.
        asks: The MLP that scores nodes in active learning, or None.
    """

    embedding: PyTree
    edges: list[PyTree]
    nodes: list[dict[str, Array]]
    asks: PyTree = None


class Labelled(NamedTuple):
    """The posterior.

    Attributes:
        nodes: The support's nodes before the first layer.
        weight: Weights of the support examples.
        hidden: One-hot hidden labels that the learner may request; rows of zeros elsewhere.
    """

    nodes: Float[Array, "n c"]
    weight: Float[Array, " n"]
    hidden: Float[Array, "n way"]


@traits(of_classes=True, reads_names=True, reads_unlabelled=True, small={"layers": 2, "filters": 8})
@checked
def gnn(
    model: Model,
    likelihood: Likelihood,
    *,
    layers: Count = 3,
    filters: Count = 96,
    unlabelled: Fraction = 0.8,
    ask: str | None = None,
) -> Learner:
    """Meta-learns how labels pass between examples along the edges of a graph.

    A support label below 0 means that the label is unknown (the semi-supervised mode). The order of the support does
    not matter, except to ask="random". Class names matter, except as far as training with random names teaches the
    network to ignore them. A support weight scales the edges to its example: a weight of 2 is not the example twice.

    Args:
        model: The network; its features (its outputs where it has none) are the inputs.
        likelihood: Must be `Categorical`.
        layers: Number of layers of the graph network.
        filters: Width. The MLP of edges has hidden layers of 2, 2, 1 and 1 times `filters` units; each layer adds
            filters / 2 numbers to each node.
        unlabelled: The largest share of the support without a label, below 1.
        ask: Whether each query's graph requests one hidden label, given as -2 - label. "attention" selects the node by
            the learned attention; "random" is a comparison that reveals the whole label of any node. None: no request.

    Raises:
        ValueError: The likelihood is not categorical, or an option is out of range. `adapt` raises it where too many
            labels are missing; compiled code cannot raise and predicts NaN instead.

    References:
        Garcia & Bruna (2018), sec. 4 and 5.
    """
    if not isinstance(likelihood, Categorical):
        raise ValueError(f"likelihood must be Categorical() for gnn, which passes class labels on, got {likelihood}.")
    if layers < 1 or filters < 2:
        raise ValueError(f"layers must be at least 1 and filters at least 2, got {layers} and {filters}.")
    if not 0 <= unlabelled < 1:
        raise ValueError(f"unlabelled must be a share of the support, at least 0 and below 1, got {unlabelled}.")
    if ask not in (None, "attention", "random") or (ask and layers < 2):
        raise ValueError(
            f"ask must be None, or 'attention' or 'random' with at least 2 layers, got {ask!r} with {layers} layers."
        )
    embed = embedding(model)
    closeness = mlp(1, (2 * filters, 2 * filters, filters, filters), "leaky_relu")
    choice = mlp(1, (filters,), "leaky_relu")

    def init(key: PRNGKeyArray, task: Task) -> Graph:
        key_model, key_edges, key_nodes = jax.random.split(key, 3)
        x, grow = task.support.x, filters // 2
        theta = model.init(key_model, x)
        way = output_width(model, theta, x)
        widths = [embed(theta, x).shape[1] + way + i * grow for i in range(layers)]
        sizes = [grow] * (layers - 1) + [way]
        keys_edges, keys_nodes = jax.random.split(key_edges, layers), jax.random.split(key_nodes, layers)
        return Graph(
            theta,
            [closeness.init(k, jnp.zeros((1, c))) for k, c in zip(keys_edges, widths, strict=True)],
            [dense_init(k, 2 * c, size) for k, c, size in zip(keys_nodes, widths, sizes, strict=True)],
            choice.init(jax.random.fold_in(key, 1), jnp.zeros((1, widths[1]))) if ask == "attention" else None,
        )

    def adapt(params: Graph, support: Batch, key: PRNGKeyArray) -> Labelled:
        way, weight = output_width(model, params.embedding, support.x), weights(support)
        known = as_inputs(likelihood, known_labels(counted(support._replace(known=None)).y), way)
        y = support.y.astype(int)
        missing = (weight * (y < 0)).sum() / count(support)
        allowed = missing <= unlabelled + 1e-6
        if not isinstance(allowed, Tracer) and not allowed:
            raise ValueError(
                f"support.y must have at most {100 * unlabelled:.0f} % of examples without a label (below 0), got "
                f"{100 * missing:.0f} %. Label more examples, or train gnn with a larger `unlabelled`."
            )
        label = jnp.where(y[:, None] < 0, 1 / way, known)
        nodes = jnp.concatenate([embed(params.embedding, support.x), label], -1)
        hidden = one_hot(-2 - y, way) * (weight > 0)[:, None]
        return Labelled(jnp.where(allowed, nodes, jnp.nan), weight, hidden)

    def adjacency(layer: PyTree, z: Float[Array, "m c"], weight: Float[Array, " m"]) -> Float[Array, "m m"]:
        m = z.shape[0]
        apart = jnp.abs(z[:, None] - z[None])
        return shares(closeness.apply(layer, apart.reshape(m * m, -1)).reshape(m, m), weight * (1 - jnp.eye(m)))

    def asked(params: Graph, z: Float[Array, "m c"], hidden: Array, key: PRNGKeyArray | None) -> Float[Array, "n way"]:
        """Returns the requested label times the attention of its node: drawn with a key, the largest without."""
        askable = hidden.sum(-1)
        scores = jnp.zeros_like(askable) if ask == "random" else choice.apply(params.asks, z[:-1])[:, 0]
        attention = shares(scores, askable)
        at = jnp.argmax(attention) if key is None else jax.random.categorical(key, jnp.log(attention))
        chosen = jax.nn.one_hot(at, askable.shape[0])
        return (chosen if ask == "random" else chosen * attention)[:, None] * hidden

    def outputs(params: Graph, seen: Labelled, x: PyTree, key: PRNGKeyArray | None) -> Float[Array, "q way"]:
        f = embed(params.embedding, x)
        start, way = f.shape[1], seen.hidden.shape[1]
        queries = jnp.concatenate([f, jnp.full((f.shape[0], way), 1 / way)], -1)
        weight = jnp.append(seen.weight, 1.0)

        def one(query: Float[Array, " c"], key: PRNGKeyArray | None) -> Float[Array, " way"]:
            z = jnp.concatenate([seen.nodes, query[None]])
            for i, (edges, nodes) in enumerate(zip(params.edges, params.nodes, strict=True)):
                new = dense("nodes", nodes, jnp.concatenate([z, adjacency(edges, z, weight) @ z], -1))
                z = new if i == layers - 1 else jnp.concatenate([z, jax.nn.leaky_relu(new)], -1)
                if ask and i == 0:
                    z = z.at[:-1, start : start + way].add(asked(params, z, seen.hidden, key))
            return z[-1]

        keys = None if key is None else jax.random.split(key, f.shape[0])
        at_once = max(EDGES // weight.shape[0] ** 2, 1)
        if queries.shape[0] <= at_once:
            return jax.vmap(one)(queries, keys)
        return jax.lax.map(jax.checkpoint(lambda q: one(*q)), (queries, keys), batch_size=at_once)

    def predict(params: Graph, seen: Labelled, x: PyTree, key: PRNGKeyArray) -> Categories:
        return likelihood.predictive(outputs(params, seen, x, key if ask == "random" else None)[None])

    def loss(params: Graph, task: Task, key: PRNGKeyArray) -> tuple[Scalar, dict[str, Scalar]]:
        predicted = outputs(params, adapt(params, task.support, key), task.query.x, key if ask else None)
        return mean_nll(likelihood, predicted, task.query), fit_metrics(likelihood, predicted, task.query)

    return Learner(init, adapt, predict, loss)
