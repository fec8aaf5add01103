"""Step-size schedules, and the only place where SGD steps become SDE time (one step of size η = η units of time)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StepSizes(Protocol):
    """What every run asks of a schedule: :class:`Schedule` here, further shapes in :mod:`theory.schedule_shapes`."""

    @property
    def label(self) -> str:
        """Short text for tables and legends."""

    def step_sizes(self, steps: int) -> Tensor:
        """η_0 … η_{N-1} of a run of N steps, shape (steps,), float64."""


@dataclass(frozen=True)
class Warmup:
    """A step size that grows: η₀ · (1 + (F - 1)(k/N)^e) while k <= int(fraction · N), constant from there on.

    The growth is in units of the whole run, as in AVPF's code: the peak is η₀ · (1 + (F - 1) fraction^e), and F itself
    would be reached after N steps.

    Attributes:
        fraction: of the run that the warmup lasts, in [0, 1].
        factor: F > 0.
        exponent: e > 0; 1 is a linear warmup.

    Raises:
        ValueError: a fraction outside [0, 1], a factor or exponent that is not positive and finite.
    """

    fraction: float
    factor: float
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.fraction <= 1 and 0 < self.factor < float("inf") and 0 < self.exponent < float("inf")):
            raise ValueError(
                f"warmup by {self.factor} over {self.fraction} of the run with exponent {self.exponent} is not usable: "
                "choose a fraction in [0, 1] and a positive factor and exponent."
            )

    def growth(self, steps: int) -> Tensor:
        """η_k / η₀ without decays for k = 0 … N-1, shape (steps,), float64."""
        progress = torch.arange(steps, dtype=torch.float64).clamp(max=int(self.fraction * steps)) / max(steps, 1)
        return 1 + (self.factor - 1) * progress**self.exponent

    @property
    def peak(self) -> float:
        """η_k / η₀ where the growth ends."""
        return 1 + (self.factor - 1) * self.fraction**self.exponent


@dataclass(frozen=True)
class Schedule:
    """A step size that is divided by given factors at given fractions of the run.

    η_k = η₀ / Π {factor : k > int(fraction · N)} for k = 0 … N-1: the step with index int(fraction · N) is the last
    at the larger size, as in AVPF's diagonal-network code.

    Attributes:
        step_size: η₀ > 0.
        decays: pairs (fraction in [0, 1], factor > 0).
        warmup: growth of the step size at the start, or ``None``.
        decay_at_once: the step with index int(fraction · N) is the first at the smaller size instead (k >= in place of
            k >), as in AVPF's code for ReLU networks.

    Raises:
        ValueError: a step size or factor that is not positive and finite, a fraction outside [0, 1].
    """

    step_size: float
    decays: tuple[tuple[float, float], ...] = ()
    warmup: Warmup | None = None
    decay_at_once: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"step size {self.step_size} is not usable: choose a positive number.")
        for fraction, factor in self.decays:
            if not (0 <= fraction <= 1 and 0 < factor < float("inf")):
                raise ValueError(
                    f"decay by {factor} at {fraction} of the run is not usable: "
                    "choose a fraction in [0, 1] and a positive factor."
                )

    def step_sizes(self, steps: int) -> Tensor:
        """η_0 … η_{N-1}, shape (steps,), float64."""
        sizes = torch.full((steps,), float(self.step_size), dtype=torch.float64)
        if self.warmup is not None:
            sizes *= self.warmup.growth(steps)
        return sizes / self.decay_factors(steps)

    def decay_factors(self, steps: int) -> Tensor:
        """The product of the factors by which η_k has been divided, k = 0 … N-1, shape (steps,), float64."""
        product = torch.ones(steps, dtype=torch.float64)
        for fraction, factor in self.decays:
            product[int(fraction * steps) + (not self.decay_at_once) :] *= factor
        return product

    @property
    def label(self) -> str:
        """Short text for tables and legends, e.g. ``η=0.282, /4.8 at 10%`` or ``η=0.08→0.206, /3.5 at 10%``."""
        start = f"η={self.step_size:g}"
        if self.warmup is not None:
            start += f"→{self.step_size * self.warmup.peak:.3g}"
        return start + "".join(f", /{factor:g} at {at:.0%}" for at, factor in self.decays)


def sde_time(step_sizes: Tensor) -> Tensor:
    """t_k = Σ_{l<k} η_l for k = 0 … N, shape (N+1,): the SDE time after k steps."""
    return torch.cat([step_sizes.new_zeros(1), step_sizes.cumsum(0)])


def stack_step_sizes(schedules: Sequence[StepSizes], steps: int) -> Tensor:
    """The step sizes of several schedules, shape (schedules, steps)."""
    if not schedules:
        raise ValueError("no schedule was given: pass at least one, e.g. Schedule(0.1).")
    return torch.stack([schedule.step_sizes(steps) for schedule in schedules])


def effective_step_size(step_size: float, momentum: float) -> float:
    """η/(1-μ): heavy-ball SGD, m ← μm + g, θ ← θ - ηm, moves slow coordinates as plain SGD of this step size does.

    One step lasts η/(1-μ) units of SDE time, and the gradient noise of each step is felt η/(1-μ) times. Valid for
    directions with η/(1-μ) times their curvature well below 1; sharper ones feel the momentum itself.
    Source: Mandt, Hoffman, Blei (2017); Li, Tai, E (2017).

    Raises:
        ValueError: momentum outside [0, 1).
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum {momentum} is not usable: choose a number in [0, 1).")
    return step_size / (1 - momentum)


class StepClock:
    """η as a function of SDE time, constant while one SGD step lasts: t ↦ η_k for t_k ≤ t < t_{k+1}."""

    def __init__(self, step_sizes: Tensor) -> None:
        self._sizes = step_sizes.tolist()
        self._starts = sde_time(step_sizes)[:-1].tolist()

    def __call__(self, t: float) -> float:
        return self._sizes[interval_of(self._starts, float(t))]

    def at(self, times: Sequence[float]) -> Tensor:
        """η at several times, shape (times,), float64."""
        return torch.tensor(self._sizes, dtype=torch.float64)[intervals_of(self._starts, times)]


def interval_of(starts: Sequence[float], t: float) -> int:
    """The last interval that begins at t or before; a start that round-off has pushed just past t still counts."""
    return max(bisect_right(starts, t * (1 + 1e-12) + 1e-300) - 1, 0)


def intervals_of(starts: Sequence[float], times: Sequence[float]) -> Tensor:
    """The same for several times, shape (times,), int64."""
    begun, at = (torch.tensor(part, dtype=torch.float64) for part in (starts, times))
    return (torch.searchsorted(begun, at * (1 + 1e-12) + 1e-300, right=True) - 1).clamp(min=0)
