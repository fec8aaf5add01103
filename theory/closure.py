"""Mean-field closure: the stabilised loss level and the α-decay from data, initialisation and step size alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from theory.alpha_decay import log_decrement
from theory.prediction import Reference
from theory.problem import Regression

SOURCE = Reference("valleydrift", 2026, "mean-field closure: slow (ln a, ln b) and the residual's covariance, README")


@dataclass(frozen=True, eq=False)
class ClosureCurve:
    """What the closure predicts for several step-size sequences at once.

    Attributes:
        steps: recorded steps, shape (T,).
        level: predicted mean training loss (‖m‖² + tr M)/2n, shape (T, cells).
        log_alpha: predicted ln α, shape (T, cells, d).
    """

    steps: Tensor
    level: Tensor
    log_alpha: Tensor


def mean_field_closure(
    problem: Regression, log_a: Tensor, log_b: Tensor, step_sizes: Tensor, record: Tensor
) -> ClosureCurve:
    """Iterate the closure for SGD with B = 1, one map per SGD step.

    Slow coordinates A = ln|a|, B = ln|b|; w = (e^{2A} - e^{2B})/4; mean residual m = Xw - y; residual covariance M;
    s_i² = m_i² + M_ii; K = X diag((e^{2A} + e^{2B})/2) Xᵀ; per step
        A ← A - (η/n)Xᵀm - ½f,   B ← B + (η/n)Xᵀm - ½f,   f_j = (1/n) Σ_i F(η² s_i² x_ij²),
        M ← M - (η/n)(KM + MK) + (η²/n) K diag(s²) K - (η²/n²) K m mᵀ K.
    M grows where K is beyond mean-square stability, the growth shrinks a and b, and that lowers K: self-stabilisation.

    Args:
        log_a, log_b: initial ln|a|, ln|b|, shape (d,).
        step_sizes: η_k, shape (cells, steps).
        record: steps to record, ascending, shape (T,).
    """
    X, y, n = problem.X, problem.y, problem.n
    squares = X.square()
    logs = squares.log()
    cells, steps = step_sizes.shape
    A, B = log_a.to(X).expand(cells, -1).clone(), log_b.to(X).expand(cells, -1).clone()
    M = X.new_zeros(cells, n, n)
    wanted = {int(step): row for row, step in enumerate(record.tolist())}
    level = X.new_full((len(wanted), cells), torch.nan)
    log_alpha = X.new_full((len(wanted), cells, problem.d), torch.nan)
    for k in range(steps + 1):
        a2, b2 = (2 * A).exp(), (2 * B).exp()
        m = (a2 - b2) / 4 @ X.T - y
        s2 = m.square() + M.diagonal(dim1=-2, dim2=-1)
        if k in wanted:
            level[wanted[k]], log_alpha[wanted[k]] = s2.mean(-1) / 2, A + B
        if k == steps:
            break
        eta = step_sizes[:, k].to(X).unsqueeze(-1)
        K = (X * ((a2 + b2) / 2).unsqueeze(-2)) @ X.T
        strength = (eta.square() * s2).unsqueeze(-1)
        shrink = log_decrement(strength * squares, strength.log() + logs).mean(-2) / 2
        pull = eta / n * (m @ X)
        A, B = A - pull - shrink, B + pull - shrink
        kick = (eta / n).unsqueeze(-1) * (K @ m.unsqueeze(-1))
        # Half of the symmetric K diag(s²) K with K M, so that one product and its transpose are both.
        half = K * (strength / (2 * n)) - (eta / n).unsqueeze(-1) * M
        half = K @ half
        M = torch.baddbmm(M, kick, kick.mT, alpha=-1).add_(half).add_(half.mT)
    return ClosureCurve(record, level, log_alpha)
