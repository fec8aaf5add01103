"""A linear network learning from noisy labels: every mode is a stochastic logistic, and noise a soft threshold.

s ← s(1 - η(s - S* + σξ))²: in the time τ = ηk, d ln s = (2(S* - s) - ησ²) dτ + 2√η σ dB. Modes with S* < ησ²/2
collapse; the others settle in Gamma(b/ησ², ησ²), b = S* - ησ²/2, whose mean is b: a soft threshold at ησ²/2.
"""

from __future__ import annotations

import numpy as np
from scipy import stats
from torch import Tensor

from theory.collapse_data import LinearTeacher
from theory.stochastic_logistic import Array, LogLaw, StochasticLogistic, evolve, log_step_moments, start


def soft_threshold(eta: float, sigma: float) -> float:
    """ησ²/2: the singular value at which a mode collapses, and by which noise lowers the others' means."""
    return eta * sigma**2 / 2


def mode_process(singular: Array, eta: float, sigma: float, finite_step: bool = True) -> StochasticLogistic:
    """The modes' process in τ = ηk.

    The SDE has a = 2S* - ησ² and s = 2√η σ; with ``finite_step`` drift and variance of ln s near collapse are exactly
    those of one SGD step, 2 E ln|1 + ηS* - ησξ|, which differ by a relative (3/2)(ησ)².
    """
    singular = np.asarray(singular, float)
    if not finite_step:
        return StochasticLogistic(2 * singular - eta * sigma**2, np.array(2.0), np.array(2 * eta**0.5 * sigma))
    drift, variance = log_step_moments(eta * singular, np.full_like(singular, eta * sigma))
    return StochasticLogistic(2 * drift / eta, np.array(2.0), 2 * np.sqrt(variance / eta))


def mode_laws(
    singular: Array, sigma: float, etas: tuple[float, ...], steps: tuple[int, ...], s0: float = 1.0
) -> list[LogLaw]:
    """The law of every mode after each phase of ``steps`` SGD steps at step size η, from s = ``s0``.

    Shape (modes,) each. Fokker-Planck in ln s: the transient is in it, and the Gamma law where it is reached.

    Raises:
        ValueError: no noise, under which a mode has no law but a value (:func:`logistic`).
    """
    if not sigma > 0:
        raise ValueError("without noise a mode has a value and no law: use logistic().")
    process = [mode_process(singular, eta, sigma) for eta in etas]
    law = start(process[0], float(np.log(s0)), sum(eta * k for eta, k in zip(etas, steps, strict=True)))
    laws = []
    for each, eta, count in zip(process, etas, steps, strict=True):
        law = evolve(each, law, eta * count)
        laws.append(law)
    return laws


def logistic(limit: Array, tau: float, s0: Array | float) -> Array:
    """Gradient flow ds = 2s(b - s) dτ from s₀: b/(1 + (b/s₀ - 1)e^{-2bτ}), for any b."""
    limit = np.where(np.abs(limit) < 1e-12, 1e-12, limit)
    decay = np.exp(-2 * np.maximum(limit, -350 / max(tau, 1e-300)) * tau)
    return limit / (1 + (limit / s0 - 1) * decay)


def published_bounds(
    singular: Array, eta: float, sigma: float, tau: float, s0: Array | float = 1.0
) -> tuple[Array, Array]:
    """The two logistics between which s is said to stay: limits S* - ησ²/2 and S*. Neither is its mean.

    Source: Chen et al. (2023), Fig. 5, where τ is drawn as k/N in place of the clock ηk = 3k/N.
    """
    return logistic(singular - soft_threshold(eta, sigma), tau, s0), logistic(singular, tau, s0)


def averaged_logistic(
    singular: Array, eta: float, eta_after: float, sigma: float, tau: float, points: int = 4000
) -> Array:
    """Mean of the logistic after a step-size drop over the Gamma law reached before it, shape (modes,).

    Its limit is S* - η'σ²/2; the noise after the drop is otherwise neglected. 0 where the mode had collapsed.
    """
    law = mode_process(singular, eta, sigma, finite_step=False)
    u = (np.arange(points) + 0.5) / points
    starts = stats.gamma.ppf(u, np.nan_to_num(law.shape, nan=1.0)[:, None], scale=law.scale[:, None])
    limit = (np.asarray(singular) - soft_threshold(eta_after, sigma))[:, None]
    mean = logistic(limit, tau, np.maximum(starts, 1e-290)).mean(1)
    return np.where(np.isnan(law.shape), 0.0, mean)


def expected_losses(teacher: LinearTeacher, mean: Array, deviation: Array) -> tuple[float, float]:
    """Training and test loss expected of independent modes with these means and standard deviations."""
    as_tensor: Tensor = teacher.singular.new_tensor(mean)
    spread = float(np.sum(np.square(deviation)))
    train = float(teacher.train_loss(as_tensor)) + spread / (2 * teacher.scale)
    test = float(teacher.test_loss(as_tensor)) + spread / (len(teacher.singular) ** 2 * teacher.scale)
    return train, test
