"""Stochastic collapse in one dimension: criterion, laws of the quartic well, threshold of the single neuron."""

import mpmath
import numpy as np
import pytest
import sympy as sp
from scipy import stats

from simulators.neuron import REACH, TABLE_ERROR, neuron_sums, single_neuron, tabulate
from simulators.scalar import quartic_well as simulate
from theory import collapse
from theory.collapse_data import neuron_data
from theory.normals import fill_row, normals_key
from theory.one_dimensional import geometric_brownian_motion, logistic, ornstein_uhlenbeck, quartic_well
from theory.stochastic_logistic import StochasticLogistic, _tr_bdf2, evolve, log_step_moments, start
from theory.symbolic import SymbolicModel
from validation.statistics import SIGMAS


def test_criterion_is_the_exponent_derived_from_the_sde():
    y, mu, zeta = quartic_well().variable, *sp.symbols("mu zeta", positive=True)
    ours = collapse.lyapunov_exponent(y**4 / 4 - mu * y**2 / 2, zeta**2 * y**2 / 2, y)
    theirs = quartic_well().lyapunov_exponent(0)
    assert sp.simplify(ours - theirs.subs({s: {"mu": mu, "zeta": zeta}[s.name] for s in theirs.free_symbols})) == 0
    with pytest.raises(ValueError, match="not invariant"):
        collapse.lyapunov_exponent(y**2 / 2, sp.Integer(1), y)


@pytest.mark.parametrize(
    ("model", "values"),
    [(quartic_well, {"mu": 1.5, "zeta": 1.2}), (geometric_brownian_motion, {"mu": 0.1, "sigma": 0.7}),
     (logistic, {"s": 0.8, "sigma": 1.1})],
)  # fmt: skip
def test_measured_exponent_is_the_symbolic_one(model, values):
    exact = model().lyapunov_exponent(0)
    exact = float(exact.subs({symbol: values[symbol.name] for symbol in exact.free_symbols}))
    for side in (1, -1):
        assert collapse.measured_exponent(model().to_sde(**values), 0.0, side) == pytest.approx(exact, abs=1e-6)


def test_measured_exponent_says_when_the_point_is_left():
    with pytest.raises(ValueError, match="not invariant"):
        collapse.measured_exponent(ornstein_uhlenbeck().to_sde(rate=1.0, sigma=1.0), 0.0)


def test_neuron_exponent_is_ito_calculus():
    """ln(w₁ + w₂) of h = w₁w₂x near the origin: d = -(1/n)Σ r x - ½Σ s²x², r = -y; SymbolicModel derives it."""
    w1, w2, x = sp.symbols("w1 w2 x", real=True)
    sde = SymbolicModel(w1 * w2 * x, [w1, w2], [x]).label_noise_sde(2)
    drift, _ = sde.ito(sp.log(w1 + w2))
    xs = [point[0] for point in sde.points]
    law = -sum(r * p for r, p in zip(sde.residuals, xs, strict=True)) / 2
    law -= sum(s**2 * p**2 for s, p in zip(sde.amplitudes, xs, strict=True)) / 2
    assert sp.simplify(drift - law) == 0
    inputs, targets = neuron_data(32, 0.1, 0)
    eta, threshold = np.array([0.5, 3.0]), collapse.neuron_threshold(inputs, targets)
    exponent = collapse.neuron_exponent(inputs, targets, eta)
    assert np.allclose(exponent, np.mean(inputs**2) * (threshold - eta / 2))
    assert (np.sign(exponent) == [1, -1]).all()


def test_eulers_threshold_is_below_the_sdes_by_its_order():
    x, y = neuron_data(32, 0.1, 1)
    limit = collapse.neuron_threshold(x, y)
    gaps = [limit - collapse.neuron_threshold(x, y, h) for h in (0.01, 0.005)]
    assert gaps[0] / limit == pytest.approx(1.5 * np.mean(x * y) * 0.01, rel=0.05)
    assert gaps[0] / gaps[1] == pytest.approx(2.0, rel=0.02)


def test_log_step_moments_against_sampling():
    first, second = log_step_moments(np.array([0.004]), np.array([0.1]))
    sample = np.log(np.abs(1 + 0.004 + 0.1 * np.random.default_rng(0).standard_normal(400_000)))
    assert abs(first[0] - sample.mean()) < SIGMAS * sample.std() / 400_000**0.5
    assert second[0] == pytest.approx(sample.var(), rel=0.02)
    assert first[0] == pytest.approx(0.004 - 0.005 - 8e-6 + 4e-5 - 0.75e-4, rel=0.005)


