"""The benchmarks' common form: ratios round by round, and tables from what was saved."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture
def measure(tmp_path, monkeypatch):
    path = Path(__file__).parent.parent / "benchmarks" / "measure.py"
    spec = importlib.util.spec_from_file_location("benchmark_measure", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_a_row_holds_ratios_of_rounds_and_both_checksums(measure):
    row = measure.row("work", "peer", [4.0, 9.0, 10.0], [1.0, 3.0, 2.0], (5.0, 5.5), "step")
    assert row["ratio"] == {"median": 4.0, "least": 3.0, "largest": 5.0}
    assert (row["peer, s"], row["here, s"]) == (9.0, 2.0)
    assert row["checksum"] == {"peer": 5.0, "here": 5.5}


def test_tables_are_made_of_what_was_saved(measure, tmp_path, capsys):
    measure.save("one", [measure.row("work", "peer", [3e-3], [1e-6], (1.0, 2.0), "step")])
    measure.save("ceilings", [], bandwidth=7)
    assert json.loads((tmp_path / "ceilings.json").read_text())["bandwidth"] == 7
    assert "bandwidth: 7" in capsys.readouterr().out
    assert "| work | peer | 3 ms a step | 1 µs a step | 3e+03 (3e+03–3e+03) | 1, 2 |" in measure.table(*measure.saved())
    readme = measure.readme_table()
    assert "| work (1 µs a step) | peer | 3e+03 (3e+03–3e+03) |" in readme
    assert readme.count("|---") == 3
