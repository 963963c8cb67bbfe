"""The kernels in C++ against what XLA makes of the same, and what becomes of a machine that cannot compile them."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaprior.core.runtime import private_folder
from metaprior.kernels import native, product
from metaprior.kernels.conv import _by_xla, _operands, conv2d, conv_p, geometry
from metaprior.kernels.native import TARGETS, build, registered, trusted

SOURCE = Path(native.__file__).with_name("kernels.cc")
# Of image, kernel, stride, padding; tasks, images, channels in and out: what networks use, and what is awkward.
CASES = [
    ((28, 28), (3, 3), 1, "SAME", (1, 5, 1, 64)),
    ((14, 14), (3, 3), 1, "SAME", (2, 3, 64, 64)),
    ((3, 3), (3, 3), 1, "SAME", (1, 33, 64, 64)),
    ((14, 13), (3, 3), 2, "SAME", (2, 5, 16, 32)),
    ((4, 4), (3, 3), 2, "SAME", (3, 9, 32, 96)),
    ((9, 8), (5, 4), 3, "SAME", (2, 2, 3, 7)),
    ((9, 8), (4, 5), 2, "VALID", (2, 2, 5, 70)),
    ((10, 10), (1, 1), 2, "SAME", (1, 2, 20, 48)),
    ((5, 6), (5, 6), 1, "VALID", (1, 2, 4, 17)),
    ((4, 4), (7, 7), 1, "SAME", (1, 2, 3, 3)),
    ((4, 4), (1, 1), 3, "VALID", (1, 2, 3, 200)),
]
pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on this machine")


def tensors(image, kernel, stride, padding, sizes):
    t, n, i, o = sizes
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (t, n, *image, i)), jax.random.normal(keys[1], (t, *kernel, i, o))
    shape = geometry(x[0], kernel, stride, padding)
    return {"x": x, "w": w, "y": jax.random.normal(keys[2], (t, n, *shape.output, o))}, shape


@pytest.mark.parametrize("out", ["y", "x", "w"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_agree_with_xla(case, out):
    assert registered()
    given, shape = tensors(*case)
    operands = [given[name] for name in _operands(out)]
    run = jax.jit(partial(conv_p.bind, out=out, shape=shape))
    assert f"metaprior_conv_{out}" in run.lower(*operands).as_text()
    ours, theirs = run(*operands), _by_xla(*operands, out=out, shape=shape)
    assert ours.shape == given[out].shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5 * float(jnp.abs(theirs).max()))
    assert (ours == run(*operands)).all()


def test_many_convolutions_at_once_all_end():
    # More of them than threads, none waiting for another: each may hold a thread while it asks for more.
    keys = jax.random.split(jax.random.key(1), 12)
    x, w = jax.random.normal(keys[0], (16, 14, 14, 64)), [jax.random.normal(k, (3, 3, 64, 64)) for k in keys]
    run = jax.jit(lambda x, ws: [conv2d(x, w) for w in ws])
    first = run(x, w)
    for _ in range(20):
        again = run(x, w)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_the_last_bit_is_that_of_any_number_of_threads(tmp_path):
    if not hasattr(os, "sched_setaffinity") or os.cpu_count() == 1:
        pytest.skip("needs two cores to differ")
    code = (
        "import os, sys; os.sched_setaffinity(0, set(list(range(os.cpu_count()))[: int(sys.argv[1])]))\n"
        "import jax, numpy as np\n"
        "from metaprior.kernels.conv import conv2d\n"
        "x, w = (jax.random.normal(jax.random.key(k), s) for k, s in enumerate([(9, 14, 14, 64), (3, 3, 64, 64)]))\n"
        "loss = lambda x, w: jax.numpy.sin(conv2d(x, w)).sum()\n"
        "np.savez(sys.argv[2], *jax.jit(jax.grad(loss, (0, 1)))(x, w))\n"
    )
    found = []
    for threads in (1, 2):
        path = tmp_path / f"{threads}.npz"
        subprocess.run([sys.executable, "-c", code, str(threads), str(path)], check=True)
        found.append(list(np.load(path).values()))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_it_is_compiled_once(tmp_path):
    first = build(SOURCE, tmp_path)
    stamp = first.stat().st_mtime_ns
    assert build(SOURCE, tmp_path) == first
    assert first.stat().st_mtime_ns == stamp
    assert {p.name for p in tmp_path.iterdir()} == {first.name, first.with_suffix(".sha256").name, ".lock"}


def cut(library, share):
    library.write_bytes(library.read_bytes()[: int(share * library.stat().st_size)])


def planted(library):
    library.write_bytes(b"another program")
    library.with_suffix(".sha256").write_text(hashlib.sha256(b"another program").hexdigest())
    library.chmod(0o777)


def linked(library):
    elsewhere = library.with_name("elsewhere.so")
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


DOUBTS = {
    "cut to a half": lambda library: cut(library, 0.5),
    "its last bytes cut off": lambda library: cut(library, 0.999),
    "without its hash": lambda library: library.with_suffix(".sha256").unlink(),
    "an empty hash": lambda library: library.with_suffix(".sha256").write_text(""),
    "open to others' writing": lambda library: library.chmod(0o722),
    "planted": planted,
    "a link": linked,
}


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    return build(SOURCE, tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("doubt", DOUBTS)
@pytest.mark.slow
def test_a_library_in_doubt_is_not_loaded(doubt, compiled_once, tmp_path):
    library = tmp_path / compiled_once.name
    for suffix in (".so", ".sha256"):
        shutil.copy2(compiled_once.with_suffix(suffix), library.with_suffix(suffix))
    assert trusted(library)
    DOUBTS[doubt](library)
    assert not trusted(library)


def test_a_library_of_another_user_is_not_loaded(compiled_once, monkeypatch):
    assert trusted(compiled_once)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    assert not trusted(compiled_once)


def test_a_library_in_doubt_is_compiled_again(tmp_path):
    source = tmp_path / "small.cc"
    source.write_text('extern "C" int metaprior() { return 7; }\n')
    library = build(source, tmp_path / "kept")
    cut(library, 0.5)
    again = build(source, tmp_path / "kept")
    assert again == library
    assert trusted(again)
    assert ctypes.CDLL(str(again)).metaprior() == 7


def test_processes_that_compile_at_once_all_get_a_whole_library(tmp_path):
    (tmp_path / "small.cc").write_text('extern "C" int metaprior() { return 7; }\n')
    code = (
        "import sys, ctypes; from pathlib import Path; from metaprior.kernels.native import build\n"
        "print(ctypes.CDLL(str(build(Path(sys.argv[1]), Path(sys.argv[2])))).metaprior())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "small.cc"), str(tmp_path / "kept")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in started] == ["7"] * 3


def test_a_private_folder_is_this_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("METAPRIOR_CACHE", str(tmp_path / "cache"))
    folder = private_folder("native")
    folder.chmod(0o777)
    assert private_folder("native") == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.warns(UserWarning, match=r"native-\d+ is not a folder of this user"):
        assert private_folder("native") is None
    monkeypatch.setenv("METAPRIOR_CACHE", str(SOURCE / "below a file"))
    with pytest.warns(UserWarning, match="cannot be used"):
        assert private_folder("native") is None


def test_without_a_compiler_or_with_a_broken_one_xla_does_it(tmp_path, monkeypatch):
    broken = tmp_path / "broken.cc"
    broken.write_text("this is no C++")
    with pytest.warns(UserWarning, match=r"broken\.cc did not compile .* continuing without it"):
        assert build(broken, tmp_path) is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert build(SOURCE, tmp_path) is None


def test_a_library_that_does_not_load_is_done_without(tmp_path, monkeypatch):
    text = tmp_path / "text.so"
    text.write_text("no library")
    monkeypatch.setattr(native, "build", lambda source, folder: text)
    with pytest.warns(UserWarning, match="do not load"):
        assert not registered.__wrapped__()


def test_it_can_be_turned_off():
    code = (
        "import jax, jax.numpy as jnp; from metaprior.kernels.conv import conv2d\n"
        "f = jax.jit(conv2d).lower(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5)))\n"
        "print([name for name in " + repr(TARGETS) + " if name in f.as_text()])"
    )
    for value, found in (("1", "['metaprior_conv_y']"), ("0", "[]")):
        env = os.environ | {"METAPRIOR_NATIVE": value}
        said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        assert said.strip() == found


# Products: tasks, rows, inputs, outputs.
PRODUCTS = [
    (1, 10, 40, 40), (25, 10, 40, 40), (3, 7, 40, 1), (2, 13, 1, 5), (2, 1, 5, 3), (1, 250, 40, 40), (2, 9, 33, 70),
    (2, 5, 17, 16), (3, 3, 64, 129), (2, 6, 2, 6), (40, 40, 40, 3), (2, 0, 3, 4), (0, 2, 3, 4),
    (3, 5, 5, 1761), (2, 7, 11, 64), (2, 4, 15, 200), (2, 0, 5, 80), (2, 6, 0, 80),
]  # fmt: skip


@pytest.mark.parametrize("shared", ["", "xy", "w"])
@pytest.mark.parametrize("out", ["y", "x", "w"])
@pytest.mark.slow
def test_products_agree_with_xla(out, shared):
    assert registered()
    for t, n, i, o in PRODUCTS:
        keys = jax.random.split(jax.random.key(2), 3)
        shapes = {"x": (t, n, i), "w": (t, i, o), "y": (t, n, o)}
        given = {
            name: jax.random.normal(key, (1 if name in shared else t, *shapes[name][1:]))
            for name, key in zip("xwy", keys, strict=True)
        }
        operands = [given[name] for name in product._operands(out)]
        run = jax.jit(partial(product.product_p.bind, out=out))
        summed = {"y": i, "x": o, "w": n}[out]
        assert (f"metaprior_product_{out}" in run.lower(*operands).as_text()) == (summed > 1)
        ours, theirs = run(*operands), product._by_xla(*operands, out=out)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-5 * float(jnp.abs(theirs).max(initial=0)))


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)], ids=["both", "weights", "inputs"])
@pytest.mark.slow
def test_a_product_and_its_derivatives_are_those_of_matrices(axes):
    keys = jax.random.split(jax.random.key(3), 4)
    shapes = [(5, 7, 6), (5, 6, 8), (5, 8), (5, 8, 3)]
    x, *weights = (jax.random.normal(k, s) / 2 for k, s in zip(keys, shapes, strict=True))
    weights = weights if axes[0] == 0 else [w[0] for w in weights]
    x = x if axes[1] == 0 else x[0]

    def ours(weights, x):
        w, b, v = weights
        return jnp.sin(product.product(jnp.tanh(product.product(x, w) + product.rows(b, x.shape[0])), v)).sum()

    def theirs(weights, x):
        w, b, v = weights
        return jnp.sin(jnp.tanh(x @ w + b) @ v).sum()

    def after_a_step(loss, weights, x):
        return loss(jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights, x)), x)

    def results(loss):
        def total(weights, x):
            return jax.vmap(partial(after_a_step, loss), axes)(weights, x).sum()

        several = [loss, jax.grad(loss, (0, 1)), jax.hessian(loss), jax.jacrev(jax.jacrev(loss, 1), 1)]
        found = [jax.jit(jax.vmap(f, axes))(weights, x) for f in several]
        return [*found, jax.jit(jax.grad(total, (0, 1)))(weights, x)]

    for a, b in zip(*map(jax.tree.leaves, (results(ours), results(theirs))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_product_of_other_shapes_is_refused():
    with pytest.raises(
        ValueError, match=r"x and w must have shapes \[n, i\] and \[i, o\] .* got \(2, 3\) and \(4, 5\)"
    ):
        product.product(jnp.ones((2, 3)), jnp.ones((4, 5)))
    with pytest.raises(
        ValueError, match=r"a and b must have shapes \[n, o\] and \[i, o\] .* got \(2, 3\) and \(4, 5\)"
    ):
        product.dots(jnp.ones((2, 3)), jnp.ones((4, 5)))


def test_tasks_own_weights_are_kept_once_for_the_backward_pass():
    # A copy of each task's w, reshaped, would be kept beside w itself: with every inner step, in a loop of them.
    traced = jax.make_jaxpr(jax.vmap(product.product))(jnp.ones((5, 7, 6)), jnp.ones((5, 6, 8)))
    assert [equation.primitive for equation in traced.eqns] == [product.product_p]


def test_no_tasks_and_no_rows_at_all():
    w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
    assert jax.vmap(product.product, (0, None))(x[None][:0], w).shape == (0, 4, 2)
    assert jax.vmap(product.product, (None, 0))(x, w[None][:0]).shape == (0, 4, 2)
    assert jax.vmap(product.product)(x[None][:0], w[None][:0]).shape == (0, 4, 2)
    back = jax.vjp(lambda w: product.product(x[:0], w), w)[1]
    assert (back(jnp.ones((0, 2)))[0] == 0).all()
    assert jax.vmap(back)(jnp.ones((0, 0, 2)))[0].shape == (0, 3, 2)