def test_fokker_planck_reaches_the_gamma_law_and_keeps_mass():
    process = StochasticLogistic(np.array([0.2, 0.5, 2.0]), 2.0, np.array([0.5, 1.0, 0.7]))
    law = evolve(process, start(process, 0.3, 400.0), 400.0)
    assert np.allclose(law.mass.sum(1), 1, atol=1e-9)
    assert law.mass.min() > -1e-9
    gamma = stats.gamma(process.shape, scale=process.scale)
    assert np.allclose(law.mean(), gamma.mean(), rtol=1e-3)
    assert np.allclose(law.standard_deviation(), gamma.std(), rtol=1e-3)
    x = np.array([0.1, 0.5, 1.0])
    assert np.allclose(law.cdf(np.log(x)), process.stationary_cdf(x), atol=2e-3)


def test_fokker_planck_solver_is_tr_bdf2():
    """One trapezoidal stage to γ dt, one BDF2 stage to dt, with the whole matrix of rates."""
    draws, cells, processes = np.random.default_rng(0), 7, 3
    up, down = draws.uniform(0.1, 30.0, (2, cells - 1, processes))
    mass, steps, gamma = draws.random((cells, processes)), [0.02, 0.5, 3.0], 2 - np.sqrt(2)
    expected = mass.T.copy()
    for p in range(processes):
        Q = np.diag(up[:, p], -1) + np.diag(down[:, p], 1)
        Q -= np.diag(Q.sum(0))
        for dt in steps:
            implicit = np.eye(cells) - gamma / 2 * dt * Q
            middle = np.linalg.solve(implicit, expected[p] + gamma / 2 * dt * Q @ expected[p])
            known = (middle - (1 - gamma) ** 2 * expected[p]) / (gamma * (2 - gamma))
            expected[p] = np.linalg.solve(implicit, known)
    _tr_bdf2(up, down, mass, np.array(steps))
    assert np.allclose(mass.T, expected, rtol=1e-11, atol=1e-13)


def test_far_down_the_law_is_a_brownian_motion():
    """Without the wall's reach ln x - ln x₀ ~ N(at, s²t)."""
    process = StochasticLogistic(np.array([-1.2]), 1e-12, np.array([0.9]))
    law = evolve(process, start(process, -30.0, 20.0), 20.0)
    y = np.array([-70.0, -54.0, -50.0])
    assert np.allclose(law.cdf(y)[0], stats.norm.cdf(y, -30 - 24, 0.9 * 20**0.5), atol=2e-3)


def test_fokker_planck_against_paths_of_the_exact_solution():
    zeta, paths = np.array([1.4, 1.9]), 4096
    theta = 2 * np.random.default_rng(3).standard_normal(paths)
    run = simulate(1.5, zeta, theta, 0.02, [500, 1500], 5, "collapse test")
    times, threshold = np.array([10.0, 30.0]), 1e-4
    predicted = collapse.collapse_probability(1.5, zeta, times, threshold, 2.0)
    measured = (run**2 < threshold).mean(-1)
    assert (np.abs(measured - predicted) < SIGMAS * np.sqrt(predicted * (1 - predicted) / paths)).all()


def test_split_scheme_is_second_order_in_the_well_and_exact_near_zero():
    process, paths = collapse.quartic_well(1.5, np.array([1.0])), 60_000
    x = simulate(1.5, [1.0], np.full(paths, 1.0), 0.05, [800], 1, "order")[0, 0] ** 2
    assert stats.kstest(x, lambda at: process.stationary_cdf(at)[0]).pvalue > 1e-4
    tiny = simulate(0.3, [2.0], np.full(4096, 1e-60), 1.0, [7], 1, "near zero")[0, 0]
    key, total, xi = normals_key(1, "near zero"), np.zeros(4096), np.empty(4096)
    for step in range(7):
        fill_row(key, step, 0, xi)
        total += 0.3 - 2.0 + 2.0 * xi
    assert np.allclose(np.log(tiny) - np.log(1e-60), total, rtol=1e-12, atol=1e-9)


