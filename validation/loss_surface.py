"""The diagonal network's loss on a plane through start, truth and gradient flow's end, with GD and SGD projected."""

from __future__ import annotations

import torch
import xarray as xr
from torch import Tensor

from nets.diagonal import gd, initial_state, sgd
from theory.diagonal import DiagonalState
from theory.observables import half_mse
from theory.problem import Regression, gaussian_sparse
from theory.schedule import Schedule
from theory.streams import seed_of
from theory.trajectory import Probe

EXTENT, POINTS = (-0.5, 2.3), 100
STEPS = 10_001


def surface(device: torch.device) -> xr.Dataset:
    """Losses on the plane and three projected paths (n = 20, d = 30, 3 non-zero coordinates).

    The plane has its origin at the start θ₀ = (u₀, v₀); e₁ points to the balanced truth (√θ*, √θ*), e₂ to gradient
    flow's end, made orthogonal to e₁. SGD is shown at (|u|, |v|), which represents the same function up to signs.
    """
    problem = gaussian_sparse(20, 30, 3).to(device)
    start, root = initial_state(problem), seed_of("loss surface")
    at = torch.cat([torch.arange(400), torch.linspace(400, STEPS, 400).long()]).unique()
    probes = {"θ": Probe(lambda state: torch.cat([state.u, state.v], -1), at)}
    large, noisy = Schedule(3.0, ((0.5, 3.0),)), Schedule(0.6, ((0.5, 3.0),))
    runs = {
        "gradient flow": gd(problem, start, [Schedule(0.03)], STEPS, probes=probes),
        "GD, η=3": gd(problem, start, [large], STEPS, probes=probes),
        "SGD, η=0.6": sgd(problem, start, [noisy], STEPS, seeds=[0], root_seed=root, probes=probes),
    }
    theta = {name: run["θ"].values[:, 0, 0] for name, run in runs.items()}
    theta["SGD, η=0.6"] = theta["SGD, η=0.6"].abs()
    origin, e1, e2 = _plane(problem, start, theta["gradient flow"][-1])
    ticks = torch.linspace(*EXTENT, POINTS, dtype=torch.float64, device=device)
    grid = origin + ticks[None, :, None] * e1 + ticks[:, None, None] * e2
    u, v = grid.chunk(2, -1)
    paths = torch.stack([torch.stack([(path - origin) @ e1, (path - origin) @ e2], -1) for path in theta.values()])
    return xr.Dataset(
        {
            "surface train loss": (("surface_y", "surface_x"), half_mse(u * v, problem.X, problem.y).cpu().numpy()),
            "surface test loss": (
                ("surface_y", "surface_x"), half_mse(u * v, problem.X_test, problem.y_test).cpu().numpy()
            ),
            "surface path": (("surface_run", "surface_step", "surface_axis"), paths.cpu().numpy()),
        },
        coords={
            "surface_x": ticks.cpu().numpy(), "surface_y": ticks.cpu().numpy(), "surface_run": list(theta),
            "surface_step": at.numpy(), "surface_axis": ["x", "y"],
        },
    )  # fmt: skip


def _plane(problem: Regression, start: DiagonalState, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert problem.truth is not None
    root = problem.truth.clamp(min=0).sqrt()
    origin = torch.cat([start.u, start.v])
    e1 = torch.cat([root, root]) - origin
    e1 = e1 / e1.norm()
    e2 = flow - origin
    e2 = e2 - (e2 @ e1) * e1
    return origin, e1, e2 / e2.norm()
