"""Figures of suite ``bouncing``, from its saved series."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from validation.figures import STYLE, SavedFigure

CELL = "bouncing_cell"
LAW, SDE = "#000000", "#D55E00"
MARKERS = "osD^vP*Xh<>d"


def autocorrelation(series: xr.Dataset) -> Figure:
    """Lag-1 autocorrelation of displacements against ηλ - 2μ: every direction of every cell on one line of slope -½."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.2, 4.0), layout="constrained")
        axes = figure.subplots()
        top = 0.0
        for c, shade in _cells(series):
            slip, momentum = _of(series, "slip", c), float(series["bouncing momentum"][c])
            axes.plot(slip - 2 * momentum, _of(series, "autocorrelation", c), MARKERS[c % len(MARKERS)], ms=3.2,
                      color=shade, label=str(series[CELL].values[c]), alpha=0.8)  # fmt: skip
            top = max(top, float(np.nanmax(slip)))
        grid = np.linspace(0, top, 100)
        low = -2 * float(series["bouncing momentum"].max())
        axes.plot([low, top], [-low / 2, -top / 2], color=LAW, lw=1, label="μ - ηλ/2", zorder=0)
        axes.plot(grid, -(1 - np.exp(-grid)) / 2, "--", color=SDE, lw=1, label="the SDE's", zorder=0)
        axes.axhline(0, color="0.7", lw=0.7, zorder=0)
        axes.axvline(1, color="0.7", lw=0.7, ls=":", zorder=0)
        axes.set_xlabel("ηλ - 2μ of a Hessian eigendirection (right of the dotted line it bounces, without momentum)")
        axes.set_ylabel("corr of successive displacements")
        axes.legend(fontsize=6.5, frameon=False)
    return figure


