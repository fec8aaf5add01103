"""The claims of suite ``collapse`` about low-dimensional models, and the statistics they are judged by."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy import stats

from theory.collapse import CKYG
from theory.prediction import Prediction, Reference
from validation.check import Check, Claim, Rival, Statistic, judge
from validation.statistics import SIGMAS, Estimate

NAME = "collapse"
WELL = Reference(CKYG, 2023, "Fig. 1")
NEURON = Reference(CKYG, 2023, "attractivity of the origin, Fig. 2")
LINEAR = Reference(CKYG, 2023, "Fig. 5")
TOY = Reference(CKYG, 2023, "Fig. 3, two-unit toy")
LARGEST = 100.0  # beyond it a χ² a degree of freedom says no more
TAIL = float(stats.norm.sf(SIGMAS))  # one-sided false-alarm rate

STATIONARY = Claim(
    "quartic well: θ² is Gamma distributed",
    "dθ = (μθ - θ³) dt + ζθ dW: θ² ~ Gamma(μ/ζ² - ½, ζ²) for ζ² < 2μ",
    "Kolmogorov distance of 20 000 paths to the law, in both phases that have one; level: 4 standard deviations.",
)
EXPONENT = Claim(
    "quartic well: beyond ζ² = 2μ all mass collapses at the Lyapunov exponent",
    "d ln|θ|/dt = μ - ζ²/2 near 0; attractive iff L''(0) + ½D''(0) = -μ + ½ζ² > 0",
    "Growth rate of ln|θ| from small θ on, against the exponent of the Euler recursion itself, E ln|1 + μh + ζ√h ξ|/h.",
)
FINITE_TIME = Claim(
    "quartic well: collapse probability at finite time",
    "P(θ_t² < ε) from the Fokker-Planck equation of ln θ², whose limit t → ∞ is the step at ζ = √(2μ)",
    "χ² a degree of freedom between measured and predicted probabilities over the noise levels.",
)
HALF_LEVEL = Claim(
    "quartic well: noise level at which half the mass has collapsed",
    "ζ with P(θ_t² < 1e-30) = ½ at t = 25, 50, 100, 200, for the Euler recursion of the published figure",
    "From independent noise at every level; published readings 2.35, 2.05, 1.88, 1.79.",
)
NEURON_RATE = Claim(
    "single neuron: Lyapunov exponent of the origin",
    "d ln|w₁ + w₂|/dt = σ'S_xy - ½ηζ²σ'²S_xx near w = 0 for h = w₂ tanh(w₁x) under label noise",
    "Measured from small weights on, against the exponent of the Euler recursion with the same dt.",
)
NEURON_THRESHOLD = Claim(
    "single neuron: threshold of collapse",
    "the origin attracts iff α = ηζ²σ'(0)/2 > Σxy/Σx²",
    "On fresh data: α at which the measured exponent changes sign, and at which the probability that |w| shrinks is ½, "
    "at three times.",
)
MODES = Claim(
    "linear teacher and student: law of every mode",
    "d ln s = (2(S* - s) - ησ²) dτ + 2√η σ dB, τ = ηk: Gamma(b/ησ², ησ²), b = S* - ησ²/2 > 0, collapse for b < 0",
    "Means and standard deviations of all modes over seeds, jointly: normal scores of their ranks among ensembles "
    "drawn from the predicted laws, squared and summed; level: 4 standard deviations.",
)
STRONG = Claim(
    "linear teacher and student: mean and spread of the teacher's modes",
    "mean S* - ησ²/2, variance ησ²(S* - ησ²/2) where settled",
    "Noise is a soft threshold on singular values.",
)
AFTER_DROP = Claim(
    "linear teacher and student: after the step-size drop",
    "mean of the logistic over the Gamma law reached before the drop",
    "Averaged over the strongest modes. The published formula puts the mean into the logistic, with a slower clock.",
)
LOSSES = Claim(
    "linear teacher and student: training and test loss",
    "‖Y - XŴ‖² and ‖Ŵ - W‖² from means and variances of the modes",
    "Collapse removes modes that are mostly noise: the test loss falls with σ, the training loss rises.",
)
PUBLISHED = Claim(
    "linear teacher and student: losses of the published figure",
    "the same, on the same data, against readings of Chen et al.'s Fig. 5 (256 seeds)",
    "Reading error 2 % of the axis' span, plus the sampling error of their seeds.",
)
MERGING = Claim(
    "two-unit toy: units merge at the predicted rate",
    "d ln‖w₁ - w₂‖² = -2 η/(1-μ) E[Cρ] a step, of order η²σ²",
    "Full-batch heavy-ball SGD with label noise. Without noise the direction is exactly flat.",
)
ESCAPE = Claim(
    "two-unit toy: the share of runs that merge",
    "linearised, every run merges, the faster the larger η; in fact too large a step escapes",
    "Share of runs with ‖w₁ - w₂‖² < 1e-10. The linear rate says nothing about staying near the set.",
)
GENERAL = Claim(
    "linear network with minibatches: noise removes singular values",
    "smaller batches, more noise, lower rank of VU",
    "Kendall's τ between batch size and the number of singular values of VU above 1 % of the largest, run by run.",
)
GENERALISES = Claim(
    "linear network with minibatches: what noise removes stays removed when the step drops",
    "‖VU - W‖² of B = 1 over full batch: above 1 while noise shakes the modes, below 1 once the step size has dropped",
    "The sign of its mean logarithm over seeds, 0 where it is within 4 standard errors of 0.",
)

CLAIMS = [
    STATIONARY, EXPONENT, FINITE_TIME, HALF_LEVEL, NEURON_RATE, NEURON_THRESHOLD, MODES, STRONG, AFTER_DROP, LOSSES,
    PUBLISHED, MERGING, ESCAPE, GENERAL, GENERALISES,
]  # fmt: skip


def kolmogorov(sample: np.ndarray) -> Estimate:
    """Kolmogorov's distance of a sample from the uniform law, with its critical value at ``SIGMAS``."""
    n = len(sample)
    distance = float(stats.kstest(sample, "uniform").statistic)
    return Estimate(distance, 0.2603 / n**0.5, float(stats.kstwobign.isf(2 * TAIL)) / n**0.5)


