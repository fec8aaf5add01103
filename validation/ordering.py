"""Does a measure fall from one schedule to the next? Medians, ranges and a trend test paired by seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor


@dataclass(frozen=True)
class Ordering:
    """A measure along ordered schedules, over the runs that stayed finite.

    Attributes:
        median, lowest, highest: per schedule, NaN where no run stayed finite.
        survivors: number of finite runs per schedule.
        paired: number of seeds finite under every schedule, which the test uses.
        p_value: of the trend under "the schedules are exchangeable", one-sided; 1 without a paired seed.
    """

    median: tuple[float, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    survivors: tuple[int, ...]
    paired: int
    p_value: float


def decreasing(values: Tensor, finite: Tensor) -> Ordering:
    """Test whether ``values`` fall along the first axis, (schedules, seeds), pairing runs that share a seed's draws.

    Page's trend test for three or more schedules; the sign test, ties halved, for two.

    Raises:
        ValueError: fewer than two schedules, or shapes that differ.
    """
    if values.ndim != 2 or values.shape != finite.shape or len(values) < 2:
        raise ValueError(
            f"values {tuple(values.shape)} and finite {tuple(finite.shape)} are no comparison: give both as "
            "(schedules, seeds) with at least two schedules."
        )
    table, alive = values.double().cpu().numpy(), finite.cpu().numpy()
    kept = [row[ok] if ok.any() else np.array([np.nan]) for row, ok in zip(table, alive, strict=True)]
    median, lowest, highest = (tuple(float(of(row)) for row in kept) for of in (np.median, np.min, np.max))
    paired = table[:, alive.all(0)].T
    survivors = tuple(int(count) for count in alive.sum(1))
    return Ordering(median, lowest, highest, survivors, len(paired), _p_value(paired))


def _p_value(paired: np.ndarray) -> float:
    """One-sided p-value of a fall along the columns of (seeds, schedules)."""
    if not len(paired):
        return 1.0
    if paired.shape[1] == 2:
        falls = (paired[:, 0] > paired[:, 1]).sum() + 0.5 * (paired[:, 0] == paired[:, 1]).sum()
        return float(stats.binomtest(int(falls), len(paired), alternative="greater").pvalue)
    return float(stats.page_trend_test(paired[:, ::-1]).pvalue)
