"""The mean-field closure: exact where it should be, and stabilising."""

import math

import torch

from theory.closure import mean_field_closure
from theory.problem import gaussian_sparse


def expected_loss_after(problem, a, b, eta):
    """Mean training loss after one and two SGD steps (B = 1) by enumerating all draws."""
    n = problem.n

    def step(a, b):
        w = (a**2 - b**2) / 4
        r = w @ problem.X.T - problem.y
        g = eta * r.unsqueeze(-1) * problem.X
        return (a.unsqueeze(-2) * (1 - g)).flatten(0, -2), (b.unsqueeze(-2) * (1 + g)).flatten(0, -2)

    def loss(a, b):
        return (((a**2 - b**2) / 4 @ problem.X.T - problem.y).square().sum(-1) / (2 * n)).mean()

    a1, b1 = step(a, b)
    a2, b2 = step(a1, b1)
    return loss(a1, b1), loss(a2, b2)


def test_first_steps_match_enumeration_to_third_order():
    """One SGD step: the closure's expected loss is exact up to O(η³), i.e. its mean and covariance are."""
    problem = gaussian_sparse(6, 9, 2)
    log_a = torch.full((9,), math.log(0.7), dtype=torch.float64)
    log_b = torch.full((9,), math.log(0.5), dtype=torch.float64)
    errors = []
    for eta in (0.02, 0.01, 0.005):
        curve = mean_field_closure(problem, log_a, log_b, torch.full((1, 2), eta).double(), torch.tensor([0, 1, 2]))
        one, _ = expected_loss_after(problem, log_a.exp(), log_b.exp(), eta)
        errors.append(abs((curve.level[1, 0] - one).item()))
    start = curve.level[0, 0]
    w = (log_a.exp() ** 2 - log_b.exp() ** 2) / 4
    assert torch.isclose(start, (problem.X @ w - problem.y).square().mean() / 2, rtol=1e-12)
    orders = [math.log2(errors[k] / errors[k + 1]) for k in range(2)]
    assert min(orders) > 1.9  # the slow variables follow the log-mean: the level is exact to first order in η


def test_level_stabilises_and_cells_are_independent():
    problem = gaussian_sparse(20, 40, 4)
    logs = torch.full((40,), math.log(0.1), dtype=torch.float64)
    record = torch.tensor([0, 300, 600])
    etas = torch.tensor([[0.05], [0.5]], dtype=torch.float64).expand(2, 600)
    both = mean_field_closure(problem, logs, logs, etas, record)
    alone = mean_field_closure(problem, logs, logs, etas[1:], record)
    assert torch.allclose(both.level[:, 1], alone.level[:, 0], rtol=1e-9)
    assert (both.log_alpha.diff(dim=0) < 0).all()
    assert both.level[2, 0] < 1e-2 * both.level[0, 0]  # a small step converges
    assert both.level[2, 1] > 0.5 * both.level[1, 1] > 0.05  # a large one keeps its level
