"""The benchmark problems in torch: networks, losses and tasks, shared by all peers."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPISODE_WAY = 60  # of ProtoNet's episodes, whose support lies class by class
Tasks = tuple[Tensor, Tensor, Tensor, Tensor]  # support x, y, query x, y; leading axis: tasks


class Problem(NamedTuple):
    model: nn.Module
    loss: object
    sample: object  # () -> Tasks
    rate: float


def sample_sinusoids(tasks: int = 25, points: int = 20, support: int = 10) -> Tasks:
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1)
    phase = math.pi * torch.rand(tasks, 1, 1)
    x = 10 * torch.rand(tasks, points, 1) - 5
    y = amplitude * torch.sin(x - phase)
    return x[:, :support], y[:, :support], x[:, support:], y[:, support:]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def conv4(way: int = 5, filters: int = 64) -> nn.Module:
    """way = 0 ends at the embedding."""

    def block(inputs: int) -> list[nn.Module]:
        norm = nn.BatchNorm2d(filters, track_running_stats=False)
        return [nn.Conv2d(inputs, filters, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]

    blocks = [layer for i in range(4) for layer in block(1 if i == 0 else filters)]
    return nn.Sequential(*blocks, nn.Flatten(), *([nn.Linear(filters, way)] if way else []))


def images(tasks: int = 8, way: int = 5, queries: int = 15) -> Tasks:
    y = torch.arange(way).expand(tasks, way)
    return (
        torch.rand(tasks, way, 1, 28, 28),
        y,
        torch.rand(tasks, way * queries, 1, 28, 28),
        y.repeat_interleave(queries, dim=1),
    )


def sample_quadratics(functions: int, dimension: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """W, y and a start theta of |W theta - y|^2, for so many functions."""
    start = 0.01 * torch.randn(functions, dimension, 1)
    return torch.randn(functions, dimension, dimension), torch.randn(functions, dimension, 1), start


def make(name: str) -> Problem:
    torch.manual_seed(0)
    if name == "sinusoid":
        return Problem(mlp(), F.mse_loss, sample_sinusoids, 0.01)
    if name == "protonet":
        episode = images(1, EPISODE_WAY, 5)
        return Problem(conv4(0), F.cross_entropy, lambda: episode, 0.0)
    tasks = images()
    return Problem(conv4(), F.cross_entropy, lambda: tasks, 0.4)
