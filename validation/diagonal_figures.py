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


FIGURES = {
    f"{prefix}-course": SavedFigure(
        f"Loss stabilisation on {what}: training loss, mean ln α, test loss (Andriushchenko et al. 2023)",
        tuple(f"{prefix} {name}" for name in PANELS),
        functools.partial(course, prefix=prefix),
    )
    for prefix, what in (("gaussian", "Gaussian data"), ("table", "a real table"))
} | {
    "loss-surface": SavedFigure(
        "Train and test loss on a plane with the paths of gradient flow, GD and SGD (Andriushchenko et al. 2023)",
        ("surface train loss", "surface test loss", "surface path"),
        loss_surface,
        bouncing_animation,
    )
}
