"""Stochastic collapse in one dimension: when noise that vanishes at a point draws the mass onto it, and how fast.

λ, the Lyapunov exponent of the point, decides: ln|θ - p| drifts at λ, and λ < 0 is collapse. The quartic well and the
single neuron are the two models of Chen et al. (2023), Figs. 1 and 2.
"""

from __future__ import annotations

import numpy as np
import sympy as sp
import torch
from scipy import stats
from scipy.optimize import brentq

from theory.sde import SDE
from theory.stochastic_logistic import STEPS, StochasticLogistic, evolve, log_step_moments, start

CKYG = "Chen, Kunin, Yamamura, Ganguli"
Array = np.ndarray


def lyapunov_exponent(loss: sp.Expr, intensity: sp.Expr, variable: sp.Symbol, point: sp.Expr = 0) -> sp.Expr:
    """λ = -L''(p) - ½D''(p) of dθ = -L' dt + √(2D) dW at an invariant point: it attracts iff L'' + ½D'' > 0.

    >>> y, mu, zeta = sp.symbols("y mu zeta", real=True)
    >>> lyapunov_exponent(y**4 / 4 - mu * y**2 / 2, zeta**2 * y**2 / 2, y)
    mu - zeta**2/2

    Raises:
        ValueError: a point that is not invariant: L', D and D' have to vanish there.

    Source: Chen et al. (2023), the one-dimensional condition for attractivity.
    """
    loss, intensity = sp.sympify(loss), sp.sympify(intensity)
    for part in (sp.diff(loss, variable), intensity, sp.diff(intensity, variable)):
        if sp.simplify(part.subs(variable, point)) != 0:
            raise ValueError(f"{variable} = {point} is not invariant: L', D and D' have to vanish at the point.")
    curvature = sp.diff(loss, variable, 2) + sp.diff(intensity, variable, 2) / 2
    return sp.expand(-curvature.subs(variable, point))


def measured_exponent(sde: SDE, point: float, side: int = 1, distance: float = 1e-4) -> float:
    """λ = b'(p) - ½g'(p)² of any one-dimensional SDE, from its values close to ``point`` on one side.

    Differences at two distances, extrapolated: error of order distance².

    Raises:
        ValueError: a point that drift or noise leaves, an equation that is not one-dimensional and Itô.
    """
    if sde.sde_type != "ito" or sde.channels != 1:
        raise ValueError("the exponent is that of a one-dimensional Itô equation: convert it, or give one channel.")

    def slopes(offset: float) -> tuple[float, float]:
        at = torch.tensor([[point], [point + offset]], dtype=torch.float64)
        b, g = sde.f_and_g_prod(0.0, at, torch.ones(2, 1, dtype=torch.float64))
        if max(abs(float(b[0])), abs(float(g[0]))) > 1e-12 * max(1.0, abs(float(b[1])), abs(float(g[1]))):
            raise ValueError(f"{point:g} is not invariant: choose a point where drift and diffusion vanish.")
        return float(b[1] - b[0]) / offset, float(g[1] - g[0]) / offset

    (b1, g1), (b2, g2) = slopes(side * distance), slopes(side * distance / 2)
    return (2 * b2 - b1) - (2 * g2 - g1) ** 2 / 2


def quartic_well(mu: float, zeta: Array, step: float = 0.0) -> StochasticLogistic:
    """θ² of dθ = (μθ - θ³) dt + ζθ dW: a = 2μ - ζ², c = 2, s = 2ζ, stationary Gamma(μ/ζ² - ½, ζ²).

    With ``step`` = h > 0, drift and variance of ln θ² far down are those of the Euler recursion
    θ ← θ(1 + h(μ - θ²) + ζ√h ξ), exactly; the wall keeps its SDE form.
    """
    zeta = np.asarray(zeta, float)
    if step == 0.0:
        return StochasticLogistic(2 * mu - zeta**2, np.array(2.0), 2 * zeta)
    drift, variance = log_step_moments(np.full_like(zeta, mu * step), zeta * step**0.5)
    return StochasticLogistic(2 * drift / step, np.array(2.0), 2 * np.sqrt(variance / step))


def quartic_modes(mu: float, zeta: float) -> tuple[float, ...]:
    """Where the stationary density of θ peaks: ±√(μ - ζ²) for ζ² < μ, 0 beyond; all mass sits on 0 for ζ² ≥ 2μ."""
    return (-((mu - zeta**2) ** 0.5), (mu - zeta**2) ** 0.5) if zeta**2 < mu else (0.0,)


def quartic_density(mu: float, zeta: float, theta: Array) -> Array:
    """Stationary density of θ: that of θ² ~ Gamma(μ/ζ² - ½, ζ²), both signs alike; for ζ² < 2μ."""
    return np.abs(theta) * stats.gamma.pdf(np.square(theta), mu / zeta**2 - 0.5, scale=zeta**2)


def collapse_probability(
    mu: float, zeta: Array, times: Array, threshold: float, start_scale: float, step: float = 0.0,
    solver_steps: int = STEPS,
) -> Array:  # fmt: skip
    """P(θ_t² < threshold) for θ₀ ~ N(0, start_scale²), shape (times, levels): the finite-time law.

    The published line ζ = √(2μ) is its limit t → ∞. Fokker-Planck in ln θ²; see :func:`quartic_well` for ``step``.
    """
    process = quartic_well(mu, zeta, step)
    points = np.linspace(-60.0, 2 * np.log(start_scale) + 4.0, 20_001)
    cumulative = stats.chi2.cdf(np.exp(points) / start_scale**2, 1)
    law, clock, rows = start(process, (points, cumulative), float(times[-1])), 0.0, []
    for time in times:
        law, clock = evolve(process, law, time - clock, solver_steps), time
        rows.append(law.cdf(np.array([np.log(threshold)]))[:, 0])
    return np.stack(rows)


def neuron_exponent(x: Array, y: Array, eta: Array, zeta: float = 1.0, slope: float = 1.0, step: float = 0.0) -> Array:
    """λ = σ' S_xy - ½ηζ²σ'² S_xx of the origin of h = w₂σ(w₁x), S means over samples: ln|w₁ + w₂| drifts at it.

    Near the origin u = w₁ + w₂ obeys du = u(σ' S_xy dt + √η ζ σ' √S_xx dB). With ``step`` > 0 the exponent of the
    Euler recursion, E ln|1 + σ' S_xy h + √(ηh) ζ σ' √S_xx ξ|/h. Source: Chen et al. (2023), attractivity of the origin.
    """
    drift, spread = slope * np.mean(x * y), np.sqrt(eta) * zeta * slope * np.sqrt(np.mean(x * x))
    if step == 0.0:
        return drift - spread**2 / 2
    return log_step_moments(np.full_like(spread, drift * step), spread * step**0.5)[0] / step


def neuron_threshold(x: Array, y: Array, step: float = 0.0) -> float:
    """α* = Σxy/Σx²: the origin attracts iff α = ηζ²σ'(0)/2 exceeds it; with ``step`` for the Euler recursion."""
    limit = float(np.sum(x * y) / np.sum(x * x))
    if step == 0.0:
        return limit
    return brentq(lambda a: float(neuron_exponent(x, y, np.array([2 * a]), step=step)[0]), 0.2 * limit, 2 * limit)


def shrinking_probability(exponent: Array, spread: Array, time: float) -> Array:
    """P(|w_t| < |w₀|) far down: Φ(-λ√t/s), ½ at the threshold whatever the time: there the curves cross."""
    return stats.norm.cdf(-exponent * time**0.5 / spread)
