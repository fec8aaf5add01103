"""Suite ``collapse``: the quartic well and the single neuron, simulated and held against theory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import stats

from simulators.neuron import single_neuron
from simulators.scalar import quartic_well as simulate
from theory import collapse as theory
from theory.collapse_data import neuron_data
from theory.prediction import Prediction
from theory.streams import named_generator, seed_of
from validation import collapse_checks as claims
from validation.check import Check, Rival, judge
from validation.collapse_checks import NAME, chi_square, fixed, kolmogorov, weighted_root
from validation.settings import CollapseSettings

Series = dict[str, Any]
STEP = 0.0025  # of the published Euler recursion
SPLIT_STEP = 0.02
TIMES = (25.0, 50.0, 100.0, 200.0)
EPSILON = 1e-30
START = 2.0  # θ₀ ~ 2 N(0, 1)
PUBLISHED_HALF = (2.35, 2.05, 1.88, 1.79)
READING = 0.03


def quartic(options: CollapseSettings, walkers: int, levels: int) -> tuple[list[Check], Series]:
    """The quartic well: stationary law, exponent, finite-time law; series of Fig. 1."""
    mu, root = options.mu, seed_of("collapse quartic well")
    critical = (2 * mu) ** 0.5
    checks = _stationary(mu, options.paths, root) + _exponents(mu, 4 * walkers, root)
    zetas = np.linspace(0.85 * critical, 1.75 * critical, levels)
    draws = named_generator(root, "start")
    records = [round(t / SPLIT_STEP) for t in TIMES]
    start = START * draws.standard_normal((levels, walkers))
    split = (simulate(mu, zetas, start, SPLIT_STEP, records, root, "split") ** 2 < EPSILON).mean(-1)
    law = theory.collapse_probability(mu, zetas, np.array(TIMES), EPSILON, START)
    chain_zetas = np.linspace(0.96 * critical, 1.6 * critical, 20)
    start = START * draws.standard_normal((20, walkers))
    records = [round(t / STEP) for t in TIMES]
    chain = (simulate(mu, chain_zetas, start, STEP, records, root, "euler", "euler") ** 2 < EPSILON).mean(-1)
    chain_law = theory.collapse_probability(mu, chain_zetas, np.array(TIMES), EPSILON, START, STEP)
    for name, levels_at, measured, predicted in (
        ("exact near 0, ", zetas, split, law), ("Euler, ", chain_zetas, chain, chain_law),
    ):  # fmt: skip
        rivals = _probability_rivals(mu, levels_at)
        for k, t in enumerate(TIMES):
            setting = f"{name}t = {t:g}, {len(levels_at)} levels"
            each = {rival: p[k] for rival, p in rivals.items()}
            each["the asymptotic step at √(2μ)"] = (levels_at > critical).astype(float)
            checks.append(
                chi_square(claims.FINITE_TIME, setting, claims.WELL, measured[k], predicted[k], walkers, each)
            )
    checks += _half_levels(chain_zetas, chain, chain_law, walkers, critical)
    series = {
        "collapse well probability": (("collapse_time", "collapse_zeta"), split),
        "collapse well law": (("collapse_time", "collapse_zeta"), law),
        "collapse well euler probability": (("collapse_time", "collapse_euler_zeta"), chain),
        "collapse_time": list(TIMES), "collapse_zeta": zetas, "collapse_euler_zeta": chain_zetas,
    }  # fmt: skip
    return checks, series | _paths(mu, root)


def _stationary(mu: float, paths: int, root: int) -> list[Check]:
    """Both phases that have a stationary law: two modes for ζ² < μ, one at 0 for μ < ζ² < 2μ."""
    checks = []
    for zeta in (0.8 * mu**0.5, 1.15 * mu**0.5):
        start = START * named_generator(root, "stationary", round(1e6 * zeta)).standard_normal(paths)
        stream = f"stationary {zeta:.6f}"
        # The spectrum begins at (2μ - ζ²)²/8ζ²: e^-9 of the start is left.
        steps = round(9 * 8 * zeta**2 / (2 * mu - zeta**2) ** 2 / SPLIT_STEP)
        x = simulate(mu, [zeta], start, SPLIT_STEP, [steps], root, stream)[0, 0] ** 2
        process = theory.quartic_well(mu, np.array([zeta]))
        rivals = {
            "Itô read as Stratonovich": stats.gamma.cdf(x, mu / zeta**2, scale=zeta**2),
            "half the noise": stats.gamma.cdf(x, 2 * mu / zeta**2 - 0.5, scale=zeta**2 / 2),
            "L'' alone: θ² = μ": (x >= mu).astype(float),
        }
        peaks = theory.quartic_modes(mu, zeta)
        setting = f"ζ = {zeta:.3g}, peaks at " + ", ".join(f"{peak:.3g}" for peak in peaks)
        prediction = Prediction("Kolmogorov distance of θ²", torch.tensor(0.0), 1.0, 0.0, claims.WELL)
        uniform = torch.from_numpy(process.stationary_cdf(x)[0])
        others = [Rival(name, 0.0, torch.from_numpy(values)) for name, values in rivals.items()]
        checks.append(judge(NAME, claims.STATIONARY, setting, prediction, uniform, rivals=others, statistic=kolmogorov))
    return checks


def _exponents(mu: float, walkers: int, root: int) -> list[Check]:
    checks = []
    for zeta in (1.2 * (2 * mu) ** 0.5, 1.5 * (2 * mu) ** 0.5):
        time = 40.0
        end = simulate(
            mu, [zeta], np.full(walkers, 1e-12), STEP, [round(time / STEP)], root, f"rate {zeta:.6f}", "euler"
        )
        growth = torch.from_numpy((np.log(np.abs(end[0, 0])) - np.log(1e-12)) / time)
        exponent = float(theory.quartic_well(mu, np.array([zeta]), STEP).growth[0]) / 2
        prediction = Prediction("d ln|θ|/dt", torch.tensor(exponent), 0.0, 0.0, claims.WELL)
        rivals = [
            Rival("Itô read as Stratonovich", mu),
            Rival("half the noise", mu - zeta**2 / 4),
            Rival("L'' alone", mu),
        ]
        setting = f"ζ = {zeta:.3g}, SDE {mu - zeta**2 / 2:.4g}"
        checks.append(judge(NAME, claims.EXPONENT, setting, prediction, growth, rivals=rivals))
    return checks


def _probability_rivals(mu: float, zetas: np.ndarray) -> dict[str, np.ndarray]:
    """P at the times under other readings of the equation: a change of μ or of ζ."""
    times = np.array(TIMES)
    half = theory.collapse_probability(mu, zetas / 2**0.5, times, EPSILON, START, solver_steps=30)
    # Stratonovich and L'' alone: ln|θ| never drifts down.
    return {"half the noise": half, "Itô read as Stratonovich, or L'' alone": np.zeros_like(half)}


def _half_levels(
    zetas: np.ndarray, measured: np.ndarray, law: np.ndarray, walkers: int, critical: float
) -> list[Check]:
    """ζ at P = ½: the same probit fit to the measured and to the predicted probabilities."""
    checks = []
    for k, t in enumerate(TIMES):
        inside = (law[k] > 0.02) & (law[k] < 0.98)
        p = np.clip(law[k][inside], 1e-9, 1)
        variance = p * (1 - p) / walkers / stats.norm.pdf(stats.norm.ppf(p)) ** 2
        found = []
        for share in (measured[k][inside], p):
            probit = stats.norm.ppf(np.clip(share, 0.5 / walkers, 1 - 0.5 / walkers))
            found.append(weighted_root(zetas[inside], probit, variance, 2))
        (value, error), (predicted, _) = found
        sample = torch.tensor([value], dtype=torch.float64)
        setting = f"{t / STEP:.0f} steps of {STEP:g}"
        prediction = Prediction("ζ at P = ½", torch.tensor(predicted), critical, 0.0, claims.WELL)
        rivals = [Rival("asymptotic √(2μ)", critical), Rival("half the noise", predicted * 2**0.5)]
        checks.append(
            judge(NAME, claims.HALF_LEVEL, setting, prediction, sample, rivals=rivals, statistic=fixed(error))
        )
        reading = torch.tensor(PUBLISHED_HALF[k])
        prediction = Prediction("ζ at P = ½ (published)", reading, critical, 0.0, claims.WELL)
        checks.append(
            judge(NAME, claims.HALF_LEVEL, f"{setting}, published reading ± {READING:g}", prediction, sample,
                  rivals=rivals[:1], statistic=fixed(error, READING))
        )  # fmt: skip
    return checks


def _paths(mu: float, root: int) -> Series:
    """Fifty walkers in each phase, as in the published figure."""
    zetas = np.array([0.1, 1.0, 2.5])
    start = START * named_generator(root, "paths").standard_normal(50)
    steps = list(range(0, 10_001, 20))
    return {
        "collapse well paths": (("collapse_step", "collapse_phase", "collapse_walker"),
                                simulate(mu, zetas, start, STEP, steps, root, "paths", "euler")),
        "collapse_step": steps, "collapse_phase": zetas,
    }  # fmt: skip


def neuron(options: CollapseSettings, trajectories: int, steps: int) -> tuple[list[Check], Series]:
    """The single tanh neuron: exponent, threshold, collapse over time; series of Fig. 2."""
    root = seed_of("collapse single neuron")
    x, y = neuron_data(options.samples, 0.1, root)
    dt, limit = options.neuron_dt, theory.neuron_threshold(x, y)
    chain = theory.neuron_threshold(x, y, dt)
    checks, slopes = _neuron_exponents(x, y, dt, limit, root)
    checks.append(_sign_change(*slopes, chain, limit))
    checks += _probabilities(x, y, dt, chain, trajectories, steps, root)
    etas = np.r_[np.linspace(0, 1, 5), np.linspace(1.05, 2.5, 40), np.linspace(2.6, 4, 5)]
    start = named_generator(root, "start").standard_normal((trajectories, 2))  # outside the ball |w| < 0.01
    records = [round(share * steps) for share in (0, 0.0625, 0.125, 0.25, 0.5, 1)]
    w = single_neuron(x, y, etas, start, dt, records, root, "sweep")
    log_norm = np.log(np.linalg.norm(w, axis=-1))
    shown = [1, 19, 39]  # α = .125, .785, 1.157
    series = {
        "collapse neuron probability": (("collapse_neuron_step", "collapse_alpha"), (log_norm < np.log(0.01)).mean(-1)),
        "collapse neuron weights": (("collapse_shown", "collapse_trajectory", "collapse_weight"), w[-1, shown, :64]),
        "collapse neuron data": (("collapse_axis", "collapse_sample"), np.stack([x, y])),
        "collapse neuron threshold": (("collapse_reading",), np.array([limit, chain])),
        "collapse_neuron_step": records, "collapse_alpha": etas / 2, "collapse_shown": etas[shown] / 2,
        "collapse_reading": ["SDE", "Euler"],
    }  # fmt: skip
    return checks, series


def _neuron_exponents(
    x: np.ndarray, y: np.ndarray, dt: float, limit: float, root: int
) -> tuple[list[Check], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Growth of ln|w₁ + w₂| from weights of 1e-20 on, at noise levels around the threshold."""
    alphas, paths, time = limit * np.array([0.5, 0.8, 0.9, 1.1, 1.2, 1.5]), 1024, 20.0
    start = np.full((paths, 2), 1e-20)
    w = single_neuron(x, y, 2 * alphas, start, dt, [round(time / dt)], root, "exponent")[0]
    growth = (np.log(np.abs(w.sum(-1))) - np.log(2e-20)) / time
    predicted, checks = theory.neuron_exponent(x, y, 2 * alphas, step=dt), []
    for k, alpha in enumerate(alphas):
        drift = float(np.mean(x * y))
        rivals = [
            Rival("Itô read as Stratonovich", drift),
            Rival("half the noise", drift - alpha * float(np.mean(x * x)) / 2),
            Rival("L'' alone", drift),
        ]
        prediction = Prediction("d ln|w|/dt", torch.tensor(predicted[k]), drift, 0.0, claims.NEURON)
        setting = f"α = {alpha / limit:.2g} Σxy/Σx²"
        checks.append(judge(NAME, claims.NEURON_RATE, setting, prediction, torch.from_numpy(growth[k]), rivals=rivals))
    return checks, (alphas, growth.mean(1), growth.var(1, ddof=1) / paths)


