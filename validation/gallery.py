"""Every figure by name: which suite's results it needs, and drawing it from saved results with its data beside it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import xarray as xr
from matplotlib.animation import PillowWriter

from validation.figures import SavedFigure
from validation.settings import SettingsError
from validation.store import replacing

MODULES = {
    "diagonal": ("diagonal_figures",),
    "stabilization": ("stabilization_figures",),
    "collapse": ("collapse_figures", "heatmaps"),
    "relu": ("relu_figures",),
    "bouncing": ("bouncing_figures", "sharpness_figures"),
    "resnet": ("resnet_figures",),
}
"""Suite to the modules that define its ``FIGURES``."""


def gallery() -> dict[str, tuple[str, SavedFigure]]:
    """Name to (suite, figure), for all suites."""
    found: dict[str, tuple[str, SavedFigure]] = {}
    for suite, modules in MODULES.items():
        for module in modules:
            for name, figure in importlib.import_module(f"validation.{module}").FIGURES.items():
                found[name] = (suite, figure)
    return found


def figures_of(suite: str, series: xr.Dataset) -> dict[str, SavedFigure]:
    """The suite's figures that these series suffice for."""
    return {
        name: figure
        for name, (of, figure) in gallery().items()
        if of == suite and all(variable in series for variable in figure.variables)
    }


def write_figure(name: str, figure: SavedFigure, series: xr.Dataset, folder: Path, kinds: Sequence[str]) -> list[Path]:
    """The figure in each of the formats, and its data as a table with a row a number.

    Raises:
        SettingsError: the series lack what the figure shows.
    """
    absent = [variable for variable in figure.variables if variable not in series]
    if absent:
        raise SettingsError(f"figure '{name}' needs '{absent[0]}', which this run has not: run its suite again.")
    drawn, written = figure.draw(series), []
    for kind in kinds:
        path = folder / f"{name}.{kind}"
        if kind == "gif" and figure.animate is None:
            raise SettingsError(f"figure '{name}' does not move: choose another --format than gif.")
        with replacing(path, f".{kind}") as temporary:
            if kind == "gif" and figure.animate is not None:
                figure.animate(series).save(temporary, writer=PillowWriter(fps=12), dpi=70)
                written.append(path)
                continue
            drawn.savefig(temporary, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        written.append(path)
    path = folder / f"{name}.csv"
    with replacing(path) as temporary:
        table = _long({variable: series[variable] for variable in figure.variables})
        table.to_csv(temporary, index=False, float_format="%.9g")
    return [*written, path]


def _long(arrays: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """Columns variable, one for each dimension, value."""
    frames = []
    for name, array in arrays.items():
        frame = array.rename("value").reset_coords(drop=True).to_dataframe().reset_index()
        frame.insert(0, "variable", name)
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    return table[[column for column in table if column != "value"] + ["value"]]
