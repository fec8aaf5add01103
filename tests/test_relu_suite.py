"""Suite ``relu``: its checks can fail, its identities hold to rounding, its figures need nothing but saved series."""

import numpy as np
import pytest
import torch
import xarray as xr

from theory.relu_published import two_layer
from theory.schedule import Schedule
from validation import relu, relu_checks
from validation.check import Verdict
from validation.relu_figures import FIGURES
from validation.relu_runs import Ensemble, Experiment, level_of, sgd_ensemble, simulate
from validation.settings import ReluSettings, RunSettings, SettingsError
from validation.suite import SUITES, Progress, run_suite

TINY = ReluSettings(two_layer_steps=240, three_layer_steps=150, one_dimensional_steps=150, seed_factor=2)


@pytest.fixture(scope="module")
def tiny():
    settings = RunSettings(suites=("relu",), seeds=4, relu=TINY)
    return run_suite("relu", settings, torch.device("cpu"), Progress("quiet"))


def ensemble(values, finite=None):
    values = torch.as_tensor(values, dtype=torch.float64)
    finite = torch.ones(len(values), dtype=torch.bool) if finite is None else torch.as_tensor(finite)
    nothing = torch.empty(0)
    return Ensemble({"sparsity": values, "rank": values}, finite, nothing, nothing, nothing)


def experiment(steps=300):
    published = two_layer()
    return Experiment.of("two-layer", published, steps, published.schedules)


def sample(mean, spread=0.02, size=200, seed=0):
    return mean + spread * np.random.default_rng(seed).standard_normal(size)


def test_the_suite_judges_every_claim(tiny):
    assert "relu" in SUITES
    assert {check.claim for check in tiny.checks} == {claim.name for claim in relu.CLAIMS}
    for name in [*tiny.series.data_vars, *tiny.series.dims]:
        assert str(name).startswith("relu"), name


def test_balance_is_exact_on_every_network_and_loss(tiny):
    checks = [check for check in tiny.checks if check.claim == relu_checks.BALANCE_STEP.name]
    assert len(checks) == 6
    for check in checks:
        assert check.verdict == Verdict.AGREES
        assert check.measured < 1e-12


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_from_their_own_series_alone(tiny, name):
    figure = FIGURES[name]
    needed = xr.Dataset({variable: tiny.series[variable] for variable in figure.variables})
    drawn = figure.draw(needed)
    assert any(axes.has_data() for axes in drawn.axes)


def test_a_distribution_that_differs_is_found_and_an_equal_one_is_not():
    cell, schedule = experiment(), Schedule(0.26)
    real, other = ensemble(sample(0.25)), ensemble(sample(0.4, seed=2))
    same, shifted, wide = (
        ensemble(sample(*of, seed=1)) for of in ((0.25, 0.02), (0.27, 0.02), (0.25, 0.06))
    )  # fmt: skip
    verdicts = [
        relu_checks.compare_distribution(cell, schedule, "sparsity", real, simulated, {"other": other}).verdict
        for simulated in (same, shifted, wide)
    ]
    assert verdicts == [Verdict.AGREES, Verdict.DISAGREES, Verdict.DISAGREES]


def test_diverged_runs_are_counted_and_left_out():
    values = sample(0.25)
    finite = np.arange(200) % 3 > 0
    real = ensemble(np.where(finite, values, np.nan), finite)
    survivors = ensemble(values[finite] + sample(0.0, 0.01, int(finite.sum()), 3))
    arguments = (relu_checks.FEATURES, experiment(), Schedule(0.26), "sparsity", real)
    check = relu_checks.compare_features(*arguments, survivors, {}, 0.3, given=True)
    assert check.verdict == Verdict.AGREES
    assert (check.seeds, check.diverged) == (200, int((~finite).sum()))
    far = ensemble(values[finite] + 0.05)
    assert relu_checks.compare_features(*arguments, far, {}, 0.3, given=True).verdict == Verdict.DISAGREES


def test_a_rival_is_named_only_where_it_can_be_told_apart():
    real, simulated = ensemble(sample(0.25)), ensemble(sample(0.25, seed=1))
    rivals = {"far": ensemble(sample(0.4, seed=2)), "alike": ensemble(sample(0.251, seed=3))}
    check = relu_checks.compare_features(
        relu_checks.FEATURES, experiment(), Schedule(0.26), "sparsity", real, simulated, rivals, 0.3, given=True
    )
    assert [(rival.name, rival.rejected) for rival in check.rivals] == [("far", True)]


def test_the_order_of_schedules_is_a_trend_with_its_p_value():
    schedules = [Schedule(0.9, ((at, 2.0),)) for at in (0.1, 0.3, 0.5)]
    falling = [ensemble(sample(mean, seed=k)) for k, mean in enumerate((0.3, 0.25, 0.2))]
    check = relu_checks.order_check(experiment(), schedules, falling, "rank")
    assert check.verdict == Verdict.AGREES
    assert "p = " in check.setting
    assert relu_checks.order_check(experiment(), schedules, falling[::-1], "rank").verdict == Verdict.DISAGREES
    flat = [ensemble(sample(0.25, seed=k)) for k in range(3)]
    assert relu_checks.order_check(experiment(), schedules, flat, "rank").verdict == Verdict.INCONCLUSIVE


def test_laws_along_the_path_hold_and_their_rivals_do_not():
    checks = relu_checks.path_laws(experiment(), 0.26, 300, 200, range(32), 1)
    by_claim = {check.claim: check for check in checks}
    law = by_claim[relu_checks.BALANCE_LAW.name]
    assert law.verdict == Verdict.AGREES
    assert len(law.rivals) == 3
    assert abs(law.measured - law.predicted) < 4 * law.standard_error + 0.03 * abs(law.predicted)


def test_the_sde_is_told_the_measured_level_of_its_own_run():
    cell = experiment(90)
    real = sgd_ensemble(cell, range(3), 0)[0]
    level = level_of(real, torch.tensor([0, 2]), cell.schedules[0], 90)
    torch.testing.assert_close(level(0.26 * 10), real.loss[10, [0, 2]])
    flow = simulate(cell, cell.schedules[0], lambda clock: relu.LabelNoise(clock, 0.0), 2, 0, "flow", 1)
    assert torch.equal(flow.theta[0], flow.theta[1])


@pytest.mark.parametrize("wrong", [{"two_layer_steps": 0}, {"middle_step": -1.0}, {"substeps": 0}])
def test_settings_that_cannot_be_used_are_told_so(wrong):
    with pytest.raises(SettingsError, match="choose a positive number"):
        ReluSettings(**wrong)


@pytest.mark.slow
def test_sparsity_of_the_sde_is_sgds_within_four_percent():
    published = two_layer()
    schedules = (Schedule(0.26), Schedule(0.6, ((0.5, 5.0),), decay_at_once=True))
    cell = Experiment.of("two-layer", published, 14_126, schedules)
    for schedule, real in zip(schedules, sgd_ensemble(cell, range(256), 11), strict=True):
        rows = torch.nonzero(real.finite).flatten()
        level = level_of(real, rows, schedule, cell.steps)
        given = simulate(cell, schedule, lambda clock, at=level: relu.LabelNoise(clock, at), len(rows), 11, "given", 2)
        gap = (given.final["sparsity"] - real.final["sparsity"][rows])[given.finite]
        mean = float(real.final["sparsity"][rows].mean())
        assert float(gap.mean().abs()) < 0.04 * mean
        assert float(gap.std() / len(gap) ** 0.5) < 0.02 * mean
