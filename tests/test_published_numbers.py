"""Numbers of AVPF's notebooks, from the same random draws where runs are stable, as ranges where they are chaotic."""

import numpy as np
import pytest
import torch

from nets.diagonal import gd, initial_state, sgd, standard_measurements
from theory.observables import jacobian_rank
from theory.problem import gaussian_sparse
from theory.schedule import Schedule
from theory.trajectory import Probe

N = 100_001
LAST = 99_599  # last point of the notebook's evaluation grid


def at_last(problem, record=LAST):
    return {k: Probe(f, torch.tensor([record])) for k, f in standard_measurements(problem).items()}


def test_stable_sgd_to_ten_digits():
    problem = gaussian_sparse(80, 200, 20)
    index = np.random.RandomState(1).randint(80, size=N)[None]
    run = sgd(problem, initial_state(problem), [Schedule(0.25)], LAST, seeds=[0], indices=index[:, :LAST],
              probes=at_last(problem))  # fmt: skip
    value = {name: series.values[-1, 0, 0].item() for name, series in run.series.items()}
    assert value["train loss"] == pytest.approx(1.4216162874e-06, rel=1e-9)
    assert value["test loss"] == pytest.approx(0.003528621944, rel=1e-9)
    assert value["l0"] == 200
    assert value["balancedness"] == pytest.approx(1.649e-4, rel=1e-3)
    u, v = run.final.u[0, 0], run.final.v[0, 0]
    assert torch.cat([u, v]).norm().item() == pytest.approx(2.57054, rel=1e-5)
    assert jacobian_rank(u, v, problem.X_test[:400], 1e-15) == 200


def test_stable_gd():
    problem = gaussian_sparse(40, 100, 20)
    run = gd(problem, initial_state(problem), [Schedule(2.0)], LAST, probes=at_last(problem))
    value = {name: series.values[-1, 0, 0].item() for name, series in run.series.items()}
    assert value["test loss"] == pytest.approx(0.16824144825, rel=1e-9)
    assert value["train loss"] < 1e-28
    assert value["l0"] == 100
    assert value["balancedness"] == pytest.approx(0.435187, abs=1e-6)
    first = standard_measurements(problem)["train loss"](initial_state(problem))
    assert first.item() == pytest.approx(0.6490066985, rel=1e-9)


def test_loss_surface_runs():
    """GF (GD 0.03) and SGD (0.6, /3 at half) of the 2-D loss-surface notebook, evaluated after step 10 000."""
    problem = gaussian_sparse(20, 30, 3)
    steps = 10_001
    measure = standard_measurements(problem)
    flow = gd(problem, initial_state(problem), [Schedule(0.03)], steps).final
    assert measure["train loss"](flow).item() == pytest.approx(4.902335457e-06, rel=1e-8)
    assert measure["test loss"](flow).item() == pytest.approx(0.01490959137, rel=1e-8)
    draws = np.random.RandomState(2)
    index = np.array([draws.randint(20) for _ in range(steps)])[None]
    schedule = Schedule(0.6, ((0.5, 3.0),))
    noisy = sgd(problem, initial_state(problem), [schedule], steps, seeds=[0], indices=index).final
    assert measure["train loss"](noisy).item() == pytest.approx(3.872966546e-08, rel=1e-8)
    assert measure["test loss"](noisy).item() == pytest.approx(3.982127812e-08, rel=1e-8)


def test_chaotic_gd_support():
    """GD 3.53 with the three decays: losses are chaotic, the support is not."""
    problem = gaussian_sparse(40, 100, 20)
    schedules = [Schedule(3.53, ((at, by),)) for at, by in ((0.1, 4.8), (0.3, 3.4), (0.5, 1.5))]
    run = gd(problem, initial_state(problem), schedules, LAST, probes=at_last(problem))
    l0 = run["l0"].values[-1, :, 0]
    assert (l0 - torch.tensor([86.0, 80.0, 78.0])).abs().max() <= 3
    assert (l0.diff() < 0).all()


def test_chaotic_sgd_by_median_and_range():
    """η = 0.282 over 32 seeds: divergence counted, medians of ℓ0 and rank inside the ranges of ten earlier seeds."""
    problem = gaussian_sparse(80, 200, 20)
    schedules = [Schedule(0.282, ((at, by),)) for at, by in ((0.1, 4.8), (0.3, 3.4), (0.5, 1.5))]
    run = sgd(problem, initial_state(problem), schedules, LAST, seeds=range(32), probes=at_last(problem))
    alive = run.finite.sum(1)
    assert (alive.diff() <= 0).all()  # the longer at the edge, the more diverge
    assert alive[0] >= 20
    assert 8 <= alive[2] <= 30
    l0_range, rank_range, medians = [(134, 200), (82, 99), (66, 81)], [(96, 154), (66, 76), (57, 67)], []
    for c in range(3):
        ok = run.finite[c]
        l0 = run["l0"].values[-1, c, ok].median()
        u, v = run.final.u[c, ok][:10], run.final.v[c, ok][:10]
        rank = jacobian_rank(u, v, problem.X_test[:400], 1e-15).median()
        assert l0_range[c][0] <= l0 <= l0_range[c][1]
        assert rank_range[c][0] <= rank <= rank_range[c][1]
        assert 1e-5 < run["test loss"].values[-1, c, ok].median() < 1e-3
        medians.append((l0, rank))
    assert medians[0] > medians[1] > medians[2]
    # The notebook's SGD at 0.272 on n = 40, d = 100 diverges for every seed, as it did for ten others.
    other = gaussian_sparse(40, 100, 20)
    run = sgd(other, initial_state(other), [Schedule(0.272, ((0.5, 20.0),))], LAST, seeds=range(8))
    assert run.finite.sum() <= 2