def _sign_change(alphas: np.ndarray, growth: np.ndarray, variance: np.ndarray, chain: float, limit: float) -> Check:
    value, error = weighted_root(alphas, growth, variance, 2)
    prediction = Prediction("α where the exponent vanishes", torch.tensor(chain), 0.0, 0.0, claims.NEURON)
    return judge(
        NAME, claims.NEURON_THRESHOLD, f"exponent from small weights, Σxy/Σx² = {limit:.4f}", prediction,
        torch.tensor([value], dtype=torch.float64), rivals=[Rival("half the noise", 2 * limit)], statistic=fixed(error),
    )  # fmt: skip


def _probabilities(
    x: np.ndarray, y: np.ndarray, dt: float, chain: float, trajectories: int, steps: int, root: int
) -> list[Check]:
    """P(|w_t| < |w₀|) from |w₀| = 1e-26 on over the noise level: ½ at the threshold at every time.

    So deep a start keeps the valley, which no path leaves and comes back from in time, out of the comparison.
    """
    alphas = np.linspace(0.85, 1.15, 16) * chain
    start = np.full((trajectories, 2), 1e-26 / 2**0.5)
    records = [steps // 4, steps // 2, steps]
    w = single_neuron(x, y, 2 * alphas, start, dt, records, root, "probability")
    share = (np.linalg.norm(w, axis=-1) < 1e-26).mean(-1)
    spread, slope, checks = np.sqrt(2 * alphas * np.mean(x * x)), np.mean(x * x), []
    for k, record in enumerate(records):
        # Weights and window from the measured centre; the law only says how wide the curve is.
        probit = stats.norm.ppf(np.clip(share[k], 0.5 / trajectories, 1 - 0.5 / trajectories))
        guess = alphas[np.argmin(np.abs(probit))]
        p = theory.shrinking_probability((guess - alphas) * slope, spread, record * dt)
        inside = (p > 0.05) & (p < 0.95)
        variance = (p * (1 - p))[inside] / trajectories / stats.norm.pdf(stats.norm.ppf(p[inside])) ** 2
        value, error = weighted_root(alphas[inside], probit[inside], variance, 1)
        prediction = Prediction("α at which P = ½", torch.tensor(chain), 0.0, 0.0, claims.NEURON)
        sample = torch.tensor([value], dtype=torch.float64)
        setting = f"collapse probability at t = {record * dt:g}"
        checks.append(
            judge(NAME, claims.NEURON_THRESHOLD, setting, prediction, sample,
                  rivals=[Rival("half the noise", 2 * chain)], statistic=fixed(error))
        )  # fmt: skip
    return checks
