"""Second-order MAML as the peers' documents write it, ProtoNet and a learned optimiser in plain torch.

Usage: peers.py WHICH PROBLEM INNER_STEPS THREADS (see worker.py).
"""

import math
import sys
from collections.abc import Callable

import torch
from torch.func import functional_call, grad, grad_and_value, vmap

from problems_torch import EPISODE_WAY, Problem, Tasks, make, sample_quadratics
from worker import serve

MetaStep = Callable[[Tasks], object]


def adapted_loss(problem: Problem, steps: int) -> Callable:
    """(theta, one task) -> query loss after the inner steps, as functions of torch.func."""

    def fit(phi: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return problem.loss(functional_call(problem.model, phi, (x,)), y)

    def loss(theta: dict, sx: torch.Tensor, sy: torch.Tensor, qx: torch.Tensor, qy: torch.Tensor) -> torch.Tensor:
        phi = theta
        for _ in range(steps):
            g = grad(fit)(phi, sx, sy)
            phi = {name: phi[name] - problem.rate * g[name] for name in phi}
        return fit(phi, qx, qy)

    return loss


def functional(problem: Problem, steps: int, compiled: bool) -> MetaStep:
    """torch.func, vmap over tasks; Adam on the module's parameters. Compiled: the whole meta-gradient."""
    theta = dict(problem.model.named_parameters())
    batched = vmap(adapted_loss(problem, steps), in_dims=(None, 0, 0, 0, 0))
    meta_gradient = grad_and_value(lambda theta, *tasks: batched(theta, *tasks).mean())
    if compiled:
        meta_gradient = torch.compile(meta_gradient)
    optimizer = torch.optim.Adam(theta.values(), lr=1e-3, fused=True)

    def step(tasks: Tasks) -> None:
        g, _ = meta_gradient({n: p.detach() for n, p in theta.items()}, *tasks)
        for name, p in theta.items():
            p.grad = g[name]
        optimizer.step()

    return step


def functional_loop(problem: Problem, steps: int) -> MetaStep:
    """torch.func, a Python loop over tasks."""
    theta = dict(problem.model.named_parameters())
    meta_gradient = grad(adapted_loss(problem, steps))
    optimizer = torch.optim.Adam(theta.values(), lr=1e-3)

    def step(tasks: Tasks) -> None:
        optimizer.zero_grad()
        at = {n: p.detach() for n, p in theta.items()}
        n = len(tasks[0])
        for task in zip(*tasks, strict=True):
            for name, g in meta_gradient(at, *task).items():
                p = theta[name]
                p.grad = g / n if p.grad is None else p.grad + g / n
        optimizer.step()

    return step


def loop(problem: Problem, task_loss: Callable[..., torch.Tensor]) -> MetaStep:
    """The outer loop of the peers' examples: one task at a time, gradients accumulate, one optimiser step."""
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-3)

    def step(tasks: Tasks) -> None:
        optimizer.zero_grad()
        for task in zip(*tasks, strict=True):
            (task_loss(*task) / len(tasks[0])).backward()
        optimizer.step()

    return step


def plain(problem: Problem, steps: int) -> MetaStep:
    """torch.autograd.grad with create_graph, one task at a time."""
    theta = dict(problem.model.named_parameters())

    def task_loss(sx: torch.Tensor, sy: torch.Tensor, qx: torch.Tensor, qy: torch.Tensor) -> torch.Tensor:
        phi = theta
        for _ in range(steps):
            inner = problem.loss(functional_call(problem.model, phi, (sx,)), sy)
            g = torch.autograd.grad(inner, list(phi.values()), create_graph=True)
            phi = {n: p - problem.rate * d for (n, p), d in zip(phi.items(), g, strict=True)}
        return problem.loss(functional_call(problem.model, phi, (qx,)), qy)

    return loop(problem, task_loss)


def with_higher(problem: Problem, steps: int) -> MetaStep:
    import higher

    inner = torch.optim.SGD(problem.model.parameters(), lr=problem.rate)

    def task_loss(sx: torch.Tensor, sy: torch.Tensor, qx: torch.Tensor, qy: torch.Tensor) -> torch.Tensor:
        with higher.innerloop_ctx(problem.model, inner, copy_initial_weights=False) as (network, differentiable):
            for _ in range(steps):
                differentiable.step(problem.loss(network(sx), sy))
            return problem.loss(network(qx), qy)

    return loop(problem, task_loss)


