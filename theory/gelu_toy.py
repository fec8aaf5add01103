"""Two GELU units under label noise merge: the rate at which ‖w₁ - w₂‖ collapses, in closed form.

h = a₁g(w₁x) + a₂g(w₂x). The set {w₁ = w₂, a₁ = a₂} is invariant. At its minimum the mean gradient per unit vanishes,
so the direction a₁ - a₂ is exactly flat: only noise makes it attractive. Let p = w₁ - w₂, q = a₁ - a₂ and per step
C = (1/n) Σ (r_i - σξ_i) g'(wx_i) x_i. To first order p is pulled by h p + C q and q by C p, while the common w is
pulled by a C: the same noise. So p = ρq with ρ a filtered copy of w's fluctuation, and ln|q| falls by η/(1-μ) E[C ρ] a
step, a covariance of a linear recursion with momentum μ: of order η²σ²/(1-μ)².
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import minimize
from scipy.special import ndtr

from theory.problem import Regression


@dataclass(frozen=True)
class MergingRate:
    """What the linearisation says.

    Attributes:
        rate: by which ln‖w₁ - w₂‖² falls, per step.
        w, a: the minimum on the invariant set.
        flat: the smallest eigenvalue of the mean Hessian normal to the set: 0, no merging without noise.
        error: what holding h at its value at the minimum drops, as a fraction: the stationary Var(h)/h².
    """

    rate: float
    w: float
    a: float
    flat: float
    error: float


def merging_rate(problem: Regression, step_size: float, sigma: float, momentum: float = 0.0) -> MergingRate:
    """The rate for full-batch heavy-ball SGD with fresh label noise σ at every step, on the loss (1/2n) Σ r².

    Raises:
        ValueError: inputs that are not one-dimensional, a step size at which the linearisation is unstable.

    Source: this package; the claim it quantifies is in Chen et al. (2023), Fig. 3 (rate ∝ η²σ²).
    """
    if problem.d != 1:
        raise ValueError(f"the toy has one input and the data have {problem.d}: give inputs of shape (n, 1).")
    x, y = problem.X[:, 0].numpy(), problem.y.numpy()
    w, a = minimize(lambda at: np.mean((2 * at[1] * _g(at[0] * x) - y) ** 2), [0.5, -0.4], tol=1e-14).x
    z = w * x
    r, g, slope, bend = 2 * a * _g(z) - y, _g(z), _g1(z) * x, _g2(z) * x * x
    dC = np.array([np.mean(2 * a * slope**2 + r * bend), np.mean(2 * g * slope)])  # of C in (w, a)
    pull = np.zeros((3, 3))  # of (w, a, ρ)
    pull[0, :2] = a * dC
    pull[1, :2] = [np.mean(2 * a * slope * g + r * slope), np.mean(2 * g * g)]
    pull[2, :2], pull[2, 2] = dC, np.mean(r * a * bend)
    normal = np.array([[pull[2, 2], np.mean(r * slope)], [np.mean(r * slope), 0.0]])
    # m ← μm + pull·s + noise, s ← s - ηm, for s = (w, a, ρ).
    eye = np.eye(3)
    step = np.block([[eye - step_size * pull, -step_size * momentum * eye], [pull, momentum * eye]])
    if np.abs(np.linalg.eigvals(step)).max() >= 1:
        raise ValueError(f"step size {step_size:g} is unstable around the minimum: choose a smaller one.")
    kick = np.stack([a * slope, g, slope]) * sigma / len(x)
    noise = np.block([[step_size * eye], [-eye]]) @ kick
    covariance = solve_discrete_lyapunov(step, noise @ noise.T)
    rate = 2 * step_size / (1 - momentum) * float(dC @ covariance[:2, 2])
    dh = np.array([np.mean(a * (2 * a * slope * bend + r * _g3(z) * x**3)), np.mean(2 * a * g * bend + r * bend)])
    error = float(dh @ covariance[:2, :2] @ dh) / pull[2, 2] ** 2
    return MergingRate(rate, float(w), float(a), float(np.linalg.eigvalsh(normal)[0]), error)


def _g(z: np.ndarray) -> np.ndarray:
    """GELU, zΦ(z)."""
    return z * ndtr(z)


def _density(z: np.ndarray) -> np.ndarray:
    return np.exp(-z * z / 2) / np.sqrt(2 * np.pi)


def _g1(z: np.ndarray) -> np.ndarray:
    return ndtr(z) + z * _density(z)


def _g2(z: np.ndarray) -> np.ndarray:
    return (2 - z * z) * _density(z)


def _g3(z: np.ndarray) -> np.ndarray:
    return (z**3 - 4 * z) * _density(z)
