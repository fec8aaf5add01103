"""Prop. 2: proof, band and cycles."""

import numpy as np
import pytest
import torch

from nets.one_dimensional import sgd_path
from theory.stabilization import (
    BAND_HIGH,
    BAND_LOW,
    absorbing_band,
    admissible_step_sizes,
    entry_bound,
    prove_band,
    step_map,
    two_cycle,
)


def test_every_step_of_the_proof_holds():
    facts = prove_band()
    assert len(facts) == 8
    assert all(facts.values()), facts
    assert float(BAND_LOW) == pytest.approx(0.6535, abs=1e-4)
    assert float(BAND_HIGH) == pytest.approx(1.1619, abs=5e-5)


def test_band_maps_into_itself_on_a_fine_grid():
    c = torch.linspace(1 + 1e-9, 1.25, 200, dtype=torch.float64).unsqueeze(1)
    left = torch.linspace(float(BAND_LOW), 1 - 1e-9, 4000, dtype=torch.float64)
    right = torch.linspace(1 + 1e-9, float(BAND_HIGH), 4000, dtype=torch.float64)
    assert ((step_map(left, c) > 1) & (step_map(left, c) <= float(BAND_HIGH) + 1e-12)).all()
    assert ((step_map(right, c) < 1) & (step_map(right, c) >= float(BAND_LOW) - 1e-12)).all()
    outside = torch.tensor(0.6, dtype=torch.float64)  # below the golden ratio f_1 stays left of 1
    assert step_map(outside, 1.0) < 1


@pytest.mark.parametrize("c", [1.01, 1.1, 1.25])
def test_two_cycle(c):
    low, high = (torch.tensor(s, dtype=torch.float64) for s in two_cycle(c))
    assert torch.isclose(step_map(low, c), high, rtol=1e-12)
    assert torch.isclose(step_map(high, c), low, rtol=1e-12)


def test_absorbing_band_contains_random_orbits_and_is_not_loose():
    rng = np.random.default_rng(0)
    c = torch.from_numpy(rng.choice([1.05, 1.2], (6000, 400)))
    s = torch.from_numpy(rng.uniform(0.3, 1.3, 400))
    tail = []
    for k in range(6000):
        s = step_map(s, c[k])
        if k >= 1000:
            tail.append(s)
    orbit = torch.stack(tail)
    band = absorbing_band(1.05, 1.2)
    left, right = orbit[orbit < 1], orbit[orbit > 1]
    assert left.min() >= band.l_out - 1e-12
    assert left.max() <= band.l_in + 1e-12
    assert right.min() >= band.r_in - 1e-12
    assert right.max() <= band.r_out + 1e-12
    # Reached to within a few per cent of its width.
    assert left.min() < band.l_out + 0.05 * (band.l_in - band.l_out)
    assert left.max() > band.l_in - 0.1 * (band.l_in - band.l_out)
    assert right.max() > band.r_out - 0.05 * (band.r_out - band.r_in)


def test_constant_c_shrinks_the_band_to_its_cycle():
    band, (low, high) = absorbing_band(1.05, 1.05), two_cycle(1.05)
    assert (band.l_in, band.r_in) == pytest.approx((low, high), abs=1e-9)


def test_entry_bound_is_kept_and_sgd_alternates():
    x = torch.linspace(1.0, 1.08, 16, dtype=torch.float64)
    low, high = admissible_step_sizes(x, 1.5)
    path = sgd_path(x, 1.5, 0.01 * 1.5, [(low + high) / 2, 0.4 * low], 500, range(8)) / 1.5
    entered = entry_bound(0.01)
    assert ((path[: entered + 1, 0] >= float(BAND_LOW)).any(0)).all()
    sides = path[entered:, 0] > 1
    assert (sides[1:] != sides[:-1]).all()
    assert (path[:, 1] <= 1 + 1e-14).all()  # c < 1/2: one-sided
    assert path[-1, 1].min() > 1 - 1e-6


def test_bad_intervals_are_said():
    with pytest.raises(ValueError, match="no step size keeps every draw"):
        admissible_step_sizes(torch.tensor([1.0, 1.2]), 1.0)
    with pytest.raises(ValueError, match="outside"):
        absorbing_band(0.9, 1.1)
    with pytest.raises(ValueError, match="positive step sizes"):
        sgd_path(torch.ones(2).double(), 1.0, 0.1, [-1.0], 3, [0])
