"""The laws of linear SGD: proved with sympy, against Lyapunov equations, and against simulated recursions."""

import math

import numpy as np
import pytest
import sympy as sp
import torch
from scipy.linalg import solve_discrete_lyapunov

from theory.bouncing import LinearSGD, ReshuffledSGD, gradient_descent_autocorrelation, linear_covariance

DOUBLE = torch.float64


def curvatures(*values):
    return torch.tensor(values, dtype=DOUBLE)


@pytest.fixture(scope="module")
def symbols():
    """Var, ρ_1 … ρ_4 of the AR(2) process from its Yule-Walker equations, solved by sympy."""
    lam, eta, mu, noise = sp.symbols("lambda eta mu C", positive=True)
    c = sp.symbols("c0:5")
    gain = 1 + mu - eta * lam
    equations = [sp.Eq(c[0], gain * c[1] - mu * c[2] + eta**2 * noise), sp.Eq(c[1], gain * c[0] - mu * c[1])]
    equations += [sp.Eq(c[m], gain * c[m - 1] - mu * c[m - 2]) for m in (2, 3, 4)]
    solved = sp.solve(equations, c, dict=True)[0]
    return lam, eta, mu, noise, [sp.simplify(solved[x]) for x in c]


def test_stationary_variance_is_that_of_the_yule_walker_equations(symbols):
    lam, eta, mu, noise, c = symbols
    closed = eta * noise * (1 + mu) / (lam * (1 - mu) * (2 * (1 + mu) - eta * lam))
    assert sp.simplify(c[0] - closed) == 0
    assert sp.simplify(closed.subs(mu, 0) - eta * noise / (lam * (2 - eta * lam))) == 0
    # The SDE is too small by the factor 2(1+μ)/(2(1+μ) - ηλ).
    assert sp.simplify(closed / (eta * noise / (2 * lam * (1 - mu))) - 2 * (1 + mu) / (2 * (1 + mu) - eta * lam)) == 0


def test_displacements_have_lag_one_autocorrelation_mu_minus_half_slip(symbols):
    lam, eta, mu, _, c = symbols
    first = (2 * c[1] - c[2] - c[0]) / (2 * (c[0] - c[1]))
    assert sp.simplify(first - (mu - eta * lam / 2)) == 0
    second = (2 * c[2] - c[3] - c[1]) / (2 * (c[0] - c[1]))
    assert sp.simplify(second - ((1 + mu - eta * lam) * first - mu)) == 0
    third = (2 * c[3] - c[4] - c[2]) / (2 * (c[0] - c[1]))
    assert sp.simplify(third.subs(mu, 0) + eta * lam / 2 * (1 - eta * lam) ** 2) == 0


def test_stability_limit_is_where_the_companion_matrix_has_an_eigenvalue_minus_one(symbols):
    lam, eta, mu, *_ = symbols
    companion = sp.Matrix([[1 + mu - eta * lam, -mu], [1, 0]])
    at_limit = companion.subs(lam, 2 * (1 + mu) / eta)
    assert {sp.simplify(value) for value in at_limit.eigenvals()} == {-1, -mu}


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_functions_equal_the_symbolic_solution(symbols, mu):
    lam, eta, momentum, noise, c = symbols
    law, values = LinearSGD(0.3, mu), (0.05, 1.0, 4.0, 6.0)
    at = [[float(part.subs({lam: v, eta: 0.3, momentum: mu, noise: 0.7})) for part in c] for v in values]
    exact = torch.tensor(at, dtype=DOUBLE)
    x, C = curvatures(*values), torch.full((4,), 0.7, dtype=DOUBLE)
    assert torch.allclose(law.variance(x, C), exact[:, 0], rtol=1e-12)
    for lag in range(5):
        assert torch.allclose(law.autocorrelation(x, lag), exact[:, lag] / exact[:, 0], rtol=1e-10, atol=1e-13)
        assert torch.allclose(
            law.mean_square_displacement(x, C, lag), 2 * (exact[:, 0] - exact[:, lag]), rtol=1e-9, atol=1e-13
        )
    for lag in (1, 2, 3):
        d = (2 * exact[:, lag] - exact[:, lag + 1] - exact[:, lag - 1]) / (2 * (exact[:, 0] - exact[:, 1]))
        assert torch.allclose(law.displacement_autocorrelation(x, lag), d, rtol=1e-9, atol=1e-12)
    assert torch.equal(law.displacement_autocorrelation(x, 0), torch.ones(4, dtype=DOUBLE))
    assert float(law.excess_loss(x, C)) == pytest.approx(float((x * exact[:, 0]).sum() / 2), rel=1e-12)


