"""What suite ``diagonal`` saves for its figures: series along the runs, the laws beside them, and end points."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xarray as xr
from torch import Tensor

from theory import alpha_decay
from theory.end_point import end_point
from theory.trajectory import Trajectory
from validation.diagonal_checks import PER_SAMPLE, Cell

LAWS = ["SGD", "SDE law, every sample's residual", "SDE law at level δ", "finite-step law at level δ"]
ENDS = ["SGD", "argmin φ_α at the realised α", "gradient flow"]


def ensemble_series(prefix: str, run: Trajectory, cells: Sequence[Cell]) -> xr.Dataset:
    """The series of an ensemble, of which ``cells`` are the schedules, with named dimensions."""
    axis, data = f"{prefix}_schedule", dict[str, xr.DataArray]()
    for name, series in run.series.items():
        if series.values.ndim != 3 or len(series.steps) < 2:
            continue
        clock = f"{prefix}_step" if name != "level" else f"{prefix}_level_step"
        data[f"{prefix} {name}"] = xr.DataArray(
            series.values.cpu().numpy(), dims=(clock, axis, "seed"), coords={clock: series.steps.numpy()}
        )
    data[f"{prefix} first bad step"] = xr.DataArray(run.first_bad_step.cpu().numpy(), dims=(axis, "seed"))
    along = torch.stack([law_along(cell, run["level"].steps, run["ln alpha"].steps) for cell in cells], 1)
    ends = torch.stack([end_laws(cell) for cell in cells], 1)
    points = torch.stack([end_points(cell) for cell in cells], 1)
    data[f"{prefix} ln alpha law"] = xr.DataArray(along.cpu().numpy(), dims=(f"{prefix}_step", axis, "seed"))
    data[f"{prefix} alpha laws"] = xr.DataArray(ends.cpu().numpy(), dims=("alpha_law", axis, "seed"))
    data[f"{prefix} end points"] = xr.DataArray(points.cpu().numpy(), dims=("end_of", axis, f"{prefix}_feature"))
    labels = [cell.setting.removeprefix(f"{cell.problem.name}: ") for cell in cells]
    return xr.Dataset(data, coords={axis: labels, "alpha_law": LAWS, "end_of": ENDS})


def law_along(cell: Cell, records: Tensor, at: Tensor) -> Tensor:
    """SDE law at level δ after the steps ``at``: mean ln α(0) - 2 m̄ Σ_{k < at} η_k² δ_k, shape (len(at), S).

    Args:
        records: steps (T,) at which the level was measured; between two of them the sum grows evenly.
    """
    part = cell.weights.unsqueeze(1).to(cell.level) * cell.eta_column.square() * cell.level
    total = torch.cat([torch.zeros_like(part[:1]), part.cumsum(0)])
    edges = torch.cat([records, records[-1:] + int(cell.weights[-1])]).to(at)
    right = torch.searchsorted(edges, at).clamp(1, len(edges) - 1)
    share = ((at - edges[right - 1]) / (edges[right] - edges[right - 1])).to(total).unsqueeze(1)
    clock = torch.lerp(total[right - 1], total[right], share)
    shrinkage = 2 * PER_SAMPLE.variance_factor(cell.problem.n) * cell.problem.mean_square.mean()
    return (cell.start.mean_log_alpha - shrinkage * clock).masked_fill(~cell.finite, torch.nan)


def end_laws(cell: Cell) -> Tensor:
    """Mean Δ ln α of SGD and of the three laws in the order of ``LAWS``, NaN where a run diverged, shape (4, S)."""
    found = [
        cell.change,
        alpha_decay.sde_change(cell.problem, cell.power, PER_SAMPLE),
        alpha_decay.sde_change_at_level(cell.problem, cell.eta_column, cell.level, cell.weights, PER_SAMPLE),
        cell.finite_step_law,
    ]
    return torch.stack(found).mean(-1).masked_fill(~cell.finite, torch.nan)


def end_points(cell: Cell) -> Tensor:
    """Coordinates of the first finite run's end, its prediction, gradient flow's end, as in ``ENDS``, shape (3, d)."""
    alpha0, z0 = cell.start.log_alpha, cell.start.z
    flow = end_point(cell.problem, alpha0, z0).w
    if not bool(cell.finite.any()):
        nothing = torch.full_like(flow, torch.nan)
        return torch.stack([nothing, nothing, flow])
    first = int(torch.nonzero(cell.finite)[0])
    return torch.stack([cell.final.w[first], end_point(cell.problem, cell.final.log_alpha[first], z0).w, flow])
