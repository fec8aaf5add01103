"""Sweeps: one run directory for every combination of settings, on this machine, a dask cluster or Slurm.

Cells are independent; a cell's results depend on its settings alone, not on how many cells or workers there are. A
sweep that is stopped, or whose workers are killed, goes on with the cells that are not done.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch

from validation.options import settings_from
from validation.settings import RunSettings, SettingsError
from validation.store import replacing
from validation.workers import Engine, Task, TaskResult, run_tasks

MOST_CELLS = 100_000


def expand(field: str, hint: Any, text: str) -> list[str]:
    """The values that ``text`` names: ``start:stop:count`` for evenly spaced ones, or ``a,b,c``.

    Raises:
        SettingsError: a range that is none, or a range for a setting that is no number.
    """
    if ":" not in text:
        return [part for part in text.split(",") if part] or [text]
    kind = get_args(hint)[0] if get_origin(hint) is tuple else hint
    shown = field.replace("_", "-")
    if kind not in (int, float):
        raise SettingsError(f"{shown} '{text}' is a range and {shown} is no number: list its values with commas.")
    try:
        start, stop, count = text.split(":")
        low, high, number = float(start), float(stop), int(count)
    except ValueError:
        raise SettingsError(f"{shown} '{text}' is not a range: write start:stop:count, e.g. 0.05:0.3:6.") from None
    if number < 2 or not abs(low) + abs(high) < float("inf"):
        raise SettingsError(f"{shown} '{text}' is not a range: give two finite ends and a count of 2 or more.")
    values = [low + (high - low) * step / (number - 1) for step in range(number)]
    if kind is int:
        return [str(round(value)) for value in values]
    return [repr(float(f"{value:.12g}")) for value in values]


def cells(
    suite: str,
    common: Mapping[str, Any],
    swept: Mapping[str, str],
    config: str | None = None,
    preset: str | None = None,
) -> list[RunSettings]:
    """Settings of every combination of the swept values.

    Args:
        common: settings of the whole run (``seeds``, ``size``, …), raw.
        swept: name of a field of the suite's settings to text for :func:`expand`.
        config, preset: a settings file and a preset that hold for all cells.

    Raises:
        SettingsError: values that cannot be used, or too many cells.
    """
    meant = settings_from({}, config, preset=preset).suites
    if meant and suite not in meant:
        raise SettingsError(f"these settings are for suite {meant[0]}: sweep that, or leave suite {suite} to others.")
    kind = type(getattr(RunSettings(), suite))
    hints = get_type_hints(kind)
    choices = {name: expand(name, hints[name], text) for name, text in swept.items()}
    total = 1
    for values in choices.values():
        total *= len(values)
    if total > MOST_CELLS:
        raise SettingsError(f"{total} cells are too many for one sweep: choose at most {MOST_CELLS}.")
    found = []
    for combination in itertools.product(*choices.values()):
        own = {f"{suite}.{name}": value for name, value in zip(choices, combination, strict=True)}
        found.append(settings_from({**common, "suites": [suite], **own}, config, preset=preset))
    return found


def sweep(
    root: Path, suite: str, settings: Sequence[RunSettings], device: torch.device, *, engine: Engine = "local",
    workers: int = 0, mode: str = "text", fresh: bool = False, scheduler: str = "",
) -> list[TaskResult]:  # fmt: skip
    """Run the cells and write ``sweep.csv``; results in the order of ``settings``.

    Args:
        engine, workers, scheduler: see :func:`validation.workers.run_tasks`; 0 workers for one a core.

    Raises:
        SettingsError: an engine that is not installed, or a number of workers that is none.
    """
    tasks = [Task(str(root), suite, cell, device.type, fresh) for cell in settings]
    bar = _Bar(len(tasks), mode)
    results = run_tasks(tasks, engine=engine, workers=workers, scheduler=scheduler, told=bar)
    _write_table(root, suite, settings, results)
    return results


class _Bar:
    """How many cells are done and how long the rest may take, on one line of standard error."""

    def __init__(self, total: int, mode: str) -> None:
        self._total, self._mode, self._started, self._done = total, mode, time.perf_counter(), 0

    def __call__(self, number: int, result: TaskResult) -> None:
        self._done = done = self._done + 1
        if self._mode == "quiet":
            return
        left = (time.perf_counter() - self._started) / done * (self._total - done)
        if self._mode == "json":
            line = json.dumps({"done": done, "cells": self._total, "seconds_left": round(left)})
            print(line, file=sys.stderr, flush=True)
        else:
            end = "\n" if done == self._total else ""
            print(f"\r  {done}/{self._total} cells, about {left:.0f} s left   ", end=end, file=sys.stderr, flush=True)


def _write_table(root: Path, suite: str, settings: Sequence[RunSettings], results: Sequence[TaskResult]) -> None:
    """sweep.csv: the cells' settings that vary, their run directories and faults."""
    rows = [dataclasses.asdict(getattr(cell, suite)) for cell in settings]
    vary = [name for name in rows[0] if len({str(row[name]) for row in rows}) > 1]
    with replacing(root / "sweep.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*vary, "run", "fault"])
        for row, result in zip(rows, results, strict=True):
            shown = [" ".join(map(str, v)) if isinstance(v, tuple) else v for v in (row[name] for name in vary)]
            writer.writerow([*shown, result.name, result.fault])