@pytest.mark.parametrize("mu", [0.0, 0.8])
def test_covariance_solves_the_lyapunov_equation_of_the_whole_recursion(mu):
    """Noise and Hessian that do not commute; the (2p, 2p) companion by scipy against the pairwise solution."""
    rng = np.random.default_rng(0)
    p, eta = 5, 0.4
    basis = np.linalg.qr(rng.standard_normal((p, p)))[0]
    H = basis @ np.diag([0.1, 0.7, 2.0, 3.0, 4.5]) @ basis.T
    root = rng.standard_normal((p, p))
    C = root @ root.T
    A = np.block([[(1 + mu) * np.eye(p) - eta * H, -mu * np.eye(p)], [np.eye(p), np.zeros((p, p))]])
    drive = np.zeros((2 * p, 2 * p))
    drive[:p, :p] = eta**2 * C
    expected = solve_discrete_lyapunov(A, drive)[:p, :p]
    law = LinearSGD(eta, mu)
    found = linear_covariance(torch.from_numpy(H), torch.from_numpy(C), law)
    assert np.allclose(found.numpy(), expected, rtol=1e-9)
    assert np.allclose(np.diag(basis.T @ found.numpy() @ basis), law.variance(
        curvatures(0.1, 0.7, 2.0, 3.0, 4.5), torch.from_numpy(np.diag(basis.T @ C @ basis).copy())
    ).numpy(), rtol=1e-9)  # fmt: skip
    # The excess loss needs C's diagonal in H's eigenbasis only: ½ tr HΣ = ½ η tr[C(2I - ηH)^{-1}] without momentum.
    excess = float(
        law.excess_loss(curvatures(0.1, 0.7, 2.0, 3.0, 4.5), torch.from_numpy(np.diag(basis.T @ C @ basis).copy()))
    )
    assert excess == pytest.approx(np.trace(H @ expected) / 2, rel=1e-9)
    if mu == 0:
        assert excess == pytest.approx(eta / 2 * np.trace(C @ np.linalg.inv(2 * np.eye(p) - eta * H)), rel=1e-9)


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_growth_of_the_variance_from_a_point_ends_in_the_stationary_one(mu):
    law, x = LinearSGD(0.3, mu), curvatures(-0.5, 0.0, 0.2, 3.0, 5.5)
    C, steps = torch.ones_like(x), torch.tensor([0, 1, 2, 7, 4000])
    found = law.variance_after(x, C, steps)
    assert torch.equal(found[0], torch.zeros_like(x))
    assert torch.allclose(found[1], 0.09 * C)
    assert torch.allclose(found[4, 2:], law.variance(x, C)[2:], rtol=1e-9)
    assert torch.isnan(law.variance(x, C)[:2]).all()
    if mu == 0:
        assert torch.allclose(found[3, 2:], (law.variance(x, C) * (1 - (1 - 0.3 * x) ** 14))[2:], rtol=1e-12)
        assert torch.allclose(found[:, 1], 0.09 * steps.double(), rtol=1e-12)


def test_alternation_is_the_orthant_probability_of_the_gaussian():
    law, x = LinearSGD(0.25), curvatures(1.0, 4.0, 6.0, 7.999999)
    rng = np.random.default_rng(0)
    for value, share in zip(x.tolist(), law.alternation(x).tolist(), strict=True):
        rho = 1 - 0.25 * value
        one, other = rng.standard_normal((2, 400_000))
        two = rho * one + math.sqrt(1 - rho**2) * other
        assert abs((one * two < 0).mean() - share) < 4 * math.sqrt(share * (1 - share) / 400_000) + 1e-6
    assert float(law.alternation(curvatures(4.0))) == pytest.approx(0.5)
    assert law.bounces(x).tolist() == [False, False, True, True]
    assert LinearSGD(0.25, 0.5).bounces(x).tolist() == [False, False, False, True]
    assert law.stable(curvatures(-1.0, 0.0, 7.9, 8.1)).tolist() == [False, False, True, False]


