"""Kronecker-factored curvature, K-FAC (Martens & Grosse 2015; Grosse & Martens 2016 for convolutions).

A layer s = a W has inputs a (a bias is an input that is always 1) and the block N A (x) G. A is the mean of a'a over
examples (summed over the positions of a convolution). G is the mean of g'g, where g is the nll's gradient in s with
labels drawn from the model. This is the true Fisher; the columns of the likelihood's root give its expectation exactly.
It is exact for a layer and one example. Layers are independent of each other. LLAMA uses this curvature (Grant et al.
2018, sec. 4.1).

Parameters without a tap (a batch norm's shift and gain) are left out: they have no variance and no part in the log
determinant.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from metaprior.core.likelihoods import Likelihood
from metaprior.core.types import Batch, Call, examples
from metaprior.inference.curvature.rows import Outputs, as_scale, chunked, curvature_root, inner, normal_like


class Factor(NamedTuple):
    """The eigendecomposition of a positive semi-definite matrix.

    Attributes:
        values: Eigenvalues [k].
        vectors: Eigenvectors, as columns [k, k].
    """

    values: Float[Array, " k"]
    vectors: Float[Array, "k k"]


class Block(NamedTuple):
    """The curvature N A (x) G of one layer, together with the prior N(., scale^2).

    Attributes:
        inputs: A.
        gradients: G.
        scale: The prior's standard deviation.
        total: N, the total weight of the examples.
    """

    inputs: Factor
    gradients: Factor
    scale: Scalar
    total: Scalar

    def spectrum(self) -> Float[Array, "k o"]:
        """Computes the eigenvalues of the whitened block, scale^2 N a_j g_i."""
        return self.scale**2 * self.total * self.inputs.values[:, None] * self.gradients.values[None, :]


class Kfac(NamedTuple):
    """The curvature of a network. `log_det` is differentiable; draws have no gradient.

    Attributes:
        blocks: A block for each tapped layer, by the layer's name.
        scale: The prior's scale, shaped as phi.
    """

    blocks: dict[str, Block]
    scale: PyTree

    def log_det(self) -> Scalar:
        """Computes the sum of log(1 + scale^2 N a_j g_i) over layers."""
        return jnp.asarray(sum(jnp.log1p(block.spectrum()).sum() for block in self.blocks.values()))

    def push(self, noise: PyTree) -> PyTree:
        """Multiplies each layer's noise by the symmetric root of its covariance. Parameters without a tap get 0.

        This is U_A [(U_A' z U_G) / sqrt(1/scale^2 + N a_j g_i)] U_G'. Unlike U_A [z / ...] U_G', it does not depend on
        the eigenvectors' signs, nor on their choice if eigenvalues repeat.

        Args:
            noise: A vector z, shaped as phi.
        """
        move = jax.tree.map(jnp.zeros_like, noise)
        for name, block in self.blocks.items():
            left, right = block.inputs.vectors, block.gradients.vectors
            shrunk = block.scale * (left.T @ _join(noise[name]) @ right) / jnp.sqrt(1 + block.spectrum())
            move[name] = _split(left @ shrunk @ right.T, move[name])
        return move

    def sample(self, key: PRNGKeyArray) -> PyTree:
        """Draws each layer from N(0, scale^2 (I + scale^2 N A (x) G)^-1).

        Args:
            key: Random key.
        """
        return self.push(normal_like(key, self.scale))

    def quadratic(self, row: PyTree) -> Scalar:
        """Computes the variance row C row' as a sum over layers.

        Args:
            row: A row, shaped as phi.
        """
        pushed = self.push(row)
        return inner(pushed, pushed)


def _join(layer: Mapping[str, Array]) -> Float[Array, "k o"]:
    """Returns a layer's weights as one matrix with the bias as the last row."""
    w = layer["w"].reshape(-1, layer["w"].shape[-1])
    return w if layer.get("b") is None else jnp.concatenate([w, layer["b"][None]])


def _split(matrix: Float[Array, "k o"], layer: Mapping[str, Array]) -> dict[str, Any]:
    """Reverts `_join`. Other parameters of the layer stay."""
    if layer.get("b") is None:
        return {**layer, "w": matrix.reshape(layer["w"].shape)}
    return {**layer, "w": matrix[:-1].reshape(layer["w"].shape), "b": matrix[-1]}


def _factor(matrix: Float[Array, "k k"]) -> Factor:
    vectors = jnp.linalg.eigh(jax.lax.stop_gradient(matrix))[1]
    # d value_i = v_i' dM v_i with fixed vectors: correct to first order, and safe if eigenvalues repeat.
    values = jnp.einsum("ji,jk,ki->i", vectors, matrix, vectors)
    return Factor(jnp.maximum(values, 0), vectors)


def kfac(
    outputs: Outputs,
    likelihood: Likelihood,
    phi: PyTree,
    batch: Batch,
    scale: PyTree,
    key: PRNGKeyArray | None = None,
) -> Kfac:
    """Computes K-FAC of the batch's summed nll at phi by r backward passes.

    Args:
        outputs: Function (phi, x, call) -> outputs [n, c]. It must call call.tap(name, inputs [n, ..., k],
            s [n, ..., o]) -> s at each linear map, whose layer is phi[name].
        likelihood: The likelihood.
        phi: The point of the curvature: a dict of layers {"w": [..., o], "b": [o]}.
        batch: The n examples.
        scale: The prior's scale, a scalar or shaped as phi. A layer uses one scale, the root mean square over its
            weights.
        key: Random key for a sign of each example; None uses a fixed key. The signs keep G unbiased if a batch norm
            couples the examples, and have no effect otherwise.

    Raises:
        ValueError: No layer of phi was tapped.
    """

    def record(phi: PyTree) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        seen = {}

        def tap(name: str, inputs: Array, s: Array) -> Array:
            seen[name] = (inputs, s)
            return s

        return outputs(phi, batch.x, Call(tap)), seen

    f, seen = record(phi)
    names = [n for n in seen if isinstance(phi, Mapping) and n in phi and phi[n].get("w") is not None]
    if not names:
        raise ValueError(
            "curvature 'kfac' must see the network's layers through outputs(phi, x, Call(tap)), but no layer of phi "
            "was tapped. Call tap(name, inputs, s) at each linear map of the network, or use curvature='dual'."
        )

    def probed(probes: dict[str, Array]) -> Array:
        def tap(name: str, _: Array, s: Array) -> Array:
            return s + probes[name] if name in probes else s

        return outputs(phi, batch.x, Call(tap))

    _, pull = jax.vjp(probed, {name: jnp.zeros_like(seen[name][1]) for name in names})
    signs = jax.random.rademacher(jax.random.key(0) if key is None else key, f.shape[:1], f.dtype)
    root = curvature_root(likelihood, f, batch) * signs[:, None, None]
    weight = jnp.ones(examples(batch), f.dtype) if batch.weight is None else batch.weight
    count = jnp.maximum(weight.sum(), jnp.finfo(f.dtype).tiny)
    whole = as_scale(scale, phi)

    def outer(column: Float[Array, "n c"]) -> dict[str, Array]:
        return {name: _second_moment(g) for name, g in pull(column)[0].items()}

    moments = chunked(outer, jnp.moveaxis(root, -1, 0), pull)
    blocks = {}
    for name in names:
        inputs, s = seen[name]
        if phi[name].get("b") is not None:
            inputs = jnp.concatenate([inputs, jnp.ones((*inputs.shape[:-1], 1), inputs.dtype)], -1)
        positions = s[0, ..., 0].size
        a = jnp.einsum("n...i,n,n...j->ij", inputs, weight, inputs) / count
        g = moments[name].sum(0) / (count * positions)
        rms = jnp.sqrt(jnp.mean(whole[name]["w"] ** 2))
        blocks[name] = Block(_factor(a), _factor(g), rms, count)
    return Kfac(blocks, whole)


def _second_moment(g: Float[Array, "n *space o"]) -> Float[Array, "o o"]:
    flat = g.reshape(-1, g.shape[-1])
    return flat.T @ flat
