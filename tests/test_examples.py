"""The examples run as they are, and show what they say."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_own_model():
    script = ROOT / "examples" / "own_model.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 40
    shown = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "kept by gradient flow: True" in shown.stdout
    assert r"\mathrm{d}" in shown.stdout
    found = re.findall(r"(SGD|SDE): .*: (\S+) ± (\S+), (\d+)/64", shown.stdout)
    (_, real, real_error, alive), (_, simulated, error, alive_sde) = found
    assert alive == "64"
    assert int(alive_sde) >= 60  # the SDE may lose a path where SGD loses none
    assert abs(float(real)) > 20 * float(real_error)  # there is an effect
    # Per step the law is exact; what differs is the course of the residuals, to an order in η the SDE drops.
    allowed = 4 * (float(real_error) ** 2 + float(error) ** 2) ** 0.5 + 0.1 * abs(float(real))
    assert abs(float(real) - float(simulated)) < allowed


def test_train_images(tmp_path, monkeypatch, capsys):
    script = ROOT / "examples" / "train_images.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", "40", "--seeds", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # forty steps pay no compilation
    runpy.run_path(str(script))
    shown = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"step \d+: test loss (\S+),", shown)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert len(re.findall(r"block \S+: sparsity coefficient 0\.\d+, without", shown)) >= 2
    assert (tmp_path / "seed-0.pt").exists()


def test_nudged_sgd(capsys, monkeypatch):
    """Two looks at the curvature: the sharpest directions make a difference that random ones do not."""
    script = ROOT / "examples" / "nudged_sgd.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 70
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", "150", "--seeds", "1", "--curvature-images", "300"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path(str(script))
    found = re.findall(r"seed 0, ([^:]+): loss \S+, λ₁ (\S+), test accuracy", capsys.readouterr().out)
    sharp = {label: float(top) for label, top in found}
    assert [*sharp] == ["SGD", "Nudged-SGD", "random directions"]
    assert abs(sharp["Nudged-SGD"] / sharp["SGD"] - 1) > 3 * abs(sharp["random directions"] / sharp["SGD"] - 1)
