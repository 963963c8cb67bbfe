"""Curvatures against dense linear algebra, in float64: Gauss-Newton, its dual, K-FAC, diagonal and Lanczos."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from metaprior.core.likelihoods import Categorical, Gaussian, Poisson
from metaprior.core.types import Batch, Call
from metaprior.inference.curvature import (
    CURVATURES,
    as_scale,
    by_size,
    diagonal,
    dual,
    kfac,
    lanczos,
    laplace_spectrum,
    output_variance,
    primal,
)
from metaprior.inference.curvature import rows as rows_module
from metaprior.inference.curvature.lanczos import log_det_estimate
from metaprior.inference.curvature.rows import one_by_one
from metaprior.inference.posteriors import CurvatureGaussian
from metaprior.networks import mlp

LIKELIHOODS = {"gaussian": Gaussian(0.3), "learned": Gaussian(None), "softmax": Categorical(), "poisson": Poisson()}


SEEN = Call(lambda name, inputs, outputs: outputs)


def tanh_net(params, x, call=SEEN):
    h = jnp.tanh(call.tap("layer", x, x @ params["layer"]["w"] + params["layer"]["b"]))
    return call.tap("head", h, h @ params["head"]["w"] + params["head"]["b"])


def normed_net(params, x):
    """Outputs tied together by the batch's mean, as batch norm ties them."""
    h = jnp.tanh(x @ params["layer"]["w"])
    return (h - h.mean(0)) @ params["head"]["w"] + params["head"]["b"]


def tanh_params(seed=0, inputs=3, hidden=4, outputs=2):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    return {
        "layer": {"w": jax.random.normal(a, (inputs, hidden)), "b": jax.random.normal(b, (hidden,))},
        "head": {"w": jax.random.normal(c, (hidden, outputs)), "b": jnp.zeros(outputs)},
    }


def batch_of(n, inputs=3, seed=1, weight=None):
    return Batch(jax.random.normal(jax.random.key(seed), (n, inputs)), None, weight)


def compiled(choice, outputs, likelihood, params, batch, scale, **options):
    """A curvature built in one compiled call: eagerly each of its operations would be compiled alone."""
    return jax.jit(lambda p, b, s: choice(outputs, likelihood, p, b, s, **options))(params, batch, scale)


def dense(outputs, likelihood, params, batch):
    """Gauss-Newton of the summed nll as a P x P matrix, and the function that flattens like it."""
    flat, build = ravel_pytree(params)

    @jax.jit
    def gauss_newton(flat):
        jacobian = jax.jacrev(lambda p: outputs(build(p), batch.x))(flat)
        root = likelihood.hessian_root(outputs(build(flat), batch.x))
        weight = jnp.ones(len(root)) if batch.weight is None else batch.weight
        return jnp.einsum("n,ncp,ncr,ndr,ndq->pq", weight, jacobian, root, root, jacobian)

    return gauss_newton(flat), build


def covariance(push, build, size):
    """root root' of the linear map `push`, by pushing the identity through it."""
    root = jax.jit(jax.vmap(lambda e: ravel_pytree(push(build(e)))[0]))(jnp.eye(size))
    return root.T @ root


