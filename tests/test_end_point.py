"""The predicted end point: mirror map, optimality, and two solvers that meet."""

import math

import pytest
import torch

from nets.diagonal import gd, initial_state
from theory.end_point import end_point, end_points, hypentropy, mirror_map, newton_end_point, weighted_l1_end_point
from theory.problem import Regression, gaussian_sparse
from theory.schedule import Schedule


@pytest.fixture(scope="module")
def problem():
    return gaussian_sparse(20, 50, 5)


def test_mirror_map_is_the_gradient_and_inverts_sinh():
    w = torch.tensor([0.3, -2.0, 1e-8, -1e-3], dtype=torch.float64, requires_grad=True)
    log_alpha = torch.tensor([-1.0, -3.0, -20.0, 0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(hypentropy(w, log_alpha), w)
    z = mirror_map(w.detach(), log_alpha)
    assert torch.allclose(gradient, z, atol=1e-9)
    assert torch.allclose(log_alpha.exp() / 2 * torch.sinh(2 * z), w.detach(), rtol=1e-12)
    assert mirror_map(torch.zeros(1, dtype=torch.float64), log_alpha[:1]) == 0
    tiny = mirror_map(torch.tensor([1.0], dtype=torch.float64), torch.tensor([-800.0], dtype=torch.float64))
    assert tiny.item() == pytest.approx((math.log(4.0) + 800) / 2, rel=1e-14)


@pytest.mark.parametrize("depth", [1.0, 20.0, 55.0, 200.0, 500.0])
def test_newton_solves_the_optimality_conditions(problem, depth):
    generator = torch.Generator().manual_seed(0)
    log_alpha = -depth * (0.8 + 0.4 * torch.rand(50, generator=generator, dtype=torch.float64))
    z0 = 0.1 * torch.randn(50, generator=generator, dtype=torch.float64)
    point = newton_end_point(problem, log_alpha, z0)
    assert point.residual < 1e-10
    z = mirror_map(point.w, log_alpha)
    support = point.w.abs() > 1e-9
    assert torch.allclose((z0 + point.dual @ problem.X)[support], z[support], rtol=1e-7, atol=1e-7)


def test_newton_and_the_linear_programme_meet(problem):
    gaps = []
    for depth in (30.0, 60.0, 100.0, 200.0):
        generator = torch.Generator().manual_seed(1)
        log_alpha = -depth * (0.8 + 0.4 * torch.rand(50, generator=generator, dtype=torch.float64))
        z0 = torch.randn(50, generator=generator, dtype=torch.float64)
        newton, programme = newton_end_point(problem, log_alpha, z0), weighted_l1_end_point(problem, log_alpha, z0)
        gaps.append(((newton.w - programme.w).norm() / programme.w.norm()).item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4
    assert gaps[3] < 1e-10


def test_method_follows_alpha(problem):
    assert end_point(problem, torch.full((50,), -59.0).double()).method == "newton"
    assert end_point(problem, torch.full((50,), -61.0).double()).method == "linear programme"


@pytest.mark.parametrize(("u0", "v0"), [(0.1, 0.0), (0.3, 0.2), (0.1, -0.25)])
def test_small_step_gd_ends_where_gradient_flow_is_predicted_to(problem, u0, v0):
    """Any start with |u| ≠ |v|: GD with a small step goes to argmin φ - ⟨z0, w⟩ at the α it started with."""
    start = initial_state(problem, u0, v0)
    flow = end_point(problem, start.log_alpha, start.z)
    gaps = []
    for eta in (0.08, 0.04):
        w = gd(problem, start, [Schedule(eta)], int(1600 / eta)).final.w[0, 0]
        assert (problem.X @ w - problem.y).norm() < 1e-6
        gaps.append((w - flow.w).norm().item())
    assert gaps[1] < 0.02 * flow.w.norm()
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.2)  # first order in the step size
    if v0:
        other = end_point(problem, start.log_alpha)  # forgetting z0 leads elsewhere
        assert (other.w - flow.w).norm() > 10 * gaps[1]


def test_runs_together_end_where_each_ends_alone(problem):
    generator = torch.Generator().manual_seed(3)
    depth = torch.tensor([1.0, 8.0, 40.0, 80.0, 200.0], dtype=torch.float64).unsqueeze(1)
    log_alpha = -depth * (0.8 + 0.4 * torch.rand(5, 50, generator=generator, dtype=torch.float64))
    log_alpha[1, ::3] = -torch.inf
    z0 = 0.1 * torch.randn(50, generator=generator, dtype=torch.float64)
    alone = [end_point(problem, each, z0) for each in log_alpha]
    assert [point.method for point in alone] == ["newton"] * 3 + ["linear programme"] * 2
    together = end_points(problem, log_alpha, z0)
    assert torch.allclose(together, torch.stack([point.w for point in alone]), rtol=1e-9, atol=1e-11)
    assert end_points(problem, log_alpha[:0]).shape == (0, 50)
    with pytest.raises(ValueError, match="of runs that stayed finite"):
        end_points(problem, log_alpha[0])


def test_singular_equations_are_solved_by_least_squares(problem):
    """Two samples that are the same make the dual's Hessian singular: ν is not unique, w is."""
    twice = Regression(
        torch.cat([problem.X, problem.X[:2]]), torch.cat([problem.y, problem.y[:2]]), problem.X_test, problem.y_test
    )
    log_alpha = torch.full((50,), -6.0, dtype=torch.float64)
    assert torch.allclose(end_point(twice, log_alpha).w, end_point(problem, log_alpha).w, rtol=1e-8, atol=1e-10)


def test_dead_coordinates_stay_out(problem):
    log_alpha = torch.full((50,), -5.0, dtype=torch.float64)
    log_alpha[::2] = -torch.inf
    assert (end_point(problem, log_alpha).w[::2] == 0).all()
    log_alpha = torch.full((50,), -100.0, dtype=torch.float64)
    log_alpha[::2] = -torch.inf
    assert (end_point(problem, log_alpha).w[::2] == 0).all()


def test_no_interpolator_is_said():
    X = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    impossible = Regression(X, torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), X[:0], torch.zeros(0).double())
    for depth in (-5.0, -100.0):
        with pytest.raises(ValueError, match="no interpolator"):
            end_point(impossible, torch.full((2,), depth, dtype=torch.float64))
    with pytest.raises(ValueError, match="without NaN"):
        end_point(impossible, torch.tensor([float("nan"), 0.0], dtype=torch.float64))
