"""Increments, Euler-Maruyama, and the same runs through torchsde without its traps."""

import math
import time

import numpy as np
import pytest
import torch
from scipy import stats

from nets.diagonal import initial_state
from simulators.euler import euler_maruyama
from simulators.noise import BLOCK, BrownianIncrements
from simulators.sdeint import sdeint
from theory.diagonal_sde import DiagonalSDE, to_logs
from theory.sde import ExactCovariance, LabelNoise
from theory.streams import named_generator, seed_of
from theory.trajectory import Probe


class GeometricBrownianMotion:
    """dy = μy dt + σy dW."""

    noise_type, sde_type, channels = "diagonal", "ito", 1

    def __init__(self, mu=0.1, sigma=0.5):
        self.mu, self.sigma = mu, sigma

    def f(self, t, y):
        return self.mu * y

    def g(self, t, y):
        return self.sigma * y

    def g_prod(self, t, y, v):
        return self.sigma * y * v

    def f_and_g_prod(self, t, y, v):
        return self.f(t, y), self.g_prod(t, y, v)


def everything(sde_state):
    return sde_state


def test_increments_are_a_pure_function_of_step_and_path():
    many, few = BrownianIncrements(7, "w", 64, 3), BrownianIncrements(7, "w", 16, 3)
    order = [0, 5, BLOCK, 3 * BLOCK + 1, 2, 5]
    for step in order:
        assert torch.equal(many(step)[:16], few(step))
    again = BrownianIncrements(7, "w", 64, 3)
    assert torch.equal(again(3 * BLOCK + 1), many(3 * BLOCK + 1))
    assert not torch.equal(BrownianIncrements(8, "w", 64, 3)(0), many(0))
    assert not torch.equal(BrownianIncrements(7, "v", 64, 3)(0), many(0))
    assert not torch.equal(many(0), many(1))


def test_coarse_increments_are_sums_of_fine_ones():
    fine, coarse = BrownianIncrements(1, "w", 5, 2), BrownianIncrements(1, "w", 5, 2, refine=4)
    for step in range(20):
        total = fine(4 * step) + fine(4 * step + 1) + fine(4 * step + 2) + fine(4 * step + 3)
        assert torch.equal(coarse(step) * 2.0, total)


def test_increments_are_standard_normal_and_uncorrelated():
    noise = BrownianIncrements(3, "law", 500, 4)
    draws = torch.stack([noise(step) for step in range(100)])
    flat = draws.flatten().numpy()
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    lag = (draws[1:] * draws[:-1]).mean().item()
    across = (draws[..., 0] * draws[..., 1]).mean().item()
    assert abs(lag) < 4 / math.sqrt(198_000)
    assert abs(across) < 4 / math.sqrt(50_000)


def test_named_streams():
    assert named_generator(1, "a").random() == named_generator(1, "a").random()
    values = {named_generator(s, n, block=b).random() for s in (0, 1) for n in ("a", "b") for b in (0, 1)}
    assert len(values) == 8
    assert seed_of("x") != seed_of("y")


def test_gbm_law_by_kolmogorov_smirnov():
    """ln y(T) of Euler-Maruyama at h = 1/512 is N((μ - σ²/2)T, σ²T) within KS at 20 000 paths."""
    sde, steps = GeometricBrownianMotion(), 512
    run = euler_maruyama(sde, torch.ones(20_000, 1).double(), 1 / steps, steps, BrownianIncrements(5, "gbm", 20_000, 1))
    standard = (run.final.log() - (0.1 - 0.125)) / 0.5
    assert stats.kstest(standard.flatten().numpy(), "norm").pvalue > 1e-3
    wrong = (run.final.log() - 0.1) / 0.5  # Stratonovich reading: rejected
    assert stats.kstest(wrong.flatten().numpy(), "norm").pvalue < 1e-10


