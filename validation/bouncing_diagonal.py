"""The suite ``bouncing`` on the diagonal linear network, whose Hessian is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from nets.diagonal import initial_state, sgd
from nets.update import Update
from theory.diagonal import DiagonalState
from theory.minibatch import Minibatch
from theory.observables import diagonal_hessian, half_mse
from theory.problem import Regression
from theory.schedule import Schedule
from theory.streams import seed_of
from theory.trajectory import Probe
from validation.bouncing_runs import Setting, Window

LABEL_NOISE = 0.1  # keeps the loss up, so that there is something to be stationary


def observe_diagonal(
    problem: Regression, setting: Setting, trained: int, runs: int, burn_in: int, steps: int, K: int, root: int
) -> Window:
    """``runs`` replicas of label-noise SGD from the state one run reaches in ``trained`` steps."""
    batch, update = Minibatch(setting.batch_size), Update(label_noise=LABEL_NOISE)
    schedule, seed = [Schedule(setting.step_size)], seed_of("bouncing", setting.label, root)
    first = sgd(
        problem, initial_state(problem), schedule, trained, seeds=[0], batch=batch, update=update, root_seed=seed
    ).final
    start = DiagonalState(*(part[0, 0] for part in (first.a, first.b, first.a_exponent, first.b_exponent)))
    probe = {"theta": Probe(lambda s: torch.cat([s.u, s.v], -1), torch.arange(burn_in, burn_in + steps))}
    run = sgd(
        problem, start, schedule, burn_in + steps, seeds=range(runs), batch=batch, update=update, probes=probe,
        root_seed=seed + 1,
    )  # fmt: skip
    finite = run.finite[0]
    theta = run["theta"].values[:, 0, finite]
    count, d = int(finite.sum()), problem.d
    unbiased = count / (count - 1)
    origin = theta[0].mean(0)
    H = diagonal_hessian(origin[:d], origin[d:], problem.X, problem.y)
    values, vectors = torch.linalg.eigh(H)
    E, curvature = vectors.flip(1)[:, :K], values.flip(0)[:K]
    middle = theta.mean(1)
    excess = (_loss(problem, theta) - _loss(problem, middle).unsqueeze(1)) * unbiased
    visited = theta[:: max(steps // 16, 1), ::8].flatten(0, 1)
    noise, total = _noise(problem, visited, E, setting.batch_size)
    return Window(
        setting, problem.n, 1, curvature.cpu(),
        ((theta - middle.unsqueeze(1)) @ E).cpu() * unbiased**0.5, noise.cpu(), noise.mean(0).cpu(),
        total.cpu(), excess.mean(0).cpu(),
        float(_loss(problem, middle).mean()), float(setting.step_size * (total - noise.sum(1)).mean() / 4), 0.0,
        float(values.sum()), torch.empty(0, count), finite.cpu(), origin, E, theta[-1],
    )  # fmt: skip


def _loss(problem: Regression, theta: Tensor) -> Tensor:
    u, v = theta.chunk(2, -1)
    return half_mse(u * v, problem.X, problem.y)


def _noise(problem: Regression, theta: Tensor, E: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """C_kk along E and tr C of minibatches with label noise at each θ of shape (J, 2d)."""
    noise, total = [], []
    for at in theta:
        u, v = at.chunk(2)
        J = torch.cat([problem.X * v, problem.X * u], 1)
        g = (problem.X @ (u * v) - problem.y).unsqueeze(1) * J
        g = g - g.mean(0)
        squares = g.square() @ torch.ones_like(at), J.square() @ torch.ones_like(at)
        noise.append(((g @ E).square().mean(0) + LABEL_NOISE**2 * (J @ E).square().mean(0)) / batch_size)
        total.append((squares[0].mean() + LABEL_NOISE**2 * squares[1].mean()) / batch_size)
    return torch.stack(noise), torch.stack(total)