def test_the_law_needs_neither_gaussian_nor_constant_noise():
    """Noise on the curvature itself: x⁺ = (1 - ηλ(1+ζ))x + skewed kicks, E ζ = 0: the same -ηλ/2 and the mean C."""
    rng = np.random.default_rng(1)
    eta, lam, paths, steps = 0.5, 2.4, 2000, 900
    x, kept, noise = np.zeros(paths), [], []
    for k in range(steps):
        curvature, kick = lam * 0.4 * rng.choice([-1.0, 1.0], paths), rng.exponential(1.0, paths) - 1
        if k >= 200:
            kept.append(x)
            noise.append((curvature * x + kick) ** 2)
        x = x - eta * (lam * x + curvature * x + kick)
    X = np.array(kept)
    d = np.diff(X, axis=0)
    shares = (d[1:] * d[:-1]).sum(0) / (d**2).sum(0).mean()
    law = LinearSGD(eta)
    assert abs(shares.mean() + eta * lam / 2) < 4 * shares.std() / math.sqrt(paths)
    ratio = (X**2).mean(0) / float(law.variance(curvatures(lam), curvatures(float(np.mean(noise)))))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(paths)


@pytest.mark.parametrize(("mu", "lam"), [(0.9, 5.0), (0.5, 0.4)])
def test_momentum_against_the_simulated_heavy_ball(mu, lam):
    rng = np.random.default_rng(2)
    eta, paths, steps = 0.5, 4000, 700
    x, m, kept = np.zeros(paths), np.zeros(paths), []
    for k in range(steps):
        if k >= 300:
            kept.append(x)
        m = mu * m + lam * x + rng.standard_normal(paths)
        x = x - eta * m
    X = np.array(kept)
    d = np.diff(X, axis=0)
    law = LinearSGD(eta, mu)
    shares = (d[1:] * d[:-1]).sum(0) / (d**2).sum(0).mean()
    assert abs(shares.mean() - (mu - eta * lam / 2)) < 4 * shares.std() / math.sqrt(paths)
    ratio = (X**2).mean(0) / float(law.variance(curvatures(lam), curvatures(1.0)))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(paths)


def reshuffled_exactly(eta, lam, M):
    """Variances and displacement products of one epoch by brute force: the joint covariance of two epochs' states.

    Epoch map x_M = ρ^M x_0 - η Σ ρ^{M-1-j} ξ_j with cov ξ = M/(M-1) (I - 11ᵀ/M).
    """
    rho = 1 - eta * lam
    noise = M / (M - 1) * (np.eye(M) - 1 / M)
    # States x_0 … x_2M as linear functions of (x_0, ξ of epoch one, ξ of epoch two).
    rows = [np.eye(1, 1 + 2 * M)[0]]
    for j in range(2 * M):
        kick = np.zeros(1 + 2 * M)
        kick[1 + j] = -eta
        rows.append(rho * rows[-1] + kick)
    L = np.array(rows)
    part = L[M, 1 : 1 + M] @ noise @ L[M, 1 : 1 + M]
    start = part / (1 - rho ** (2 * M))
    joint = np.zeros((1 + 2 * M, 1 + 2 * M))
    joint[0, 0], joint[1 : 1 + M, 1 : 1 + M], joint[1 + M :, 1 + M :] = start, noise, noise
    covariance = L @ joint @ L.T
    d = np.diff(L, axis=0)
    moved = d @ joint @ d.T
    k = np.arange(M)
    return np.diag(covariance)[:M], moved[k, k + 1].sum() / moved[k, k].sum()


@pytest.mark.parametrize("M", [2, 3, 17])
@pytest.mark.parametrize("lam", [0.01, 0.8, 2.0, 3.7])
def test_reshuffling_equals_the_explicit_covariance_of_an_epoch(M, lam):
    law = ReshuffledSGD(0.5, M)
    variances, correlation = reshuffled_exactly(0.5, lam, M)
    found = law.variances(curvatures(lam), curvatures(1.0))[:, 0]
    assert np.allclose(found.numpy(), variances, rtol=1e-8)
    assert float(law.displacement_autocorrelation(curvatures(lam))) == pytest.approx(correlation, rel=1e-7, abs=1e-10)


