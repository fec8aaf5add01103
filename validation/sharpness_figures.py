"""Figures of the claims on sharpness, drawn from the saved series alone."""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from validation.figures import STYLE, SavedFigure

ORDER = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # Okabe-Ito


def _band(axis: Axes, x: np.ndarray, values: np.ndarray, colour: object, label: str) -> None:
    """Median and range over seeds of values (points, seeds)."""
    low, middle, high = np.nanquantile(values, [0.0, 0.5, 1.0], axis=1)
    axis.plot(x, middle, color=colour, lw=1.3, label=label)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)


def sharpness_curves(series: xr.Dataset) -> Figure:
    """λ₁ along training, over step sizes with 2/η, and over batch sizes."""
    looks = series["bouncing_look"].to_numpy()
    with rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        etas = series["bouncing_eta"].to_numpy()
        shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.85, len(etas)))
        for e, eta in enumerate(etas):
            values = series["bouncing lambda_1 over eta"].isel(bouncing_eta=e).to_numpy()
            _band(left, looks, values, shades[e], f"η={eta:g}")
            left.axhline(2 / eta, color=shades[e], lw=0.8, ls=":")
        batches = series["bouncing_batch"].to_numpy()
        shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.85, len(batches)))
        for b, batch in enumerate(batches):
            values = series["bouncing lambda_1 over B"].isel(bouncing_batch=b).to_numpy()
            _band(right, series["bouncing_sparse_look"].to_numpy(), values, shades[b], f"B={batch}")
        left.set_title("λ₁ over step sizes, B = 32 (dotted: 2/η)", loc="left", fontsize=9)
        right.set_title("λ₁ over batch sizes, η = 0.2", loc="left", fontsize=9)
        top = float(np.nanmax(series["bouncing lambda_1 over eta"].to_numpy()))
        left.set_ylim(0, 1.2 * top)
        for axis in (left, right):
            axis.set_xscale("symlog", linthresh=50)
            axis.set_xlim(0, looks[-1])
            axis.set_xlabel("SGD step")
            axis.legend(fontsize=7, frameon=False)
    return figure


def cross_sections(series: xr.Dataset) -> Figure:
    """The loss along e₁ in units of the SGD step, and the change after multiples of the step, against c² - c."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        offsets = series["bouncing_offset"].to_numpy()
        for row in series["bouncing cross-section"].to_numpy():
            left.plot(offsets, row, color=ORDER[0], lw=0.9, alpha=0.7)
        left.set_xlim(-4, 4)
        inside = np.abs(offsets) <= 4
        left.set_ylim(0, 1.05 * float(np.nanmax(series["bouncing cross-section"].to_numpy()[:, inside])))
        left.axvline(0, color="0.6", lw=0.8)
        left.set_xlabel("k, θ + k·η⟨|g|, e₁⟩ e₁")
        left.set_title("L / L(θ) across the valley, one line a seed", loc="left", fontsize=9)
        c = np.linspace(0, 2.1, 100)
        right.plot(c, c**2 - c, color="0.4", lw=1, label="stationary bouncing: c² - c")
        right.plot(c, -c, color="0.6", lw=1, ls="--", label="descent: -c")
        multiples = series["bouncing_multiple"].to_numpy()
        for row in series["bouncing step change"].to_numpy():
            right.plot(multiples, row, "o", color=ORDER[3], ms=3, alpha=0.7)
        right.axhline(0, color="0.6", lw=0.8)
        right.set_xlabel("c, multiple of the SGD step")
        right.set_title("change of L after a step along e₁, in units of gradient flow's", loc="left", fontsize=9)
        right.legend(fontsize=7, frameon=False)
    return figure


def nudged(series: xr.Dataset) -> Figure:
    """Loss and λ₁ along training for SGD, Nudged-SGD and its control."""
    steps = series["bouncing_nudged_step"].to_numpy()
    with rc_context(STYLE):
        figure = Figure(figsize=(8.2, 3.2), layout="constrained")
        panels = [("bouncing nudged loss", "training loss"), ("bouncing nudged lambda_1", "λ₁")]
        for axis, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
            for r, label in enumerate(series["bouncing_nudge"].to_numpy()):
                _band(axis, steps, series[name].isel(bouncing_nudge=r).to_numpy(), ORDER[r % len(ORDER)], str(label))
            axis.set_title(title, loc="left", fontsize=9)
            axis.set_xlabel("step")
            axis.legend(fontsize=7, frameon=False)
            if "loss" in name:
                axis.set_yscale("log")
    return figure


FIGURES = {
    "sharpness-curves": SavedFigure(
        "λ₁ along training over step and batch sizes (Jastrzębski et al. 2019, Fig. 2 and 3)",
        ("bouncing lambda_1 over eta", "bouncing lambda_1 over B"),
        sharpness_curves,
    ),
    "cross-sections": SavedFigure(
        "The loss across the valley and after steps along e₁ (Jastrzębski et al. 2019, Fig. 5)",
        ("bouncing cross-section", "bouncing step change"),
        cross_sections,
    ),
    "nudged-sgd": SavedFigure(
        "Nudged-SGD against SGD at equal step size (Jastrzębski et al. 2019, section 5)",
        ("bouncing nudged loss", "bouncing nudged lambda_1"),
        nudged,
    ),
}
