"""Figures of suite ``collapse``, from its saved series: Chen et al. (2023), Figs. 1, 2, 5 and the two-unit toy."""

from __future__ import annotations

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from theory.collapse import quartic_density
from theory.teacher_student import logistic
from validation.figures import STYLE, SavedFigure

MU = 1.5
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PHASES = (BLUE, GREEN, RED)
PUBLISHED_ETA = 3 / 1024


def _shades(count: int) -> np.ndarray:
    return matplotlib.colormaps["cividis"](np.linspace(0.0, 0.88, count))


def quartic_well(series: xr.Dataset) -> Figure:
    """Walkers in the three phases with their stationary density, and P(θ² < ε) over ζ: runs, law, published line."""
    paths, time = series["collapse well paths"], series["collapse_time"].values
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.0), layout="constrained")
        axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.5))
        for k, axis in enumerate(axes[:3]):
            zeta, colour = float(paths["collapse_phase"][k]), PHASES[k]
            axis.plot(paths["collapse_step"], paths[:, k], color=colour, lw=0.4, alpha=0.25)
            axis.set_title(f"ζ = {zeta:g}", loc="left", fontsize=9)
            axis.set_ylim(-2.6, 2.6)
            axis.set_yticks([-(MU**0.5), 0, MU**0.5], ["-√μ", "0", "√μ"])
            axis.set_xlabel("step of 0.0025")
            if zeta**2 < 2 * MU:
                theta = np.linspace(-2.6, 2.6, 800)
                density = quartic_density(MU, zeta, theta)
                last = float(paths["collapse_step"][-1])
                axis.plot(last * (1 + 0.3 * density / density.max()), theta, color="0.2", lw=1)
        axes[0].set_ylabel("θ, and its Gamma law")
        measured, law = series["collapse well probability"], series["collapse well law"]
        for k, shade in enumerate(_shades(len(time))):
            zetas = measured["collapse_zeta"]
            axes[3].plot(zetas, measured[k], "o", ms=2.5, color=shade, label=f"t = {time[k]:g}")
            axes[3].plot(zetas, law[k], color=shade, lw=1)
        axes[3].axvline((2 * MU) ** 0.5, color="0.5", ls="--", lw=1, label="published: √(2μ)")
        axes[3].set_xlabel("ζ")
        axes[3].set_title("P(θ² < 1e-30): runs and finite-time law", loc="left", fontsize=9)
        axes[3].legend(fontsize=7, frameon=False)
    return figure


def single_neuron(series: xr.Dataset) -> Figure:
    """Final weights at three noise levels over the loss of all samples; probability of collapse over noise."""
    x, y = series["collapse neuron data"].values
    limit, chain = series["collapse neuron threshold"].values
    share = series["collapse neuron probability"]
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
        span = np.linspace(-2.6, 2.6, 121)
        w1, w2 = np.meshgrid(span, span)
        loss = ((w2[..., None] * np.tanh(w1[..., None] * x) - y) ** 2).mean(-1) / 2
        drawn = left.contourf(span, span, np.log10(loss), levels=18, cmap="Greys_r", alpha=0.8)
        figure.colorbar(drawn, ax=left, label="log₁₀ loss, all samples")
        weights = series["collapse neuron weights"]
        for k, colour in enumerate((BLUE, ORANGE, GREEN)):
            label = f"α = {float(weights['collapse_shown'][k]):.3g}"
            left.plot(*np.clip(weights[k].values.T, -2.6, 2.6), "o", ms=3, color=colour, label=label)
            right.axvline(float(weights["collapse_shown"][k]), color=colour, ls=":", lw=1)
        left.set_xlabel("input weight w₁")
        left.set_ylabel("output weight w₂")
        left.legend(fontsize=7, frameon=True)
        steps = share["collapse_neuron_step"].values
        for k, shade in zip(range(1, len(steps)), _shades(len(steps) - 1), strict=True):
            right.plot(share["collapse_alpha"], share[k], color=shade, lw=1.2, label=f"step {steps[k]}")
        right.axvline(limit, color="k", lw=1.2, label="Σxy/Σx²")
        right.axvline(chain, color="k", lw=1, ls="--", label="the same for Euler's dt")
        right.set_xlabel("α = ηζ²σ'(0)/2")
        right.set_title("P(|w| < 0.01), started outside the ball", loc="left", fontsize=9)
        right.legend(fontsize=7, frameon=False)
    return figure


