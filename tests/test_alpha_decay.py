"""α-decay: the laws against each other, against sympy, against Monte Carlo, and far below the float range."""

import math

import mpmath
import numpy as np
import pytest
import sympy as sp
import torch

from nets.diagonal import initial_state, sgd
from theory import alpha_decay
from theory.minibatch import Minibatch
from theory.problem import Regression, gaussian_sparse
from theory.schedule import Schedule
from theory.symbolic import alpha_decay as derive
from theory.trajectory import Probe, dense_grid, step_weights


def test_sympy_derives_the_decay_and_the_code_computes_it():
    drifts, rows, laws = derive(samples=3, features=2)
    for drift, row, law in zip(drifts, rows, laws, strict=True):
        assert sp.simplify(drift - law) == 0
        assert row.is_zero_matrix  # no noise: the decay is deterministic
    generator = torch.Generator().manual_seed(0)
    X, r = torch.randn(3, 2, generator=generator).double(), torch.randn(3, generator=generator).double()
    problem, eta = Regression(X, r, X[:0], r[:0]), 0.3
    values = {f"x{i + 1}_{j + 1}": X[i, j].item() for i in range(3) for j in range(2)}
    values |= {f"s{i + 1}": math.sqrt(eta / 3) * abs(r[i].item()) for i in range(3)}
    change = alpha_decay.sde_change(problem, eta**2 * r.square(), Minibatch())  # one step: time η
    for j in range(2):
        assert change[j].item() == pytest.approx(
            eta * float(laws[j].subs({symbol: values[symbol.name] for symbol in laws[j].free_symbols})), rel=1e-12
        )


@pytest.mark.parametrize("s", [1e-6, 9e-5, 1.1e-4, 1e-2, 0.3, 1.0, 20.0, 9e5, 2e6])
def test_log_decrement_against_quadrature(s):
    def integrand(z):
        return -mpmath.log(abs(1 - s * z * z)) * mpmath.exp(-z * z / 2) / mpmath.sqrt(2 * mpmath.pi)

    at = 1 / math.sqrt(s)
    expected = 2 * mpmath.quad(integrand, sorted({0, min(at / 2, 14), min(at, 14), min(2 * at, 14), 3, 14}))
    value = alpha_decay.log_decrement(torch.tensor(s, dtype=torch.float64)).item()
    assert value == pytest.approx(float(expected), rel=1e-10, abs=1e-11)


def test_log_decrement_series_and_nan():
    s = torch.tensor([1e-3], dtype=torch.float64)
    assert alpha_decay.log_decrement(s).item() == pytest.approx(1e-3 + 1.5e-6 + 5e-9 + 2.6e-11, rel=1e-10)
    assert torch.isnan(alpha_decay.log_decrement(torch.tensor([float("nan")], dtype=torch.float64))).all()
    ends = torch.tensor([0.0, 1e-40, 1e13, 1e17, torch.inf], dtype=torch.float64)
    zero, tiny, far, further, infinite = alpha_decay.log_decrement(ends).tolist()
    assert (zero, infinite) == (0.0, -math.inf)
    assert tiny == pytest.approx(1e-40, rel=1e-10)
    assert far == pytest.approx(-math.log(1e13) + np.euler_gamma + math.log(2), rel=1e-10)
    assert far - further == pytest.approx(math.log(1e4), rel=1e-10)


