"""The peers' side of gradient_parity.py. Usage: parity_torch.py NPZ PROBLEM INNER_STEPS; prints relative errors."""

import json
import sys

import numpy as np
import torch
from torch.func import grad

from peers import adapted_loss
from problems_torch import make


def torch_names(problem: str) -> dict[str, str]:
    """Our name of each parameter -> torch's. A convolution's bias, which batch norm cancels, has no counterpart."""
    if problem == "sinusoid":
        layers = {"layer1": 0, "layer2": 2, "head": 4}
    else:
        layers = {"head": 17}
        blocks = {f"block{i + 1}": 4 * i for i in range(4)}
    names = {f"{layer}/{ours}": f"{i}.{theirs}" for layer, i in layers.items()
             for ours, theirs in (("w", "weight"), ("b", "bias"))}  # fmt: skip
    if problem != "sinusoid":
        for layer, i in blocks.items():
            names[f"{layer}/w"] = f"{i}.weight"
            names |= {f"{layer}/shift": f"{i + 1}.bias", f"{layer}/gain": f"{i + 1}.weight"}
    return names


def to_torch(value: np.ndarray) -> np.ndarray:
    """[in, out] -> [out, in]; [h, w, in, out] -> [out, in, h, w]."""
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T


def relative(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """|a - b| / |b| over all parameters as one vector."""
    difference = sum(((a[n].astype(np.float64) - b[n]) ** 2).sum() for n in b)
    return float(np.sqrt(difference / sum((b[n].astype(np.float64) ** 2).sum() for n in b)))


def main(path: str, problem: str, steps: str) -> None:
    arrays, made, names = np.load(path), make(problem), torch_names(problem)
    ours, theirs = {}, {}
    for dtype, name in ((torch.float64, "float64"), (torch.float32, "float32")):
        theta = {n: torch.zeros_like(p, dtype=dtype) for n, p in made.model.named_parameters()}
        for mine, other in names.items():
            theta[other] = torch.tensor(to_torch(arrays[f"theta/{mine}"]).copy()).to(dtype)
        tasks = [torch.tensor(arrays[n]) for n in ("sx", "sy", "qx", "qy")]
        tasks = [t.to(dtype) if t.is_floating_point() else t.long() for t in tasks]
        if problem == "conv4":
            tasks = [t.permute(0, 1, 4, 2, 3) if t.ndim == 5 else t for t in tasks]
        gradients = [grad(adapted_loss(made, int(steps)))(theta, *task) for task in zip(*tasks, strict=True)]
        theirs[name] = {n: (sum(g[n] for g in gradients) / len(gradients)).numpy() for n in names.values()}
        ours[name] = {other: to_torch(arrays[f"gradient/{name}/{mine}"]) for mine, other in names.items()}
    errors = {
        "float64, ours against torch.func": relative(ours["float64"], theirs["float64"]),
        "float32, ours against torch.func": relative(ours["float32"], theirs["float32"]),
        "float32, ours against torch.func in float64": relative(ours["float32"], theirs["float64"]),
        "float32, torch.func against itself in float64": relative(theirs["float32"], theirs["float64"]),
    }
    print(json.dumps(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
