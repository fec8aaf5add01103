"""Figures of suite ``diagonal``, from its saved series."""

from __future__ import annotations

import functools

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from validation.figures import STYLE, SavedFigure

PANELS = {"train loss": "training loss", "ln alpha": "mean ln α", "test loss": "test loss"}


def course(series: xr.Dataset, prefix: str) -> Figure:
    """Training loss, mean ln α and test loss of an ensemble along the run: median and 10-90 % over seeds."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.1), layout="constrained")
        axes = figure.subplots(1, len(PANELS))
        labels = series[f"{prefix}_schedule"].values
        shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.92, len(labels)))
        for axis, (name, title) in zip(axes, PANELS.items(), strict=True):
            data = series[f"{prefix} {name}"]
            for c, label in enumerate(labels):
                values = data.isel({f"{prefix}_schedule": c})
                low, middle, high = np.nanquantile(values, [0.1, 0.5, 0.9], axis=1)
                steps = values[f"{prefix}_step"]
                axis.plot(steps, middle, color=shades[c], lw=1.2, label=str(label))
                axis.fill_between(steps, low, high, color=shades[c], alpha=0.2, lw=0)
            axis.set_title(title, loc="left", fontsize=9)
            axis.set_xlabel("SGD step")
            if "loss" in name:
                axis.set_yscale("log")
                axis.set_ylim(bottom=max(1e-7, axis.get_ylim()[0]))
        axes[0].legend(fontsize=6.5, frameon=False, ncols=2)
    return figure


def alpha_decay(series: xr.Dataset, prefix: str) -> Figure:
    """How far mean ln α has fallen: along the run, SGD and the SDE law at its level; at the end, three laws."""
    labels = series[f"{prefix}_schedule"].values
    shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.92, len(labels)))
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        along, end = figure.subplots(1, 2)
        steps = series[f"{prefix}_step"].values
        for c, label in enumerate(labels):
            for name, line, shown in ((f"{prefix} ln alpha", "-", str(label)), (f"{prefix} ln alpha law", "--", None)):
                values = series[name].isel({f"{prefix}_schedule": c}).values
                fallen = np.nanmedian(values[0] - values, axis=1) if np.isfinite(values).any() else 0 * steps
                along.plot(steps[1:], fallen[1:], line, color=shades[c], lw=1.1, label=shown)
        along.set_title("SGD (lines), SDE law at the measured level (dashed)", loc="left", fontsize=8)
        along.set_xlabel("SGD step")
        along.set_ylabel("fall of mean ln α, median run")
        along.legend(fontsize=6.5, frameon=False)
        fall = -series[f"{prefix} alpha laws"]
        measured = fall.isel(alpha_law=0)
        for law, marker, colour in zip(fall["alpha_law"].values[1:], "osx", LAW_COLOURS, strict=True):
            end.plot(fall.sel(alpha_law=law).mean("seed"), measured.mean("seed"), marker, color=colour, ms=5,
                     mfc="none", label=str(law))  # fmt: skip
        end.axline((1, 1), slope=1, color="0.6", lw=0.8, zorder=0)
        end.set_xlabel("predicted fall at the end, mean over runs")
        end.set_ylabel("SGD's")
        end.legend(fontsize=7, frameon=False)
        for axis in (along, end):
            axis.set_xscale("log")
            axis.set_yscale("log")
        along.set_ylim(bottom=1e-3)
    return figure


def end_points(series: xr.Dataset, prefix: str) -> Figure:
    """Every coordinate of a run's end against its prediction at the realised α, and against gradient flow's end."""
    points, across = series[f"{prefix} end points"], 4
    labels = series[f"{prefix}_schedule"].values
    rows = -(-len(labels) // across)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.3 * min(len(labels), across), 2.3 * rows + 0.4), layout="constrained")
        axes = figure.subplots(rows, min(len(labels), across), sharex=True, sharey=True, squeeze=False).ravel()
        for c, axis in enumerate(axes):
            if c >= len(labels):
                axis.set_visible(False)
                continue
            reached, predicted, flow = points.isel({f"{prefix}_schedule": c}).values
            axis.axline((0, 0), slope=1, color="0.6", lw=0.8, zorder=0)
            axis.plot(flow, reached, "x", color="0.6", ms=3, label="gradient flow's")
            axis.plot(predicted, reached, "o", color=LAW_COLOURS[0], ms=3, mfc="none", label="argmin φ_α at its α")
            axis.set_title(str(labels[c]), loc="left", fontsize=8)
        axes[0].legend(fontsize=6.5, frameon=False)
        figure.supxlabel("coordinates predicted", fontsize=9)
        figure.supylabel("coordinates of SGD's end", fontsize=9)
    return figure


LAW_COLOURS = ("#0072B2", "#D55E00", "#000000")
LINES = {"gradient flow": "#000000", "GD, η=3": "#D55E00", "SGD, η=0.6": "#009E73"}


def _plane(series: xr.Dataset) -> tuple[Figure, list[Axes]]:
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.0), layout="constrained")
        axes = list(figure.subplots(1, 2, sharey=True))
        for axis, name in zip(axes, ("train", "test"), strict=True):
            loss = series[f"surface {name} loss"]
            levels = 2.0 ** np.arange(np.floor(np.log2(float(loss.min()))), np.ceil(np.log2(float(loss.max()))) + 1)
            axis.contourf(
                loss["surface_x"], loss["surface_y"], loss, levels=levels, norm=LogNorm(), cmap="Blues_r", alpha=0.9
            )
            axis.set_title(f"{name} loss", loc="left", fontsize=9)
            axis.set_xlabel("towards the truth")
        axes[0].set_ylabel("towards gradient flow's end")
    return figure, axes


def loss_surface(series: xr.Dataset) -> Figure:
    """Contours of train and test loss with the projected paths of gradient flow, GD and SGD."""
    figure, axes = _plane(series)
    for axis in axes:
        for run in series["surface_run"].values:
            x, y = series["surface path"].sel(surface_run=run).values.T
            axis.plot(x, y, color=LINES.get(str(run), "0.5"), lw=0.8, label=str(run))
            axis.plot(x[-1], y[-1], "o", color=LINES.get(str(run), "0.5"), mec="black", ms=5)
        axis.set_xlim(-0.5, 2.3)
        axis.set_ylim(-0.5, 2.3)
    axes[0].legend(fontsize=7, loc="upper right")
    return figure


def bouncing_animation(series: xr.Dataset) -> FuncAnimation:
    """The same paths, drawn as they come: SGD bounces across the valley and drifts along it."""
    figure, axes = _plane(series)
    paths = series["surface path"]
    drawn = {
        (a, str(run)): axis.plot([], [], "-", color=LINES.get(str(run), "0.5"), lw=0.9, label=str(run))[0]
        for a, axis in enumerate(axes)
        for run in series["surface_run"].values
    }
    axes[0].legend(fontsize=7, loc="upper right")
    for axis in axes:
        axis.set_xlim(-0.5, 2.3)
        axis.set_ylim(-0.5, 2.3)

    def frame(record: int) -> list[Line2D]:
        for (_, run), line in drawn.items():
            x, y = paths.sel(surface_run=run).values[max(0, record - 60) : record + 1].T
            line.set_data(x, y)
        figure.suptitle(f"step {int(paths['surface_step'][record])}", fontsize=9)
        return list(drawn.values())

    FigureCanvasAgg(figure)
    records = [*range(0, 200, 4), *range(200, paths.sizes["surface_step"], 12)]
    return FuncAnimation(figure, frame, frames=records, blit=False)


DATA = (("gaussian", "Gaussian data"), ("table", "a real table"))
FIGURES = (
    {
        f"{prefix}-course": SavedFigure(
            f"Loss stabilisation on {what}: training loss, mean ln α, test loss (Andriushchenko et al. 2023)",
            tuple(f"{prefix} {name}" for name in PANELS),
            functools.partial(course, prefix=prefix),
        )
        for prefix, what in DATA
    }
    | {
        f"{prefix}-{name}": SavedFigure(
            f"{title}, {what} (Andriushchenko et al. 2023)",
            tuple(f"{prefix} {variable}" for variable in variables),
            functools.partial(draw, prefix=prefix),
        )
        for prefix, what in DATA
        for name, title, variables, draw in (
            ("alpha-decay", "α-decay: SGD and three laws", ("ln alpha", "ln alpha law", "alpha laws"), alpha_decay),
            ("end-points", "End points: SGD, its prediction, gradient flow", ("end points",), end_points),
        )
    }
    | {
        "loss-surface": SavedFigure(
            "Train and test loss on a plane with the paths of gradient flow, GD and SGD (Andriushchenko et al. 2023)",
            ("surface train loss", "surface test loss", "surface path"),
            loss_surface,
            bouncing_animation,
        )
    }
)
