"""Figures of suite ``resnet``, from its saved series."""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.figure import Figure

from validation.figures import STYLE, SavedFigure
from validation.resnet_checks import GAUSSIAN_STEPS, ISOTROPIC, UNAMPLIFIED

KINDS = {"sgd": ("SGD", "#D55E00"), "svag": ("SVAG", "#0072B2")}
OTHERS = {
    GAUSSIAN_STEPS: ("Gaussian steps of SGD's size", "#CC79A7", "-."),
    UNAMPLIFIED: ("noise of the wrong scale", "#999999", ":"),
    ISOTROPIC: ("isotropic noise", "#009E73", "--"),
}


def sparsity(series: xr.Dataset) -> Figure:
    """Coefficient of the last block along the run, a panel a schedule: SGD, SVAG (mean and range), the others."""
    cells, steps = series["resnet_schedule"].values, series["resnet_step"].values
    with rc_context(STYLE):
        figure = Figure(figsize=(2.3 * len(cells) + 0.6, 2.9), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(cells), sharey=True))
        for c, axis in enumerate(axes):
            for kind, (label, colour) in KINDS.items():
                values = series[f"resnet distinct sparsity {kind}"].isel(resnet_schedule=c, resnet_block=-1).values
                axis.plot(steps, np.nanmean(values, 1), "o-", ms=3, color=colour, lw=1.2, label=label)
                axis.fill_between(steps, np.nanmin(values, 1), np.nanmax(values, 1), color=colour, alpha=0.2, lw=0)
            if c == len(cells) - 2:  # where the others ran
                for name, (label, colour, line) in OTHERS.items():
                    axis.plot(steps, np.nanmean(series[f"resnet {name}"].values, 1), line, color=colour, label=label)
            axis.set_title(str(cells[c]), loc="left", fontsize=8)
            axis.set_xlabel("SGD step")
            axis.set_ylim(0, None)
        axes[0].set_ylabel("sparsity coefficient, last block")
        handles, labels = axes[len(cells) - 2].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=7, frameon=False, ncols=len(handles), loc="outside lower center")
    return figure


def blocks(series: xr.Dataset) -> Figure:
    """Coefficient of every block at the end, predicted against measured, and the test accuracy reached."""
    cells = series["resnet_schedule"].values
    shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.9, len(cells)))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        ends = {kind: series[f"resnet distinct sparsity {kind}"].isel(resnet_step=-1).values for kind in KINDS}
        for c, label in enumerate(cells):
            for b, marker in enumerate("osD^v"[: ends["sgd"].shape[-1]]):
                x, y = ends["svag"][c, :, b], ends["sgd"][c, :, b]
                text = f"{label}" if b == 0 else None
                left.errorbar(
                    x.mean(), y.mean(), xerr=x.std(), yerr=y.std(), fmt=marker, ms=4, color=shades[c], label=text
                )
            accuracy = series["resnet test accuracy sgd"].isel(resnet_step=-1).values[c]
            right.plot(ends["sgd"][c, :, -1], 100 * accuracy, "o", ms=3, color=shades[c])
        low, high = 0.0, 1.05 * max(float(np.nanmax(e)) for e in ends.values())
        left.plot([low, high], [low, high], color="0.6", lw=0.8)
        left.set_xlabel("SVAG (circles: block 1, squares: block 2, …)")
        left.set_ylabel("SGD")
        left.set_title("sparsity coefficient at the end", loc="left", fontsize=9)
        left.legend(fontsize=7, frameon=False)
        right.set_xlabel("sparsity coefficient, last block")
        right.set_ylabel("test accuracy, %")
        right.set_title("SGD, one point a seed", loc="left", fontsize=9)
    return figure


def growth(series: xr.Dataset) -> Figure:
    """Δ ln‖θ_j‖ of every unit over a window, mean over replicas, against Itô's rate and against its two terms."""
    realised = series["resnet growth realised"].values.mean(0)
    layers = np.array([str(unit).split(" #")[0] for unit in series["resnet_unit"].values])
    with rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.0), layout="constrained")
        panels = {"predicted": "drift + noise", "drift": "drift alone", "noise": "noise alone"}
        for axis, (name, title) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
            predicted = series[f"resnet growth {name}"].values.mean(0)
            for layer, colour in zip(dict.fromkeys(layers), ("#0072B2", "#E69F00", "#009E73", "#D55E00"), strict=False):
                chosen = layers == layer
                axis.plot(predicted[chosen], realised[chosen], "o", ms=3, color=colour, label=layer)
            ends = [min(predicted.min(), realised.min()), max(predicted.max(), realised.max())]
            axis.plot(ends, ends, color="0.6", lw=0.8)
            axis.set_title(title, loc="left", fontsize=9)
            axis.set_xlabel("predicted Δ ln‖θ_j‖")
            if name == "predicted":
                axis.set_ylabel("SGD")
                axis.legend(fontsize=6, frameon=False)
    return figure


_BOTH = ("resnet distinct sparsity sgd", "resnet distinct sparsity svag")
FIGURES = {
    "resnet-sparsity": SavedFigure(
        "Sparsity of a residual network along training, predicted against measured, with rivals",
        (*_BOTH, *(f"resnet {name}" for name in OTHERS)),
        sparsity,
    ),
    "resnet-blocks": SavedFigure(
        "Sparsity of every block at the end, predicted against measured, and test accuracy",
        (*_BOTH, "resnet test accuracy sgd"),
        blocks,
    ),
    "resnet-growth": SavedFigure(
        "Growth of every unit of a residual network against Itô's rate and its terms",
        ("resnet growth realised", "resnet growth predicted", "resnet growth drift", "resnet growth noise"),
        growth,
    ),
}
