"""Linear teacher and student, and the two-unit toy: theory, runs, and the literal recursions behind both."""

import numpy as np
import pytest
import torch
from scipy import stats

from nets.gelu_toy import START, toy_sgd
from nets.teacher_student import diagonal_sgd, general_sgd
from theory import teacher_student as theory
from theory.collapse_data import LinearTeacher, linear_teacher, toy_data
from theory.gelu_toy import merging_rate
from theory.minibatch import Minibatch
from theory.normals import fill_row, normals_key
from theory.schedule import Schedule
from validation.statistics import SIGMAS

ETA = 3 / 1024


@pytest.fixture(scope="module")
def teacher() -> LinearTeacher:
    return linear_teacher()


def test_data_are_the_published_draws(teacher):
    """Chen et al.: Var(y) = .0039404, S* in [.0042, 1.267], losses without noise .4601 and 1.51e-5."""
    assert teacher.scale / 65536 == pytest.approx(0.0039404, abs=5e-8)
    assert float(teacher.singular[0]) == pytest.approx(1.267, abs=6e-4)
    assert float(teacher.singular[-1]) == pytest.approx(0.0042, abs=5e-5)
    assert float(teacher.train_loss(teacher.singular)) == pytest.approx(0.4601, abs=5e-5)
    assert float(teacher.test_loss(teacher.singular)) == pytest.approx(1.51e-5, abs=5e-8)


def test_losses_from_modes_are_those_of_the_matrices():
    teacher, draws = linear_teacher(40, 6, 2), np.random.RandomState(0)

    def haar(size):
        q, r = np.linalg.qr(draws.normal(size=(size, size)))
        return q * np.sign(np.diag(r))

    left, right = haar(6), haar(6)
    W = left @ np.diag([0.5, 1, 0, 0, 0, 0]) @ right
    left, right = haar(40), haar(6)
    X = left[:, :6] @ right
    Y = X @ W + 0.5 * draws.standard_normal((40, 6)) / 6**0.5
    assert np.allclose(X.T @ X, np.eye(6))
    V, _, U = np.linalg.svd(X.T @ Y)
    s = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    guess = V @ np.diag(s.numpy()) @ U
    scale = Y.var() * 40 * 6
    assert float(teacher.train_loss(s)) == pytest.approx(0.5 * ((Y - X @ guess) ** 2).sum() / scale)
    assert float(teacher.test_loss(s)) == pytest.approx(((guess - W) ** 2).mean() / scale)


def test_diagonal_sgd_is_the_literal_recursion(teacher):
    schedule = Schedule(ETA, ((0.5, 10.0),))
    run = diagonal_sgd(teacher, [0.0, 15.0], schedule, 600, [0, 300, 600], [4, 7], root_seed=9)
    eta = schedule.step_sizes(600).numpy()
    for k, seed in enumerate((4, 7)):
        noise = np.empty(600 * 64)
        fill_row(normals_key(9, f"mode noise {seed}"), 0, 0, noise)
        noise = noise.reshape(600, 64)
        for level, sigma in enumerate((0.0, 15.0)):
            u, v = np.ones(64), np.ones(64)
            for step in range(600):
                r = u * v - teacher.singular.numpy() + sigma * noise[step]
                u, v = u - eta[step] * r * v, v - eta[step] * r * u
            assert np.allclose(run[2, level, k], u * v, rtol=1e-9)
    assert (run[0] == 1).all()
    alone = diagonal_sgd(teacher, [15.0], schedule, 600, [300], [7], root_seed=9)
    assert np.array_equal(alone[0, 0, 0], run[1, 1, 1])


def test_mode_laws_against_the_network(teacher):
    sigma, steps = 15.0, 3000
    run = diagonal_sgd(teacher, [sigma], Schedule(ETA), steps, [steps], range(512))[0, 0]
    law = theory.mode_laws(teacher.singular.numpy(), sigma, (ETA,), (steps,))[0]
    z = (run.mean(0) - law.mean()) / law.standard_deviation() * 512**0.5
    assert np.abs(z).max() < 5
    assert (z**2).sum() < stats.chi2.ppf(stats.norm.cdf(SIGMAS), 64)
    uniform = stats.norm.ppf(np.clip(law.cdf(np.log(run.T)), 1e-12, 1 - 1e-12))
    assert stats.kstest(uniform[::8].ravel(), "norm").pvalue > 1e-4


def test_soft_threshold_and_limits(teacher):
    S = teacher.singular.numpy()
    law = theory.mode_laws(S[:8], 10.0, (ETA,), (80_000,))[0]
    assert np.allclose(law.mean(), S[:8] - theory.soft_threshold(ETA, 10.0), rtol=2e-3)
    assert np.allclose(theory.logistic(S, 1e4, 1.0), S, rtol=1e-12)
    assert theory.logistic(np.array([-0.5]), 40.0, 1.0)[0] == pytest.approx(0.5 / 1.5 * np.exp(-40.0), rel=1e-6)
    low, high = theory.published_bounds(S, ETA, 20.0, 48.8)
    assert (low <= high).all()
    # What the paper's own code draws after the drop, and the average over the Gamma start that replaces it.
    before, _ = theory.published_bounds(S, ETA, 20.0, 50_000 / 1024)
    after, _ = theory.published_bounds(S, ETA / 10, 20.0, 1000 / 1024, before)
    assert after[0] == pytest.approx(1.127, abs=5e-4)
    assert theory.averaged_logistic(S, ETA, ETA / 10, 20.0, 1000 * ETA)[0] == pytest.approx(1.170, abs=5e-4)
    with pytest.raises(ValueError, match="logistic"):
        theory.mode_laws(S, 0.0, (ETA,), (10,))


