"""Figures of suite ``relu``, from its saved series."""

from __future__ import annotations

import functools

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.figure import Figure

from validation.figures import STYLE, SavedFigure

SGD, SDE = "#D55E00", "#0072B2"
EXPERIMENTS = {
    "two-layer": "two-layer teacher-student",
    "three-layer": "three-layer teacher-student",
    "1d": "one-dimensional regression",
}
KINDS = {"sgd": ("SGD", SGD), "sde": ("label-noise SDE given δ", SDE)}


def loss_curves(series: xr.Dataset, experiment: str) -> Figure:
    """Training loss along the run, SGD and SDE, a panel a schedule: median and 10-90 % over seeds."""
    cells = series[f"relu_{experiment}_schedule"].values
    with rc_context(STYLE):
        figure = Figure(figsize=(2.7 * len(cells) + 0.5, 2.8), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(cells), sharey=True))
        for c, axis in enumerate(axes):
            for kind, (label, colour) in KINDS.items():
                curve = series[f"relu {experiment} loss {kind}"].isel({f"relu_{experiment}_schedule": c})
                steps = curve[f"relu_{experiment}_{kind}_step"]
                low, middle, high = curve.values.T
                axis.plot(steps, middle, color=colour, lw=0.9, label=label)
                axis.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
            axis.set_yscale("log")
            axis.set_title(str(cells[c]), loc="left", fontsize=8)
            axis.set_xlabel("SGD step")
        axes[0].set_ylabel("training loss")
        axes[0].legend(fontsize=7, frameon=False)
    return figure


def distributions(series: xr.Dataset, experiment: str) -> Figure:
    """Distribution functions over seeds of sparsity coefficient and rank, SGD (solid) and SDE (dashed)."""
    cells = series[f"relu_{experiment}_schedule"].values
    shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.92, len(cells)))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.1), layout="constrained")
        for axis, measure in zip(figure.subplots(1, 2, sharey=True), ("sparsity", "rank"), strict=True):
            for kind, line in (("sgd", "-"), ("sde", "--")):
                values = series[f"relu {experiment} {measure} {kind}"].values
                for c, label in enumerate(cells):
                    finite = np.sort(values[c][np.isfinite(values[c])])
                    if len(finite):
                        shares = np.arange(1, len(finite) + 1) / len(finite)
                        name = f"{label} ({len(finite)})" if kind == "sgd" else None
                        axis.step(finite, shares, line, where="post", color=shades[c], lw=1.1, label=name)
            axis.set_xlabel("feature sparsity coefficient" if measure == "sparsity" else "rank of the Jacobian")
        figure.axes[0].set_ylabel("share of seeds (SGD —, SDE - -)")
        figure.axes[0].legend(fontsize=6.5, frameon=False)
    return figure


def neurons(series: xr.Dataset) -> Figure:
    """Where the units of one run end, w_j |a_j| in the plane: SGD above, the SDE below, a column a schedule."""
    cells = series["relu_two-layer_schedule"].values
    with rc_context(STYLE):
        figure = Figure(figsize=(2.2 * len(cells), 4.4), layout="constrained")
        axes = figure.subplots(2, len(cells), sharex=True, sharey=True, squeeze=False)
        reach = 1.05 * max(float(abs(series[f"relu two-layer neurons {kind}"][:, 0]).max()) for kind in KINDS)
        for r, (row, (kind, (label, colour))) in enumerate(zip(axes, KINDS.items(), strict=True)):
            for c, axis in enumerate(row):
                ends = series[f"relu two-layer neurons {kind}"].isel({"relu_two-layer_schedule": c, "relu_shown": 0})
                for x, y in ends.values:
                    axis.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 0.7})
                axis.plot(*ends.values.T, "o", color=colour, ms=2.5)
                axis.axhline(0, color="0.85", lw=0.6, zorder=0)
                axis.axvline(0, color="0.85", lw=0.6, zorder=0)
                axis.set_aspect("equal")
                axis.set_xlim(-reach, reach)
                axis.set_ylim(-reach, reach)
                if r == 0:
                    axis.set_title(str(cells[c]), loc="left", fontsize=8)
            row[0].set_ylabel(label)
    return figure