def teacher_student(series: xr.Dataset) -> Figure:
    """Losses along the run, singular values before the drop and after it, with law and published curves."""
    train, test, modes = (series[f"collapse linear {name}"] for name in ("train", "test", "modes"))
    sigmas, steps = modes["collapse_sigma"].values, modes["collapse_linear_step"].values
    targets, law = series["collapse linear targets"].values, series["collapse linear law"]
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 3.2), layout="constrained")
        axes, shades = figure.subplots(1, 4), _shades(len(sigmas))
        for axis, values, title in zip(axes, (train, test), ("training loss", "test loss"), strict=False):
            for c, sigma in enumerate(sigmas):
                axis.plot(steps, values[:, c], color=shades[c], lw=1.2, label=f"σ = {sigma:g}")
            axis.axvline(50_000, color="0.6", ls="--", lw=0.8)
            axis.set_title(title, loc="left", fontsize=9)
            axis.set_xlabel("SGD step")
        axes[0].set_ylim(0.455, 0.5)
        axes[1].set_ylim(0, 2e-5)
        axes[0].legend(fontsize=7, frameon=False)
        seeds, at = float(series["collapse linear seeds"][0]), int(np.searchsorted(steps, 50_000))
        spread = series["collapse linear spread"]
        for c in range(len(sigmas)):
            error = spread[at, c] / seeds**0.5
            axes[2].errorbar(targets, modes[at, c], error, fmt="o", ms=2, lw=0.7, color=shades[c])
            axes[2].plot(targets, law[0, c], color=shades[c], lw=1)
        axes[2].set_title("s at step 50 000 and its law's mean", loc="left", fontsize=9)
        _after_drop(axes[3], series, targets, steps)
        for axis in axes[2:]:
            axis.plot([0, targets[0]], [0, targets[0]], color="0.6", ls="--", lw=0.8)
            axis.set_xlabel("S*")
    return figure


def _after_drop(axis: Axes, series: xr.Dataset, targets: np.ndarray, steps: np.ndarray) -> None:
    """Modes at the largest σ after the drop; the law at the end, and the published curve with its slower clock."""
    modes, sigma = series["collapse linear modes"], float(series["collapse_sigma"][-1])
    after = [k for k in range(len(steps)) if steps[k] >= 50_000][::2]
    half = PUBLISHED_ETA * sigma**2 / 2
    before = logistic(targets - half, 50_000 / 1024, 1.0)
    for k, shade in zip(after, matplotlib.colormaps["copper"](np.linspace(0, 0.9, len(after))), strict=True):
        axis.plot(targets, modes[k, -1], "o", ms=2, color=shade)
        drawn = logistic(targets - half / 10, (steps[k] - 50_000) * 0.1 / 1024, np.maximum(before, 1e-300))
        axis.plot(targets, drawn, color=shade, lw=0.8, ls=":", label="published curves" if k == after[0] else None)
    axis.plot(targets, series["collapse linear law"][1, -1], color=BLUE, lw=1.2, label="law, step 60 000")
    axis.set_title(f"σ = {sigma:g}, s from the drop on", loc="left", fontsize=9)
    axis.legend(fontsize=7, frameon=False)


def two_units(series: xr.Dataset) -> Figure:
    """Weights of one run, and ‖w₁ - w₂‖² over steps for step sizes and noise levels, with predicted rates."""
    distance, weights = series["collapse toy distance"], series["collapse toy weights"]
    steps, rate = distance["collapse_toy_step"].values, series["collapse toy rate"].values
    names, merged = distance["collapse_setting"].values, series["collapse toy merged"].values
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        axes = figure.subplots(1, 3)
        for k, name in enumerate(weights["collapse_toy_weight"].values):
            axes[0].plot(steps[1:], weights[1:, k], lw=1.2, label=name)
        axes[0].set_xscale("log")
        axes[0].legend(fontsize=7, frameon=False)
        axes[0].set_title(f"weights, {names[0]}", loc="left", fontsize=9)
        panels = (
            [c for c, name in enumerate(names) if name.endswith("σ=0.1")],
            [c for c, name in enumerate(names) if name.startswith("η=0.1,")],
        )
        for axis, chosen in zip(axes[1:], panels, strict=True):
            for c, shade in zip(chosen, _shades(len(chosen)), strict=True):
                axis.semilogy(steps, np.maximum(distance[:, c], 1e-30), color=shade, lw=0.5, alpha=0.7)
                guide = 1e-3 * np.exp(-rate[c] * steps)
                axis.semilogy(steps, guide, color=shade, lw=1.6, ls="--", label=f"{names[c]}: {merged[c]:.0%} merge")
            axis.set_ylim(1e-12, 3e4)
            axis.legend(fontsize=6.5, frameon=False, loc="upper right", ncols=2)
            axis.set_title("‖w₁ - w₂‖² and predicted rates (dashed)", loc="left", fontsize=9)
        for axis in axes:
            axis.set_xlabel("SGD step")
    return figure


FIGURES = {
    "quartic-well": SavedFigure(
        "Quartic well: three phases, and collapse probability with the finite-time law (Chen et al. 2023, Fig. 1)",
        ("collapse well paths", "collapse well probability", "collapse well law"),
        quartic_well,
    ),
    "single-neuron": SavedFigure(
        "Single tanh neuron: final weights and collapse probability over the noise level (Chen et al. 2023, Fig. 2)",
        ("collapse neuron probability", "collapse neuron weights", "collapse neuron data", "collapse neuron threshold"),
        single_neuron,
    ),
    "teacher-student": SavedFigure(
        "Linear teacher and student: losses and singular values, law and published curves (Chen et al. 2023, Fig. 5)",
        ("collapse linear train", "collapse linear test", "collapse linear modes", "collapse linear spread",
         "collapse linear law", "collapse linear targets", "collapse linear seeds"),
        teacher_student,
    ),
    "two-unit-toy": SavedFigure(
        "Two GELU units under label noise: they merge at the predicted rate, or escape (Chen et al. 2023, toy)",
        ("collapse toy distance", "collapse toy weights", "collapse toy merged", "collapse toy rate"),
        two_units,
    ),
}  # fmt: skip
