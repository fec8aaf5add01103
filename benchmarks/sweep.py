"""Sweeps: two worker processes against one, on the same cells of suite stabilization.

Usage: python benchmarks/sweep.py [--rounds 5] [--cells 24]
One thread a worker. All results have to be equal bit for bit; then both are timed in turns, starting the processes
included. CPU seconds and the load of the machine are kept beside: where others compute too, the two workers get a
larger share of it than the one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch
from measure import row, save, seconds

from validation.run_directory import load
from validation.settings import RunSettings
from validation.sweep import cells
from validation.workers import Task, TaskResult, run_tasks

CPU = torch.device("cpu")


def swept(settings: list[RunSettings], workers: int, root: str) -> list[TaskResult]:
    """The cells, run anew."""
    return run_tasks([Task(root, "stabilization", cell, "cpu") for cell in settings], workers=workers)


def bits(results: list[TaskResult], root: str) -> tuple[float, list[tuple[float, bytes]]]:
    """CPU seconds of all cells; mean of the measured values and all series of every one."""
    busy, found = 0.0, []
    for result in results:
        assert result.fresh, result
        saved = load(Path(root) / result.name)
        series = b"".join(array.values.tobytes() for array in saved.series.values())
        busy += saved.origin["cpu_seconds"]
        found.append((statistics.fmean(check.measured for check in saved.checks), series))
    return busy, found


def once(settings: list[RunSettings], workers: int) -> tuple[float, float, list[tuple[float, bytes]]]:
    """Seconds, CPU seconds and results of one sweep in a folder of its own."""
    with tempfile.TemporaryDirectory() as root:
        results: list[TaskResult] = []
        wall = seconds(lambda: results.extend(swept(settings, workers, root)))
        return wall, *bits(results, root)


def main() -> None:
    """Compare, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", type=int, default=24)
    given = parser.parse_args()
    settings = cells("stabilization", {}, {"spread": f"0.02:0.1:{given.cells}"}, None)
    taken: dict[int, list[float]] = {1: [], 2: []}
    used: dict[int, list[float]] = {1: [], 2: []}
    load_before, found = os.getloadavg()[0], dict[int, list[tuple[float, bytes]]]()
    for _ in range(given.rounds):
        for workers in (1, 2):
            wall, busy, found[workers] = once(settings, workers)
            taken[workers].append(wall)
            used[workers].append(busy)
        assert found[1] == found[2], "one and two workers differ"
    sums = tuple(statistics.fmean(value for value, _ in found[workers]) for workers in (1, 2))
    compared = row(
        f"sweep of {given.cells} cells of suite stabilization, two workers", "one worker", taken[1], taken[2],
        (sums[0], sums[1]), "sweep",
    )  # fmt: skip
    save(
        "sweep", [compared],
        **{"CPU seconds of the cells": {f"{n} workers": statistics.median(used[n]) for n in used}},
        load={"before": load_before, "after": os.getloadavg()[0]},
    )  # fmt: skip


if __name__ == "__main__":
    main()