def test_reshuffling_quiets_slow_directions_and_leaves_sharp_ones():
    law, plain, x = ReshuffledSGD(0.5, 50), LinearSGD(0.5), curvatures(0.0001, 0.04, 2.0, 3.9)
    ratio = law.variance(x, torch.ones_like(x)) / plain.variance(x, torch.ones_like(x))
    assert ratio[0] < 0.01
    assert (ratio.diff()[:2] > 0).all()
    assert float(ratio[2]) == pytest.approx(1.0, abs=0.02)
    assert float(law.excess_loss(x, torch.ones_like(x))) < float(plain.excess_loss(x, torch.ones_like(x)))


def test_reshuffled_data_themselves_have_the_assumed_covariance():
    """Batches of a random order: cov = σ²/B (n-B)/(n-1) at equal places, -1/(M-1) of it between batches."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(12)
    values -= values.mean()
    orders = rng.permuted(np.tile(values, (200_000, 1)), axis=1).reshape(-1, 4, 3).mean(2)
    expected = (values**2).mean() / 3 * (12 - 3) / 11 * (np.eye(4) * 4 / 3 - 1 / 3)
    assert np.abs(orders.T @ orders / len(orders) - expected).max() < 4 * expected[0, 0] * math.sqrt(2 / 200_000)


def test_gradient_descent_bounces_without_noise():
    x, rho = [1.0], 1 - 0.5 * 3.6
    for _ in range(40):
        x.append(rho * x[-1])
    d = np.diff(x)
    assert (d[1:] * d[:-1]).sum() / (d[:-1] ** 2).sum() == pytest.approx(
        float(gradient_descent_autocorrelation(0.5, curvatures(3.6)))
    )


def test_loss_amplification_is_the_fixed_point_of_residual_noise():
    """L = floor + excess(C = 2L H/(cB)) solved by iteration; 1 - χ = 0 is where it stops having a solution."""
    law, x = LinearSGD(0.1, 0.3), curvatures(0.5, 3.0, 9.0)
    level = torch.tensor(0.0, dtype=DOUBLE)
    for _ in range(300):
        level = 0.2 + law.excess_loss(x, 2 * level * x / (4 * 2))
    chi = law.loss_amplification(x, batch_size=4, outputs=2)
    assert 0 < float(chi) < 1
    assert float(level) == pytest.approx(float(0.2 / (1 - chi)), rel=1e-10)


def test_sde_laws_are_the_small_step_limits():
    x, C = curvatures(0.3, 1.0), curvatures(1.0, 2.0)
    for mu in (0.0, 0.6):
        law = LinearSGD(1e-5, mu)
        assert torch.allclose(law.sde_variance(x, C), law.variance(x, C), rtol=1e-4)
        assert float(law.sde_excess_loss(C)) == pytest.approx(float(law.excess_loss(x, C)), rel=1e-4)
    law = LinearSGD(1e-5)
    assert torch.allclose(law.sde_displacement_autocorrelation(x), law.displacement_autocorrelation(x), rtol=1e-4)


def test_bad_input_is_said():
    with pytest.raises(ValueError, match="step size 0 is not usable"):
        LinearSGD(0)
    with pytest.raises(ValueError, match="momentum 1 is not usable"):
        LinearSGD(0.1, 1)
    with pytest.raises(ValueError, match="has no order"):
        ReshuffledSGD(0.1, 1)
    with pytest.raises(ValueError, match="no stationary state"):
        linear_covariance(torch.diag(curvatures(1.0, 30.0)), torch.eye(2, dtype=DOUBLE), LinearSGD(0.1))
    assert math.isnan(float(LinearSGD(0.1).excess_loss(curvatures(21.0), curvatures(1.0))))
    assert not torch.isfinite(ReshuffledSGD(0.1, 3).variance(curvatures(-1.0, 20.5), curvatures(1.0, 1.0))).any()
