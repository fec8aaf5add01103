"""Step-size schedules of the papers' image networks: warmups that grow until a decay, cosine, triangle, milestones.

All are :class:`theory.schedule.StepSizes`; constant and piecewise ones are :class:`theory.schedule.Schedule`. Time is
t_k = (k + 1)/N, the share of the run that is over once step k is done, as in AVPF's code for deep networks.
Sources: Andriushchenko et al. (2023), AVPF, code for deep networks; Chen, Kunin et al. (2023), CKYG, training options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from theory.schedule import Warmup

LAST_DECAY = 0.9  # share of the run at which AVPF's schedules decay for the second time


def _positive(what: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{what} {value} is not usable: choose a positive number.")


class Growth(Protocol):
    """How the step size of :class:`GrowThenDecay` grows."""

    def at(self, t: Tensor) -> Tensor:
        """η/η₀ before the decay, for shares t of the run, shape (steps,)."""

    def at_decay(self, share: float) -> float:
        """What the decayed step size is a tenth of, in units of η₀, when the decay comes at this share of the run."""


@dataclass(frozen=True)
class Exponential:
    """η/η₀ = w^(100 t), w > 1: ``base`` a percent of the run."""

    base: float = 1.05

    def __post_init__(self) -> None:
        if not 1 < self.base < math.inf:
            raise ValueError(f"growth by {self.base} a percent of the run is not usable: choose a base above 1.")

    def at(self, t: Tensor) -> Tensor:
        return self.base ** (100 * t)

    def at_decay(self, share: float) -> float:
        return self.base ** (100 * share)


@dataclass(frozen=True)
class Power:
    """η/η₀ = 1 + (100 t)^e, 0 < e < 1."""

    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.exponent < 1:
            raise ValueError(f"growth with exponent {self.exponent} is not usable: choose one between 0 and 1.")

    def at(self, t: Tensor) -> Tensor:
        return 1 + (100 * t) ** self.exponent

    def at_decay(self, share: float) -> float:
        return 1 + (100 * share) ** self.exponent


@dataclass(frozen=True)
class Linear:
    """η/η₀ rises from 1 to F over the first half of the run. With F = 1 it is constant.

    The decayed step size is a tenth of 2·share·F·η₀, whatever was reached before: even a constant step size decays to
    one proportional to the time of the decay, so *when* and *how much* it decays are confounded. AVPF's numbers were
    made that way; :class:`DecayTo` separates the two.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        _positive("growth by a factor of", self.factor)

    def at(self, t: Tensor) -> Tensor:
        return 1 + (self.factor - 1) * (2 * t).clamp(max=1)

    def at_decay(self, share: float) -> float:
        return 2 * share * self.factor


@dataclass(frozen=True)
class GrowThenDecay:
    """AVPF's deep networks: η₀ growth(t) while t < p, then η₀ growth(p)/10, and from t = 0.9 on η₀ growth(p)/100.

    Attributes:
        step_size: η₀ > 0.
        decay_at: p, in (0, 0.9]; 0.1, 0.3 and 0.5 in the paper.
        growth: :class:`Exponential`, :class:`Power` or :class:`Linear`.

    Raises:
        ValueError: a number that is not usable.
    """

    step_size: float
    decay_at: float
    growth: Growth = Linear()

    def __post_init__(self) -> None:
        _positive("step size", self.step_size)
        if not 0 < self.decay_at <= LAST_DECAY:
            raise ValueError(f"a decay at {self.decay_at} of the run is not usable: choose 0 < share <= {LAST_DECAY}.")

    def step_sizes(self, steps: int) -> Tensor:
        t = _shares(steps)
        decayed = torch.where(t < LAST_DECAY, 0.1, 0.01) * self.growth.at_decay(self.decay_at)
        return self.step_size * torch.where(t < self.decay_at, self.growth.at(t), decayed)

    @property
    def label(self) -> str:
        peak = self.step_size * float(self.growth.at(torch.tensor(self.decay_at, dtype=torch.float64)))
        low = self.step_size * self.growth.at_decay(self.decay_at) / 10
        grown = f"→{peak:.3g}" if peak != self.step_size else ""
        return f"η={self.step_size:g}{grown}, {low:.3g} from {self.decay_at:.0%}, {low / 10:.3g} from {LAST_DECAY:.0%}"


@dataclass(frozen=True)
class DecayTo:
    """η until t = p, then the same final step size however late that is: *when* it decays, apart from *how much*.

    Attributes:
        step_size: η > 0 before the decay, after the warmup when there is one.
        final: step size from step int(p N) on, > 0.
        decay_at: p, in [0, 1].
        warmup: growth at the start; its ``factor`` is in units of ``step_size``, as in :class:`theory.schedule.Warmup`.

    Raises:
        ValueError: a number that is not usable.
    """

    step_size: float
    final: float
    decay_at: float
    warmup: Warmup | None = None

    def __post_init__(self) -> None:
        _positive("step size", self.step_size)
        _positive("final step size", self.final)
        if not 0 <= self.decay_at <= 1:
            raise ValueError(f"a decay at {self.decay_at} of the run is not usable: choose a share in [0, 1].")

    def step_sizes(self, steps: int) -> Tensor:
        sizes = torch.full((steps,), float(self.step_size), dtype=torch.float64)
        if self.warmup is not None:
            sizes *= self.warmup.growth(steps)
        sizes[int(self.decay_at * steps) :] = self.final
        return sizes

    @property
    def label(self) -> str:
        grown = "" if self.warmup is None else f"→{self.step_size * self.warmup.peak:.3g}"
        return f"η={self.step_size:g}{grown}, {self.final:g} from {self.decay_at:.0%}"


