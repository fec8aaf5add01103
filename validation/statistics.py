"""Estimates with standard errors, at one stated false-alarm rate for every check."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

SIGMAS = 4.0
"""Sampling error allowed, in standard errors (Gaussian equivalent): a true claim fails by chance in 6 of 100 000."""

BOOTSTRAP = 2000


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample, its standard error, and the sampling error allowed to it (``SIGMAS`` of them)."""

    value: float
    standard_error: float
    allowance: float


def mean(sample: np.ndarray) -> Estimate:
    """Mean; the allowance uses Student's t, so that few replicates do not pass for certainty."""
    n = len(sample)
    error = float(sample.std(ddof=1) / np.sqrt(n)) if n > 1 else float("inf")
    if error < 1e-13 * np.abs(sample).max():
        error = 0.0  # all alike: rounding, not spread
    quantile = float(stats.t.ppf(stats.norm.cdf(SIGMAS), n - 1)) if n > 1 else float("inf")
    return Estimate(float(sample.mean()), error, quantile * error if error else 0.0)


def median(sample: np.ndarray) -> Estimate:
    """Median, with the bootstrap's standard error (fixed seed)."""
    if len(sample) < 2:
        return Estimate(float(np.median(sample)), float("inf"), float("inf"))
    draws = np.random.default_rng(0).choice(sample, (BOOTSTRAP, len(sample)))
    error = float(np.median(draws, axis=1).std(ddof=1))
    return Estimate(float(np.median(sample)), error, SIGMAS * error)


def worst(sample: np.ndarray) -> Estimate:
    """The entry furthest from zero, for identities that have no sampling error."""
    return Estimate(float(sample[np.argmax(np.abs(sample))]), 0.0, 0.0)


def kendall_tau(ordered: np.ndarray) -> np.ndarray:
    """Kendall's τ_b between the column order and the entries of each row, shape (rows,): +1 where a row ascends."""
    first, second = np.triu_indices(ordered.shape[1], 1)
    signs = np.sign(ordered[:, second] - ordered[:, first])
    return signs.mean(1)