def functions(series: xr.Dataset) -> Figure:
    """The functions that several runs fit to the twelve points, SGD and SDE, a panel a schedule."""
    cells = series["relu_1d_schedule"].values
    target = series["relu 1d target"]
    with rc_context(STYLE):
        figure = Figure(figsize=(3.9 * len(cells), 2.9), layout="constrained")
        for c, axis in enumerate(np.atleast_1d(figure.subplots(1, len(cells), sharey=True))):
            for kind, (label, colour) in KINDS.items():
                fitted = series[f"relu 1d function {kind}"].isel(relu_1d_schedule=c)
                lines = axis.plot(fitted["relu_x"], fitted.values.T, color=colour, lw=0.7, alpha=0.6)
                lines[0].set_label(label)
            axis.plot(target["relu_point"], target, "o", color="black", ms=3)
            axis.set_title(str(cells[c]), loc="left", fontsize=8)
            axis.set_xlabel("x")
        figure.axes[0].legend(fontsize=7, frameon=False)
    return figure


def surface(series: xr.Dataset) -> Figure:
    """Training and test loss on the plane through the start, gradient flow's end and SGD's end."""
    points = series["relu surface points"]
    with rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.2), layout="constrained")
        for axis, kind in zip(figure.subplots(1, 2), ("train", "test"), strict=True):
            values = series[f"relu surface {kind}"]
            filled = axis.contourf(values["relu_a"], values["relu_b"], values.values.T / np.log(10), 20, cmap="cividis")
            figure.colorbar(filled, ax=axis, label=f"log₁₀ {kind} loss")
            for place, marker in zip(points["relu_point_of_interest"].values, "so*", strict=True):
                x, y = points.sel(relu_point_of_interest=place).values
                axis.plot(x, y, marker, color="white", mec="black", ms=7, label=str(place))
            axis.set_xlabel("towards gradient flow's end")
        figure.axes[0].set_ylabel("towards SGD's end")
        figure.axes[0].legend(fontsize=7, loc="best")
    return figure


FIGURES = {
    f"relu-{experiment}-loss": SavedFigure(
        f"Loss stabilisation, {what}: SGD and the SDE (Andriushchenko et al. 2023)",
        (f"relu {experiment} loss sgd", f"relu {experiment} loss sde"),
        functools.partial(loss_curves, experiment=experiment),
    )
    for experiment, what in EXPERIMENTS.items()
}
FIGURES |= {
    f"relu-{experiment}-sparsity": SavedFigure(
        f"Sparsity and rank over seeds, {what}: SGD and the SDE (Andriushchenko et al. 2023)",
        tuple(f"relu {experiment} {measure} {kind}" for measure in ("sparsity", "rank") for kind in KINDS),
        functools.partial(distributions, experiment=experiment),
    )
    for experiment, what in EXPERIMENTS.items()
}
FIGURES |= {
    "relu-neurons": SavedFigure(
        "Neurons of the two-layer student at the end, SGD and the SDE (Andriushchenko et al. 2023)",
        ("relu two-layer neurons sgd", "relu two-layer neurons sde"),
        neurons,
    ),
    "relu-function": SavedFigure(
        "Functions fitted to twelve points, SGD and the SDE (Andriushchenko et al. 2023; Blanc et al. 2020)",
        ("relu 1d function sgd", "relu 1d function sde", "relu 1d target"),
        functions,
    ),
    "relu-surface": SavedFigure(
        "Loss surface through the start and the ends of gradient flow and SGD, two layers (Andriushchenko et al. 2023)",
        ("relu surface train", "relu surface test", "relu surface points"),
        surface,
    ),
}
