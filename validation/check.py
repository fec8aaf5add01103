"""The verdict: a prediction against a measurement, and its rivals against the same measurement.

A claim conforms when |measured - predicted| ≤ sampling error + stated error × |predicted - null|. The stated error is
a fraction of the *effect*, not of the value. A rival is held to the same rule; the claim agrees only if it conforms
and every rival is rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theory.prediction import Prediction
from validation.statistics import SIGMAS, Estimate, mean

Statistic = Callable[[np.ndarray], Estimate]


class Verdict(StrEnum):
    """What a check comes to."""

    AGREES = "agrees"
    DISAGREES = "disagrees"
    INCONCLUSIVE = "inconclusive"
    NOT_EVALUABLE = "not evaluable"


@dataclass(frozen=True, eq=False)
class Rival:
    """A competing prediction of the same observable.

    Attributes:
        name: what it assumes.
        value: scalar, or one entry per replicate.
        measured: for observables that are distances to the prediction: the distance to this rival instead.
        standard_error: the value's own sampling error, when it comes from simulated paths.
    """

    name: str
    value: Tensor | float
    measured: Tensor | None = None
    standard_error: float = 0.0


@dataclass(frozen=True)
class RivalOutcome:
    """How a rival fared: its prediction (for distances: how far it lies), and whether it is rejected."""

    name: str
    predicted: float
    rejected: bool


@dataclass(frozen=True)
class Check:
    """One row of the verdict table. ``allowed`` is the largest gap that conforms; ``seeds`` counts all replicates."""

    suite: str
    claim: str
    source: str
    setting: str
    observable: str
    predicted: float
    predicted_error: float
    null: float
    measured: float
    standard_error: float
    seeds: int
    diverged: int
    allowed: float
    expected: Verdict
    verdict: Verdict
    rivals: tuple[RivalOutcome, ...] = field(default=())
    given: str = ""

    @property
    def as_expected(self) -> bool:
        """Whether the verdict is the one the suite expects (a known failure of theory is expected to disagree)."""
        return self.verdict == self.expected


def check_from_row(row: Mapping[str, Any]) -> Check:
    """A check as it was saved (``dataclasses.asdict`` with null for NaN)."""

    def number(value: float | None) -> float:
        return float("nan") if value is None else value

    numbers = {
        name: number(row[name])
        for name in ("predicted", "predicted_error", "null", "measured", "standard_error", "allowed")
    }
    rivals = tuple(RivalOutcome(r["name"], number(r["predicted"]), r["rejected"]) for r in row["rivals"])
    verdicts = {name: Verdict(row[name]) for name in ("expected", "verdict")}
    return Check(**{**row, **numbers, **verdicts, "rivals": rivals})


@dataclass(frozen=True)
class Claim:
    """A statement under test, in words and as an equation, and what would falsify it."""

    name: str
    equation: str
    meaning: str


def judge(
    suite: str,
    claim: Claim,
    setting: str,
    prediction: Prediction,
    measured: Tensor,
    *,
    finite: Tensor | None = None,
    rivals: Sequence[Rival] = (),
    statistic: Statistic = mean,
    expected: Verdict = Verdict.AGREES,
) -> Check:
    """Hold ``measured`` (one entry per replicate) against a prediction and its rivals.

    Replicates that diverged are left out of the estimate and counted. A prediction with one entry per replicate is
    compared replicate by replicate.
    """
    sample = _numpy(measured)
    ok = np.ones(len(sample), bool) if finite is None else _numpy(finite).astype(bool)
    ok &= np.isfinite(sample)
    common: dict[str, Any] = {
        "suite": suite,
        "claim": claim.name,
        "source": str(prediction.source),
        "setting": setting,
        "observable": prediction.observable,
        "predicted_error": prediction.error,
        "null": prediction.null,
        "seeds": len(sample),
        "diverged": int((~ok).sum()),
        "expected": expected,
        "given": prediction.given,
    }
    value = _per_replicate(prediction.value, len(sample))[ok]
    if ok.sum() < min(2, len(sample)) or not np.isfinite(value).all():
        nan = float("nan")
        unknown = tuple(RivalOutcome(rival.name, nan, False) for rival in rivals)
        return Check(
            **common, predicted=nan, measured=nan, standard_error=nan, allowed=nan,
            verdict=Verdict.NOT_EVALUABLE, rivals=unknown,
        )  # fmt: skip
    gap = statistic(sample[ok] - value)
    allowed = _allowed(gap, prediction.standard_error, value, prediction)
    fared = []
    for rival in rivals:
        rival_value = _per_replicate(rival.value, len(sample))[ok]
        rival_sample = sample[ok] if rival.measured is None else _numpy(rival.measured)[ok]
        rival_gap = statistic(rival_sample - rival_value)
        rejected = abs(rival_gap.value) > _allowed(rival_gap, rival.standard_error, rival_value, prediction)
        shown = rival_value.mean() if rival.measured is None else statistic(rival_sample).value
        fared.append(RivalOutcome(rival.name, float(shown), bool(rejected)))
    if abs(gap.value) > allowed:
        verdict = Verdict.DISAGREES
    elif all(outcome.rejected for outcome in fared):
        verdict = Verdict.AGREES
    else:
        verdict = Verdict.INCONCLUSIVE
    return Check(
        **common, predicted=float(value.mean()), measured=float(value.mean()) + gap.value,
        standard_error=math.hypot(gap.standard_error, prediction.standard_error),
        allowed=allowed, verdict=verdict, rivals=tuple(fared),
    )  # fmt: skip


def _allowed(gap: Estimate, standard_error: float, value: np.ndarray, prediction: Prediction) -> float:
    sampling = math.hypot(gap.allowance, SIGMAS * standard_error)
    return sampling + prediction.error * abs(float(value.mean()) - prediction.null)


def _per_replicate(value: Tensor | float, replicates: int) -> np.ndarray:
    return np.broadcast_to(_numpy(torch.as_tensor(value, dtype=torch.float64)), (replicates,))


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