def test_expected_losses_are_averages(teacher):
    s = np.abs(np.random.default_rng(0).normal(0.5, 0.2, (4000, 64)))
    train, test = theory.expected_losses(teacher, s.mean(0), s.std(0))
    assert train == pytest.approx(float(teacher.train_loss(torch.from_numpy(s)).mean()))
    assert test == pytest.approx(float(teacher.test_loss(torch.from_numpy(s)).mean()))


@pytest.mark.parametrize("size", [3, 20])
def test_general_sgd_is_the_gradient(size):
    rng = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(20, d, generator=rng, dtype=torch.float64) for d in (5, 4))
    V, U = (torch.randn(*shape, generator=rng, dtype=torch.float64) / 2 for shape in ((5, 3), (3, 4)))
    batch = Minibatch(size, replacement=False)
    vs, us = general_sgd(X, Y, (V, U), Schedule(0.05), 1, [0, 1], [2, 3], batch)
    assert torch.equal(vs[0, 0], V)
    if size == 20:
        V, U = V.requires_grad_(), U.requires_grad_()
        gradient = torch.autograd.grad((X @ V @ U - Y).square().sum() / 2 / 20, [V, U])
        assert torch.allclose(vs[1, 0], V - 0.05 * gradient[0])
        assert torch.allclose(us[1, 1], U - 0.05 * gradient[1])
    else:
        assert not torch.equal(vs[1, 0], vs[1, 1])


def test_full_batch_of_orthonormal_inputs_needs_only_their_products_with_the_targets():
    rng = torch.Generator().manual_seed(1)
    X = torch.linalg.qr(torch.randn(40, 5, generator=rng, dtype=torch.float64)).Q
    Y = torch.randn(40, 4, generator=rng, dtype=torch.float64)
    start = tuple(torch.randn(*shape, generator=rng, dtype=torch.float64) / 2 for shape in ((5, 3), (3, 4)))
    plain, few = (Minibatch(n, replacement=False) for n in (40, 5))
    every = general_sgd(X, Y, start, Schedule(2.0, ((0.5, 10.0),)), 60, [30, 60], [0], plain)
    short = Schedule(2.0 * 5 / 40, ((0.5, 10.0),))
    same = general_sgd(torch.eye(5).double(), X.T @ Y, start, short, 60, [30, 60], [0], few)
    for one, other in zip(every, same, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_toy_is_torchs_own_sgd():
    problem = toy_data()
    weights, distance = toy_sgd(problem, [(0.2, 0.0), (0.1, 0.3)], 50, [5], every=50)
    w, a = (torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in START)
    optimiser = torch.optim.SGD([w, a], lr=0.2, momentum=0.9)
    for _ in range(50):
        optimiser.zero_grad()
        h = torch.nn.functional.gelu(problem.X * w) @ a
        ((h - problem.y).square().sum() / 16).backward()
        optimiser.step()
    expected = torch.cat([w, a]).detach().numpy()
    assert np.allclose(weights[-1, 0, 0], expected, rtol=1e-12)
    assert distance[-1, 0, 0] == pytest.approx((expected[0] - expected[1]) ** 2 + (expected[2] - expected[3]) ** 2)
    assert not np.allclose(weights[-1, 1, 0], expected, rtol=0.1)


def test_merged_units_stay_merged_and_merging_needs_noise():
    problem = toy_data()
    weights, _ = toy_sgd(problem, [(0.1, 0.3)], 400, range(3), every=400, start=((0.8, 0.8), (-0.5, -0.5)))
    assert (weights[-1, ..., 0] == weights[-1, ..., 1]).all()
    assert (weights[-1, ..., 2] == weights[-1, ..., 3]).all()
    law = merging_rate(problem, 0.1, 0.0, 0.9)
    assert law.rate == 0
    assert abs(law.flat) < 1e-8


def test_merging_rate_scales_as_step_size_and_noise_squared_and_is_right():
    problem = toy_data()
    small = [merging_rate(problem, eta, sigma, 0.9).rate for eta, sigma in ((1e-3, 0.1), (2e-3, 0.1), (1e-3, 0.2))]
    assert small[1] / small[0] == pytest.approx(4, rel=0.01)
    assert small[2] / small[0] == pytest.approx(4, rel=1e-6)
    plain = merging_rate(problem, 1e-2, 0.1).rate  # momentum acts as η/(1-μ)
    assert small[0] == pytest.approx(plain, rel=0.01)
    _, distance = toy_sgd(problem, [(0.2, 0.1)], 9000, range(48), every=3000)
    law = merging_rate(problem, 0.2, 0.1, 0.9)
    fall = np.log(distance[1, 0] / distance[3, 0]) / 6000
    error = SIGMAS * fall.std(ddof=1) / 48**0.5 + law.error * law.rate
    assert abs(fall.mean() - law.rate) < error
    assert abs(fall.mean() - law.rate / 2) > error


def test_bad_input_is_one_clear_sentence(teacher):
    problem = toy_data()
    cases = [
        (lambda: diagonal_sgd(teacher, [1.0], Schedule(ETA), 10, [20], [0]), "up to 10"),
        (lambda: diagonal_sgd(teacher, [-1.0], Schedule(ETA), 10, [10], [0]), "noise levels"),
        (lambda: toy_sgd(problem, [(0.0, 0.1)], 10, [0]), "positive"),
        (lambda: toy_sgd(problem, [], 10, [0]), "setting"),
        (lambda: merging_rate(problem, 50.0, 0.1), "unstable"),
        (lambda: linear_teacher(10, 20), "rank"),
        (lambda: general_sgd(torch.ones(3, 2), torch.ones(3, 2), (torch.ones(2, 2), torch.ones(3, 2)), Schedule(1.0),
                             1, [1], [0], Minibatch()), "chain"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
