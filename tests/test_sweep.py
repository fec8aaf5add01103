"""Sweeps: the same results however many workers, whoever runs the cells, and however often it is killed."""

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from validation import workers as module
from validation.cli import main
from validation.run_directory import MARK, load, run_name
from validation.settings import RunSettings, SettingsError
from validation.sweep import cells, expand, sweep
from validation.workers import Task, TaskResult, run_task

CPU = torch.device("cpu")
COMMON = {"seeds": 3}
SWEPT = {"spread": "0.02:0.1:3", "steps": "150,200", "samples": "8"}
SPREADS = ["sweep", "stabilization", "--spread", "0.02:0.1:3", "--samples", "8", "--seeds", "3"]
ARGUMENTS, HALF = ([*SPREADS, "--steps", steps] for steps in ("150,200", "150"))  # a cluster's job starts a process


def results(root):
    """What every run below ``root`` holds, bit for bit, by name."""
    found = {}
    for mark in sorted(root.glob(f"*/{MARK}")):
        saved = load(mark.parent)
        series = {name: array.values.tobytes() for name, array in saved.series.items()}
        found[mark.parent.name] = ([repr(check) for check in saved.checks], series)
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The cells one after the other in this process."""
    root = tmp_path_factory.mktemp("reference")
    settings = cells("stabilization", COMMON, SWEPT, None)
    assert len(settings) == 6
    for cell in settings:
        assert run_task(Task(str(root), "stabilization", cell, "cpu")).fault == ""
    return results(root)


def test_ranges_and_lists():
    assert expand("spread", float, "0.05:0.3:6") == ["0.05", "0.1", "0.15", "0.2", "0.25", "0.3"]
    assert expand("steps", int, "10:20:3") == ["10", "15", "20"]
    assert expand("step_sizes", tuple[float, ...], "0.1,0.2") == ["0.1", "0.2"]
    assert cells("diagonal", {}, {"step_sizes": "0.1,0.2"}, None)[1].diagonal.step_sizes == (0.2,)
    for text in ("1:2", "a:b:3", "1:2:1", "1:inf:3", "1:2:3:4"):
        with pytest.raises(SettingsError, match="range"):
            expand("spread", float, text)
    with pytest.raises(SettingsError, match="no number"):
        expand("table", str, "a:b:3")
    with pytest.raises(SettingsError, match="too many"):
        cells("stabilization", {}, {"spread": "0:0.1:1000", "start": "0.1:0.2:1000"}, None)


def test_presets_and_files_hold_for_all_cells(tmp_path):
    found = cells("collapse", {}, {"samples": "16,32"}, preset="ckyg-neuron")
    assert [cell.collapse.samples for cell in found] == [16, 32]
    assert all(cell.collapse.experiments == ("neuron",) and cell.size == "standard" for cell in found)
    with pytest.raises(SettingsError, match="for suite collapse"):
        cells("diagonal", {}, {"n": "10,20"}, preset="ckyg-neuron")
    config = tmp_path / "mine.yaml"
    config.write_text("suites: [relu]\n")
    with pytest.raises(SettingsError, match="for suite relu"):
        cells("diagonal", {}, {"n": "10,20"}, str(config))
    assert [cell.relu.experiments for cell in cells("relu", {}, {"experiments": "1d,two-layer"}, str(config))] == [
        ("1d",), ("two-layer",)
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_results(tmp_path, reference, workers):
    done = sweep(
        tmp_path, "stabilization", cells("stabilization", COMMON, SWEPT, None), CPU, workers=workers, mode="quiet"
    )
    assert all(result.fresh and not result.fault for result in done)
    assert results(tmp_path) == reference


def is_half_of(reference, found):
    assert len(found) == 3
    assert found == {name: reference[name] for name in found}


@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_results(tmp_path, reference):
    pytest.importorskip("distributed")
    code = "import sys; from validation.cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--engine", "dask", "--workers", "2", "--out", str(tmp_path), "--quiet"]
    ended = subprocess.run([sys.executable, "-c", code, *HALF, *options], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    is_half_of(reference, results(tmp_path))


def test_submitit_gives_the_same_results(tmp_path, reference):
    pytest.importorskip("submitit")
    assert main([*HALF, "--engine", "slurm", "--out", str(tmp_path), "--quiet"]) == 0
    is_half_of(reference, results(tmp_path))


def test_a_sweep_that_is_done_runs_nothing_and_adds_what_is_new(tmp_path, capsys):
    arguments = ["sweep", "stabilization", "--steps", "150", "--samples", "8", "--seeds", "3", "--out", str(tmp_path)]
    arguments += ["--workers", "1", "--quiet"]
    assert main([*arguments, "--spread", "0.02,0.06"]) == 0
    assert "2 cells: 2 run" in capsys.readouterr().out
    assert main([*arguments, "--spread", "0.02,0.04,0.06"]) == 0
    assert "3 cells: 1 run, 2 done before" in capsys.readouterr().out
    with open(tmp_path / "sweep.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["spread"]) for row in rows] == [0.02, 0.04, 0.06]
    assert all((tmp_path / row["run"] / MARK).exists() for row in rows)


def test_a_cell_that_fails_is_named_and_the_others_are_done(tmp_path, capsys):
    """Two samples leave no room for the edge draws to be the only ones; a table that is missing fails its cell."""
    arguments = ["sweep", "diagonal", "--table", "nowhere.csv", "--target", "y", "--table-rows", "3,4", "--steps", "10"]
    assert main([*arguments, "--seeds", "2", "--out", str(tmp_path), "--workers", "1"]) == 3
    printed = capsys.readouterr()
    assert "2 failed" in printed.out
    assert printed.err.count("no table at") == 2


class Killer:
    """Stands for the engine: kills the worker of one cell, as the system does when memory runs out."""

    def __init__(self, times):
        self.left = times

    def __call__(self, pending, tasks, workers, scheduler):
        from concurrent.futures.process import BrokenProcessPool

        for number in pending:
            if number == 1 and self.left:
                self.left -= 1
                raise BrokenProcessPool
            yield number, TaskResult(str(number), True)


def test_killed_workers_are_tried_again_and_in_the_end_given_up(tmp_path, monkeypatch):
    settings = cells("stabilization", COMMON, {"spread": "0.02,0.04,0.06"}, None)
    monkeypatch.setattr(module, "_local", Killer(2))
    assert [r.fault for r in sweep(tmp_path, "stabilization", settings, CPU, mode="quiet")] == ["", "", ""]
    monkeypatch.setattr(module, "_local", Killer(99))
    faults = [r.fault for r in sweep(tmp_path, "stabilization", settings, CPU, mode="quiet")]
    assert faults[0] == ""
    assert "killed" in faults[1]


STANDARD = ["sweep", "stabilization", "--size", "standard", "--samples", "8", "--spread", "0.02:0.1:6"]
STANDARD += ["--steps", "150:170:4", "--quiet"]  # 24 cells


def marks(root):
    """When each run that is done was done."""
    return {mark: mark.stat().st_mtime_ns for mark in root.glob(f"stabilization-*/{MARK}")}


@pytest.mark.slow
def test_killed_fifty_times_it_ends_with_the_same_results(tmp_path):
    """SIGKILL at random moments of a standard sweep, on average a cell apart: no run lost, none done twice."""
    # Forked from a process that has imported everything: what is killed is at work from its first moment on.
    multiprocessing.set_forkserver_preload(["validation.commands", "validation.stabilization"])
    forked = multiprocessing.get_context("forkserver").Process

    def begun(out):
        process = forked(target=main, args=([*STANDARD, "--workers", "1", "--out", str(out)],))
        process.start()
        return process

    whole, out, rng, at_work, seen = tmp_path / "whole", tmp_path / "killed", np.random.default_rng(0), 0, {}
    started = time.perf_counter()
    begun(whole).join()
    longest = 2 * (time.perf_counter() - started) / 24
    assert len(marks(whole)) == 24
    for _ in range(50):
        process = begun(out)
        process.join(rng.uniform(0, longest))
        at_work += process.is_alive()
        process.kill()
        process.join()
        for mark, time_ns in seen.items():
            assert mark.stat().st_mtime_ns == time_ns  # neither lost nor done twice
        seen = marks(out)
    assert at_work == 50
    begun(out).join()
    assert {mark: when for mark, when in marks(out).items() if mark in seen} == seen
    assert results(out) == results(whole)


@pytest.mark.slow
def test_killed_with_its_workers_it_ends_with_the_same_results(tmp_path, reference):
    """SIGKILL to the whole process group of a command with two worker processes."""
    code = "import sys; from validation.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *ARGUMENTS, "--workers", "2", "--quiet", "--out"]
    rng, seen = np.random.default_rng(1), {}
    started = time.perf_counter()
    subprocess.run([*command, str(tmp_path / "timing")], check=True, capture_output=True)
    whole = time.perf_counter() - started
    for _ in range(5):
        process = subprocess.Popen(
            [*command, str(tmp_path / "out")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        time.sleep(rng.uniform(0.4 * whole, whole))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert {mark: when for mark, when in marks(tmp_path / "out").items() if mark in seen} == seen
        seen = marks(tmp_path / "out")
    subprocess.run([*command, str(tmp_path / "out")], check=True, capture_output=True)
    assert results(tmp_path / "out") == reference


def test_names_of_cells_do_not_depend_on_the_sweep():
    one = cells("stabilization", COMMON, {"spread": "0.02"}, None)[0]
    many = cells("stabilization", COMMON, {"spread": "0.02,0.04"}, None)[0]
    assert run_name("stabilization", one, CPU) == run_name("stabilization", many, CPU)
    assert one == RunSettings(suites=("stabilization",), seeds=3, stabilization=one.stabilization)
