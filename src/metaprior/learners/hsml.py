"""HSML (Yao, Wei, Huang & Li 2019): a hierarchy of task clusters that adjusts MAML's initialisation to the task.

A task is encoded as g, the code of a recurrent autoencoder over its support (sec. 4.1). It is assigned softly to the
leaves of a learned tree and passed up to the root (sec. 4.2). A sigmoid gate on [g, root] multiplies theta (sec. 4.3).
MAML's inner steps start there. The tree follows the authors' code:

* Leaf a: p_a = softmax_a(-|g - c_a|^2 / (2 sigma)), value u_a = p_a tanh(W_a g + b_a). The code divides by 2 sigma.
* Middle node j: sum_a share_aj tanh(W_j u_a + b_j), where the shares of a leaf are a softmax over the nodes.
* Root: sum_j tanh(W node_j + b).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.likelihoods import Likelihood
from metaprior.core.named import passes_options_to
from metaprior.core.options import Count, NonNegative, Positive
from metaprior.core.types import Learner, Model
from metaprior.inference.inner_loop import InnerLoop
from metaprior.inference.posteriors import PosteriorRule, point
from metaprior.learners.builders.gates import Aggregator, Reading, Rows, gated_learner, summary, summary_init
from metaprior.learners.traits import traits
from metaprior.networks.layers import dense_init

Shares = Literal["linear", "distance"]


def climb(
    tree: dict, g: Float[Array, " d"], spread: float, shares: Shares = "linear"
) -> tuple[Float[Array, " d"], Float[Array, " leaves"]]:
    """Passes the code of a task from the leaves of the tree to its root.

    Args:
        tree: Parameters of the tree.
        g: The code of the task.
        spread: sigma of the leaves.
        shares: How a leaf is shared among middle nodes: a softmax of a "linear" score of u_a, or of the "distance"
            -(|u_a - w_j|^2 + b_j) / 2.

    Returns:
        The root, and the assignments p to the leaves.
    """
    p = jax.nn.softmax(-((g - tree["centres"]) ** 2).sum(-1) / (2 * spread))
    u = p[:, None] * jnp.tanh(jnp.einsum("aij,i->aj", tree["leaf"]["w"], g) + tree["leaf"]["b"])
    share = tree["share"]
    if shares == "linear":
        score = u @ share["w"] + share["b"]
    else:
        score = -(((u[:, None] - share["w"].T) ** 2).sum(-1) + share["b"]) / 2
    passed = jnp.tanh(jnp.einsum("ai,jik->ajk", u, tree["middle"]["w"]) + tree["middle"]["b"])
    nodes = jnp.einsum("aj,ajk->jk", jax.nn.softmax(score, -1), passed)
    return jnp.tanh(nodes @ tree["root"]["w"] + tree["root"]["b"]).sum(0), p


def tree_init(key: PRNGKeyArray, width: int, leaves: int, middle: int) -> dict:
    """Initialises the tree: Glorot's uniform weights and centres, biases of 0.

    Args:
        key: Random key.
        width: Length of the code.
        leaves: Number of leaves.
        middle: Number of middle nodes.
    """
    keys = jax.random.split(key, 5)

    def layers(key: PRNGKeyArray, n: int) -> dict[str, Array]:
        return jax.vmap(lambda k: dense_init(k, width, width))(jax.random.split(key, n))

    return {
        "centres": jax.nn.initializers.glorot_uniform()(keys[0], (leaves, width)),
        "leaf": layers(keys[1], leaves),
        "share": dense_init(keys[2], width, middle),
        "middle": layers(keys[3], middle),
        "root": dense_init(keys[4], width, width),
    }


@traits(reads_names=True, ordered=True, small={"hidden": 8, "rate": 0.02})
@passes_options_to(InnerLoop, steps=5)
def hsml(
    model: Model,
    likelihood: Likelihood,
    *,
    leaves: Count = 4,
    middle: Count = 2,
    hidden: Count = 40,
    spread: Positive = 2.0,
    shares: Shares = "linear",
    aggregator: Aggregator = "recurrent",
    reconstruction: NonNegative = 0.01,
    gate_bias: float = 0.0,
    posterior: PosteriorRule = point(),
    **inner: Any,
) -> Learner:
    """Meta-learns an initialisation and a tree of task clusters whose gate adjusts it to the task.

    Where targets are numbers, the recurrent encoder reads the support in its order, so the order matters. Where they
    are classes, it reads their means in the order of labels, so the order of examples does not matter, but the names of
    classes do.

    Args:
        model: The network; all of its parameters are gated and adapted.
        likelihood: Likelihood of the support and the query.
        leaves: Number of leaves of the tree.
        middle: Number of nodes between the leaves and the root.
        hidden: Length of an embedded example, of the task's code and of the nodes; 128 for images in the paper.
        spread: sigma of the leaves' softmax; 10 for images.
        shares: How a leaf is shared among middle nodes: by a "linear" score, or by "distance".
        aggregator: The autoencoder of the support: "recurrent", or "pooling" (a mean over examples, for which their
            order does not matter).
        reconstruction: Weight of the autoencoder's loss.
        gate_bias: Bias of the gate before training. With 0, as in the authors' code, the gate starts near 1/2 and
            halves theta. With 5 it starts near 1, which is MAML.
        posterior: Rule that forms the posterior at the last phi, e.g. `laplace()`.
        inner: Options of the inner loop, see `InnerLoop`.

    References:
        Yao, Wei, Huang & Li (2019), Algorithm 1.
    """

    def init(key: PRNGKeyArray, rows: Rows) -> dict:
        of_code, of_tree = jax.random.split(key)
        return {
            "code": summary_init(of_code, rows.labelled.shape[1], hidden, aggregator),
            "tree": tree_init(of_tree, hidden, leaves, middle),
        }

    def read(params: dict, rows: Rows) -> Reading:
        g, rebuilt = summary(params["code"], rows.labelled, rows.weight, aggregator)
        root, p = climb(params["tree"], g, spread, shares)
        return Reading(jnp.concatenate([g, root]), p, rebuilt)

    return gated_learner(
        model, likelihood, InnerLoop(**inner), posterior, init, read,
        hidden=hidden, reconstruction=reconstruction, gate_bias=gate_bias,
    )  # fmt: skip
