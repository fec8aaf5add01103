"""Suite ``bouncing`` on problems where the laws are exact: it agrees there, and does not when theory is bent."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from nets.mlp import mlp
from nets.objective import SQUARED, FlatNet, Objective
from theory.problem import gaussian_sparse
from validation import bouncing_checks as claims
from validation.bouncing import CLAIMS, diagonal_checks, run
from validation.bouncing_diagonal import observe_diagonal
from validation.bouncing_figures import FIGURES
from validation.bouncing_orthogonal import orthogonal_checks
from validation.bouncing_runs import Setting, descended, leave_one_out, observe, trained
from validation.bouncing_series import dataset
from validation.check import Verdict
from validation.settings import BouncingSettings, RunSettings, SettingsError
from validation.suite import Progress

ROOT = 1


def regression(n):
    """Linear regression to class labels that inputs know nothing of: constant Hessian, residuals that stay."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (n,), generator=generator)
    return Objective(FlatNet(mlp((16, 3), nn.Tanh)), x, labels, SQUARED)


@pytest.fixture(scope="module")
def linear():
    return regression(96)


def window_of(objective, setting, runs=48, steps=216):
    (state,) = trained(objective, [setting], 300, ROOT)
    return observe(objective, setting, state, runs, 60, steps, 48, ROOT)


@pytest.fixture(scope="module")
def window(linear):
    return window_of(linear, Setting("linear", 0.8, 32))


def verdicts(checks):
    return {check.claim: check.verdict for check in checks}


def test_the_basis_and_the_noise_are_the_exact_ones(linear, window):
    inputs = torch.cat([linear.X.flatten(1), torch.ones(96, 1)], 1)
    values = torch.linalg.eigvalsh(inputs.T @ inputs / 96).flip(0).repeat_interleave(3)
    # A single start vector may miss a copy of a threefold eigenvalue.
    assert (window.curvature.unsqueeze(1) / values - 1).abs().amin(1).max() < 1e-3
    assert torch.allclose(window.curvature[:15], values[:15], rtol=1e-3)
    assert window.slip[0] > 1.2
    assert window.trace == pytest.approx(float(values.sum()), rel=0.1)
    assert window.outputs == 3
    assert torch.allclose(window.x.mean(1), torch.zeros(216, 48, dtype=torch.float64), atol=1e-9)
    at_floor = linear.values(window.origin.unsqueeze(0))[0]
    assert window.floor == pytest.approx(float(at_floor), rel=0.05)


def test_where_the_law_is_exact_every_claim_agrees_and_every_rival_falls(window):
    checks = [
        *claims.autocorrelation_checks(window), *claims.variance_checks(window), claims.excess_check(window),
        *claims.sde_checks(window),
    ]  # fmt: skip
    assert {check.claim for check in checks} >= {claims.VARIANCE.name, claims.EXCESS.name, claims.SDE_FAILS.name}
    for check in checks:
        assert check.verdict == Verdict.AGREES, check
    sides = claims.inside_and_outside_checks(window)
    assert all(check.as_expected for check in sides), sides
    assert Verdict.DISAGREES in verdicts(sides).values()


def autoregressive(window, slip, runs, steps, seed):
    """The window of replicas that obey the law exactly, x⁺ = (1-ηλ)x + Gaussian noise, from the stationary law."""
    generator = torch.Generator().manual_seed(seed)
    kicks = torch.randn(steps, runs, len(slip), generator=generator, dtype=torch.float64)
    rho, path = 1 - slip, [kicks[0] / (1 - (1 - slip).square()).sqrt()]
    for kick in kicks[1:]:
        path.append(rho * path[-1] + kick)
    x = torch.stack(path)
    x = (x - x.mean(1, keepdim=True)) * (runs / (runs - 1)) ** 0.5
    finite = torch.ones(runs, dtype=torch.bool)
    return replace(window, x=x, curvature=slip / window.setting.step_size, finite=finite)


def test_r_squared_is_free_of_what_few_replicas_add_to_it_and_its_error_is_right(window):
    """16 replicas x 200 steps: sampling noise alone makes 1 - R² = 0.009; leaving one out takes it away."""
    slip = torch.cat([torch.linspace(1.6, 0.3, 7), torch.linspace(0.25, 0.03, 17)]).double()
    rows, plain = [], []
    for seed in range(40):
        at = autoregressive(window, slip, 16, 200, seed)
        check = claims.autocorrelation_checks(at)[1]
        assert check.observable == "1 - R²"
        assert check.verdict == Verdict.AGREES
        rows.append((check.measured, check.standard_error))
        products, squares = (part.mean(0) for part in claims.autocorrelations(at))
        measured, predicted = products / squares, -slip / 2
        plain.append(float((measured - predicted).square().sum() / (measured - measured.mean()).square().sum()))
    value, error = torch.tensor(rows).T
    assert abs(value.mean()) < 4 * value.std() / 40**0.5 + 1e-3  # what is left is of second order in 1/R
    assert min(plain) > 0
    assert np.mean(plain) > 5 * abs(value.mean())
    # z-scores have unit variance: χ² of 40, 4 sigma, and a tenth for the error of the errors.
    assert abs(float((value / error).square().mean()) - 1) < 4 * (2 / 40) ** 0.5 + 0.1


