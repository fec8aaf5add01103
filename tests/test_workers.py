"""Worker processes: the same bits as without them, and nothing left behind however the command ends."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from validation import workers as module
from validation.cli import main
from validation.run_directory import MARK, load
from validation.settings import RunSettings, SettingsError, StabilizationSettings
from validation.suite import COST, SUITES, estimate
from validation.workers import Task, TaskResult, run_task, run_tasks, workers_for

CODE = "import sys; from validation.cli import main; sys.exit(main(sys.argv[1:]))"
PAIR = ["validate", "stabilization", "collapse", "--seeds", "3", "--stabilization.steps", "200"]
PAIR += ["--stabilization.samples", "8", "--collapse.experiments", "linear-network"]
LONG = ["sweep", "stabilization", "--steps", "3000000,3000001", "--samples", "8", "--seeds", "2", "--workers", "2"]


def command(arguments, out, **more):
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, **more,
    )  # fmt: skip


def content(root):
    """What the runs below a folder hold, bit for bit."""
    found = {}
    for mark in root.glob(f"*/{MARK}"):
        saved = load(mark.parent)
        series = {name: array.values.tobytes() for name, array in saved.series.items()}
        found[mark.parent.name] = [repr(check) for check in saved.checks], series
    return found


def test_suites_side_by_side_give_the_bits_of_one_after_the_other(tmp_path):
    """Progress comes in whole lines that name their suite; the order of the report is that of the command."""
    beside = command([*PAIR, "--workers", "2"], tmp_path / "two")
    assert main([*PAIR, "--workers", "1", "--quiet", "--out", str(tmp_path / "one")]) in (0, 1)
    out, said = beside.communicate(timeout=300)
    assert beside.returncode in (0, 1), said
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(content(tmp_path / "one")) == 2
    drawn = {path.parts[-3:] for path in (tmp_path / "two").glob("*/figures/*.svg")}  # each worker drew its share
    assert drawn == {path.parts[-3:] for path in (tmp_path / "one").glob("*/figures/*.svg")}
    assert len(drawn) == (tmp_path / "two" / "report.html").read_text().count("<svg")
    lines = said.splitlines()
    assert any(line.startswith("  collapse ") and "linear network" in line for line in lines)
    assert sum(line.endswith(("done, 1 of 2", "done, 2 of 2")) for line in lines) == 2
    assert "about " in lines[0]
    assert "2 workers" in lines[0]
    runs = json.loads((tmp_path / "two" / "checks.json").read_text())["provenance"]["runs"]
    assert [run.split("-")[0] for run in runs] == ["stabilization", "collapse"]
    assert "report:" in out


def at_work(root):
    """Wait until two cells are being run; their locks."""
    for _ in range(1200):
        logs = list(root.glob("*/log.jsonl"))
        if len(logs) == 2 and all(log.read_text() for log in logs):  # the proof is done, SGD goes on
            return [log.parent / "lock" for log in logs]
        time.sleep(0.1)
    raise AssertionError("two cells were not begun in two minutes")


def free(lock):
    """Whether nobody works on a run any more, waiting a little."""
    for _ in range(200):
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
                continue
            return True
    return False


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGKILL))],
)
def test_workers_end_with_their_command(tmp_path, number):
    """SIGTERM goes to the command alone, SIGINT to the whole group as a terminal sends it, SIGKILL is not answered."""
    process = command(LONG, tmp_path, start_new_session=True)
    locks = at_work(tmp_path)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    if number != signal.SIGKILL:
        assert "the same command goes on from there" in said
        assert "Traceback" not in said
    assert all(free(lock) for lock in locks)


def test_a_suite_that_breaks_is_named_and_the_others_are_reported(tmp_path, monkeypatch, capsys):
    import validation.run_directory as directory

    honest = directory.run_suite

    def sometimes(suite, *rest):
        if suite == "collapse":
            raise RuntimeError("it broke")
        return honest(suite, *rest)

    monkeypatch.setattr(directory, "run_suite", sometimes)
    assert main([*PAIR, "--workers", "1", "--out", str(tmp_path)]) == 3
    printed = capsys.readouterr()
    assert "failed: collapse-" in printed.out
    assert "RuntimeError: it broke" in printed.out
    assert "15 checks" in printed.out
    assert (tmp_path / "report.html").exists()
    assert "Traceback" in printed.err  # a mistake of ours, not of the settings


def test_settings_that_a_suite_cannot_use_stop_the_command(tmp_path, capsys):
    arguments = ["validate", "diagonal", "stabilization", "--diagonal.table", "nowhere.csv", "--diagonal.target", "y"]
    assert main([*arguments, "--workers", "1", "--seeds", "2", "--out", str(tmp_path), "--quiet"]) == 2
    assert capsys.readouterr().err.count("valleydrift: ") == 1
    assert not list(tmp_path.glob(f"*/{MARK}"))


def test_torch_and_blas_have_one_thread_while_a_run_is_made(tmp_path, monkeypatch):
    from threadpoolctl import threadpool_info

    seen = []

    def look(*_, **__):
        blas = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
        seen.append((torch.get_num_threads(), blas, module.numba.get_num_threads()))
        raise ValueError("enough")

    before = torch.get_num_threads(), module.numba.get_num_threads()
    monkeypatch.setattr(module, "run_or_load", look)
    result = run_task(Task(str(tmp_path), "stabilization", RunSettings(), "cpu", threads=1))
    assert (result.fault, result.misused) == ("enough", True)
    assert seen == [(1, {1}, 1)]
    assert (torch.get_num_threads(), module.numba.get_num_threads()) == before


def test_a_gpu_gets_as_many_workers_as_its_memory_holds(monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 16)
    need = module.CONTEXT_MIB + COST["relu"][1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(3.5 * need / 0.9) * 2**20, 2**40))
    assert workers_for(0, ["relu"] * 40, torch.device("cuda")) == 3
    assert workers_for(0, ["relu"] * 2, torch.device("cuda")) == 2
    assert workers_for(8, ["relu"] * 40, torch.device("cuda")) == 8
    assert workers_for(0, ["relu"] * 40, torch.device("cpu")) == 16
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20, 2**40))
    assert workers_for(0, ["relu"] * 40, torch.device("cuda")) == 1


def test_a_number_of_workers_that_is_none(capsys):
    with pytest.raises(SettingsError, match="choose 1 or more"):
        workers_for(-1, ["relu"], torch.device("cpu"))
    for engine in ([], ["--engine", "slurm"]):
        assert main(["sweep", "stabilization", "--steps", "10,20", "--workers", "-2", *engine]) == 2
    assert main(["validate", "stabilization", "--workers", "-2"]) == 2
    assert main(["validate", "stabilization", "--workers", "two"]) == 2
    assert capsys.readouterr().err.count("valleydrift: ") == 4


def test_the_estimate_is_the_longest_of_the_workers(monkeypatch):
    for name, cost in zip(SUITES, [(60, 1000), (50, 500), (30, 500), (10, 100)], strict=False):
        monkeypatch.setitem(COST, name, cost)
    four = list(SUITES)[:4]
    assert estimate(four, 32, 1).startswith("about 2 min on one worker and 1.0 GiB")  # 150 s
    assert estimate(four, 32, 2).startswith("about 80 s on 2 workers and 1.5 GiB")  # 60 + 10, 50 + 30
    assert estimate(four, 64, 4).startswith("about 2 min on 4 workers and 4.1 GiB")


def test_results_come_in_the_order_of_the_tasks(monkeypatch):
    def backwards(pending, tasks, workers, scheduler):
        yield from ((number, TaskResult(tasks[number].suite, True)) for number in reversed(pending))

    monkeypatch.setattr(module, "_local", backwards)
    settings = RunSettings(stabilization=StabilizationSettings())
    told, tasks = [], [Task("", name, settings, "cpu") for name in SUITES]
    results = run_tasks(tasks, told=lambda number, result: told.append(number))
    assert [result.name for result in results] == list(SUITES)
    assert told == list(reversed(range(len(SUITES))))
