"""Figures of suite ``diagonal``, from its saved series."""

from __future__ import annotations

import functools

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.figure import Figure

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


FIGURES = {
    f"{prefix}-course": SavedFigure(
        f"Loss stabilisation on {what}: training loss, mean ln α, test loss (Andriushchenko et al. 2023)",
        tuple(f"{prefix} {name}" for name in PANELS),
        functools.partial(course, prefix=prefix),
    )
    for prefix, what in (("gaussian", "Gaussian data"), ("table", "a real table"))
}