def test_r_squared_below_98_percent_is_found_out_with_few_replicas(window):
    slip = torch.cat([torch.linspace(1.6, 0.3, 7), torch.linspace(0.25, 0.03, 17)]).double()
    at = autoregressive(window, slip, 16, 200, 0)
    bent = replace(at, curvature=at.curvature * torch.linspace(0.65, 1.35, 24).double().roll(5))
    check = claims.autocorrelation_checks(bent)[1]
    assert check.verdict == Verdict.DISAGREES, check


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_wrong_curvature_is_found_out(window, factor):
    bent = replace(window, curvature=window.curvature * factor)
    checks = claims.autocorrelation_checks(bent)
    assert all(check.verdict == Verdict.DISAGREES for check in checks), checks


def test_wrong_noise_is_found_out(window):
    bent = replace(
        window,
        noise=window.noise * 1.5,
        floor_noise=window.noise.mean(0) * 1.5,
        total_noise=window.total_noise * 1.5,
        rest=window.rest * 1.5,
    )
    found = verdicts([*claims.variance_checks(bent), claims.excess_check(bent)])
    assert set(found.values()) == {Verdict.DISAGREES}


@pytest.mark.parametrize(
    ("n", "setting"),
    [(96, Setting("linear", 0.6, 32, momentum=0.6)), (480, Setting("linear", 0.4, 12, reshuffled=True))],
    ids=["momentum", "reshuffled"],
)
def test_momentum_and_reshuffling_agree_on_the_linear_network(n, setting):
    window = window_of(regression(n), setting, steps=240)
    checks = [
        *claims.autocorrelation_checks(window), *claims.variance_checks(window), claims.excess_check(window)
    ]  # fmt: skip
    for check in checks:
        assert abs(check.measured - check.predicted) <= check.allowed, check


def test_level_from_the_floor_names_the_number_of_outputs(window):
    check = claims.level_check(window, Verdict.AGREES)
    assert {rival.name for rival in check.rivals} == {"no noise", "the SDE's χ", "one output"}
    assert check.predicted == pytest.approx(check.measured, rel=0.15)
    assert check.predicted > window.floor


def test_the_projected_sde_keeps_the_complements_loss(linear, window):
    (check,) = orthogonal_checks(linear, window, RunSettings(), ROOT)
    assert abs(check.measured - check.predicted) <= check.allowed
    assert check.measured < float(window.excess.mean())


def test_without_noise_the_replicas_relax_as_gradient_descent_does(linear, window):
    x = descended(linear, window)
    d = x.diff(dim=0)
    assert torch.allclose(d[1:], (1 - window.slip) * d[:-1], atol=1e-4 * float(d.abs().max()))
    check = claims.descent_check(window, x)
    assert check.verdict == Verdict.AGREES
    assert check.measured == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_the_quick_suite_is_as_expected():
    outcome = run(RunSettings(), torch.device("cpu"), Progress("quiet"))
    assert [check for check in outcome.checks if not check.as_expected] == []
    assert {check.claim for check in outcome.checks} == {claim.name for claim in CLAIMS}


def test_diverged_replicas_are_counted(linear, window):
    lost = window.finite.clone()
    lost[:3] = False
    fewer = replace(window, finite=lost, x=window.x[:, 3:], excess=window.excess[3:])
    check = claims.excess_check(fewer)
    assert (check.seeds, check.diverged) == (48, 3)
    state = (window.origin, torch.zeros_like(window.origin))
    with pytest.raises(ValueError, match="diverged: choose a smaller step size"):
        observe(linear, Setting("linear", 1e6, 32), state, 4, 60, 60, 24, ROOT)


def test_pseudo_values_of_a_mean_are_the_sample_and_remove_the_bias_of_a_square():
    sample = torch.from_numpy(np.random.default_rng(0).standard_normal(12))
    assert torch.allclose(leave_one_out(lambda weights: float(weights @ sample), 12), sample)
    squared = leave_one_out(lambda weights: float(weights @ sample) ** 2, 12)
    assert float(squared.mean()) == pytest.approx(float(sample.mean() ** 2 - sample.var() / 12), rel=1e-9)


def test_diagonal_window_by_explicit_per_sample_gradients():
    problem, setting = gaussian_sparse(20, 30, 5), Setting("diagonal", 1.0, 10)
    window = observe_diagonal(problem, setting, 300, 16, 50, 80, 24, ROOT)
    assert window.x.shape == (80, 16, 24)
    assert bool((window.curvature.diff() <= 1e-12).all())
    assert bool((window.noise.sum(1) <= window.total_noise * (1 + 1e-9)).all())
    assert all(math.isfinite(check.measured) for check in diagonal_checks(window))


def test_series_hold_what_the_figures_draw(linear, window):
    series = dataset([window, replace(window, setting=Setting("MLP", 0.8, 8))])
    assert all(str(name).startswith("bouncing") for name in [*series.data_vars, *series.dims])
    windows = {name: figure for name, figure in FIGURES.items() if name != "bouncing-moving-basis"}
    assert len(windows) == 4
    for figure in windows.values():
        assert set(figure.variables) <= set(series.data_vars)
        assert figure.draw(series[list(figure.variables)]).axes


def test_every_claim_is_named_once():
    names = [claim.name for claim in CLAIMS]
    assert len(set(names)) == len(names) > 15


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": 1500}, "do not make epochs"), ({"window": 10}, "decides nothing"), ({"steps": 0}, "positive"),
        ({"resnet_images": 5000}, "1797 digits"),
    ],
)  # fmt: skip
def test_unusable_settings_are_said(wrong, message):
    with pytest.raises(SettingsError, match=message):
        BouncingSettings(**wrong)