def random_scale(params, seed=5):
    flat, build = ravel_pytree(params)
    return build(jax.random.uniform(jax.random.key(seed), flat.shape, minval=0.2, maxval=1.5))


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_rows_make_the_hessian_of_a_linear_softmax_model():
    batch = Batch(jax.random.normal(jax.random.key(0), (7, 3)), jnp.arange(7) % 4)
    params = jax.random.normal(jax.random.key(1), (3, 4))

    def apply(p, x):
        return x @ p

    hessian = jax.hessian(lambda p: Categorical().nll(apply(p, batch.x), batch.y).sum())(params).reshape(12, 12)
    rows = compiled(dual, apply, Categorical(), params, batch, 1.0).rows.reshape(-1, 12)
    np.testing.assert_allclose(rows.T @ rows, hessian, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("net", [tanh_net, normed_net])
@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.slow
def test_dual_equals_dense_linear_algebra(net, name):
    likelihood, params, scale = LIKELIHOODS[name], tanh_params(), random_scale(tanh_params())
    # 20 examples are 40 rows: more than one chunk, and more than the 26 parameters.
    batch = batch_of(20, weight=jnp.array([0.0, 2.0, *np.ones(18)]))
    h, build = dense(net, likelihood, params, batch)
    s = ravel_pytree(scale)[0]
    precision = jnp.eye(len(s)) + s[:, None] * h * s
    exact = s[:, None] * jnp.linalg.inv(precision) * s
    fit = compiled(dual, net, likelihood, params, batch, scale)
    np.testing.assert_allclose(fit.log_det(), jnp.linalg.slogdet(precision)[1], rtol=1e-12)

    zero = jax.tree.map(jnp.zeros_like, params)
    gaussian = fit.gaussian(zero, laplace_spectrum)
    np.testing.assert_allclose(covariance(gaussian.push, build, len(s)), exact, atol=1e-11)
    np.testing.assert_allclose(gaussian.log_det(), jnp.linalg.slogdet(exact)[1], rtol=1e-10)

    v = jax.random.normal(jax.random.key(8), s.shape)
    np.testing.assert_allclose(fit.quadratic(build(v)), v @ exact @ v, rtol=1e-9)
    x = batch_of(18, seed=9).x
    j = jax.jit(jax.jacrev(lambda p: net(build(p), x)))(ravel_pytree(params)[0])
    variance = jnp.einsum("ncp,pq,ncq->nc", j, exact, j)
    posterior = gaussian._replace(mean=params)
    got = jax.jit(lambda at: output_variance(net, at, x))
    np.testing.assert_allclose(got(posterior), variance, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(got(CurvatureGaussian(params, fit, 2.0)), 2 * variance, rtol=1e-8, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("choice", ["dual", "kfac", "diagonal", "lanczos"])
def test_log_det_gradient_is_right_with_repeated_eigenvalues(choice):
    # Every example twice: each curvature's matrices have repeated eigenvalues, zero among them.
    params, half = tanh_params(), batch_of(3)
    batch = Batch(jnp.concatenate([half.x, half.x]), None)
    flat, build = ravel_pytree(params)

    @jax.jit
    def log_det(p):
        return CURVATURES[choice](tanh_net, Categorical(), build(p), batch, 0.8).log_det()

    direction = jax.random.normal(jax.random.key(3), flat.shape)
    slope = jax.jit(jax.grad(log_det))(flat) @ direction
    e = 1e-5
    difference = (log_det(flat + e * direction) - log_det(flat - e * direction)) / (2 * e)
    np.testing.assert_allclose(slope, difference, rtol=1e-5)


def test_scales():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    assert as_scale(0.5, params)["w"].shape == (2, 3)
    assert as_scale({"w": jnp.ones(3), "b": 2.0}, params)["w"].shape == (2, 3)
    with pytest.raises(ValueError, match="scale"):
        as_scale({"w": jnp.ones(3)}, params)
    with pytest.raises(ValueError, match="outputs"):
        dual(lambda p, x: x @ p["w"].sum(1), Gaussian(1.0), params, batch_of(4, 2), 1.0)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_parameter_of_scale_zero_does_not_move():
    params = tanh_params()
    scale = as_scale(0.7, params) | {"layer": jax.tree.map(jnp.zeros_like, params["layer"])}
    fit = compiled(dual, tanh_net, Gaussian(0.3), params, batch_of(5), scale)

    def head_only(head, x):
        return tanh_net({"layer": params["layer"], "head": head}, x)

    alone = compiled(dual, head_only, Gaussian(0.3), params["head"], batch_of(5), 0.7)
    np.testing.assert_allclose(fit.log_det(), alone.log_det(), rtol=1e-12)
    draw = fit.sample(jax.random.key(0))
    assert not jnp.any(draw["layer"]["w"])
    assert jnp.all(jnp.isfinite(draw["head"]["w"]))


@pytest.mark.usefixtures("x64")
def test_diagonal_is_the_diagonal():
    params, scale, batch = tanh_params(), random_scale(tanh_params()), batch_of(5)
    h, build = dense(tanh_net, Categorical(), params, batch)
    s = ravel_pytree(scale)[0]
    fit = compiled(diagonal, tanh_net, Categorical(), params, batch, scale)
    d = s**2 * jnp.diag(h)
    np.testing.assert_allclose(fit.log_det(), jnp.log1p(d).sum(), rtol=1e-12)
    np.testing.assert_allclose(covariance(fit.push, build, len(s)), jnp.diag(s**2 / (1 + d)), atol=1e-13)
    v = jax.random.normal(jax.random.key(8), s.shape)
    np.testing.assert_allclose(fit.quadratic(build(v)), (v**2 * s**2 / (1 + d)).sum(), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_diagonal_is_exact_for_a_diagonal_problem():
    params, batch = {"mean": jnp.arange(3.0)}, Batch(2 * jnp.eye(3), None)

    def apply(p, x):
        return (x @ p["mean"])[:, None]

    exact, cheap = (c(apply, Gaussian(0.5), params, batch, 0.9) for c in (dual, diagonal))
    np.testing.assert_allclose(exact.log_det(), cheap.log_det(), rtol=1e-12)
    row = {"mean": jnp.array([1.0, -2.0, 0.5])}
    np.testing.assert_allclose(exact.quadratic(row), cheap.quadratic(row), rtol=1e-12)


def blocks_of(h, params):
    """The diagonal blocks of a dense matrix, in the order of the layers' parameters (b before w in a dict)."""
    sizes = {name: ravel_pytree(layer)[0].size for name, layer in sorted(params.items())}
    ends = np.cumsum([0, *sizes.values()])
    return {name: h[a:b, a:b] for name, a, b in zip(sizes, ends, ends[1:], strict=False)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.slow
def test_kfac_blocks_are_exact_for_one_example(name):
    likelihood, params, batch = LIKELIHOODS[name], tanh_params(), batch_of(1, weight=jnp.array([3.0]))
    fit = compiled(kfac, tanh_net, likelihood, params, batch, 0.7)
    h, build = dense(tanh_net, likelihood, params, batch)
    exact = jax.scipy.linalg.block_diag(*(jnp.eye(len(b)) + 0.49 * b for b in blocks_of(h, params).values()))
    np.testing.assert_allclose(fit.log_det(), jnp.linalg.slogdet(exact)[1], rtol=1e-11)
    inverse = 0.49 * jnp.linalg.inv(exact)
    np.testing.assert_allclose(covariance(fit.push, build, len(h)), inverse, atol=1e-11)
    v = jax.random.normal(jax.random.key(8), (len(h),))
    np.testing.assert_allclose(fit.quadratic(build(v)), v @ inverse @ v, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_kfac_is_the_whole_fisher_of_one_linear_layer_and_of_each_layer_of_a_deep_linear_network():
    one = {"head": {"w": jax.random.normal(jax.random.key(0), (3, 4)), "b": jnp.ones(4)}}

    def linear(p, x, call=SEEN):
        return call.tap("head", x, x @ p["head"]["w"] + p["head"]["b"])

    batch = batch_of(1)
    exact = compiled(dual, linear, Categorical(), one, batch, 0.7).log_det()
    np.testing.assert_allclose(kfac(linear, Categorical(), one, batch, 0.7).log_det(), exact, rtol=1e-12)

    def deep(p, x, call=SEEN):
        for name in ("a", "b", "c"):
            x = call.tap(name, x, x @ p[name]["w"])
        return x

    keys = jax.random.split(jax.random.key(1), 3)
    params = {n: {"w": jax.random.normal(k, (3, 3))} for n, k in zip("abc", keys, strict=True)}
    # Any number of examples: a deep linear network's gradients in s do not depend on the example if the noise is fixed.
    batch = batch_of(6)
    h, _ = dense(deep, Gaussian(0.5), params, batch)
    fit = compiled(kfac, deep, Gaussian(0.5), params, batch, 0.7)
    for name, block in blocks_of(h, params).items():
        values = jnp.sort(fit.blocks[name].spectrum().reshape(-1))
        np.testing.assert_allclose(values, 0.49 * jnp.linalg.eigvalsh(block), atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_kfac_log_det_golden():
    # A = diag(2, 3), G = 5, tau = 0.1: log(10.1) + log(15.1).
    batch = Batch(jnp.array([[2.0, 0.0], [0.0, 6.0**0.5]]), None)
    params = {"head": {"w": jnp.zeros((2, 1))}}

    def apply(p, x, call=SEEN):
        return call.tap("head", x, x @ p["head"]["w"])

    # N A (x) G with N = 2 examples: A is a mean, so the nll's precision 2.5 makes it A (x) 5.
    fit = compiled(kfac, apply, Gaussian(2.5**-0.5), params, batch, 0.1**-0.5)
    np.testing.assert_allclose(fit.log_det() + 2 * jnp.log(0.1), 5.02723017, atol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_kfac_sums_over_positions_and_weighs_examples():
    """A convolution is a layer at each position; an example of weight 2 is that example twice."""
    params = {"conv": {"w": jax.random.normal(jax.random.key(0), (1, 2, 3))}, "norm": {"gain": jnp.ones(3)}}

    def apply(p, x, call=SEEN):
        s = call.tap("conv", x, x @ p["conv"]["w"].reshape(2, 3))
        return jnp.tanh(s * p["norm"]["gain"]).mean(1)

    x = jax.random.normal(jax.random.key(2), (2, 5, 2))
    twice = compiled(kfac, apply, Categorical(), params, Batch(x[jnp.array([0, 1, 1])], None), 0.9)
    heavy = compiled(kfac, apply, Categorical(), params, Batch(x, None, jnp.array([1.0, 2.0])), 0.9)
    np.testing.assert_allclose(twice.log_det(), heavy.log_det(), rtol=1e-12)
    assert set(heavy.blocks) == {"conv"}
    draw = heavy.sample(jax.random.key(0))
    assert draw["conv"]["w"].shape == (1, 2, 3)
    assert not jnp.any(draw["norm"]["gain"])

    # By the definition: A sums inputs over positions, G averages gradients over them (Grosse & Martens 2016).
    w = params["conv"]["w"].reshape(2, 3)

    def nll_root(s):
        f = jnp.tanh(s).mean(0)
        p = jax.nn.softmax(f)
        return f, jnp.diag(jnp.sqrt(p)) - jnp.outer(p, jnp.sqrt(p))

    a = sum(xi.T @ xi for xi in x) / 2
    g = jnp.zeros((3, 3))
    for xi in x:
        jac = jax.jacrev(lambda s: nll_root(s)[0])(xi @ w)
        per_position = jnp.einsum("cto,cr->rto", jac, nll_root(xi @ w)[1])
        g += jnp.einsum("rto,rtu->ou", per_position, per_position) / (2 * 5)
    plain = compiled(kfac, apply, Categorical(), params, Batch(x, None), 0.9)
    expected = jnp.linalg.slogdet(jnp.eye(6) + 0.81 * 2 * jnp.kron(a, g))[1]
    np.testing.assert_allclose(plain.log_det(), expected, rtol=1e-12)


def test_kfac_says_that_it_needs_taps():
    with pytest.raises(ValueError, match="tap"):
        kfac(lambda p, x, call: x @ p["head"]["w"], Gaussian(1.0), {"head": {"w": jnp.ones((3, 1))}}, batch_of(2), 1.0)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_lanczos_log_det_converges_with_its_order_and_so_does_its_gradient():
    roots = jax.random.normal(jax.random.key(0), (8, 20)) * jnp.logspace(-1, 1, 8)[:, None]
    probes = jnp.sqrt(8.0) * jnp.eye(8)  # their mean is the trace itself: what is left is the error of the order

    def exact(t):
        return jnp.linalg.slogdet(jnp.eye(8) + (roots * t) @ (roots * t).T)[1]

    def estimate(t, order):
        return log_det_estimate(lambda u: (roots * t) @ ((roots * t).T @ u), probes, order)

    value, slope = jax.value_and_grad(exact)(1.3)
    at = jax.jit(jax.value_and_grad(estimate), static_argnums=1)
    values, slopes = zip(*(at(1.3, order) for order in (1, 2, 4, 8)), strict=True)
    errors = np.abs(np.asarray(values) - value)
    assert np.all(np.diff(errors) < 0)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-9
    assert abs(slopes[0] - slope) > abs(slopes[2] - slope) > abs(slopes[-1] - slope)
    np.testing.assert_allclose(slopes[-1], slope, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_lanczos_probes_are_unbiased_and_the_leading_forms_carry_the_gradient():
    params, batch = tanh_params(), batch_of(10)
    flat, build = ravel_pytree(params)

    def log_det(p, choice, **options):
        return choice(tanh_net, Gaussian(0.3), build(p), batch, 0.8, **options).log_det()

    value, slope = jax.jit(jax.value_and_grad(lambda p: log_det(p, dual)))(flat)
    draw = jax.jit(jax.value_and_grad(lambda p, k: log_det(p, lanczos, key=k, order=20, probes=64)))
    values, slopes = zip(*(draw(flat, key) for key in jax.random.split(jax.random.key(1), 6)), strict=True)
    values, slopes = np.asarray(values), np.asarray(slopes)
    error, spread = values.mean() - value, values.std(ddof=1) / np.sqrt(6)
    assert abs(error) < 4 * spread < 0.1 * value
    alike = slopes.mean(0) @ slope / np.linalg.norm(slopes.mean(0)) / np.linalg.norm(slope)
    assert alike > 0.99


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_lanczos_posterior_is_exact_at_full_order_and_cautious_below():
    # Three outputs that share their inputs: each eigenvalue comes three times, which exhausts a Krylov space early.
    params, batch = {"w": jax.random.normal(jax.random.key(0), (6, 3))}, batch_of(4, 6)

    def apply(p, x):
        return x @ p["w"]

    exact = compiled(dual, apply, Gaussian(0.5), params, batch, 0.8)
    rows = {"w": jax.random.normal(jax.random.key(4), (5, 6, 3))}
    wanted = jax.vmap(exact.quadratic)(rows)
    for order in (2, 6, 40):
        fit = compiled(lanczos, apply, Gaussian(0.5), params, batch, 0.8, order=order)
        got = jax.jit(jax.vmap(fit.quadratic))(rows)
        assert jnp.all(got > wanted - 1e-9)
    np.testing.assert_allclose(got, wanted, rtol=1e-8)
    zero = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_allclose(
        fit.gaussian(zero, laplace_spectrum).log_det(),
        exact.gaussian(zero, laplace_spectrum).log_det(),
        rtol=1e-8,
    )


@pytest.mark.parametrize("choice", CURVATURES)
def test_gradients_reach_the_meta_parameters_through_tasks_side_by_side(choice):
    """grad of vmap over tasks, compiled, equals the sum of the tasks' gradients one by one."""
    params = tanh_params()
    tasks = jax.random.normal(jax.random.key(2), (3, 4, 3))

    def log_det(p, x):
        return CURVATURES[choice](tanh_net, Categorical(), p, Batch(x, None), 0.8).log_det()

    together = jax.jit(jax.grad(lambda p: jax.vmap(log_det, (None, 0))(p, tasks).sum()))(params)
    alone = jax.jit(jax.grad(log_det))
    single = [alone(params, x) for x in tasks]
    apart = jax.tree.map(lambda *leaves: sum(leaves), *single)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_float32_holds_under_a_very_broad_prior():
    """Few-shot size with S^2 = 1000: the variance is a small difference of large numbers."""
    params = tanh_params(inputs=30, hidden=100)
    batch, x = batch_of(10, 30), batch_of(5, 30, seed=4).x

    def variance():
        return jax.jit(both)(params, batch, x)

    def both(params, batch, x):
        fit = dual(tanh_net, Gaussian(0.3), params, batch, 1000.0**0.5)
        zero = fit.gaussian(params, laplace_spectrum)
        return output_variance(tanh_net, zero, batch.x), output_variance(tanh_net, zero, x)

    near, far = variance()
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, batch))
        x = x.astype(jnp.float64)
        near64, far64 = variance()
    np.testing.assert_allclose(far, far64, rtol=1e-3)
    np.testing.assert_allclose(near, near64, rtol=0.5, atol=0.05)  # the noise variance is 0.09


@pytest.mark.slow
def test_rows_one_by_one_are_the_rows_at_once(monkeypatch, x64):
    model, x = mlp(3, (8,)), jax.random.normal(jax.random.key(0), (5, 2))
    phi, batch = model.init(jax.random.key(1), x), Batch(x, jnp.asarray([0, 1, 2, 0, 1]))

    def log_det(phi):
        return CURVATURES["dual"](model.apply, Categorical(), phi, batch, jnp.asarray(0.5)).log_det()

    at_once = jax.value_and_grad(log_det)(phi)
    monkeypatch.setattr(rows_module, "CACHE", 1)
    one_by_one = jax.value_and_grad(log_det)(phi)
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def sizes_of(posterior, queries, params):
    """Variances at the queries, and log det of I + S H S."""
    return output_variance(tanh_net, posterior.gaussian(params, laplace_spectrum), queries), posterior.log_det()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["gaussian", "softmax"])
@pytest.mark.slow
def test_many_rows_have_the_duals_posterior(name):
    """Weights and padding included."""
    params, weight = tanh_params(), jnp.tile(jnp.asarray([1.0, 0.5, 0.0]), 70)
    batch, queries = batch_of(210, weight=weight), batch_of(6, seed=3).x
    exact, form = (compiled(c, tanh_net, LIKELIHOODS[name], params, batch, 0.7) for c in (dual, primal))
    for right, got in zip(sizes_of(exact, queries, params), sizes_of(form, queries, params), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-8)


def test_the_curvature_is_chosen_by_shapes():
    """No Gram matrix of the rows beyond 512, and the dual's own bits up to there."""
    small, batch = tanh_params(), batch_of(20)
    a, b = (compiled(c, tanh_net, Gaussian(0.3), small, batch, 0.7) for c in (dual, by_size))
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a, b))
    many, tied = (partial(by_size, net, Gaussian(0.3), small) for net in (tanh_net, normed_net))
    assert jax.eval_shape(many, batch_of(600), 1.0).values.shape == (26,)
    assert jax.eval_shape(tied, batch_of(600), 1.0).gram.shape == (1200, 1200)  # two outputs
    with pytest.raises(ValueError, match="exact curvature, got 10000 rows of a support and 26 parameters"):
        jax.eval_shape(tied, batch_of(5000), 1.0)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_variances_of_many_queries_take_examples_apart_only_where_they_are():
    params, x = tanh_params(), batch_of(150).x
    for net, apart in ((tanh_net, True), (normed_net, False)):
        assert jax.jit(lambda p, x, net=net: jnp.asarray(one_by_one(net, p, x)))(params, x) == apart
        around = compiled(dual, net, Gaussian(0.3), params, batch_of(9), 0.7).gaussian(params, laplace_spectrum)
        jacobian = jax.vmap(jax.vmap(around.quadratic))(jax.jacrev(lambda p, net=net: net(p, x))(params))
        np.testing.assert_allclose(jax.jit(partial(output_variance, net))(around, x), jacobian, rtol=1e-8)


@pytest.mark.parametrize(
    "tie",
    [
        lambda h: h - h.mean(0),
        lambda h: jnp.cumsum(h, 0),
        lambda h: jnp.tanh(50 * h.sum(0)) + h,
        lambda h: jax.nn.softmax(h @ h.T) @ h,
        lambda h: h / h.shape[0],
        lambda h: jnp.sort(h, 0),
    ],
)
def test_ties_between_examples_are_seen(tie):
    def net(params, x):
        return tie(tanh_net(params, x))

    assert not one_by_one(net, tanh_params(), batch_of(5).x)
