"""The convolution and its derivatives of every order and mode against XLA's own, in float64."""

from collections.abc import Callable
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from metaprior.kernels import conv
from metaprior.kernels.conv import _by_xla, _on_cpu, conv2d, conv_p, geometry, max_pool, patches

pytestmark = pytest.mark.usefixtures("x64")


def by_lax(x: jax.Array, w: jax.Array, stride: int = 1, padding: str = "SAME") -> jax.Array:
    return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def close(ours: jax.Array, theirs: jax.Array) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * (1 + float(jnp.abs(b).max())))


def inputs(side: int, channels: int, kernel: int, lead: tuple[int, ...] = ()) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(side), (*lead, 2, side, side, channels))
    return x, jax.random.normal(jax.random.key(1), (*lead, kernel, kernel, channels, 4)) / kernel


def loss(conv: Callable, x: jax.Array, w: jax.Array) -> jax.Array:
    """Not polynomial: no derivative of any order is zero."""
    return jnp.sin(conv(x, w)).sum()


def value(conv: Callable, x: jax.Array, w: jax.Array) -> jax.Array:
    return conv(x, w)


def gradient(conv: Callable, x: jax.Array, w: jax.Array) -> tuple:
    return jax.grad(partial(loss, conv), (0, 1))(x, w)


def reverse_over_reverse(conv: Callable, x: jax.Array, w: jax.Array) -> tuple:
    """A MAML meta-gradient: the loss after a gradient step."""
    return jax.grad(lambda x, w: loss(conv, x, w - 0.01 * jax.grad(partial(loss, conv), 1)(x, w)), (0, 1))(x, w)


def forward_over_reverse(conv: Callable, x: jax.Array, w: jax.Array) -> tuple:
    return jax.jvp(partial(gradient, conv), (x, w), (jnp.cos(x), jnp.cos(w)))


def reverse_over_forward(conv: Callable, x: jax.Array, w: jax.Array) -> tuple:
    return jax.grad(lambda x, w: jax.jvp(partial(loss, conv), (x, w), (jnp.cos(x), w))[1], (0, 1))(x, w)


def third_order(conv: Callable, x: jax.Array, w: jax.Array) -> tuple:
    return jax.grad(lambda x, w: sum((g**2).sum() for g in reverse_over_reverse(conv, x, w)), (0, 1))(x, w)


def rematerialised(conv: Callable, x: jax.Array, w: jax.Array) -> tuple:
    return reverse_over_reverse(jax.checkpoint(conv), x, w)


def linearised(conv: Callable, x: jax.Array, w: jax.Array) -> jax.Array:
    """A Gauss-Newton product, J'J v."""
    forward, push = jax.linearize(lambda w: conv(x, w), w)
    pull = jax.linear_transpose(push, w)
    return pull(push(jnp.cos(w)))[0] + forward.sum()


def jacobian(conv: Callable, x: jax.Array, w: jax.Array) -> tuple:
    return jax.jacfwd(lambda w: conv(x[:1], w[:1, :1])[0, 0])(w), jax.jacrev(lambda w: conv(x[:1], w)[0, 0, 0])(w)


def every_derivative(conv: Callable, x: jax.Array, w: jax.Array) -> dict:
    orders = [value, gradient, reverse_over_reverse, forward_over_reverse, reverse_over_forward, linearised]
    return {of.__name__: of(conv, x, w) for of in [*orders, rematerialised]}


@pytest.mark.parametrize("side", [28, 14, 7, 4, 84, 21])
@pytest.mark.parametrize(("stride", "kernel", "channels"), [(1, 3, 1), (2, 3, 3), (2, 1, 3)])
def test_second_order_at_the_sizes_in_use(side, stride, kernel, channels):
    x, w = inputs(side, channels, kernel)
    ours, theirs = (jax.jit(partial(reverse_over_reverse, partial(conv, stride=stride)))(x, w)
                    for conv in (conv2d, by_lax))  # fmt: skip
    close(ours, theirs)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "side"), [(2, 4), (3, 4), (3, 5)])
def test_geometries(side, kernel, stride, padding):
    x, w = inputs(side, 2, kernel)
    options = {"stride": stride, "padding": padding}
    close(jax.jit(partial(gradient, partial(conv2d, **options)))(x, w),
          jax.jit(partial(gradient, partial(by_lax, **options)))(x, w))  # fmt: skip


@pytest.mark.parametrize(("stride", "channels"), [(1, 1), (1, 3), (2, 3)])
def test_every_derivative(stride, channels):
    x, w = inputs(4, channels, 3)
    ours, theirs = (jax.jit(partial(every_derivative, partial(conv, stride=stride)))(x, w) for conv in (conv2d, by_lax))
    close(ours, theirs)


@pytest.mark.parametrize("of", [third_order, jacobian])
def test_third_order_and_jacobians(of):
    x, w = inputs(3, 2, 3)
    close(jax.jit(partial(of, conv2d))(x, w), jax.jit(partial(of, by_lax))(x, w))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 3)])
