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
TOLERANCE = 1e-12
NEARLY_SINGULAR = 1e-6  # smallest pivot of a Cholesky factor of a matrix of unit diagonal: its condition reaches 1e12


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
    _check(problem, log_alpha, 1, f"({problem.d},)", "one run")
    start = torch.zeros_like(log_alpha) if z0 is None else z0.expand(problem.d)
    if bool(log_alpha.max() < SMALL_ALPHA):
        return weighted_l1_end_point(problem, log_alpha, start)
    return newton_end_point(problem, log_alpha, start)


def end_points(problem: Regression, log_alpha: Tensor, z0: Tensor | None = None) -> Tensor:
    """:func:`end_point`'s w of several runs at once, shape (R, d).

    Args:
        log_alpha: final ln|α| of each run, shape (R, d).
        z0: as there, the same for all runs.

    Raises:
        ValueError: as there.
    """
    _check(problem, log_alpha, 2, f"(runs, {problem.d})", "runs")
    start = log_alpha.new_zeros(problem.d) if z0 is None else z0
    w, large = torch.empty_like(log_alpha), log_alpha.amax(1) >= SMALL_ALPHA
    if large.any():
        w[large] = _newton_path(problem, log_alpha[large], start, TOLERANCE)[0]
    for row in torch.nonzero(~large).flatten().tolist():
        w[row] = weighted_l1_end_point(problem, log_alpha[row], start).w
    return w


def _check(problem: Regression, log_alpha: Tensor, dims: int, shape: str, whose: str) -> None:
    if log_alpha.ndim != dims or log_alpha.shape[-1] != problem.d or torch.isnan(log_alpha).any():
        raise ValueError(
            f"ln α needs shape {shape} without NaN, got {tuple(log_alpha.shape)}: "
            f"pass the final ln|α| of {whose} that stayed finite."
        )


def newton_end_point(problem: Regression, log_alpha: Tensor, z0: Tensor, tolerance: float = TOLERANCE) -> EndPoint:
    """The same by damped Newton steps on the convex dual F(ν) = Σ_j ¼α_j cosh 2z_j - ⟨ν, y⟩, z = z0 + Xᵀν."""
    w, nu, residual = _newton_path(problem, log_alpha.unsqueeze(0), z0, tolerance)
    return EndPoint(w[0], nu[0], float(residual[0]), "newton")


def _newton_path(problem: Regression, log_alpha: Tensor, z0: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """w (R, d), ν (R, n) and relative residuals (R,) for ln α of shape (R, d).

    Small α makes F steep, so the problem is solved along α^t, t rising to 1, each solution starting the next.
    """
    X, y = problem.X, problem.y
    alive = torch.isfinite(log_alpha)
    z0 = torch.where(alive, z0, 0.0)
    depth = (-torch.where(alive, log_alpha, 0.0).amin(1) / 20).clamp(min=1.0)
    stages = 1 + math.ceil(math.log(float(depth.max())) / math.log(1.25))
    scale = float(y.norm())
    nu, previous, w = y.new_zeros(len(log_alpha), len(y)), 1 / depth, torch.zeros_like(log_alpha)
    for share in np.linspace(1.0, 0.0, stages) if stages > 1 else [0.0]:
        t = depth**-share
        nu = nu * (t / previous).unsqueeze(1)
        nu, w = _newton(X, y, t.unsqueeze(1) * log_alpha, t.unsqueeze(1) * z0, nu, tolerance * scale)
        previous = t
    residual = torch.linalg.vector_norm(w @ X.T - y, dim=1) / max(scale, 1e-300)
    if not float(residual.max()) < 1e-8:
        raise ValueError(
            f"no interpolator was found (‖Xw - y‖/‖y‖ = {float(residual.max()):.1e}): the theory needs Xw = y to be "
            "solvable, so give n < d or consistent targets."
        )
    return w, nu, residual


def _newton(X: Tensor, y: Tensor, log_alpha: Tensor, z0: Tensor, nu: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Every run on its own from ν (R, n) until its gradient is below ``target``: ν and w (R, d)."""
    alive = torch.isfinite(log_alpha)

    def dual(runs: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = z0[runs] + at @ X
        up, down = (log_alpha[runs] + 2 * z).exp(), (log_alpha[runs] - 2 * z).exp()
        return (up + down).sum(1) / 8 - at @ y, (up - down) / 4, (up + down) / 2

    runs, nu = torch.arange(len(nu), device=nu.device), nu.clone()
    value, w, curvature = dual(runs, nu)
    for _ in range(200):
        gradient = w[runs] @ X.T - y
        short = torch.linalg.vector_norm(gradient, dim=1) <= target
        runs, gradient = runs[~short], gradient[~short]
        if not len(runs):
            break
        step = -_solve((X * curvature[runs].unsqueeze(1)) @ X.T, gradient)
        slope = (gradient * step).sum(1)
        # No entry of 2z moves by more than 4 in one step: beyond that the quadratic model of cosh is meaningless.
        length = (2 / ((step @ X) * alive[runs]).abs().amax(1).clamp(min=1e-300)).clamp(max=1.0)
        trying = torch.arange(len(runs), device=runs.device)
        while len(trying):
            now, size = runs[trying], length[trying]
            at = nu[now] + size.unsqueeze(1) * step[trying]
            trial, trial_w, trial_curvature = dual(now, at)
            fell = trial <= value[now] + 1e-4 * size * slope[trying] + 1e-14 * value[now].abs()
            fell &= torch.isfinite(trial)
            done = now[fell]
            nu[done], value[done] = at[fell], trial[fell]
            w[done], curvature[done] = trial_w[fell], trial_curvature[fell]
            length[trying[~fell]] /= 2
            trying = trying[~fell & (size > 2e-10)]
        runs = runs[length > 1e-10]  # what falls no further has reached its rounding
    return nu, w


def _solve(hessian: Tensor, gradient: Tensor) -> Tensor:
    """H⁻¹g for each run, shape (R, n), from Cholesky factors of the equilibrated H; least squares where singular."""
    scale = hessian.diagonal(dim1=-2, dim2=-1).rsqrt()
    factor, failed = torch.linalg.cholesky_ex(hessian * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    step = scale * torch.cholesky_solve((scale * gradient).unsqueeze(-1), factor).squeeze(-1)
    singular = (failed != 0) | ~(factor.diagonal(dim1=-2, dim2=-1).amin(-1) > NEARLY_SINGULAR)
    for run in torch.nonzero(singular).flatten().tolist():
        step[run] = torch.linalg.lstsq(hessian[run], gradient[run].unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return step


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
