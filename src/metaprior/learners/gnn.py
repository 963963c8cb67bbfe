"""Few-shot learning with a graph network (Garcia & Bruna 2018): labels pass along edges that are learned.

The nodes are the support and one query, each its embedding beside its label: one-hot, or uniform where it is not known.
Each layer (sec. 4) first makes edges from the nodes as they stand, A_ij = MLP(|z_i - z_j|) with a softmax a row,
then nodes from edges, z' = rho([z, A z] w), put beside z; the last layer gives the query's class. Each query has a
graph of its own. The authors' batch norm over edges and nodes is left out: a task does not see the others of its batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from metaprior.inference.amortised import amortised_learner, as_inputs, embedding, output_width, weights
from metaprior.likelihoods import Categorical, Likelihood
from metaprior.networks.attention import shares
from metaprior.networks.layers import dense, dense_init
from metaprior.networks.mlp import mlp
from metaprior.types import Batch, Learner, Model, Task

EDGES = 2**16  # in memory at once; queries beyond that go one chunk after another


class Graph(NamedTuple):
    """theta: the embedding of x (the given model), and of each layer the MLP of its edges and the map of its nodes."""

    embedding: PyTree
    edges: list[PyTree]
    nodes: list[dict[str, Array]]


class Labelled(NamedTuple):
    """The posterior: the support's nodes."""

    nodes: Float[Array, "n c"]
    weight: Float[Array, " n"]


def gnn(model: Model, likelihood: Likelihood, *, layers: int = 3, filters: int = 96) -> Learner:
    """Meta-learn how labels pass between examples, on the model's features. Classification only.

    layers: of the graph. filters: the edges' MLP has hidden layers of 2, 2, 1 and 1 times so many units, a layer adds
    half as many to each node. A support label below 0 says that it is not known (the semi-supervised mode). The order
    of the support does not matter; class names do as far as training has not taught otherwise.
    """
    if not isinstance(likelihood, Categorical):
        raise ValueError(f"likelihood: came {likelihood}, needs a categorical one: the graph passes class labels")
    if layers < 1 or filters < 2:
        raise ValueError(f"layers, filters: came {layers}, {filters}; needs at least 1 layer and 2 filters")
    embed = embedding(model)
    closeness = mlp(1, (2 * filters, 2 * filters, filters, filters), "leaky_relu")

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
        )

    def adapt(params: Graph, support: Batch, key: PRNGKeyArray) -> Labelled:
        way = output_width(model, params.embedding, support.x)
        label = jnp.where(support.y[:, None] < 0, 1 / way, as_inputs(likelihood, support.y, way))
        return Labelled(jnp.concatenate([embed(params.embedding, support.x), label], -1), weights(support))

    def adjacency(layer: PyTree, z: Float[Array, "m c"], weight: Float[Array, " m"]) -> Float[Array, "m m"]:
        m = z.shape[0]
        apart = jnp.abs(z[:, None] - z[None])
        return shares(closeness.apply(layer, apart.reshape(m * m, -1)).reshape(m, m), weight * (1 - jnp.eye(m)))

    def outputs(params: Graph, seen: Labelled, x: PyTree) -> Float[Array, "q way"]:
        f = embed(params.embedding, x)
        way = seen.nodes.shape[1] - f.shape[1]
        queries = jnp.concatenate([f, jnp.full((f.shape[0], way), 1 / way)], -1)
        weight = jnp.append(seen.weight, 1.0)

        def one(query: Float[Array, " c"]) -> Float[Array, " way"]:
            z = jnp.concatenate([seen.nodes, query[None]])
            for i, (edges, nodes) in enumerate(zip(params.edges, params.nodes, strict=True)):
                new = dense("nodes", nodes, jnp.concatenate([z, adjacency(edges, z, weight) @ z], -1))
                z = new if i == layers - 1 else jnp.concatenate([z, jax.nn.leaky_relu(new)], -1)
            return z[-1]

        at_once = max(EDGES // weight.shape[0] ** 2, 1)
        if queries.shape[0] <= at_once:
            return jax.vmap(one)(queries)
        return jax.lax.map(jax.checkpoint(one), queries, batch_size=at_once)

    return amortised_learner(init, adapt, outputs, likelihood)
