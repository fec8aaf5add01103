"""Sweeps: one run directory for every combination of settings, on this machine, a dask cluster or Slurm.

Cells are independent; a cell's results depend on its settings alone, not on how many cells or workers there are. A
sweep that is stopped, or whose workers are killed, goes on with the cells that are not done.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from validation.options import settings_from
from validation.run_directory import run_name, run_or_load
from validation.settings import RunSettings, SettingsError
from validation.store import replacing

Engine = Literal["local", "dask", "slurm"]
RETRIES = 3
MOST_CELLS = 100_000


@dataclass(frozen=True)
class CellResult:
    """How a cell ended: its run's name, whether it was done now, and what went wrong (``""`` for nothing)."""

    name: str
    fresh: bool
    fault: str


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


def cells(suite: str, common: Mapping[str, Any], swept: Mapping[str, str], config: str | None) -> list[RunSettings]:
    """Settings of every combination of the swept values.

    Args:
        common: settings of the whole run (``seeds``, ``size``, …), raw.
        swept: name of a field of the suite's settings to text for :func:`expand`.

    Raises:
        SettingsError: values that cannot be used, or too many cells.
    """
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
        found.append(settings_from({**common, "suites": [suite], **own}, config))
    return found


def run_cell(root: str, suite: str, settings: RunSettings, device: str, fresh: bool) -> CellResult:
    """One cell in a worker: run it, or find it done. Whatever goes wrong is said, not raised."""
    torch.set_num_threads(1)
    where = torch.device(device)
    name = run_name(suite, settings, where)
    try:
        _, ran = run_or_load(Path(root), suite, settings, where, mode="quiet", fresh=fresh, wait=True)
    except Exception as fault:  # a cell must not take the sweep with it
        return CellResult(name, False, " ".join(f"{type(fault).__name__}: {fault}".split()))
    return CellResult(name, ran, "")


def sweep(
    root: Path, suite: str, settings: Sequence[RunSettings], device: torch.device, *, engine: Engine = "local",
    workers: int = 0, mode: str = "text", fresh: bool = False, scheduler: str = "",
) -> list[CellResult]:  # fmt: skip
    """Run the cells and write ``sweep.csv``; results in the order of ``settings``.

    Args:
        engine: worker processes on this machine, a dask cluster, or Slurm through submitit.
        workers: processes; 0 for one a core.
        scheduler: address of the dask scheduler; a local cluster when empty.

    Raises:
        SettingsError: an engine that is not installed.
    """
    run: Callable[..., Results] = {"local": _joblib, "dask": _dask, "slurm": _slurm}[engine]
    tasks = [(str(root), suite, cell, device.type, fresh) for cell in settings]
    done: dict[int, CellResult] = {}
    shown, attempts = _Bar(len(tasks), mode), 0
    while len(done) < len(tasks):
        pending = [number for number in range(len(tasks)) if number not in done]
        before = len(done)
        try:
            for number, result in run(pending, tasks, workers, scheduler):
                done[number] = result
                shown(len(done))
        except BrokenProcessPool:
            attempts = attempts + 1 if len(done) == before else 0
            if attempts >= RETRIES:
                lost = f"its worker was killed {RETRIES} times in a row (out of memory?): choose fewer --workers"
                done |= {n: CellResult(run_name(suite, settings[n], device), False, lost) for n in pending}
    results = [done[number] for number in range(len(tasks))]
    _write_table(root, suite, settings, results)
    return results


Tasks = Sequence[tuple[str, str, RunSettings, str, bool]]
Results = Iterator[tuple[int, CellResult]]


def _numbered(number: int, task: tuple[Any, ...]) -> tuple[int, CellResult]:
    return number, run_cell(*task)


def _joblib(pending: Sequence[int], tasks: Tasks, workers: int, scheduler: str, backend: str = "loky") -> Results:
    import joblib

    pinned: dict[str, Any] = {"inner_max_num_threads": 1} if backend == "loky" else {}
    with joblib.parallel_config(backend=backend, n_jobs=workers or -1, **pinned):
        parallel = joblib.Parallel(return_as="generator_unordered")
        yield from parallel(joblib.delayed(_numbered)(number, tasks[number]) for number in pending)


def _dask(pending: Sequence[int], tasks: Tasks, workers: int, scheduler: str) -> Results:
    try:
        from dask.distributed import Client, LocalCluster
    except ImportError:
        raise SettingsError("dask is not installed: pip install 'valleydrift[dask]' for --engine dask.") from None
    with contextlib.ExitStack() as stack:
        address: Any = scheduler
        if not scheduler:
            own = LocalCluster(n_workers=workers or None, threads_per_worker=1, dashboard_address=None)
            address = stack.enter_context(own)
        stack.enter_context(Client(address))
        yield from _joblib(pending, tasks, -1, scheduler, backend="dask")


def _slurm(pending: Sequence[int], tasks: Tasks, workers: int, scheduler: str) -> Results:
    """submitit: Slurm where ``srun`` is, else its local engine; at most ``workers`` jobs at once."""
    try:
        import submitit
    except ImportError:
        raise SettingsError("submitit is not installed: pip install 'valleydrift[slurm]' for --engine slurm.") from None
    executor = submitit.AutoExecutor(folder=Path(tasks[0][0]) / "submitit")
    executor.update_parameters(timeout_min=24 * 60, slurm_array_parallelism=workers or 1000, cpus_per_task=1)
    with executor.batch():
        jobs = {number: executor.submit(run_cell, *tasks[number]) for number in pending}
    while jobs:
        finished = [number for number, job in jobs.items() if job.done()]
        for number in finished:
            job = jobs.pop(number)
            try:
                yield number, job.result()
            except Exception as fault:  # the job died: submitit says how
                yield number, CellResult("", False, " ".join(str(fault).split())[:500])
        if jobs and not finished:
            time.sleep(0.2)


class _Bar:
    """How many cells are done and how long the rest may take, on one line of standard error."""

    def __init__(self, total: int, mode: str) -> None:
        self._total, self._mode, self._started = total, mode, time.perf_counter()

    def __call__(self, done: int) -> None:
        if self._mode == "quiet":
            return
        left = (time.perf_counter() - self._started) / done * (self._total - done)
        if self._mode == "json":
            line = json.dumps({"done": done, "cells": self._total, "seconds_left": round(left)})
            print(line, file=sys.stderr, flush=True)
        else:
            end = "\n" if done == self._total else ""
            print(f"\r  {done}/{self._total} cells, about {left:.0f} s left   ", end=end, file=sys.stderr, flush=True)


def _write_table(root: Path, suite: str, settings: Sequence[RunSettings], results: Sequence[CellResult]) -> None:
    """sweep.csv: the cells' settings that vary, their run directories and faults."""
    rows = [dataclasses.asdict(getattr(cell, suite)) for cell in settings]
    vary = [name for name in rows[0] if len({str(row[name]) for row in rows}) > 1]
    with replacing(root / "sweep.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*vary, "run", "fault"])
        for row, result in zip(rows, results, strict=True):
            shown = [" ".join(map(str, v)) if isinstance(v, tuple) else v for v in (row[name] for name in vary)]
            writer.writerow([*shown, result.name, result.fault])
