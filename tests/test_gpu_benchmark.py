"""The GPU benchmark's pieces run and agree at tiny size; nothing that is not measured on a GPU is ever kept."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The benchmark as a module, its results in a folder of the test's own."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu
    import measure

    for module in (gpu, measure):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return gpu


@pytest.mark.parametrize("name", ["noise", "diagonal", "label_noise_sde", "relu", "well"])
def test_a_piece_runs_agrees_and_keeps_nothing_of_a_trial(gpu, monkeypatch, capsys, tmp_path, name):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--device", "cpu", "--piece", name])
    gpu.main()
    shown = capsys.readouterr().out
    assert f"{name}: " in shown
    assert "agrees with" in shown
    assert not list(tmp_path.iterdir())


def test_a_piece_that_disagrees_stops(gpu, monkeypatch):
    wrong = gpu.fill_rows
    monkeypatch.setattr(gpu, "fill_rows", lambda key, first, out: wrong(key, first + 1, out))
    with pytest.raises(AssertionError, match="not the CPU's"):
        gpu.PIECES["noise"](gpu.Bench(gpu.torch.device("cpu"), True, 1))


def test_finished_pieces_are_skipped_and_others_kept(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "PIECES", {})
    calls = []

    @gpu.piece
    def another(bench):
        """A piece added by one function."""
        calls.append(bench)
        return gpu.Found([gpu.row("work", "peer", [2.0], [1.0], (1.0, 1.0))], notes=["a note"])

    bench = gpu.Bench(gpu.torch.device("cuda"), False, 1)
    for fresh in (False, False, True):
        gpu.measure_pieces(["another"], bench, fresh)
    assert len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-another.json"]
    assert '"a note"' in (tmp_path / "gpu-another.json").read_text(encoding="utf-8")
    assert "done already" in capsys.readouterr().out


def test_fractions_are_limits_over_what_was_taken(gpu):
    bench = gpu.Bench(gpu.torch.device("cpu"), True, 1)
    found = gpu.reached(bench, "loop", "step", 2.0, {"memory, B/s": 100.0, "of no known ceiling": 1.0})
    assert found["limits"] == {"memory, B/s": 100.0 / found["ceilings"]["memory, B/s"]}
    assert found["fraction"] == {"memory, B/s": found["limits"]["memory, B/s"] / 2.0}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--device", "cpu"], "only a CUDA device is measured"), (["--piece", "all"], "invalid choice")],
)
def test_mistakes_are_said(gpu, monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