@dataclass(frozen=True)
class Cosine:
    """η_f + (η - η_f)(1 + cos π s)/2, s the share of what follows the warmup, or of each of several equal cycles.

    Attributes:
        step_size: η > 0, the largest.
        final: η_f ≥ 0, the smallest.
        warmup: share of the run over which the step size first rises linearly from 0 to η, in [0, 1).
        cycles: number of times that the cosine starts again at η.

    Raises:
        ValueError: a number that is not usable.
    """

    step_size: float
    final: float = 0.0
    warmup: float = 0.0
    cycles: int = 1

    def __post_init__(self) -> None:
        _positive("step size", self.step_size)
        if not (0 <= self.final <= self.step_size and 0 <= self.warmup < 1 and self.cycles >= 1):
            raise ValueError(
                f"a cosine from {self.step_size} to {self.final} after a warmup of {self.warmup} of the run, "
                f"{self.cycles} times, is not usable: choose 0 <= final <= step size, 0 <= warmup < 1 and 1 or more."
            )

    def step_sizes(self, steps: int) -> Tensor:
        t = _shares(steps)
        s = self.cycles * (t - self.warmup).clamp(min=0) / (1 - self.warmup)
        s = s - (s.ceil() - 1).clamp(min=0)  # a cycle's last step is its lowest, not the next one's first
        fall = self.final + (self.step_size - self.final) * (1 + torch.cos(math.pi * s)) / 2
        return torch.where(t < self.warmup, self.step_size * t / max(self.warmup, 1e-300), fall)

    @property
    def label(self) -> str:
        risen = f", warmup {self.warmup:.0%}" if self.warmup else ""
        return f"cosine η={self.step_size:g}→{self.final:g}{risen}" + (f", {self.cycles}×" if self.cycles > 1 else "")


@dataclass(frozen=True)
class Cyclic:
    """A triangle: from 0 up to η at t = ``peak_at`` and back to 0 at the end; AVPF's cyclic one peaks at 0.4.

    Raises:
        ValueError: a step size that is not positive, a peak outside (0, 1).
    """

    step_size: float
    peak_at: float = 0.4

    def __post_init__(self) -> None:
        _positive("step size", self.step_size)
        if not 0 < self.peak_at < 1:
            raise ValueError(f"a peak at {self.peak_at} of the run is not usable: choose a share between 0 and 1.")

    def step_sizes(self, steps: int) -> Tensor:
        t = _shares(steps)
        return self.step_size * torch.minimum(t / self.peak_at, (1 - t) / (1 - self.peak_at))

    @property
    def label(self) -> str:
        return f"cyclic η={self.step_size:g}, peak at {self.peak_at:.0%}"


@dataclass(frozen=True)
class Multistep:
    """CKYG: linear warmup over so many steps, then η divided by ``factor`` at each milestone, all in steps.

    η_k = η · min((k + 1)/warmup, 1) / factor^#{milestones ≤ k}.

    Attributes:
        step_size: η > 0.
        milestones: ascending step numbers, 0 or more.
        factor: > 0; 10 in CKYG.
        warmup: number of steps, 0 for none; 1000 in CKYG.

    Raises:
        ValueError: a number that is not usable.
    """

    step_size: float
    milestones: tuple[int, ...] = ()
    factor: float = 10.0
    warmup: int = 0

    def __post_init__(self) -> None:
        _positive("step size", self.step_size)
        _positive("a factor of", self.factor)
        if self.warmup < 0 or any(m < 0 for m in self.milestones) or any(a >= b for a, b in pairwise(self.milestones)):
            raise ValueError(
                f"milestones {self.milestones} and a warmup of {self.warmup} steps are not usable: give ascending step "
                "numbers and 0 or more steps."
            )

    def step_sizes(self, steps: int) -> Tensor:
        k = torch.arange(steps, dtype=torch.float64)
        passed = torch.bucketize(k, torch.tensor(self.milestones, dtype=torch.float64), right=True)
        return self.step_size * ((k + 1) / max(self.warmup, 1)).clamp(max=1) / self.factor**passed

    @property
    def label(self) -> str:
        risen = f", warmup {self.warmup} steps" if self.warmup else ""
        return f"η={self.step_size:g}{risen}" + "".join(f", /{self.factor:g} at step {m}" for m in self.milestones)


def _shares(steps: int) -> Tensor:
    """t_k = (k + 1)/N, shape (steps,), float64."""
    return torch.arange(1, steps + 1, dtype=torch.float64) / max(steps, 1)
