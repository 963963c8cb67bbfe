"""ARML (Yao, Wu, Tao, Li, Ding, Li & Li 2020): a learned graph of meta-knowledge that adjusts MAML's initialisation.

A task is a small graph of prototypes, which is attached to a graph of learned vertices (sec. 3.1-3.3). One step of a
graph network passes what the vertices hold to the prototypes. Two autoencoders code the task before (q) and after (t)
that step. A sigmoid gate on [q, t] multiplies theta (sec. 3.4), and MAML's inner steps start there. The sizes and
formulas follow the authors' code:

* Prototypes c: class means, or for numbers P'E, where P shares each embedded example among clusters.
* Edges: sigmoid(w |c_i - c_j| + b) among prototypes, the same with other weights among the vertices h, and
  softmax_m(-|c_i - h_m|^2 / (2 s)) between both. The diagonal is 0.
* [C; H] after the step: tanh(D^-1 (A + I) [C; H] W + b).
* q codes the examples for numbers and the labelled class means for classes; t codes the prototypes after the step.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from metaprior.core.likelihoods import Categorical, Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count, NonNegative, Positive
from metaprior.core.types import Learner, Model
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.learners.builders.gates import Aggregator, Reading, Rows, gated_learner, summary, summary_init
from metaprior.learners.traits import traits
from metaprior.networks.layers import dense_init


def edges(layer: dict[str, Array], v: Float[Array, "n d"]) -> Float[Array, "n n"]:
    """Computes sigmoid(w |v_i - v_j| + b), with a diagonal of 0."""
    score = (jnp.abs(v[:, None] - v) @ layer["w"] + layer["b"])[..., 0]
    return jax.nn.sigmoid(score) * (1 - jnp.eye(len(v), dtype=v.dtype))


def attached(
    graph: dict, c: Float[Array, "n d"], there: Bool[Array, " n"], spread: float
) -> tuple[Float[Array, "m m"], Float[Array, "n v"]]:
    """Returns D^-1 (A + I) of prototypes and vertices together, and the edges between both.

    Args:
        graph: Parameters of the graph.
        c: The prototypes.
        there: Which prototypes exist; the others have no edges.
        spread: s of the edges between prototypes and vertices.
    """
    h = graph["vertices"]
    cross = jax.nn.softmax(-((c[:, None] - h) ** 2).sum(-1) / (2 * spread), -1)
    exists = jnp.concatenate([there, jnp.ones(len(h), bool)])
    a = jnp.block([[edges(graph["task"], c), cross], [cross.T, edges(graph["meta"], h)]])
    a = jnp.where(exists[:, None] & exists, a, 0) + jnp.eye(len(exists), dtype=a.dtype)
    return a / a.sum(-1, keepdims=True), cross


@traits(reads_names=True, ordered=True, small={"hidden": 8, "rate": 0.02})
@passes_options_to(InnerLoop, steps=5)
def arml(
    model: Model,
    likelihood: Likelihood,
    *,
    vertices: Count = 6,
    clusters: Count = 2,
    hidden: Count = 40,
    spread: Positive = 2.0,
    aggregator: Aggregator = "recurrent",
    reconstruction: NonNegative = 0.01,
    gate_bias: float = 0.0,
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns an initialisation and a graph of knowledge about tasks whose gate adjusts it to the task.

    Where targets are numbers, a recurrent encoder reads the support in its order, so the order matters. Where they are
    classes, it reads their means in the order of labels, so the order of examples does not matter, but the names of
    classes do.

    Args:
        model: The network; all of its parameters are gated and adapted.
        likelihood: Likelihood of the support and the query.
        vertices: Number of learned vertices; 4 or 8 for images in the paper.
        clusters: Number of prototypes of a task whose targets are numbers. Classes have one prototype each.
        hidden: Length of an embedded example, of a vertex and of each code; 128 for images.
        spread: s of the edges between prototypes and vertices; 8 for images.
        aggregator: The autoencoders: "recurrent", or "pooling" (a mean over rows, for which their order does not
            matter).
        reconstruction: Weight of the autoencoders' losses.
        gate_bias: Bias of the gate before training. With 0, as in the authors' code, the gate starts near 1/2 and
            halves theta. With 5 it starts near 1, which is MAML.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`.

    References:
        Yao et al. (2020), Algorithm 1.
    """
    of_classes = isinstance(likelihood, Categorical)

    def init(key: PRNGKeyArray, rows: Rows) -> dict:
        keys = jax.random.split(key, 7)
        return {
            "clusters": None if of_classes else dense_init(keys[0], hidden, clusters),
            "vertices": jax.nn.initializers.glorot_uniform()(keys[1], (vertices, hidden)),
            "task": dense_init(keys[2], hidden, 1),
            "meta": dense_init(keys[3], hidden, 1),
            "step": dense_init(keys[4], hidden, hidden, 1.0),
            "before": summary_init(keys[5], rows.labelled.shape[1], hidden, aggregator),
            "after": summary_init(keys[6], hidden, hidden, aggregator),
        }

    def prototypes(params: dict, rows: Rows) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
        """Returns the prototypes and their weights."""
        if of_classes:
            return rows.values, rows.weight
        shares = jax.nn.softmax(rows.values @ params["clusters"]["w"] + params["clusters"]["b"], -1)
        return (shares * rows.weight[:, None]).T @ rows.values, jnp.ones(clusters, rows.values.dtype)

    def read(params: dict, rows: Rows) -> Reading:
        c, weight = prototypes(params, rows)
        there = weight != 0
        adjacency, cross = attached(params, c, there, spread)
        passed = jnp.tanh(
            adjacency @ jnp.concatenate([c, params["vertices"]]) @ params["step"]["w"] + params["step"]["b"]
        )[: len(c)]
        before = summary(params["before"], rows.labelled, rows.weight, aggregator)
        after = summary(params["after"], passed, weight, aggregator)
        number = there.sum()
        kinds = jnp.where(number == 0, 1 / vertices, (cross * there[:, None]).sum(0) / jnp.maximum(number, 1))
        return Reading(jnp.concatenate([before.code, after.code]), kinds, before.loss + after.loss)

    return gated_learner(
        model, likelihood, InnerLoop(**inner), posterior, init, read,
        hidden=hidden, reconstruction=reconstruction, gate_bias=gate_bias,
    )  # fmt: skip