def test_euler_is_the_published_recursion():
    theta = np.random.default_rng(0).standard_normal(300)
    fast = simulate(1.5, [0.5, 2.5], theta, 0.0025, [0, 40], 3, "literal", "euler")
    key, xi = normals_key(3, "literal"), np.empty(300)
    assert (fast[0] == theta).all()
    for level, zeta in enumerate((0.5, 2.5)):
        slow = theta.copy()
        for step in range(40):
            fill_row(key, step, level * 512, xi)  # two blocks of 256 a level
            slow = slow + 0.0025 * (1.5 * slow - slow**3) + np.sqrt(0.0025) * zeta * slow * xi
        assert np.allclose(fast[1, level], slow, rtol=1e-12)


def test_quartic_phases():
    assert collapse.quartic_modes(1.5, 1.0) == pytest.approx((-(0.5**0.5), 0.5**0.5))
    assert collapse.quartic_modes(1.5, 1.5) == (0.0,)
    theta = np.linspace(-4, 4, 160_001)
    assert collapse.quartic_density(1.5, 1.0, theta).sum() * 5e-5 == pytest.approx(1, abs=1e-5)
    at = theta[80_500:][collapse.quartic_density(1.5, 1.0, theta[80_500:]).argmax()]
    assert at == pytest.approx(0.5**0.5, abs=1e-3)


def test_neuron_kernel_is_euler_with_the_same_covariance():
    """A literal twin with numpy's tanh; the kernel's 2 × 2 factor reproduces ηζ²/m ΦᵀΦ."""
    x, y = neuron_data(32, 0.1, 2)
    start_at = np.random.default_rng(1).standard_normal((200, 2)) * np.array([[0.7, 1.1]])
    start_at[:40] *= 1e-8  # relative accuracy is needed down there
    start_at[40:44, 0] = [11.0, -15.0, 40.0, -300.0]  # the last are beyond the table
    fast = single_neuron(x, y, [0.3, 1.7], start_at, 0.01, [0, 60], 4, "twin")
    assert (fast[0, 1] == start_at).all()
    key, xi = normals_key(4, "twin"), np.empty(256)
    for level, eta in enumerate((0.3, 1.7)):
        w = start_at.copy()
        for step in range(60):
            noise = []
            for block in range(2):
                fill_row(key, step, (level * 2 + block) * 256, xi)
                noise.append(xi.copy().reshape(2, 128).T)
            noise = np.concatenate(noise)[:200]
            t, slope = np.tanh(w[:, :1] * x), np.cosh(w[:, :1] * x) ** -2
            jacobian = np.stack([w[:, 1:] * x * slope, t], -1)  # (paths, m, 2)
            drift = -((w[:, 1:] * t - y)[..., None] * jacobian).mean(1)
            one = np.sign(w[:, 1]) * np.sqrt((jacobian[..., 0] ** 2).sum(1))
            cross = (jacobian[..., 0] * jacobian[..., 1]).sum(1) / one
            rest = np.linalg.norm(jacobian[..., 1] - jacobian[..., 0] * (cross / one)[:, None], axis=1)
            factor = np.stack([np.stack([one, 0 * one], -1), np.stack([cross, rest], -1)], 1)
            gram = np.einsum("pik,pil->pkl", jacobian, jacobian)
            assert np.allclose(factor @ factor.transpose(0, 2, 1), gram, rtol=1e-12, atol=1e-30)
            kick = np.sqrt(eta * 0.01 / 32) * np.einsum("pkl,pl->pk", factor, noise)
            w = w + 0.01 * drift + kick
        assert np.allclose(fast[1, level], w, rtol=1e-10, atol=0), np.abs(fast[1, level] / w - 1).max()


def test_neuron_sums_keep_their_digits_at_every_size():
    """Against 40 digits: where tanh z - z/cosh²z is the difference of nearly equal numbers too."""
    x, y = neuron_data(5, 0.1, 1)
    for w in (1e-9, 1e-3, 0.13, 0.26, 1.0, 7.0):
        with mpmath.workdps(60):
            t = [mpmath.tanh(w * mpmath.mpf(float(part))) for part in x]
            q = [mpmath.mpf(float(part)) * (1 - value**2) for part, value in zip(x, t, strict=True)]
            length, along = mpmath.sqrt(sum(part**2 for part in q)), mpmath.fdot(t, q)
            rest = [a - along / length**2 * b for a, b in zip(t, q, strict=True)]
            exact = [
                mpmath.fdot(y, t) / w, mpmath.fdot(y, q), length, along / length / w,
                mpmath.sqrt(sum(part**2 for part in rest)) / w**3,
            ]  # fmt: skip
            assert np.allclose(neuron_sums(x, y, np.array(w))[0], [float(part) for part in exact], rtol=1e-13), w


