"""What the suite ``bouncing`` saves of its windows, as named series."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from torch import Tensor

from validation.bouncing_checks import autocorrelations, expected_excess
from validation.bouncing_runs import Window

LAGS = tuple(range(1, 13))
FOLLOWED = (0, 2, 5, 10, 20, 40)


def dataset(windows: Sequence[Window]) -> xr.Dataset:
    """Per cell and direction: ηλ, autocorrelation and variance, measured and predicted; MSD; per cell: excess loss."""
    width = max(len(window.curvature) for window in windows)

    def padded(values: Tensor) -> np.ndarray:
        row = np.full(width, np.nan)
        row[: len(values)] = values.numpy()
        return row

    rows: dict[str, list[np.ndarray]] = {}
    lags: dict[str, list[np.ndarray]] = {}
    cells: dict[str, list[float]] = {}
    for window in windows:
        law, noise = window.setting.law, window.noise.mean(0)
        products, squares = (part.mean(0) for part in autocorrelations(window))
        sde = law.sde_variance(window.curvature, noise)
        for name, values in {
            "slip": window.slip,
            "autocorrelation": products / squares,
            "autocorrelation predicted": window.displacement_autocorrelation(window.curvature),
            "variance over SDE": window.x.square().mean((0, 1)) / sde,
            "variance over SDE predicted": window.variance(window.curvature, noise) / sde,
        }.items():
            rows.setdefault(name, []).append(padded(values))
        for name, table in _displacements(window).items():
            lags.setdefault(name, []).append(table)
        for name, value in {
            "excess": float(window.excess.mean()),
            "excess error": float(window.excess.std() / len(window.excess) ** 0.5),
            "excess predicted": expected_excess(window)[0],
            "excess of the SDE": float(law.sde_excess_loss(window.total_noise.unsqueeze(1)).mean()),
            "floor": window.floor,
            "momentum": law.momentum,
        }.items():
            cells.setdefault(name, []).append(value)
    cell, direction = "bouncing_cell", "bouncing_direction"
    data = {f"bouncing {name}": ((cell, direction), np.stack(values)) for name, values in rows.items()}
    data |= {
        f"bouncing {name}": ((cell, "bouncing_followed", "bouncing_lag"), np.stack(v))  # type: ignore[misc]
        for name, v in lags.items()
    }
    data |= {f"bouncing {name}": ((cell,), np.array(values)) for name, values in cells.items()}  # type: ignore[misc]
    return xr.Dataset(
        data,
        coords={
            cell: [window.setting.label for window in windows],
            direction: np.arange(1, width + 1),
            "bouncing_followed": np.array(FOLLOWED) + 1,
            "bouncing_lag": np.array(LAGS),
        },
    )


def _displacements(window: Window) -> dict[str, np.ndarray]:
    """Mean-square displacement over lags in units of 2 Var x, measured and predicted, shape (followed, lags)."""
    K = len(window.curvature)
    measured, predicted = np.full((2, len(FOLLOWED), len(LAGS)), np.nan)
    for row, k in enumerate(k for k in FOLLOWED if k < K):
        x = window.x[..., k]
        for column, lag in enumerate(LAGS):
            measured[row, column] = float((x[lag:] - x[:-lag]).square().mean() / (2 * x.square().mean()))
            rho = window.setting.law.autocorrelation(window.curvature[k], lag)
            predicted[row, column] = 1 - float(rho)
    return {"displacement": measured, "displacement predicted": predicted}
