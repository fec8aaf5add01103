"""Increments, Euler-Maruyama, and the same runs through torchsde without its traps."""

import math
import time

import numpy as np
import pytest
import torch
from numba import njit
from scipy import stats

from nets.diagonal import initial_state
from simulators.diagonal import integrate_diagonal
from simulators.integrate import integrate, steps_at
from simulators.noise import BrownianIncrements
from simulators.scalar import exponentials
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
    many, few = BrownianIncrements(7, "w", 90, 3), BrownianIncrements(7, "w", 50, 3)
    order = [0, 5, 255, 256, 257, 700, 2, 5, 701]
    for step in order:
        assert torch.equal(many(step)[:50], few(step))
    again = BrownianIncrements(7, "w", 90, 3)
    assert torch.equal(again(700), many(700))
    assert not torch.equal(BrownianIncrements(8, "w", 90, 3)(0), many(0))
    assert not torch.equal(BrownianIncrements(7, "v", 90, 3)(0), many(0))
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
    run = integrate(sde, torch.ones(20_000, 1).double(), 1 / steps, steps, BrownianIncrements(5, "gbm", 20_000, 1))
    standard = (run.final.log() - (0.1 - 0.125)) / 0.5
    assert stats.kstest(standard.flatten().numpy(), "norm").pvalue > 1e-3
    wrong = (run.final.log() - 0.1) / 0.5  # Stratonovich reading: rejected
    assert stats.kstest(wrong.flatten().numpy(), "norm").pvalue < 1e-10


@pytest.mark.parametrize("covariance", [ExactCovariance(0.1), LabelNoise(0.1)])
def test_own_loop_equals_torchsde_on_the_same_increments(small, covariance):
    sde = DiagonalSDE(small, covariance)
    y0 = to_logs(initial_state(small, 0.3)).expand(6, -1).clone()
    probes = {"y": Probe(everything, torch.tensor([0, 7, 50, 120]))}
    runs = [
        run_with(sde, y0, 0.05, 120, BrownianIncrements(2, "w", 6, small.n), probes) for run_with in (integrate, sdeint)
    ]
    for own, theirs in zip(runs[0]["y"].values, runs[1]["y"].values, strict=True):
        assert torch.allclose(own, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "covariance",
    [ExactCovariance(0.3), LabelNoise(0.3), LabelNoise(0.3, lambda t: 0.1 + t)],
    ids=["exact", "own", "δ(t)"],
)
def test_fused_diagonal_loop_equals_the_generic_one(small, covariance):
    y0 = to_logs(initial_state(small, 0.3)).expand(40, -1).clone()
    probes = {"y": Probe(lambda y: y, torch.tensor([0, 7, 50, 200]))}
    runs = [
        integrate(DiagonalSDE(small, covariance), y0, 0.1, 200, BrownianIncrements(2, "w", 40, small.n), probes),
        integrate_diagonal(small, covariance, y0, 0.1, 200, BrownianIncrements(2, "w", 40, small.n), probes),
    ]
    assert torch.allclose(runs[0]["y"].values, runs[1]["y"].values, rtol=1e-10, atol=1e-11)
    half = integrate_diagonal(small, covariance, y0, 0.1, 90, BrownianIncrements(2, "w", 40, small.n))
    rest = integrate_diagonal(
        small, covariance, half.final, 0.1, 200, BrownianIncrements(2, "w", 40, small.n), first_step=90
    )
    assert torch.equal(rest.final, runs[1].final)


def test_fused_diagonal_loop_far_down_and_diverging(small):
    """Logs at -1000 stay exact; a path that blows up is dated and keeps its last finite state."""
    low = torch.full((2, 2 * small.d), -1000.0, dtype=torch.float64)
    low[1, : small.d] = 300.0
    run = integrate_diagonal(small, LabelNoise(0.1), low, 0.1, 5, BrownianIncrements(0, "w", 2, small.n))
    generic = integrate(DiagonalSDE(small, LabelNoise(0.1)), low, 0.1, 5, BrownianIncrements(0, "w", 2, small.n))
    assert torch.allclose(run.final[0], generic.final[0], rtol=1e-14)
    assert run.first_bad_step[0] == -1
    assert run.first_bad_step[1] > 0
    assert torch.isfinite(run.final).all()


def test_the_call_that_hangs_torchsde_returns():
    """float64, 100 steps with a positive remainder: 5.000000000000001 / 0.1 on torchsde's own clock never ends."""
    start = time.perf_counter()
    y0 = torch.ones(8, 1, dtype=torch.float64)
    run = sdeint(GeometricBrownianMotion(), y0, 0.1, 100, BrownianIncrements(0, "w", 8, 1))
    assert torch.isfinite(run.final).all()
    assert time.perf_counter() - start < 1


