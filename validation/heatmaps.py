"""Figures of suite ``collapse`` about networks: similarity of units by layer, and growth of units against theory."""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.figure import Figure

from validation.figures import STYLE, SavedFigure

LAYERS = {"conv1": "plain", "conv2": "BatchNorm", "fc3": "dense"}
REALISED, PREDICTED, DRIFT = "#0072B2", "#D55E00", "#999999"


def similarity(series: xr.Dataset) -> Figure:
    """Distances of incoming and of outgoing weights, units ordered by cluster, after large and small steps."""
    counts = series["collapse counts"]
    labels = [str(label) for label in counts["collapse_steps"].values]
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 2.1 * len(labels)), layout="constrained")
        axes = figure.subplots(len(labels), 2 * len(LAYERS), squeeze=False)
        shades = matplotlib.colormaps["viridis"]
        for column, (layer, kind) in enumerate(LAYERS.items()):
            for row, label in enumerate(labels):
                at = {"collapse_steps": row, "collapse_network": 0}
                published, _, vanished, rank = counts.sel(collapse_layer=layer).isel(at).values
                for side in range(2):
                    axis = axes[row, 2 * column + side]
                    distance = series[f"collapse distance {layer}"][row, side].values
                    image = axis.imshow(distance, vmin=0, vmax=2.5, cmap=shades, interpolation="nearest")
                    axis.set_xticks([])
                    axis.set_yticks([])
                    if side == 0:
                        axis.set_title(f"{layer}, {kind}: w_in", loc="left", fontsize=7.5)
                        found = f"{published:.0f} of {len(distance)} independent, {vanished:.0f} vanishing, "
                        axis.set_xlabel(found + f"effective rank {rank:.1f}", fontsize=7, loc="left")
                    else:
                        axis.set_title("w_out", loc="left", fontsize=7.5)
                if column == 0:
                    axes[row, 0].set_ylabel(label, fontsize=8)
        figure.colorbar(image, ax=axes, label="normalised distance, 0: alike, 2: orthogonal", shrink=0.8)
    return figure


def growth(series: xr.Dataset) -> Figure:
    """Left: mean ln‖x‖ of releases next to a set, with the predicted end. Right: every unit of a trained layer."""
    course, ends, units = (series[f"collapse {name}"] for name in ("release course", "release end", "unit growth"))
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        shades = matplotlib.colormaps["cividis"](np.linspace(0, 0.88, course.sizes["collapse_release"]))
        for k, label in enumerate(course["collapse_release"].values):
            left.plot(course["collapse_share_of_run"], course[k], color=shades[k], lw=1.2, label=str(label))
            left.plot(1.02, ends[k].sel(collapse_end="predicted"), "<", ms=6, color=shades[k], clip_on=False)
            left.plot(1.06, ends[k].sel(collapse_end="drift"), "x", ms=5, color=shades[k], clip_on=False)
        left.axhline(0, color="0.7", lw=0.8)
        left.set_xlabel("share of the run   (◂: predicted end, ×: without noise)")
        left.set_title("mean ln‖x‖ after release next to an invariant set", loc="left", fontsize=9)
        left.legend(fontsize=6.5, frameon=False)
        values = units[0]
        realised = values.sel(collapse_end="realised")
        right.axline((0, 0), slope=1, color="0.6", lw=0.8)
        right.plot(values.sel(collapse_end="drift"), realised, "x", ms=4, color=DRIFT, label="drift alone")
        right.plot(values.sel(collapse_end="predicted"), realised, "o", ms=4, color=REALISED, label="with noise")
        right.set_xlabel("predicted mean Δ ln‖θ_j‖")
        right.set_ylabel("realised")
        name = str(units["collapse_activation"].values[0])
        right.set_title(f"every unit of a 16-24-10 {name} network on digits", loc="left", fontsize=9)
        right.legend(fontsize=7, frameon=False)
    return figure


FIGURES = {
    "similarity-heatmaps": SavedFigure(
        "Similarity of units by cluster in dense, convolution and BatchNorm layers (Chen et al. 2023, Fig. 3)",
        ("collapse counts", *(f"collapse distance {layer}" for layer in LAYERS)),
        similarity,
    ),
    "unit-growth": SavedFigure(
        "Growth rate of units and pairs of units: predicted from per-sample gradients against real SGD",
        ("collapse release course", "collapse release end", "collapse unit growth"),
        growth,
    ),
}