def variance(series: xr.Dataset) -> Figure:
    """Stationary variance over the SDE's against ηλ: 1 orthogonal to the bouncing directions, 2/(2 - ηλ) inside."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for c, shade in _cells(series):
            if float(series["bouncing momentum"][c]):
                continue
            axes.plot(_of(series, "slip", c), _of(series, "variance over SDE", c), MARKERS[c % len(MARKERS)], ms=3.2,
                      color=shade, label=str(series[CELL].values[c]), alpha=0.8)  # fmt: skip
        grid = np.linspace(0, 1.985, 400)
        axes.plot(grid, 2 / (2 - grid), color=LAW, lw=1, label="2/(2 - ηλ)", zorder=0)
        axes.axhline(1, color=SDE, lw=1, ls="--", label="the SDE", zorder=0)
        axes.set_yscale("log")
        axes.set_ylim(0.3, 200)
        axes.set_xlabel("ηλ")
        axes.set_ylabel("Var x over ηC/2λ")
        axes.legend(fontsize=6.5, frameon=False)
    return figure


def excess(series: xr.Dataset) -> Figure:
    """Loss above the valley floor, measured over predicted by the discrete law and by the SDE, cell by cell."""
    with rc_context(STYLE):
        cells = series[CELL].values
        figure = Figure(figsize=(6.6, 0.9 + 0.34 * len(cells)), layout="constrained")
        axes = figure.subplots()
        measured, error = series["bouncing excess"].values, 2 * series["bouncing excess error"].values
        rows = np.arange(len(cells))
        axes.axvline(1, color="0.7", lw=0.8)
        for name, label, colour in (
            ("bouncing excess predicted", "½ η tr[C(2I - ηH)⁻¹]", "#0072B2"),
            ("bouncing excess of the SDE", "¼ η tr C", SDE),
        ):
            law = series[name].values
            axes.errorbar(measured / law, rows, xerr=error / law, fmt="o", ms=4, capsize=2, color=colour, label=label)
        axes.set_xscale("log")
        axes.set_yticks(rows, [str(name) for name in cells], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("loss above the floor, measured over predicted (± 2 standard errors)")
        axes.legend(fontsize=7, frameon=False)
    return figure


def displacement(series: xr.Dataset) -> Figure:
    """Mean-square displacement over lags: alternating where the direction bounces, growing where it does not."""
    with rc_context(STYLE):
        wanted = [c for c, name in enumerate(series[CELL].values) if str(name).startswith("MLP")][:3]
        figure = Figure(figsize=(10.5, 3.1), layout="constrained")
        panels: Sequence[Axes] = list(np.atleast_1d(figure.subplots(1, len(wanted), sharey=True)))
        lags = series["bouncing_lag"].values
        shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.92, series.sizes["bouncing_followed"]))
        for axis, c in zip(panels, wanted, strict=True):
            slip = _of(series, "slip", c)
            for row, k in enumerate(series["bouncing_followed"].values):
                if k > np.isfinite(slip).sum():
                    continue
                at: dict[str, Any] = {CELL: c, "bouncing_followed": row}
                axis.plot(lags, series["bouncing displacement predicted"].isel(at), color=shades[row], lw=0.9)
                axis.plot(
                    lags, series["bouncing displacement"].isel(at), "o", ms=3, color=shades[row],
                    label=f"ηλ = {slip[k - 1]:.2f}",
                )  # fmt: skip
            axis.set_title(str(series[CELL].values[c]), loc="left", fontsize=9)
            axis.set_xlabel("lag in SGD steps")
            axis.legend(fontsize=6.5, frameon=False)
        panels[0].set_ylabel("E(x_{k+m} - x_k)² over 2 Var x")
    return figure


def moving_basis(series: xr.Dataset) -> Figure:
    """Autocorrelation along every direction against the law's, in a basis renewed on the way and in the first one."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.8), layout="constrained")
        axes = figure.subplots()
        for basis, label, marker, colour in (
            ("moving", "basis renewed every block of steps", "o", "#0072B2"),
            ("first", "basis of the first block", "x", SDE),
        ):
            measured, predicted = (
                series[f"bouncing basis {basis} {what}"].values for what in ("measured", "predicted")
            )
            axes.plot(predicted, measured, marker, ms=4, color=colour, label=label)
        low = float(series["bouncing basis moving predicted"].min())
        axes.plot([low, 0], [low, 0], color=LAW, lw=1, label="the law", zorder=0)
        axes.set_xlabel("predicted: -ηλ/2 of the basis")
        axes.set_ylabel("corr of successive displacements")
        axes.legend(fontsize=7, frameon=False)
    return figure


def _cells(series: xr.Dataset) -> list[tuple[int, Any]]:
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.92, series.sizes[CELL]))
    return list(enumerate(shades))


def _of(series: xr.Dataset, name: str, cell: int) -> np.ndarray:
    return series[f"bouncing {name}"].isel({CELL: cell}).values


FIGURES = {
    "bouncing-law": SavedFigure(
        "Bouncing law: successive displacements along every eigendirection have autocorrelation μ - ηλ/2",
        ("bouncing slip", "bouncing autocorrelation", "bouncing momentum"),
        autocorrelation,
    ),
    "bouncing-variance": SavedFigure(
        "Where the SDE holds: variance of each eigendirection over the SDE's",
        ("bouncing slip", "bouncing variance over SDE", "bouncing momentum"),
        variance,
    ),
    "bouncing-excess": SavedFigure(
        "Loss above the valley floor: discrete law and SDE",
        ("bouncing excess", "bouncing excess error", "bouncing excess predicted", "bouncing excess of the SDE"),
        excess,
    ),
    "bouncing-displacement": SavedFigure(
        "Mean-square displacement over lags along eigendirections: measured (dots) and predicted (lines)",
        ("bouncing slip", "bouncing displacement", "bouncing displacement predicted"),
        displacement,
    ),
    "bouncing-moving-basis": SavedFigure(
        "While the valley turns: the bouncing law in a moving eigenbasis",
        (
            "bouncing basis moving measured",
            "bouncing basis moving predicted",
            "bouncing basis first measured",
            "bouncing basis first predicted",
        ),
        moving_basis,
    ),
}