def test_clock_is_exact_in_float32():
    """The state may be float32: steps are counted, not added up, and land where they are asked."""
    times = []

    class Clock(GeometricBrownianMotion):
        def f(self, t, y):
            times.append(t)
            return 0 * y

    y0 = torch.ones(2, 1)
    noise = BrownianIncrements(0, "w", 2, 1, dtype=torch.float32)
    run = integrate(Clock(), y0, 1e-3, 5000, noise)
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
    for run_with in (integrate, sdeint):
        run = run_with(Explosive(), y0, 0.1, 30, BrownianIncrements(0, "w", 2, 1), probes)
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
        ({"noise": BrownianIncrements(0, "w", 4, 2)}, "normals a step"),
        ({"steps": -1}, "not negative"),
    ],
)
def test_mistakes_get_one_sentence(change, sentence):
    good = {"y0": torch.ones(4, 1), "dt": 0.1, "steps": 5, "noise": BrownianIncrements(0, "w", 4, 1)}
    call = {**good, **change}
    with pytest.raises(ValueError, match=sentence) as caught:
        integrate(GeometricBrownianMotion(), call["y0"], call["dt"], call["steps"], call["noise"])
    assert str(caught.value).count("\n") == 0


def test_everything_torchsde_has_goes_through_one_signature():
    """Itô and Stratonovich methods of torchsde on GBM: means as the calculus says, Lévy-area methods included."""

    class Stratonovich(GeometricBrownianMotion):
        sde_type = "stratonovich"

    y0, expected = torch.ones(4000, 1).double(), {"ito": math.exp(0.1), "stratonovich": math.exp(0.1 + 0.125)}
    for sde, methods in (
        (GeometricBrownianMotion(), ("euler", "milstein", "srk")),
        (Stratonovich(), ("heun", "midpoint", "euler_heun", "milstein", "log_ode")),
    ):
        for method in methods:
            run = sdeint(sde, y0, 0.05, 20, BrownianIncrements(4, "w", 4000, 1), method=method)
            error = 4 * run.final.std() / 4000**0.5
            assert abs(run.final.mean() - expected[sde.sde_type]) < error, method


def test_no_increments_without_paths():
    with pytest.raises(ValueError, match="all >= 1"):
        BrownianIncrements(0, "w", 0, 1)


def test_stop_and_resume_bit_for_bit(small):
    sde = DiagonalSDE(small, LabelNoise(0.1))
    y0, noise = to_logs(initial_state(small, 0.3)).expand(6, -1).clone(), BrownianIncrements(2, "w", 6, small.n)
    whole = integrate(sde, y0, 0.05, 100, noise)
    half = integrate(sde, y0, 0.05, 37, noise)
    rest = integrate(sde, half.final, 0.05, 100, BrownianIncrements(2, "w", 6, small.n), first_step=37)
    assert torch.equal(rest.final, whole.final)
    changing = torch.linspace(0.01, 0.1, 100).double()
    whole = integrate(sde, y0, changing, 100, noise)
    half = integrate(sde, y0, changing[:37], 37, noise)
    assert torch.equal(integrate(sde, half.final, changing, 100, noise, first_step=37).final, whole.final)


@pytest.mark.parametrize("steps", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_steps_of_a_thousandth_are_counted_exactly(steps):
    """A float32 state does not make a float32 clock: T = 1000 takes exactly 10^6 steps of 10^-3."""

    class Counting(GeometricBrownianMotion):
        calls = 0

        def f_and_g_prod(self, t, y, v):
            self.calls += 1
            self.last = t
            return 0 * y, 0 * y

    sde = Counting()
    assert int(steps_at([steps / 1000], 1e-3)[0]) == steps
    noise = BrownianIncrements(0, "w", 1, 1, dtype=torch.float32)
    run = integrate(sde, torch.ones(1, 1), 1e-3, steps, noise)
    assert run.final.dtype == torch.float32
    assert sde.calls == steps
    assert sde.last == (steps - 1) * 1e-3


def test_save_times_off_the_grid_and_absurd_lengths():
    assert steps_at([0.0, 0.3, 1.0], 0.1).tolist() == [0, 3, 10]
    with pytest.raises(ValueError, match="not a multiple of dt"):
        steps_at([0.35], 0.1)
    with pytest.raises(ValueError, match="not end in a lifetime"):
        integrate(GeometricBrownianMotion(), torch.ones(1, 1), 1e-9, 10**12, BrownianIncrements(0, "w", 1, 1))
    with pytest.raises(ValueError, match="between 0 and 5"):
        integrate(GeometricBrownianMotion(), torch.ones(1, 1), 0.1, 5, BrownianIncrements(0, "w", 1, 1), first_step=6)


def test_wrong_shape_from_g_is_said():
    class Wrong(GeometricBrownianMotion):
        def f_and_g_prod(self, t, y, v):
            return y.sum(1), y

    with pytest.raises(ValueError, match="return the state's shape"):
        integrate(Wrong(), torch.ones(3, 1), 0.1, 5, BrownianIncrements(0, "w", 3, 1))


@njit(fastmath={"contract", "nsz"}, error_model="numpy")  # as the loops that it is a part of
def exponentials_of(x, out):
    bits = np.empty(len(x), dtype=np.int64)
    powers = bits.view(np.float64)
    exponentials(x, out, bits)
    for j in range(len(x)):
        out[j] *= powers[j]


def test_exponentials_are_exact_to_rounding():
    x = np.concatenate([np.linspace(-700, 700, 20_011), np.log(2) * (np.arange(-900, 900) + 0.5), [0.0, -800.0, 800.0]])
    out = np.empty_like(x)
    exponentials_of(x, out)
    np.testing.assert_allclose(out, np.exp(np.clip(x, -700, 700)), rtol=4 * np.finfo(float).eps)
    assert out[-3] == 1
