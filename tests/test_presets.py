"""Presets: every one loads, is what the papers ran, and runs what it is named after."""

import json

import pytest

from validation.cli import main
from validation.options import PRESETS, presets, settings_from
from validation.settings import BouncingSettings, CollapseSettings, ReluSettings, RunSettings, SettingsError
from validation.suite import SUITES


@pytest.mark.parametrize("name", presets())
def test_every_preset_resolves(name, tmp_path, capsys):
    settings = settings_from({}, None, preset=name)
    assert len(settings.suites) == 1
    assert set(settings.suites) <= set(SUITES)
    assert settings != RunSettings(suites=settings.suites)
    assert (PRESETS / f"{name}.toml").read_text(encoding="utf-8").startswith("# ")  # says which experiment it is
    assert main(["validate", "--preset", name, "--print-config"]) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert settings_from({}, str(printed)) == settings


def test_the_papers_small_experiments_are_there():
    found = {name: settings_from({}, None, preset=name) for name in presets()}
    assert len(found) >= 10
    plane = found["avpf-diagonal-2d"].diagonal
    assert (plane.n, plane.d, plane.nonzero, plane.steps) == (20, 30, 3, 10_001)
    assert (plane.large_step, plane.decay_at, plane.decay_by) == (0.6, (0.5,), (3.0,))
    relu = {found[f"avpf-relu-{name}"].relu.experiments for name in ("two-layer", "three-layer", "1d")}
    assert relu == {("two-layer",), ("three-layer",), ("1d",)}
    assert found["ckyg-neuron"].collapse.experiments == ("neuron",)
    assert found["ckyg-quartic-well"].collapse.mu == 1.5
    assert found["ckyg-teacher-student"].collapse.sigmas == (5.0, 10.0, 15.0, 20.0)
    assert 5 * found["ckyg-teacher-student"].replicates >= 256
    assert 16 * found["ckyg-quartic-well"].replicates >= 1000
    assert found["jkbfbs-sharpness"].bouncing.experiments == ("sharpness",)


@pytest.mark.parametrize("kind", [BouncingSettings, CollapseSettings, ReluSettings])
def test_experiments_that_do_not_exist_are_said(kind):
    with pytest.raises(SettingsError, match="there is no experiment 'nothing': choose among"):
        kind(experiments=("nothing",))
    with pytest.raises(SettingsError, match="must not be empty"):
        kind(experiments=())


@pytest.mark.slow
def test_a_preset_runs_its_experiment_alone(tmp_path):
    assert main(["validate", "--preset", "ckyg-toy", "--out", str(tmp_path), "--quiet"]) == 0
    checks = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert checks
    assert all("toy" in check["claim"] or "GELU" in check["claim"] or "units" in check["claim"] for check in checks)
