"""The command: what it writes, its exit status, and one sentence for whatever it cannot use."""

import csv
import json
import re
import resource
import subprocess
import sys

import pytest
import torch
import xarray as xr

from validation.cli import main

SMALL = ["--stabilization.steps", "300", "--stabilization.samples", "8", "--seeds", "4"]
SCHEMA = {
    "suite", "claim", "source", "setting", "observable", "predicted", "predicted_error", "null", "measured",
    "standard_error", "seeds", "diverged", "allowed", "expected", "verdict", "rivals",
}  # fmt: skip


def run_of(out):
    """The one run directory below ``out``."""
    (mark,) = out.glob("*/DONE")
    return mark.parent


def test_a_run_leaves_everything_it_says(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["validate", "stabilization", *SMALL, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "agrees" in printed.out
    assert "report:" in printed.out
    assert "proof of Prop. 2" in printed.err
    saved = json.loads((out / "checks.json").read_text(encoding="utf-8"))
    run = run_of(out)
    assert [run.name] == saved["provenance"]["runs"]
    assert json.loads((run / "settings.json").read_text())["settings"]["steps"] == 300
    own = json.loads((run / "checks.json").read_text(encoding="utf-8"))
    assert own["provenance"]["settings"]["stabilization"]["steps"] == 300
    assert own["checks"] == saved["checks"]
    assert saved["checks"]
    for check in saved["checks"]:
        assert set(check) >= SCHEMA
        assert check["verdict"] == check["expected"]
        assert all(set(rival) == {"name", "predicted", "rejected"} for rival in check["rivals"])
    with open(out / "checks.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(saved["checks"])
    assert float(rows[0]["measured"]) == saved["checks"][0]["measured"]
    series = xr.load_dataset(run / "results.nc")
    assert series["stabilization theta"].dims == ("stabilization_step", "eta", "seed")
    assert "stabilization" in series.attrs["provenance"]
    stages = [json.loads(line)["stage"] for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert stages[0] == "proof of Prop. 2 in exact arithmetic"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == len({check["claim"] for check in saved["checks"]}) + 1
    assert (out / "report.md").read_text(encoding="utf-8").count("\n") == len(saved["checks"]) + 2
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_unexpected_verdicts_give_status_1(tmp_path, monkeypatch):
    """Break the dynamics (a gradient 5 % too small) and the suite must notice."""
    import validation.stabilization as suite

    honest = suite.sgd_path
    monkeypatch.setattr(suite, "sgd_path", lambda x, star, start, etas, *rest: honest(
        x, star, start, [0.93 * eta for eta in etas], *rest))  # fmt: skip
    assert main(["validate", "stabilization", *SMALL, "--out", str(tmp_path), "--quiet"]) == 1


def test_settings_file(tmp_path):
    config = tmp_path / "mine.toml"
    config.write_text('suites = ["stabilization"]\nseeds = 3\n[stabilization]\nsteps = 250\nsamples = 8\n')
    out = tmp_path / "run"
    arguments = ["validate", "--config", str(config), "--out", str(out), "--seeds", "4", "--quiet"]
    assert main(arguments) == 0
    settings = json.loads((run_of(out) / "checks.json").read_text())["provenance"]["settings"]
    assert (settings["seeds"], settings["stabilization"]["steps"]) == (4, 250)  # options override the file


# Command lines with {tmp} for the test's folder, and what the one sentence says.
CASES = {
    "unknown suite": ("validate diagnal", "did you mean 'diagonal'"),
    "unknown command": ("validat", "did you mean 'validate'"),
    "unknown option": ("validate --sedes 3", "did you mean '--seeds'"),
    "unknown size": ("validate --size quik", "did you mean 'quick'"),
    "unknown device": ("validate --device tpu", "did you mean 'cpu'"),
    "absent device": ("validate --device cuda", "choose --device cpu"),
    "negative step": ("validate diagonal --diagonal.step-sizes 0.1 -0.2", "positive"),
    "zero step": ("validate diagonal --diagonal.large-step 0", "positive"),
    "n beyond d": ("validate diagonal --diagonal.n 300", "needs n < d"),
    "nonzero beyond d": ("validate diagonal --diagonal.nonzero 300", "nonzero <= d"),
    "negative d": ("validate diagonal --diagonal.d -5", "positive"),
    "not a number": ("validate --seeds many", "not a whole number"),
    "one seed": ("validate --seeds 1", "choose 2 or more"),
    "NaN in a table": (
        "validate diagonal --diagonal.table {tmp}/table.csv --diagonal.target y --diagonal.table-rows 2", "NaN"),
    "no such table": ("validate diagonal --diagonal.table nowhere.csv --diagonal.target y", "no table at"),
    "table without target": ("validate --diagonal.table {tmp}/table.csv", "give both"),
    "output is a file": ("validate --out {tmp}/file", "choose another with --out"),
    "output below a file": ("validate --out {tmp}/file/x", "choose another with --out"),
    "output not writable": ("validate --out /proc/valleydrift", "choose another with --out"),
    "missing option value": ("validate --seeds", "expected one argument"),
    "spread too wide": ("validate --stabilization.spread 0.5", "0.118"),
    "unknown model": ("explore quartic-wel", "did you mean 'quartic-well'"),
    "unknown parameter": ("explore logistic --sigm 1", "did you mean '--sigma'"),
    "negative dt": ("explore logistic --dt -1", "positive"),
    "one path": ("explore logistic --paths 1", "2 or more"),
    "Milstein on general noise": ("explore diagonal --scheme milstein --out {tmp}/x", "choose EulerMaruyama"),
    "batch too large": ("explore diagonal --batch-size 0 --out {tmp}/x", "1 or more"),
    "no settings file": ("validate --config {tmp}/absent.toml", "cannot be read"),
}  # fmt: skip
FILES = {
    "unknown key": ("sedes = 3", "did you mean 'seeds'"),
    "unknown nested key": ("[diagonal]\nnonzer = 3", "did you mean 'diagonal.nonzero'"),
    "unknown table": ("[stabilisation]\nsteps = 3", "no setting 'stabilisation"),
    "suite as a number": ("diagonal = 3", "table .diagonal."),
    "broken TOML": ("seeds = [", "not TOML"),
    "wrong kind": ('seeds = "many"', "whole number"),
    "fraction of a seed": ("seeds = 2.5", "whole number"),
    "list of suites gone wrong": ("suites = [3]", "wrong kind"),
}


@pytest.mark.parametrize("case", [*CASES, *FILES])
def test_bad_input_is_one_sentence_and_status_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("a,b,y\n1,2,3\n4,nan,5\n6,7,8\n")
    (tmp_path / "file").write_text("kept")
    if case in FILES:
        text, sentence = FILES[case]
        (tmp_path / "bad.toml").write_text(text)
        command = "validate --config {tmp}/bad.toml"
    else:
        command, sentence = CASES[case]
    assert main([word.format(tmp=tmp_path) for word in command.split()]) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("valleydrift: ")]
    assert len(lines) == 1
    assert re.search(sentence, lines[0]), lines[0]
    assert "Traceback" not in said.err
    assert (tmp_path / "file").read_text() == "kept"


def test_list_and_help_do_not_import_torch():
    code = "import sys; from validation.cli import main; main(['list']); assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "diagonal" in shown.stdout
    assert "stabilization" in shown.stdout
    shown = subprocess.run(
        [sys.executable, "-m", "validation.cli", "validate", "--help"], capture_output=True, text=True, check=True
    )
    assert "--diagonal.step-sizes" in shown.stdout
    assert "positive" not in shown.stderr


def test_help_comes_in_half_a_second():
    """CPU seconds, the least of three: the clock on the wall is the machine's."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "validation.cli", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(taken) < 0.5


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("quartic-well", ["--zeta", "2.5"]), ("ornstein-uhlenbeck", ["--scheme", "platen"]), ("logistic", []),
        ("geometric-brownian-motion", []), ("diagonal", ["--n", "8", "--d", "12", "--nonzero", "3"]),
    ],
)  # fmt: skip
def test_explore(model, options, tmp_path, capsys):
    command = ["explore", model, "--time", "1", "--dt", "0.05", "--paths", "50", "--out", str(tmp_path), *options]
    assert main(command) == 0
    assert "mean at the end" in capsys.readouterr().out
    saved = json.loads((tmp_path / "exploration.json").read_text())
    assert saved["provenance"]["settings"]["paths"] == 50
    if model == "quartic-well":
        assert saved["found"]["Lyapunov exponent at 0"] == pytest.approx(1.5 - 2.5**2 / 2)
    with open(tmp_path / "exploration.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["time"]) == pytest.approx(1.0)
    assert float(rows[-1]["quantile 0.05"]) <= float(rows[-1]["quantile 0.95"])
    assert (tmp_path / "exploration.png").stat().st_size > 5000
    first = (tmp_path / "exploration.csv").read_bytes()
    assert main([*command, "--seed", "1"]) == 0
    assert (tmp_path / "earlier-1" / "exploration.csv").read_bytes() == first
    assert (tmp_path / "exploration.csv").read_bytes() != first


@pytest.mark.slow
def test_the_quick_suites_come_out_as_expected(tmp_path):
    assert main(["validate", "--out", str(tmp_path), "--quiet"]) == 0
    checks = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert {check["suite"] for check in checks} == {"diagonal", "stabilization"}
    assert {check["verdict"] for check in checks} == {"agrees", "disagrees"}