def with_torchopt(problem: Problem, steps: int) -> MetaStep:
    import torchopt

    inner = torchopt.MetaSGD(problem.model, lr=problem.rate)
    outer = torch.optim.Adam(problem.model.parameters(), lr=1e-3)

    def step(tasks: Tasks) -> None:
        outer.zero_grad()
        losses = []
        network_state = torchopt.extract_state_dict(problem.model, by="reference", detach_buffers=True)
        optimizer_state = torchopt.extract_state_dict(inner, by="reference")
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            for _ in range(steps):
                inner.step(problem.loss(problem.model(sx), sy))
            losses.append(problem.loss(problem.model(qx), qy))
            torchopt.recover_state_dict(problem.model, network_state)
            torchopt.recover_state_dict(inner, optimizer_state)
        torch.stack(losses).mean().backward()
        outer.step()

    return step


def with_learn2learn(problem: Problem, steps: int) -> MetaStep:
    import learn2learn as l2l

    meta = l2l.algorithms.MAML(problem.model, lr=problem.rate, first_order=False)

    def task_loss(sx: torch.Tensor, sy: torch.Tensor, qx: torch.Tensor, qy: torch.Tensor) -> torch.Tensor:
        network = meta.clone()
        for _ in range(steps):
            network.adapt(problem.loss(network(sx), sy))
        return problem.loss(network(qx), qy)

    return loop(problem, task_loss)


def prototypes(problem: Problem, compiled: bool) -> MetaStep:
    """ProtoNet as its authors write it: support and queries through the network in one batch, then class means."""
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=1e-3)

    def episode_loss(sx: torch.Tensor, sy: torch.Tensor, qx: torch.Tensor, qy: torch.Tensor) -> torch.Tensor:
        z = problem.model(torch.cat([sx, qx]))
        support, query = z[: len(sx)], z[len(sx) :]
        means = support.view(EPISODE_WAY, -1, z.shape[1]).mean(1)
        return problem.loss(-(query[:, None] - means).pow(2).sum(-1), qy)

    run = torch.compile(episode_loss) if compiled else episode_loss

    def step(tasks: Tasks) -> None:
        optimizer.zero_grad()
        for task in zip(*tasks, strict=True):
            (run(*task) / len(tasks[0])).backward()
        optimizer.step()

    return step


PEERS: dict[str, Callable[[Problem, int], MetaStep]] = {
    "torch.func vmap": lambda problem, steps: functional(problem, steps, compiled=False),
    "torch.compile": lambda problem, steps: functional(problem, steps, compiled=True),
    "torch.func loop": functional_loop,
    "torch loop": plain,
    "higher": with_higher,
    "torchopt": with_torchopt,
    "learn2learn": with_learn2learn,
    "torch": lambda problem, steps: prototypes(problem, compiled=False),
    "torch compiled": lambda problem, steps: prototypes(problem, compiled=True),
}


def learned_optimiser(functions: int, steps: int, unroll: int = 20, p: float = 10.0) -> Callable[[], None]:
    """Andrychowicz et al. 2016: a meta-step is one optimisation of all functions at once, truncated every `unroll`.

    The inner gradient is a constant, so it is taken apart; all coordinates of all functions are rows of one LSTM.
    """
    torch.manual_seed(0)
    first, second, out = torch.nn.LSTMCell(2, 20), torch.nn.LSTMCell(20, 20), torch.nn.Linear(20, 1)
    optimizer = torch.optim.Adam([w for m in (first, second, out) for w in m.parameters()], lr=1e-3, fused=True)

    def preprocess(g: torch.Tensor) -> torch.Tensor:
        least = math.exp(-p)
        large = g.abs() >= least
        size = torch.where(large, g.abs().clamp_min(least).log() / p, -1.0)
        return torch.stack([size, torch.where(large, g.sign(), g / least)], -1)

    def step() -> None:
        optimizer.zero_grad()
        w, y, theta = sample_quadratics(functions)
        value = lambda theta: ((w @ theta - y) ** 2).sum((1, 2))  # noqa: E731
        one = two = None
        total = torch.zeros(())
        for t in range(steps):
            at = theta.detach().requires_grad_()
            (g,) = torch.autograd.grad(value(at).sum(), at)
            one = first(preprocess(g.reshape(-1)), one)
            two = second(one[0], two)
            theta = theta + 0.1 * out(two[0]).view_as(theta)
            total = total + value(theta).mean()
            if (t + 1) % unroll == 0:
                (total / steps).backward()
                total, theta = torch.zeros(()), theta.detach()
                one, two = (tuple(s.detach() for s in state) for state in (one, two))
        optimizer.step()

    return step


def main(which: str, problem: str, steps: str, threads: str) -> None:
    def build() -> Callable[[], int]:
        torch.set_num_threads(int(threads))
        if problem.startswith("quadratics-"):
            learn = learned_optimiser(int(problem.removeprefix("quadratics-")), int(steps))
            return lambda: learn() or 1
        made = make(problem)
        step = PEERS[which](made, int(steps))

        def run() -> int:
            step(made.sample())
            return 1

        return run

    serve(build)


if __name__ == "__main__":
    main(*sys.argv[1:])
