"""What figures share, and the one every claim has: predicted against measured."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import rc_context
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from validation.check import Check, Verdict
from validation.statistics import SIGMAS

# Okabe-Ito: told apart by colour-blind readers and in print.
COLOURS = {
    Verdict.AGREES: "#0072B2",
    Verdict.DISAGREES: "#D55E00",
    Verdict.INCONCLUSIVE: "#E69F00",
    Verdict.NOT_EVALUABLE: "#999999",
}
MARGIN = 3  # points around a figure
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "",
}


@dataclass(frozen=True)
class SavedFigure:
    """A figure drawn from a run's saved series alone.

    Attributes:
        title: one line that says what it shows and which figure of which paper it corresponds to.
        variables: names of the series it needs; its CSV holds exactly these.
        draw: makes the figure from the dataset.
        animate: makes a moving one, where there is one (``--format gif``).
    """

    title: str
    variables: tuple[str, ...]
    draw: Callable[[xr.Dataset], Figure]
    animate: Callable[[xr.Dataset], FuncAnimation] | None = None


def claim_figure(checks: Sequence[Check]) -> Figure:
    """Predicted against measured for one claim: a scatter where predictions vary, else a row a setting."""
    known = [check for check in checks if check.verdict != Verdict.NOT_EVALUABLE]
    with rc_context(STYLE):
        if len({round(check.predicted, 9) for check in known}) > 2:
            figure = Figure(figsize=(4.6, 3.6), layout="constrained")
            _scatter(figure.subplots(), known)
        else:
            figure = Figure(figsize=(6.4, 0.9 + 0.32 * max(len(known), 1)), layout="constrained")
            _rows(figure.subplots(), known)
    return figure


def _scatter(axes: Axes, checks: Sequence[Check]) -> None:
    everything = [value for check in checks for value in (check.predicted, check.measured)]
    low, high = min(*everything, 0.0), max(*everything, 0.0)
    axes.axline((0, 0), slope=1, color="0.6", lw=0.8, zorder=0)
    crosses = np.array([(rival.predicted, check.measured) for check in checks for rival in check.rivals])
    axes.plot(*crosses.reshape(-1, 2).T, "x", color="0.7", ms=4, zorder=1)
    for colour, rows in _by_colour(checks):
        x, y, error = np.array([(checks[row].predicted, *_measured(checks[row])) for row in rows]).T
        axes.errorbar(x, y, error, fmt="o", ms=4, capsize=2, color=colour, zorder=2)
    sizes = np.abs([value for value in everything if value != 0])
    if len(sizes) and sizes.max() / sizes.min() > 50:
        for scale in (axes.set_xscale, axes.set_yscale):
            scale("symlog", linthresh=float(sizes.min()))
    else:
        margin = 0.08 * (high - low)
        axes.set_xlim(low - margin, high + margin)
    axes.set_xlabel(f"predicted {checks[0].observable}")
    axes.set_ylabel(f"measured (± {SIGMAS:g} standard errors)")


def _rows(axes: Axes, checks: Sequence[Check]) -> None:
    for row, check in enumerate(checks):
        axes.barh(row, 2 * check.allowed, left=check.predicted - check.allowed, height=0.7, color="#56B4E9", alpha=0.25)
        axes.plot([check.predicted] * 2, [row - 0.35, row + 0.35], color="0.4", lw=1)
        axes.plot([rival.predicted for rival in check.rivals], [row] * len(check.rivals), "x", color="0.55", ms=4)
    for colour, rows in _by_colour(checks):
        x, error = np.array([_measured(checks[row]) for row in rows]).T
        axes.errorbar(x, rows, xerr=error, fmt="o", ms=4, capsize=2, color=colour)
    axes.set_yticks(range(len(checks)), [check.setting for check in checks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"{checks[0].observable if checks else ''}   (band: what conforms; ×: rivals)")


def _by_colour(checks: Sequence[Check]) -> list[tuple[str, list[int]]]:
    """Colours of verdicts that occur, and which checks have them."""
    rows = [(colour, [n for n, check in enumerate(checks) if check.verdict == of]) for of, colour in COLOURS.items()]
    return [(colour, found) for colour, found in rows if found]


def _measured(check: Check) -> tuple[float, float]:
    return check.measured, SIGMAS * check.standard_error


def svg(figure: Figure) -> str:
    """The figure as an inline SVG element."""
    buffer = io.StringIO()
    with rc_context(STYLE):  # its salt: the same figure has the same identifiers
        canvas, layout, dpi = FigureCanvasSVG(figure), figure.get_layout_engine(), figure.dpi
        if layout is not None:  # savefig would draw twice, the first time for the layout alone
            figure.set_dpi(72)  # SVG's
            for axes in figure.axes:
                axes.minorticks_off()  # of logarithmic axes: a fifth of the time
            if len(figure.axes) == 1 and not figure.texts and not figure.legends:
                _fill(figure)
            else:
                layout.execute(figure)
            figure.set_dpi(dpi)
            figure.set_layout_engine("none")
        canvas.print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _fill(figure: Figure) -> None:
    """Let the only axes fill the figure: measured once, where a layout engine measures twice."""
    (axes,) = figure.axes
    figure.set_layout_engine("none")
    renderer = figure._get_renderer()  # type: ignore[attr-defined]
    whole, inner, outer = figure.bbox, axes.get_window_extent(renderer), axes.get_tightbbox(renderer)
    assert outer is not None
    left, bottom = inner.x0 - outer.x0 + MARGIN, inner.y0 - outer.y0 + MARGIN
    right, top = whole.width - (outer.x1 - inner.x1) - MARGIN, whole.height - (outer.y1 - inner.y1) - MARGIN
    if right > left and top > bottom:
        size = whole.width, whole.height
        axes.set_position((left / size[0], bottom / size[1], (right - left) / size[0], (top - bottom) / size[1]))
