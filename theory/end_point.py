"""Where the diagonal network ends: the hypentropy mirror map and argmin {φ_α(w) : Xw = y}.

SGD and its SDE move z = ½ ln|a/b| inside the row space of X, while α decays. Whatever interpolator is reached then
satisfies w_j = (α_j/2) sinh 2z_j with z = z(0) + Xᵀν, which is the minimiser of a Bregman potential at the final α.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from theory.prediction import PPF, Reference
from theory.problem import Regression

SOURCE = Reference(PPF, 2021, "Theorem 1, at the final α")
SMALL_ALPHA = -60.0


@dataclass(frozen=True, eq=False)
class EndPoint:
    """A predicted interpolator: weights w (d,), dual variable ν (n,), relative residual ‖Xw - y‖/‖y‖, method used."""

    w: Tensor
    dual: Tensor
    residual: float
    method: str


def mirror_map(w: Tensor, log_alpha: Tensor) -> Tensor:
    """z = φ'_α(w) = ½ arcsinh(2w/α), in logs: exact however small α is."""
    size = (2 * w.abs()).log() - log_alpha
    # arcsinh(e^s) = s + ln(1 + √(1 + e^{-2s})) for large s.
    large = size + torch.log1p(torch.sqrt(1 + torch.exp(-2 * size.clamp(min=0.0))))
    return torch.sign(w) * torch.where(size > 0, large, torch.asinh(size.clamp(max=0.0).exp())) / 2


def hypentropy(w: Tensor, log_alpha: Tensor) -> Tensor:
    """φ_α(w) = Σ_j ½[w arcsinh(2w/α) - ½√(4w² + α²) + α/2], shape (...); its gradient is :func:`mirror_map`.

    Source: Pesme et al. (2021), in this package's scaling.
    """
    alpha = log_alpha.exp()
    return (w * mirror_map(w, log_alpha) - (4 * w.square() + alpha.square()).sqrt() / 4 + alpha / 4).sum(-1)


def end_point(problem: Regression, log_alpha: Tensor, z0: Tensor | None = None) -> EndPoint:
    """argmin {φ_α(w) - ⟨z0, w⟩ : Xw = y}, the interpolator that SGD is predicted to reach with final ln α.

    Newton's method on the dual, in logs; once every ln α_j is below -60, the weighted-ℓ1 linear programme
    min Σ_j (ln(1/α_j)|w_j| - 2 z0_j w_j), to which the problem has then converged to rounding.

    Args:
        log_alpha: final ln|α_j|, shape (d,). Entries of -inf fix w_j = 0.
        z0: initial mirror coordinate ½ ln|a/b|, shape (d,); zero for the usual start v₀ = 0.

    Raises:
        ValueError: shapes that do not fit, NaN, no interpolator (the equations Xw = y have no solution).
    """
    if log_alpha.shape != (problem.d,) or torch.isnan(log_alpha).any():
        raise ValueError(
            f"ln α needs shape ({problem.d},) without NaN, got {tuple(log_alpha.shape)}: "
            "pass the final ln|α| of one run that stayed finite."
        )
    start = torch.zeros_like(log_alpha) if z0 is None else z0.expand(problem.d)
    if bool(log_alpha.max() < SMALL_ALPHA):
        return weighted_l1_end_point(problem, log_alpha, start)
    return newton_end_point(problem, log_alpha, start)


def newton_end_point(problem: Regression, log_alpha: Tensor, z0: Tensor, tolerance: float = 1e-12) -> EndPoint:
    """The same by damped Newton steps on the convex dual F(ν) = Σ_j ¼α_j cosh 2z_j - ⟨ν, y⟩, z = z0 + Xᵀν.

    Small α makes F steep, so the problem is solved along α^t, t rising to 1, each solution starting the next.
    """
    X, y = problem.X, problem.y
    alive = torch.isfinite(log_alpha)
    X = X * alive
    log_alpha = torch.where(alive, log_alpha, torch.zeros_like(log_alpha))
    depth = max(1.0, float(-log_alpha.min()) / 20)
    stages = 1 + math.ceil(math.log(depth) / math.log(1.25))
    nu, previous = torch.zeros_like(y), 1.0 / depth
    w, scale = torch.zeros_like(log_alpha), float(y.norm())
    for t in np.geomspace(1.0 / depth, 1.0, stages):
        nu, previous = nu * (t / previous), t
        nu, w = _newton(X, y, t * log_alpha, t * z0, nu, tolerance * scale)
    residual = float((X @ w - y).norm()) / max(scale, 1e-300)
    if not residual < 1e-8:
        raise ValueError(
            f"no interpolator was found (‖Xw - y‖/‖y‖ = {residual:.1e}): the theory needs Xw = y to be solvable, "
            "so give n < d or consistent targets."
        )
    return EndPoint(w * alive, nu, residual, "newton")


def _newton(X: Tensor, y: Tensor, log_alpha: Tensor, z0: Tensor, nu: Tensor, target: float) -> tuple[Tensor, Tensor]:
    def dual(at: Tensor) -> tuple[float, Tensor, Tensor]:
        z = z0 + at @ X
        up, down = (log_alpha + 2 * z).exp(), (log_alpha - 2 * z).exp()
        return float((up + down).sum() / 8 - at @ y), (up - down) / 4, (up + down) / 2

    value, w, curvature = dual(nu)
    for _ in range(200):
        gradient = X @ w - y
        if float(gradient.norm()) <= target:
            break
        step = -torch.linalg.lstsq((X * curvature) @ X.T, gradient.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        slope = float(gradient @ step)
        # No entry of 2z moves by more than 4 in one step: beyond that the quadratic model of cosh is meaningless.
        length = min(1.0, 2.0 / max(float((step @ X).abs().max()), 1e-300))
        while length > 1e-10:
            trial, trial_w, trial_curvature = dual(nu + length * step)
            if math.isfinite(trial) and trial <= value + 1e-4 * length * slope + 1e-14 * abs(value):
                break
            length /= 2
        else:
            break
        nu, value, w, curvature = nu + length * step, trial, trial_w, trial_curvature
    return nu, w


def weighted_l1_end_point(problem: Regression, log_alpha: Tensor, z0: Tensor | None = None) -> EndPoint:
    """The α → 0 limit: min Σ_j (ln(1/α_j)|w_j| - 2 z0_j w_j) subject to Xw = y, a linear programme (HiGHS).

    Raises:
        ValueError: Xw = y has no solution.
    """
    from scipy.optimize import linprog

    X, y = problem.X.cpu().numpy(), problem.y.cpu().numpy()
    price = -log_alpha.cpu().numpy()
    alive = np.isfinite(price)
    tilt = 2 * (np.zeros(problem.d) if z0 is None else z0.cpu().numpy())
    costs = np.concatenate([(price - tilt)[alive], (price + tilt)[alive]])
    result = linprog(costs, A_eq=np.hstack([X[:, alive], -X[:, alive]]), b_eq=y, bounds=(0, None), method="highs")
    if result.status != 0:
        raise ValueError(
            f"no interpolator was found ({result.message}): the theory needs Xw = y to be solvable, "
            "so give n < d or consistent targets."
        )
    w = np.zeros(problem.d)
    w[alive] = np.subtract(*np.split(result.x, 2))
    residual = float(np.linalg.norm(X @ w - y)) / max(float(np.linalg.norm(y)), 1e-300)
    dual = torch.from_numpy(np.asarray(result.eqlin.marginals)) / 2
    return EndPoint(torch.from_numpy(w).to(problem.X), dual.to(problem.X), residual, "linear programme")