@pytest.mark.parametrize("samples", ["published", "one", "equal", "of all sizes", "some zero", "pairs"])
def test_neuron_table_is_right_to_its_stated_error(samples):
    draws = np.random.default_rng(0)
    x = {
        "published": neuron_data(32, 0.1, 0)[0], "one": np.array([-3.0]), "equal": np.full(4, 0.2),
        "of all sizes": 10 ** draws.uniform(-9, 3, 16), "some zero": np.array([0, 0, 1, -0.3]),
        "pairs": np.array([1.0, -1.0, 0.5, -0.5]),
    }[samples]  # fmt: skip
    y = draws.standard_normal(len(x))
    table = tabulate(x, y)
    w = np.r_[1e-300, draws.uniform(0, REACH, 2000)] / np.abs(x).max()
    values, sizes = neuron_sums(x, y, np.maximum(w, 1e-9))
    assert table.error < TABLE_ERROR
    assert (np.abs(table(w) - values) <= TABLE_ERROR * sizes).all()


def test_noise_of_a_neuron_step_has_the_covariance_of_one_motion_a_sample():
    """Moments of one step from one point against the literal recursion's, exactly known: mean w - h∇L, ηhζ²/m ΦᵀΦ."""
    x, y = neuron_data(32, 0.1, 3)
    paths, eta, h, at = 400_000, 1.5, 0.01, np.array([0.8, -1.3])
    move = single_neuron(x, y, [eta], np.tile(at, (paths, 1)), h, [1], 0, "moments", zeta=0.7)[0, 0] - at
    t = np.tanh(at[0] * x)
    jacobian = np.stack([at[1] * x * (1 - t**2), t], 1)
    mean, covariance = -h * (at[1] * t - y) @ jacobian / 32, eta * h * 0.49 / 32 * jacobian.T @ jacobian
    spread = np.sqrt(np.diag(covariance))
    assert (np.abs(move.mean(0) - mean) < SIGMAS * spread / paths**0.5).all()
    error = np.sqrt((covariance**2 + np.outer(spread, spread) ** 2) / paths)
    assert (np.abs(np.cov(move.T) - covariance) < SIGMAS * error).all()


def test_shrinking_probability_is_that_of_the_neuron():
    x, y = neuron_data(32, 0.1, 5)
    eta, paths = np.array([1.6, 2.0, 2.4]) * collapse.neuron_threshold(x, y), 512
    w = single_neuron(x, y, eta, np.full((paths, 2), 1e-30), 0.01, [1000], 0, "shrink")[0]
    share = (np.linalg.norm(w, axis=-1) < 2**0.5 * 1e-30).mean(-1)
    exponent, spread = collapse.neuron_exponent(x, y, eta, step=0.01), np.sqrt(eta * np.mean(x * x))
    p = collapse.shrinking_probability(exponent, spread, 10.0)
    assert p[0] < 0.4
    assert p[2] > 0.6
    assert (np.abs(share - p) < SIGMAS * np.sqrt(p * (1 - p) / paths)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate(1.5, [1.0], np.ones(4), -1.0, [5], 0, "x"), "positive step"),
        (lambda: simulate(1.5, [1.0], np.ones(4), 0.1, [5, 5], 0, "x"), "ascending"),
        (lambda: simulate(1.5, [1.0], np.full(4, np.nan), 0.1, [5], 0, "x"), "NaN"),
        (lambda: simulate(1.5, [1.0], np.ones(4), 0.1, [5], 0, "x", "heun"), "scheme"),
        (lambda: single_neuron(np.ones(3), np.ones(2), [1.0], np.ones((2, 2)), 0.1, [1], 0, "x"), "same length"),
        (lambda: single_neuron(np.ones(3), np.ones(3), [1.0], np.ones((2, 3)), 0.1, [1], 0, "x"), "paths, 2"),
        (lambda: single_neuron(np.zeros(3), np.ones(3), [1.0], np.ones((2, 2)), 0.1, [1], 0, "x"), "not all inputs"),
        (lambda: single_neuron(np.ones(3), np.ones(3), [-1.0], np.ones((2, 2)), 0.1, [1], 0, "x"), ">= 0"),
        (lambda: StochasticLogistic(1.0, 2.0, 0.0), "positive"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
