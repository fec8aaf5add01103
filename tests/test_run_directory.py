"""Run directories: done once, redone when damaged or made by other code, nothing lost, one process at a time."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from validation import run_directory
from validation.cli import main
from validation.run_directory import FILES, MARK, load, run_name, run_or_load
from validation.settings import RunSettings, SettingsError, StabilizationSettings
from validation.suite import Progress

SETTINGS = RunSettings(seeds=4, stabilization=StabilizationSettings(steps=200, samples=8))
CPU = torch.device("cpu")


def run(root, **more):
    return run_or_load(root, "stabilization", SETTINGS, CPU, mode="quiet", **more)


def content(saved):
    return [repr(check) for check in saved.checks], {n: v.values.tobytes() for n, v in saved.series.items()}


@pytest.fixture
def done(tmp_path):
    saved, fresh = run(tmp_path)
    assert fresh
    return saved


def test_a_run_is_done_once_and_reads_back_as_it_was(done, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("it ran twice")

    monkeypatch.setattr(run_directory, "run_suite", never)
    again, fresh = run(tmp_path)
    assert not fresh
    assert content(again) == content(done)
    assert {path.name for path in done.folder.iterdir()} == {*FILES, MARK, "lock"}


def test_the_name_depends_on_what_decides_the_results_alone():
    name = run_name("stabilization", SETTINGS, CPU)
    assert name == run_name(
        "stabilization", RunSettings(seeds=4, out="elsewhere", stabilization=SETTINGS.stabilization), CPU
    )
    others = [RunSettings(seeds=5, stabilization=SETTINGS.stabilization), RunSettings(seeds=4)]
    assert len({name, *(run_name("stabilization", other, CPU) for other in others)}) == 3
    assert name != run_name("stabilization", SETTINGS, torch.device("cuda"))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "gone", "one byte"])
def test_damage_is_named_set_aside_and_redone(done, tmp_path, file, damage, capsys):
    path = done.folder / file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else data[:-3] + b"#" + data[-2:])
    again, fresh = run_or_load(tmp_path, "stabilization", SETTINGS, CPU)
    assert fresh
    assert content(again) == content(done)
    said = capsys.readouterr().err
    assert file in said
    assert "earlier-1" in said
    kept = done.folder / "earlier-1" / file
    assert not kept.exists() if damage == "gone" else kept.read_bytes() != data


def test_a_run_without_its_mark_is_redone(done, tmp_path):
    (done.folder / MARK).unlink()
    (done.folder / ".results.nc.99").write_bytes(b"half")
    again, fresh = run(tmp_path)
    assert fresh
    assert content(again) == content(done)
    assert not (done.folder / ".results.nc.99").exists()


def test_other_code_and_fresh_run_again_and_keep_what_was(done, tmp_path, monkeypatch):
    first = (done.folder / "checks.json").read_bytes()
    assert run(tmp_path, fresh=True)[1]
    assert (done.folder / "earlier-1" / "checks.json").read_bytes() == first
    monkeypatch.setattr(run_directory, "code_digest", lambda: "other")
    assert run(tmp_path)[1]
    assert (done.folder / "earlier-2" / MARK).exists()
    assert not run(tmp_path)[1]


def test_a_later_format_is_refused_and_kept(done, tmp_path):
    mark = json.loads((done.folder / MARK).read_text())
    (done.folder / MARK).write_text(json.dumps(mark | {"format": 99}))
    with pytest.raises(SettingsError, match="update valleydrift"):
        run(tmp_path)
    assert json.loads((done.folder / MARK).read_text())["format"] == 99


def test_an_earlier_format_is_read(done, tmp_path, capsys):
    """Format 1 had the same files under their mark and no digest of the code: it is read, and redone by a new run."""
    text = json.loads((done.folder / "checks.json").read_text())
    del text["provenance"]["code"], text["provenance"]["cpu_seconds"]
    (done.folder / "checks.json").write_text(json.dumps(text))
    digests = {name: hashlib.sha256((done.folder / name).read_bytes()).hexdigest() for name in FILES}
    (done.folder / MARK).write_text(json.dumps({"format": 1, "sha256": digests}))
    assert content(load(done.folder)) == content(done)
    assert main(["report", str(done.folder), "--out", str(tmp_path / "report")]) == 0
    again, fresh = run_or_load(tmp_path, "stabilization", SETTINGS, CPU)
    assert fresh
    assert content(again) == content(done)
    assert "made by other code" in capsys.readouterr().err


def test_two_processes_do_not_share_a_run(tmp_path):
    folder = tmp_path / run_name("stabilization", SETTINGS, CPU)
    folder.mkdir()
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); f.truncate(0); "
        "f.write('4711'); f.flush(); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(folder / "lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SettingsError, match="process 4711 works on"):
            run(tmp_path)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert run(tmp_path)[1]  # the lock went with the process


def test_a_full_disk_is_one_sentence_and_loses_nothing(done, tmp_path, capsys):
    """A file size limit stands for the disk: every write beyond it fails in the middle, as on a full one."""
    before = {path: path.read_bytes() for path in done.folder.iterdir()}
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import validation.commands; "
        "from validation.cli import main; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["validate", "stabilization", "--stabilization.steps", "200", "--stabilization.samples", "8"]
    arguments += ["--out", str(tmp_path), "--quiet", "--seeds"]
    ended = subprocess.run([sys.executable, "-c", code, *arguments, "5"], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("valleydrift: ") == 1
    assert "free room there" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert {path: path.read_bytes() for path in done.folder.iterdir()} == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2000
    assert main([*arguments, "5"]) == 0
    assert len(list(tmp_path.glob(f"*/{MARK}"))) == 2


def test_a_folder_that_cannot_be_written_is_one_sentence(done, tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(run_directory.store, "write_text", read_only)
    with pytest.raises(SettingsError, match="Read-only file system"):
        run(tmp_path, fresh=True)
    monkeypatch.undo()
    again, fresh = run(tmp_path)
    assert fresh  # what was there had been set aside
    assert (done.folder / "earlier-1" / MARK).exists()
    assert content(again) == content(done)


def test_a_log_or_a_lock_that_cannot_be_written_is_one_sentence(tmp_path):
    folder = tmp_path / run_name("stabilization", SETTINGS, CPU)
    (folder / "lock").mkdir(parents=True)  # opening it fails, as on a file system that is read-only
    with pytest.raises(SettingsError, match="could not be written to"):
        run(tmp_path)
    (tmp_path / "log").mkdir()
    progress = Progress("quiet", tmp_path / "log" / "log.jsonl")
    progress("a stage")
    (tmp_path / "log").rename(tmp_path / "gone")
    with pytest.raises(SettingsError, match="could not be written to"):
        progress.close()


def test_termination_says_how_to_go_on(tmp_path):
    arguments = ["validate", "stabilization", "--stabilization.steps", "2000000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "validation.cli", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    seen = ""
    while "SGD in one dimension" not in seen:
        seen += process.stderr.read(1)
    time.sleep(0.2)
    process.terminate()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 143
    assert "the same command goes on from there" in said
    assert not list(tmp_path.glob(f"*/{MARK}"))


def test_report_and_figures_come_from_what_is_saved(done, tmp_path, capsys):
    root = tmp_path / "elsewhere"
    shutil.copytree(done.folder, root / done.folder.name)
    assert main(["report", str(root / done.folder.name), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert (
        main(["figures", "bouncing-1d", "--from", str(root), "--out", str(tmp_path / "f"), "--format", "svg", "png"])
        == 0
    )
    rows = (tmp_path / "f" / "bouncing-1d.csv").read_text().splitlines()
    assert rows[0] == "variable,stabilization_step,eta,seed,value"
    assert len(rows) == 1 + load(done.folder).series["stabilization theta"].size
    assert main(["report", str(root), "--against", str(done.folder)]) == 0
    assert "0 differences" in capsys.readouterr().out
    (root / done.folder.name / "results.nc").write_bytes(b"nothing")
    assert main(["figures", "bouncing-1d", "--from", str(root), "--out", str(tmp_path / "f")]) == 2
    assert "results.nc is not what was written" in capsys.readouterr().err


def test_a_comparison_names_what_differs(done, tmp_path, capsys):
    text = json.loads((done.folder / "checks.json").read_text())
    text["checks"][1]["measured"] += 0.5
    text["checks"][1]["verdict"] = "disagrees"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(text))
    assert main(["report", str(done.folder), "--against", str(other)]) == 0
    said = capsys.readouterr().out
    assert "1 differences" in said
    assert text["checks"][1]["claim"] in said


def test_settings_of_saved_runs_are_complete(done):
    saved = json.loads((done.folder / "settings.json").read_text())
    assert saved["seeds"] == 4
    assert saved["settings"]["steps"] == 200
    assert np.isfinite(done.origin["seconds"])
    assert os.path.basename(done.folder).startswith("stabilization-")