def test_log_decrement_in_the_loop_is_that_of_tensors():
    s = torch.cat([torch.logspace(-14, 14, 4001, dtype=torch.float64), torch.tensor([0.0, torch.nan, torch.inf])])
    expected = alpha_decay.log_decrement(s.unsqueeze(0), s.log())[0]  # shapes that differ stay with torch
    torch.testing.assert_close(alpha_decay.log_decrement(s, s.log()), expected, rtol=1e-12, atol=0, equal_nan=True)
    single = alpha_decay.log_decrement(s.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_finite_step_law_is_the_mean_of_the_exact_law(small):
    rng = np.random.default_rng(0)
    eta, level, draws = 0.3, 0.4, 400_000
    i = rng.integers(0, small.n, draws)
    r = rng.normal(0, math.sqrt(2 * level), draws)
    exact = np.log(np.abs(1 - (eta * r[:, None] * small.X.numpy()[i]) ** 2))
    arguments = (torch.full((1, 1), eta).double(), torch.full((1, 1), level).double(), torch.ones(1), Minibatch())
    law = alpha_decay.finite_step_change(small, *arguments)[0].numpy()
    assert (np.abs(exact.mean(0) - law) < 4 * exact.std(0) / math.sqrt(draws)).all()
    first = alpha_decay.sde_change_at_level(small, *arguments)[0].numpy()
    assert (np.abs(exact.mean(0) - first) > 4 * exact.std(0) / math.sqrt(draws)).any()  # the test can tell


def test_laws_agree_to_their_stated_order(small):
    """Finite-step minus SDE law, relative, falls like η² with the coefficient next_order_fraction states."""
    gaps = []
    for eta in (0.04, 0.02, 0.01):
        arguments = (torch.full((1, 1), eta).double(), torch.full((1, 1), 0.3).double(), torch.ones(1), Minibatch())
        first = alpha_decay.sde_change_at_level(small, *arguments).mean()
        full = alpha_decay.finite_step_change(small, *arguments).mean()
        stated = alpha_decay.next_order_fraction(small, *arguments).item()
        gaps.append(((full - first) / first).item())
        assert gaps[-1] == pytest.approx(stated, rel=0.1)
    assert gaps[0] / gaps[2] == pytest.approx(16, rel=0.1)


def test_per_sample_next_order(small):
    r = torch.linspace(-1, 1, small.n, dtype=torch.float64)
    for eta in (0.02, 0.01):
        g2 = (eta * r.unsqueeze(1) * small.X).square()
        exact = -torch.log1p(-g2).mean(0).mean()
        power, power4 = eta**2 * r.square(), eta**4 * r.pow(4)
        first = -alpha_decay.sde_change(small, power, Minibatch()).mean()
        stated = alpha_decay.sde_change_next_order(small, power, power4)
        assert ((exact - first) / first).item() == pytest.approx(stated.item(), rel=0.05)


def test_batches_scale_the_laws(small):
    eta, level, weights = torch.full((2, 1), 0.1).double(), torch.full((2, 1), 0.2).double(), torch.ones(2)
    one = alpha_decay.sde_change_at_level(small, eta, level, weights, Minibatch())
    four = alpha_decay.sde_change_at_level(small, eta, level, weights, Minibatch(4, replacement=False))
    assert torch.allclose(four, one * (small.n - 4) / (small.n - 1) / 4)
    full = alpha_decay.sde_change_at_level(small, eta, level, weights, Minibatch(small.n, replacement=False))
    assert (full == 0).all()


@pytest.mark.parametrize("batch", [Minibatch(3), Minibatch(3, replacement=False)])
def test_batch_law_against_sgd(batch):
    """Mean Δ ln α of SGD with B = 3, at small η where the SDE law is exact to a percent, both sampling schemes."""
    problem = gaussian_sparse(12, 30, 4)
    steps, eta, seeds = 4000, 0.02, range(64)
    grid = dense_grid(steps, 1000, 10)
    weights = (step_weights(grid, steps) * eta**2).double()
    r = Probe(lambda s: (s.w @ problem.X.T - problem.y).square(), grid, weights)
    drift = Probe(lambda s: ((s.w @ problem.X.T - problem.y) @ problem.X / problem.n).square(), grid, weights)
    start = initial_state(problem)
    run = sgd(problem, start, [Schedule(eta)], steps, seeds=seeds, batch=batch, probes={"r2": r, "g2": drift})
    measured = (run.final.log_alpha - start.log_alpha)[0].mean(-1)
    # E g² = variance + squared mean; the SDE law holds the variance part, with the rank-one term.
    total = alpha_decay.sde_change(problem, run["r2"].values[0, 0], batch)
    mean_square = run["g2"].values[0, 0]
    predicted = (total - (1 - batch.variance_factor(problem.n)) * mean_square).mean(-1)
    gap = measured - predicted
    assert gap.mean().abs() < 4 * gap.std() / 8 + 0.01 * predicted.mean().abs()
    wrong = alpha_decay.sde_change(problem, run["r2"].values[0, 0], Minibatch()).mean(-1)
    assert (measured - wrong).mean().abs() > 4 * gap.std() / 8 + 0.1 * wrong.mean().abs()


def test_alpha_is_followed_far_below_the_float_range():
    """ln α of single coordinates beyond -1000, equal to the exact law summed in logs along the same draws."""
    problem = gaussian_sparse(80, 200, 20)
    steps, seeds = 60_000, range(8)
    index = np.random.default_rng(1).integers(0, 80, (8, steps))
    start = initial_state(problem)
    run = sgd(problem, start, [Schedule(0.282)], steps, seeds=seeds, indices=index)
    alive = torch.nonzero(run.finite[0]).flatten()
    assert len(alive) >= 2
    log_alpha = run.final.log_alpha[0, alive]
    assert (log_alpha.mean(-1) < -480).all()
    assert torch.isfinite(log_alpha).all()
    u, v = run.final.u[0, alive], run.final.v[0, alive]
    assert ((u**2 - v**2).abs() < 1e-16).any()  # u² - v² computed directly has lost α
    # The same draws through an independent accumulation: Σ ln|1 - g²| with g from the run's own predictors.
    probes = {"w": Probe(lambda s: s.w, torch.arange(2000))}
    short = sgd(problem, start, [Schedule(0.282)], 2000, seeds=seeds, indices=index[:, :2000], probes=probes)
    rows, k = torch.from_numpy(index[alive[0], :2000]), alive[0]
    w, x = short["w"].values[:, 0, k], problem.X[rows]
    g = 0.282 * ((w * x).sum(1) - problem.y[rows]).unsqueeze(1) * x
    expected = start.log_alpha + alpha_decay.exact_change(g)
    assert torch.allclose(short.final.log_alpha[0, k], expected, rtol=1e-9)
