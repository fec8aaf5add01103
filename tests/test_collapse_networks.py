"""The networks of suite ``collapse``: what its runs hand over is what SGD did, and its figures need nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from nets.units import hidden_layers
from validation import collapse_networks, trained_units
from validation.check import Verdict
from validation.heatmaps import FIGURES
from validation.near_sets import NEAR, Setting, release

SHORT = Setting("sign", steps=40)


def test_a_release_starts_next_to_its_set_and_repeats():
    first, again = (release(SHORT, 6, 3, burn_in=20, every=10) for _ in range(2))
    assert torch.allclose(first.course[0].exp(), torch.full((6,), NEAR, dtype=torch.float64))
    assert torch.equal(first.course, again.course)
    assert torch.equal(first.change, first.course[-1] - first.course[0])
    assert first.steps.tolist() == [0, 10, 20, 30, 40]
    more = release(SHORT, 8, 3, burn_in=20, every=10)
    assert torch.allclose(more.change[:6], first.change, rtol=1e-10)  # a seed's run is its own


@pytest.mark.parametrize("setting", [SHORT, replace(SHORT, kind="pair", inputs=3, activation=nn.GELU)])
def test_terms_along_a_release_add_up_to_its_exact_steps(setting):
    """With rates at every step, drift + noise + dropped is the sum of one-step means of the realised change."""
    run = release(setting, 400, 1, burn_in=20, every=1)
    law = run.drift + run.noise + run.dropped
    gap = run.change - law
    assert run.finite.all()
    assert gap.mean().abs() < 4 * gap.std() / 400**0.5
    assert gap.std() < 2 * (run.trace.mean() ** 0.5)  # a martingale of the size that the covariance says


def test_window_sees_what_sgd_did():
    units, pairs = trained_units.growth_window(nn.Tanh, 3, 1, steps=20, every=10, burn_in=5, samples=12, width=4)
    assert units.realised.shape == (3, 4)
    assert pairs.realised.shape == (3, 3)
    for window in (units, pairs):
        assert (window.realised - window.exact).abs().max() < 0.5
        assert window.noise.abs().min() > 0


def test_a_start_is_a_function_of_the_seed():
    one, other = trained_units.conv_network(3), trained_units.conv_network(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        again = trained_units.conv_network(3)
    for (name, a), b, c in zip(one.named_parameters(), other.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name
        if a.ndim == 1:
            assert bool((a == (0.0 if name.endswith("bias") else 1.0)).all()), name


def test_label_noise_and_placing():
    module = trained_units.conv_network(0)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trained_units.train(module, 2, 0.1, 0)
    assert all((p.detach() != before[name]).any() for name, p in module.named_parameters())
    layers = hidden_layers(module)
    assert list(layers) == ["conv1", "conv2", "fc3"]
    assert layers["conv2"].norm == "batch"


def test_checks_that_must_hold_and_the_loop_they_hold_to():
    count = collapse_networks._counts(1)
    assert count.verdict == Verdict.AGREES
    chain = np.stack([np.cos(np.deg2rad([0, 15, 30])), np.sin(np.deg2rad([0, 15, 30]))], 1)
    assert collapse_networks.published_count(chain) == 2
    assert collapse_networks._invariance(2, 1).verdict == Verdict.AGREES


def test_a_wrong_growth_law_is_caught():
    run = release(replace(SHORT, steps=400, noise=3.0, inputs=8, kind="pair"), 256, 1, burn_in=20, every=20)
    right = collapse_networks._near_checks(SHORT, run)
    wrong = collapse_networks._near_checks(SHORT, replace(run, noise=run.noise / 2, dropped=run.dropped / 2))
    assert [check.verdict for check in right] == [Verdict.AGREES, Verdict.AGREES]
    assert [check.verdict for check in wrong] == [Verdict.DISAGREES, Verdict.DISAGREES]


def series():
    """Series of the right shape and names."""
    found, _ = collapse_networks._similarities(2, 1, 0)
    released = [(SHORT, release(SHORT, 4, 0, burn_in=5, every=10))]
    windows = trained_units.growth_window(nn.Tanh, 3, 1, steps=20, every=10, burn_in=5, samples=12, width=4)
    found |= collapse_networks._course(released) | collapse_networks._growth_series({"tanh": windows})
    return xr.Dataset(found)


def test_figures_are_drawn_from_saved_series_alone(tmp_path):
    series().to_netcdf(tmp_path / "series.nc")
    with xr.open_dataset(tmp_path / "series.nc") as saved:
        assert all(str(name).startswith("collapse") for name in (*saved.variables, *saved.dims))
        for name, figure in FIGURES.items():
            assert all(variable in saved for variable in figure.variables), name
            drawn = figure.draw(saved)
            assert len(drawn.axes) > 1
            drawn.savefig(tmp_path / f"{name}.png")
            assert (tmp_path / f"{name}.png").stat().st_size > 10_000