def test_every_derivative_under_vmap(axes):
    x, w = inputs(3, 2, 3, lead=(3,))
    x = x[0] if axes[0] is None else jnp.moveaxis(x, 0, axes[0])
    w = w[0] if axes[1] is None else jnp.moveaxis(w, 0, axes[1])
    ours, theirs = (jax.jit(jax.vmap(partial(every_derivative, conv), axes))(x, w) for conv in (conv2d, by_lax))
    close(ours, theirs)


@pytest.mark.slow
def test_vmap_of_vmap():
    x, w = inputs(4, 2, 3, lead=(2, 3))
    close(jax.vmap(jax.vmap(conv2d), (0, 0))(x, w), jax.vmap(jax.vmap(by_lax))(x, w))
    close(jax.vmap(jax.vmap(conv2d, (None, 0)), (0, 0))(x[:, 0], w), jax.vmap(jax.vmap(by_lax, (None, 0)))(x[:, 0], w))


def test_scan_and_map_over_tasks_equal_vmap():
    x, w = inputs(3, 2, 3, lead=(3,))

    def one(pair: tuple[jax.Array, jax.Array]) -> tuple:
        return reverse_over_reverse(conv2d, *pair)

    together = jax.jit(jax.vmap(one))((x, w))
    close(lax.map(one, (x, w), batch_size=2), together)
    close(lax.scan(lambda c, pair: (c, one(pair)), None, (x, w))[1], together)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("out", ["y", "x", "w"])
def test_the_kernels_of_all_platforms_agree(out, stride, tasks):
    x, w = inputs(5, 2, 3, lead=(tasks,))
    shape = geometry(x[0], (3, 3), stride, "SAME")
    y = conv_p.bind(x, w, out="y", shape=shape)
    operands = {"y": (x, w), "x": (w, y), "w": (x, y)}[out]
    close(_on_cpu(*operands, out=out, shape=shape), _by_xla(*operands, out=out, shape=shape))


def test_an_accelerator_gets_its_own_convolution():
    x, w = inputs(5, 2, 3)
    text = {
        platform: jax.export.export(jax.jit(partial(gradient, conv2d)), platforms=[platform])(x, w).mlir_module()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert "stablehlo.convolution" in text["cuda"]
    assert "stablehlo.convolution" in text["tpu"]
    assert "stablehlo.convolution" not in text["cpu"]


@pytest.mark.parametrize("stride", [1, 2])
def test_single_precision(stride):
    x = jax.random.normal(jax.random.key(0), (2, 7, 7, 8), jnp.float32)
    w = jax.random.normal(jax.random.key(1), (3, 3, 8, 8), jnp.float32) / 9
    exact = jax.jit(partial(gradient, partial(by_lax, stride=stride)))(x.astype(jnp.float64), w.astype(jnp.float64))
    ours = jax.jit(partial(gradient, partial(conv2d, stride=stride)))(x, w)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_by_groups_of_images(monkeypatch):
    x, w = inputs(5, 2, 3)
    x = jnp.concatenate([x, 2 * x, 3 * x])
    whole = gradient(conv2d, x, w)
    monkeypatch.setattr(conv, "CACHE", 0)
    for size in (0, 2 * 25 * 18 * 8):
        monkeypatch.setattr(conv, "GROUP", size)
        jax.clear_caches()
        close(gradient(conv2d, x, w), whole)


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_times_weights_is_the_convolution(stride):
    x, w = inputs(5, 2, 3)
    close(patches(x, (3, 3), stride) @ w.reshape(-1, 4), conv2d(x, w, stride))


def by_reduction(x: jax.Array, window: int = 2) -> jax.Array:
    n, h, w, c = x.shape
    h, w = h // window, w // window
    return x[:, : h * window, : w * window].reshape(n, h, window, w, window, c).max((2, 4))


@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_max_pool_and_its_derivatives(side, window):
    x = jax.random.normal(jax.random.key(0), (3, 2, side, side, 3))

    def second(pool: Callable, x: jax.Array) -> tuple:
        gradient = jax.grad(lambda x: (pool(x, window) ** 3).sum())
        return pool(x, window), gradient(x), jax.jvp(gradient, (x,), (jnp.cos(x),)), \
            jax.grad(lambda x: (gradient(x) ** 2).sum())(x)  # fmt: skip

    close(jax.jit(jax.vmap(partial(second, max_pool)))(x), jax.jit(jax.vmap(partial(second, by_reduction)))(x))


def test_entries_that_tie_share_the_derivative():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 0, 0, 0].set(1.0).at[0, 0, 1, 0].set(1.0)
    close(jax.grad(lambda x: max_pool(x).sum())(x), jax.grad(lambda x: by_reduction(x).sum())(x))


def test_bad_input_is_named():
    x, w = inputs(4, 2, 3)
    with pytest.raises(ValueError, match="same i"):
        conv2d(x[..., :1], w)
    with pytest.raises(ValueError, match="padding"):
        conv2d(x, w, padding="CIRCULAR")
    with pytest.raises(ValueError, match="window"):
        max_pool(x, 5)
