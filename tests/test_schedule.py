"""Schedules, SDE time, grids and recording."""

import math

import pytest
import torch

from theory.minibatch import Minibatch
from theory.schedule import Schedule, StepClock, sde_time, stack_step_sizes
from theory.trajectory import Probe, Recorder, Series, dense_grid, linear_grid, step_weights, widening_grid


def test_decays_follow_the_step_at_the_threshold():
    sizes = Schedule(0.3, ((0.1, 3.0), (0.5, 2.0))).step_sizes(100)
    assert sizes[:11].tolist() == [0.3] * 11
    assert torch.allclose(sizes[11:51], torch.tensor(0.1, dtype=torch.float64))
    assert torch.allclose(sizes[51:], torch.tensor(0.05, dtype=torch.float64))
    assert Schedule(0.282, ((0.1, 4.8),)).label == "η=0.282, /4.8 at 10%"


def test_sde_time_and_clock():
    sizes = Schedule(0.25, ((0.5, 2.0),)).step_sizes(10)
    times = sde_time(sizes)
    assert times[0] == 0
    assert times[-1].item() == pytest.approx(6 * 0.25 + 4 * 0.125)
    clock = StepClock(sizes)
    assert [clock(float(t)) for t in times[:-1]] == sizes.tolist()
    assert [clock(float(t) + 0.1) for t in times[:-1]] == sizes.tolist()


def test_a_clock_read_at_several_times_is_the_clock_read_one_by_one():
    sizes = torch.linspace(0.1, 0.3, 50, dtype=torch.float64)
    clock, starts = StepClock(sizes), sde_time(sizes)
    at = torch.cat([starts, starts * (1 - 1e-15), starts + 0.07, torch.tensor([-1.0, 1e6])]).tolist()
    assert clock.at(at).tolist() == [clock(t) for t in at]
    assert clock.at(at[:50]).tolist() == sizes.tolist()


@pytest.mark.parametrize("eta", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_step_sizes(eta):
    with pytest.raises(ValueError, match="choose a positive number"):
        Schedule(eta)


def test_bad_decay_and_no_schedule():
    with pytest.raises(ValueError, match="fraction in"):
        Schedule(0.1, ((1.5, 2.0),))
    with pytest.raises(ValueError, match="at least one"):
        stack_step_sizes([], 3)


def test_minibatch_variance_factors():
    assert Minibatch(4).variance_factor(10) == 0.25
    assert Minibatch(4, replacement=False).variance_factor(10) == pytest.approx(6 / 9 / 4)
    assert Minibatch(10, replacement=False).variance_factor(10) == 0
    with pytest.raises(ValueError, match="at most 10"):
        Minibatch(11, replacement=False).variance_factor(10)
    with pytest.raises(ValueError, match="1 or more"):
        Minibatch(0)


def test_grids():
    grid = linear_grid(100_001)
    assert len(grid) == 348
    assert (grid[0], grid[99], grid[-1]) == (0, 99, 99_599)
    grid = dense_grid(1000, 10, 100)
    assert grid.tolist() == [*range(10), *range(10, 1000, 100)]
    assert step_weights(grid, 1000).sum() == 1000
    grid = widening_grid(10_000, share=0.1, widest=50)
    gaps = grid.diff()
    assert gaps[:20].tolist() == [1] * 20
    assert torch.equal(gaps, (0.1 * grid[:-1]).long().clamp(1, 50))
    assert gaps.max() == 50
    assert step_weights(grid, 10_000).sum() == 10_000
    decay = torch.exp(-grid.double() / 300)
    assert (step_weights(grid, 10_000) * decay).sum() == pytest.approx(1 / -math.expm1(-1 / 300), rel=0.1)


def test_recorder_keeps_sums_and_masks_what_came_after_a_bad_step():
    probes = {
        "value": Probe(lambda s: s, torch.tensor([0, 1, 2])),
        "sum": Probe(lambda s: s, torch.tensor([0, 1, 2]), torch.tensor([1.0, 10.0, 100.0])),
    }
    recorder = Recorder(probes, 2)
    for step in range(3):
        recorder.record(step, torch.tensor([step + 1.0, -(step + 1.0)]))
    series = recorder.series(torch.tensor([-1, 1]))
    assert series["value"].values[:, 0].tolist() == [1, 2, 3]
    assert series["value"].values[:2, 1].tolist() == [-1, -2]
    assert torch.isnan(series["value"].values[2, 1])
    assert series["sum"].values[0, 0] == 321
    assert torch.isnan(series["sum"].values[0, 1])
    with pytest.raises(ValueError, match="have to ascend"):
        Recorder({"x": Probe(lambda s: s, torch.tensor([3]))}, 2)


def test_series_at():
    series = Series(torch.tensor([2, 5]), torch.tensor([1.0, 7.0]))
    assert series.at(4) == 1.0
    with pytest.raises(ValueError, match="first record is 2"):
        series.at(1)
