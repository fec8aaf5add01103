"""Figures of suite ``stabilization``, from its saved series."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.figure import Figure

from theory.stabilization import BAND_HIGH, BAND_LOW
from validation.figures import STYLE, SavedFigure


def bouncing(series: xr.Dataset) -> Figure:
    """θ/θ* of one seed, a panel a step size: below the interval of Prop. 2 it settles, inside it bounces for ever."""
    theta = series["stabilization theta"].isel(seed=0)
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, 2.6), layout="constrained")
        axes = figure.subplots(1, theta.sizes["eta"], sharey=True)
        for e, axis in enumerate(np.atleast_1d(axes)):
            axis.axhspan(float(BAND_LOW), float(BAND_HIGH), color="#56B4E9", alpha=0.2, lw=0)
            axis.axhline(1, color="0.6", lw=0.7)
            axis.plot(theta["stabilization_step"][:60], theta[:60, e], "o-", color="#0072B2", ms=2, lw=0.6)
            axis.set_title(f"η = {theta['eta'].values[e]}", loc="left", fontsize=9)
            axis.set_xlabel("SGD step")
        np.atleast_1d(axes)[0].set_ylabel("θ/θ*")
    return figure


FIGURES = {
    "bouncing-1d": SavedFigure(
        "One-dimensional network: it bounces for ever in the band of Prop. 2 (Andriushchenko et al. 2023)",
        ("stabilization theta",),
        bouncing,
    )
}