def test_strong_order_of_euler_maruyama():
    sde, errors, steps = GeometricBrownianMotion(), [], (16, 32, 64, 128, 256)
    for n in steps:
        noise = BrownianIncrements(11, "order", 20_000, 1, refine=256 // n)
        run = euler_maruyama(sde, torch.ones(20_000, 1).double(), 1 / n, n, noise)
        fine = BrownianIncrements(11, "order", 20_000, 1)
        W = sum(fine(k) for k in range(256)) / 16
        exact = ((0.1 - 0.125) + 0.5 * W).exp()
        errors.append((run.final - exact).abs().mean().item())
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("covariance", [ExactCovariance(0.1), LabelNoise(0.1)])
def test_own_loop_equals_torchsde_on_the_same_increments(small, covariance):
    sde = DiagonalSDE(small, covariance)
    y0 = to_logs(initial_state(small, 0.3)).expand(6, -1).clone()
    probes = {"y": Probe(everything, torch.tensor([0, 7, 50, 120]))}
    runs = [
        integrate(sde, y0, 0.05, 120, BrownianIncrements(2, "w", 6, small.n), probes)
        for integrate in (euler_maruyama, sdeint)
    ]
    for own, theirs in zip(runs[0]["y"].values, runs[1]["y"].values, strict=True):
        assert torch.allclose(own, theirs, rtol=0, atol=1e-12)


def test_the_call_that_hangs_torchsde_returns():
    """float64, 100 steps with a positive remainder: 5.000000000000001 / 0.1 on torchsde's own clock never ends."""
    start = time.perf_counter()
    y0 = torch.ones(8, 1, dtype=torch.float64)
    run = sdeint(GeometricBrownianMotion(), y0, 0.1, 100, BrownianIncrements(0, "w", 8, 1))
    assert torch.isfinite(run.final).all()
    assert time.perf_counter() - start < 5


def test_clock_is_exact_in_float32():
    """The state may be float32: steps are counted, not added up, and land where they are asked."""
    times = []

    class Clock(GeometricBrownianMotion):
        def f(self, t, y):
            times.append(t)
            return 0 * y

    y0 = torch.ones(2, 1)
    noise = BrownianIncrements(0, "w", 2, 1, dtype=torch.float32)
    run = euler_maruyama(Clock(), y0, 1e-3, 5000, noise)
    assert run.final.dtype == torch.float32
    assert len(times) == 5000
    assert times[-1] == 4999 * 1e-3


def test_divergence_is_dated_and_masked():
    class Explosive(GeometricBrownianMotion):
        def f(self, t, y):
            return torch.where(y > 1, y**3, 0 * y)

        def g_prod(self, t, y, v):
            return 0 * y

    y0 = torch.tensor([[0.5], [10.0]], dtype=torch.float64)
    probes = {"y": Probe(everything, torch.arange(0, 31, 10))}
    for integrate in (euler_maruyama, sdeint):
        run = integrate(Explosive(), y0, 0.1, 30, BrownianIncrements(0, "w", 2, 1), probes)
        assert run.finite.tolist() == [True, False]
        assert 0 < run.first_bad_step[1] <= 10
        assert torch.isnan(run["y"].values[1:, 1]).all()
        assert (run["y"].values[:, 0] == 0.5).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"y0": torch.ones(3)}, r"give .paths, dim."),
        ({"y0": torch.full((4, 1), float("nan"))}, "finite"),
        ({"dt": 0.0}, "positive and finite"),
        ({"dt": torch.ones(3)}, "one each"),
        ({"noise": BrownianIncrements(0, "w", 4, 2)}, "noise channels"),
        ({"steps": -1}, "not negative"),
    ],
)
def test_mistakes_get_one_sentence(change, sentence):
    good = {"y0": torch.ones(4, 1), "dt": 0.1, "steps": 5, "noise": BrownianIncrements(0, "w", 4, 1)}
    call = {**good, **change}
    with pytest.raises(ValueError, match=sentence) as caught:
        euler_maruyama(GeometricBrownianMotion(), call["y0"], call["dt"], call["steps"], call["noise"])
    assert str(caught.value).count("\n") == 0


def test_levy_area_methods_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"levy_area|Lévy"):
        sdeint(
            GeometricBrownianMotion(), torch.ones(4, 1).double(), 0.1, 5, BrownianIncrements(0, "w", 4, 1), method="srk"
        )
    with pytest.raises(ValueError, match="all >= 1"):
        BrownianIncrements(0, "w", 0, 1)
