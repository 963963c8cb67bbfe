"""MAML's meta-gradient against torch.func on the same weights and data: relative error in float64 and float32."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from harness import HERE, PEERS, environment, options, write
from metaprior.core.likelihoods import Categorical, Gaussian
from metaprior.learners.maml import maml
from metaprior.networks.conv4 import conv4
from metaprior.networks.mlp import mlp
from metaprior.tasks.synthetic.sinusoid import sinusoid
from ours import images

CASES = {  # name: (learner, source, tasks)
    "sinusoid, 1 step": lambda: (maml(mlp(), Gaussian(), steps=1, rate=0.01), sinusoid().train, 25),
    "sinusoid, 5 steps": lambda: (maml(mlp(), Gaussian(), steps=5, rate=0.01), sinusoid().train, 25),
    "conv4, 1 step": lambda: (maml(conv4(gain=True), Categorical(), steps=1, rate=0.4), images(2), 2),
}


def dump(path: Path, name: str) -> None:
    """Weights and tasks (float64 values of float32 draws) and the meta-gradient in both precisions."""
    learner, source, count = CASES[name]()
    tasks = source.sample(jax.random.key(1), count)
    params = learner.init(jax.random.key(2), jax.tree.map(lambda leaf: leaf[0], tasks))
    params, tasks = jax.device_get((params, tasks))
    arrays = {"sx": tasks.support.x, "sy": tasks.support.y, "qx": tasks.query.x, "qy": tasks.query.y}
    for dtype in (np.float64, np.float32):
        with jax.enable_x64(dtype is np.float64):

            def cast(leaf: np.ndarray, dtype: type = dtype) -> np.ndarray:
                return leaf.astype(dtype) if np.issubdtype(leaf.dtype, np.floating) else leaf

            theta, data = jax.tree.map(cast, (params, tasks))

            def loss(theta: dict, data: object = data) -> jax.Array:
                keys = jax.random.split(jax.random.key(0), count)
                return jax.vmap(lambda task, key: learner.loss(theta, task, key)[0])(data, keys).mean()

            gradient = jax.device_get(jax.jit(jax.grad(loss))(theta))
        for layer, leaves in gradient.items():
            for leaf, value in leaves.items():
                if value.dtype != dtype:
                    raise TypeError(f"{layer}.{leaf}: gradient is {value.dtype}, needs {dtype}")
                arrays[f"gradient/{np.dtype(dtype).name}/{layer}/{leaf}"] = value
    arrays |= {f"theta/{layer}/{leaf}": v for layer, leaves in params.items() for leaf, v in leaves.items()}
    np.savez(path, **arrays)


def main() -> None:
    chosen = options(__doc__)
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            path = Path(folder) / "case.npz"
            dump(path, name)
            steps = "5" if "5 steps" in name else "1"
            command = [str(PEERS), str(HERE / "parity_torch.py"), str(path), name.split(",")[0], steps]
            said = subprocess.run(command, env=environment(1), check=True, capture_output=True, text=True).stdout
            result[name] = json.loads(said)
            print(name, *(f"{k}: {v:.2e}" for k, v in result[name].items()), sep="\n  ")
    write(chosen.json, result)
    if max(row["float64, ours against torch.func"] for row in result.values()) > 1e-5:
        sys.exit("the meta-gradients differ")


if __name__ == "__main__":
    main()