def fixed(standard_error: float, allowance: float | None = None) -> Statistic:
    """One measured number whose standard error is known from elsewhere."""
    allowed = SIGMAS * standard_error if allowance is None else allowance
    return lambda sample: Estimate(float(sample[0]), standard_error, allowed)


def chi_square(
    claim: Claim, setting: str, source: Reference, measured: np.ndarray, predicted: np.ndarray, n: int,
    rivals: Mapping[str, np.ndarray],
) -> Check:  # fmt: skip
    """Shares of ``n`` independent paths against predicted probabilities, jointly; only where both outcomes occur."""
    open_ = (predicted * n > 5) & ((1 - predicted) * n > 5)

    def per_degree(theory: np.ndarray) -> float:
        p = np.clip(theory[open_], 0.5 / n, 1 - 0.5 / n)
        return min(float((n * (measured[open_] - p) ** 2 / (p * (1 - p))).mean()), LARGEST)

    degrees = int(open_.sum())
    allowance = float(stats.chi2.isf(TAIL, degrees)) / degrees - 1
    observable = f"χ² a degree of freedom ({degrees}; at most {LARGEST:g} shown)"
    prediction = Prediction(observable, torch.tensor(1.0), 0.0, 0.0, source)
    return judge(
        NAME, claim, setting, prediction, torch.tensor([per_degree(predicted)], dtype=torch.float64),
        rivals=[Rival(name, 1.0, torch.tensor([per_degree(p)], dtype=torch.float64)) for name, p in rivals.items()],
        statistic=fixed((2 / degrees) ** 0.5, allowance),
    )  # fmt: skip


def weighted_root(x: np.ndarray, y: np.ndarray, variance: np.ndarray, degree: int) -> tuple[float, float]:
    """Where the weighted polynomial fit of y crosses 0 nearest to the middle of x, and its standard error."""
    centre = x.mean()
    design = np.vander(x - centre, degree + 1)
    weight = 1 / variance
    inverse = np.linalg.inv((design.T * weight) @ design)
    fit = inverse @ (design.T * weight) @ y
    roots = np.roots(fit)
    real = roots[np.abs(roots.imag) < 1e-9].real
    if not len(real):
        return float("nan"), float("nan")
    root = float(real[np.argmin(np.abs(real))])
    row = root ** np.arange(degree, -1, -1)
    slope = float(np.polyval(np.polyder(fit), root))
    return centre + root, float(np.sqrt(row @ inverse @ row)) / abs(slope)
