"""Long stages of an unfinished run: kept, read back as they were by the same code alone, gone when the run is done."""

import json
import signal
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import xarray as xr

from theory.diagonal import DiagonalState
from theory.trajectory import Series, Trajectory
from validation import run_directory, stages, store
from validation.check import Check, RivalOutcome, Verdict
from validation.run_directory import MARK, STAGES, run_name, run_or_load
from validation.settings import RunSettings, SettingsError
from validation.stages import Stages
from validation.suite import Outcome, Progress

CPU = torch.device("cpu")
CHECK = Check(
    "s", "c", "source", "set", "x", 1.0, 0.1, 0.0, 1.0, 0.1, 3, 0, 0.1, Verdict.AGREES, Verdict.DISAGREES,
    (RivalOutcome("half", 0.5, True),),
)  # fmt: skip


def leaves():
    """All that suites leave: trajectories, checks, series as arrays of several kinds."""
    draws = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = DiagonalState(draws, draws.T.contiguous(), draws.long(), draws.long())
    run = Trajectory({"loss": Series(torch.arange(4), draws)}, state, torch.tensor([-1, 2]), ("seed",))
    arrays = {"a": np.arange(3.0), "b": np.array([True]), "c": np.array(["x", "yz"]), "d": np.float64(0.1)}
    return run, [CHECK], {"series": (("time",), arrays), "names": ["p", "q"], "at": 3, "seen": None}


def same(left, right):
    (run, checks, data), (other, others, more) = left, right
    assert checks == others
    assert isinstance(others[0].verdict, Verdict)
    assert torch.equal(run["loss"].values, other["loss"].values)
    assert torch.equal(run.final.b, other.final.b)
    assert run.final.b.stride() == other.final.b.stride()
    assert run.dims == other.dims
    for name, array in data["series"][1].items():
        assert np.array_equal(array, more["series"][1][name])
        assert np.asarray(array).dtype == np.asarray(more["series"][1][name]).dtype
    assert {**data, "series": 0} == {**more, "series": 0}


def never():
    raise AssertionError("it was done again")


def test_what_is_kept_is_read_back_bit_for_bit(tmp_path):
    first = Stages(tmp_path / "s", "code")("one", leaves)
    again = Stages(tmp_path / "s", "code")("one", never)
    same(first, again)


def test_other_code_does_not_use_it(tmp_path):
    Stages(tmp_path / "s", "code")("one", lambda: 1)
    assert Stages(tmp_path / "s", "other code")("one", lambda: 2) == 2
    assert Stages(tmp_path / "s", "other code")("one", never) == 2


@pytest.mark.parametrize("damage", ["truncated", "one byte", "empty"])
def test_a_damaged_stage_is_named_and_done_again(tmp_path, damage):
    Stages(tmp_path / "s", "code")("one", leaves)
    (path,) = (tmp_path / "s").iterdir()
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-40], "one byte": data[:-40] + b"#" + data[-39:], "empty": b""}[damage])
    said = []
    same(leaves(), Stages(tmp_path / "s", "code", said.append)("one", leaves))
    assert len(said) == 1
    assert "'one'" in said[0]
    assert "damaged" in said[0]
    same(leaves(), Stages(tmp_path / "s", "code")("one", never))


@dataclass(frozen=True)
class Elsewhere:
    """A record of another package."""

    x: int = 0


def test_only_records_of_this_package_are_read(tmp_path):
    Stages(tmp_path / "s", "code")("one", Elsewhere)
    said = []
    assert Stages(tmp_path / "s", "code", said.append)("one", lambda: 5) == 5
    assert "cannot be read" in said[0]


def test_a_name_is_used_once(tmp_path):
    kept = Stages(tmp_path / "s", "code")
    kept("one", lambda: 1)
    with pytest.raises(ValueError, match="a name of its own"):
        kept("one", lambda: 2)


def test_a_stage_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stages, "replacing", full)
    with pytest.raises(SettingsError, match="No space left on device"):
        Stages(tmp_path / "s", "code")("one", lambda: 1)


def test_progress_without_a_store_keeps_nothing():
    progress, calls = Progress("quiet"), []
    for _ in range(2):
        progress.kept("one", lambda: calls.append(1))
    assert calls == [1, 1]


class Suite:
    """Three stages; ends after ``stop`` of them as a killed process does."""

    def __init__(self):
        self.stop, self.done = 0, []

    def __call__(self, suite, settings, device, progress):
        values = []
        for name in ("first", "second", "third"):
            if len(values) == self.stop:
                raise KeyboardInterrupt
            progress(f"stage {name}")
            values.append(progress.kept(name, lambda name=name: self.work(name)))
        progress.close()
        return Outcome([CHECK], [], xr.Dataset({"x": ("at", torch.stack(values).numpy())}))

    def work(self, name):
        self.done.append(name)
        return torch.tensor(float(len(name)) / 3)


@pytest.fixture
def suite(monkeypatch):
    made = Suite()
    monkeypatch.setattr(run_directory, "run_suite", made)
    return made


def test_a_run_that_was_stopped_goes_on_after_its_last_stage(tmp_path, suite, capsys):
    folder = tmp_path / run_name("stabilization", RunSettings(), CPU)
    for suite.stop in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run_or_load(tmp_path, "stabilization", RunSettings(), CPU, mode="quiet")
        assert not (folder / MARK).exists()
    suite.stop = 4
    (folder / STAGES / ".half.pt.99").write_bytes(b"half")
    saved, fresh = run_or_load(tmp_path, "stabilization", RunSettings(), CPU)
    assert fresh
    assert suite.done == ["first", "second", "third"]
    assert not (folder / STAGES).exists()
    assert not list(folder.glob("earlier-*"))  # nothing but a log was there, and it goes on
    logged = [json.loads(line)["stage"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert logged == ["stage first", *(f"stage {name}" for name in ("first", "second", "third"))]  # none but the ended
    suite.done.clear()
    whole, _ = run_or_load(tmp_path / "whole", "stabilization", RunSettings(), CPU, mode="quiet")
    assert np.array_equal(whole.series["x"].values, saved.series["x"].values)


def test_fresh_begins_again(tmp_path, suite):
    suite.stop = 2
    with pytest.raises(KeyboardInterrupt):
        run_or_load(tmp_path, "stabilization", RunSettings(), CPU, mode="quiet")
    suite.stop = 4
    run_or_load(tmp_path, "stabilization", RunSettings(), CPU, mode="quiet", fresh=True)
    assert suite.done == ["first", "second", "first", "second", "third"]


def test_how_a_suite_failed_is_in_the_log(tmp_path, monkeypatch):
    def broken(suite, settings, device, progress):
        progress("the stage")
        raise RuntimeError("it broke")

    monkeypatch.setattr(run_directory, "run_suite", broken)
    with pytest.raises(RuntimeError):
        run_or_load(tmp_path, "stabilization", RunSettings(), CPU, mode="quiet")
    (log,) = tmp_path.glob("*/log.jsonl")
    event = json.loads(log.read_text().splitlines()[-1])
    assert event["stage"] == "the stage"
    assert "RuntimeError: it broke" in event["fault"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_a_write_is_done_whichever_thread_gets_it(number):
    """Another thread, in which the signal is not blocked, is there to take it."""
    reached = []

    def stop(*_):
        raise KeyboardInterrupt

    def write():
        with store.uninterrupted():
            signal.pthread_kill(other.ident, number)
            time.sleep(0.05)
            reached.append("the end of the write")

    before = signal.signal(number, stop)
    other = threading.Thread(target=time.sleep, args=(0.3,))
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            write()
        assert reached
        assert signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
        other.join()
