"""What any run leaves behind, simulated or real, and the grids of steps at which it is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Probe:
    """What to measure and when: a function of the (batched) state, and ascending steps; k means "after k steps".

    With ``weights`` of shape (T, ...), whose trailing axes match the leading batch axes of the values, only the sum
    Σ_at weight · value is kept: a series with one entry, at the last step.

    ``at_once`` says that the function takes states with a further leading axis, so that an integrator which keeps
    the states of several steps may have them measured in one call.
    """

    function: Callable[[Any], Tensor]
    at: Tensor
    weights: Tensor | None = None
    at_once: bool = False


@dataclass(frozen=True, eq=False)
class Series:
    """A measured quantity: recorded steps (T,) and values (T, *batch, ...), NaN after a run's first bad step."""

    steps: Tensor
    values: Tensor

    def at(self, step: int) -> Tensor:
        """The values at the last recorded step that is at most ``step``.

        Raises:
            ValueError: a step before the first record.
        """
        row = int(torch.searchsorted(self.steps, step, right=True)) - 1
        if row < 0:
            raise ValueError(
                f"nothing was recorded at or before step {step}: the first record is {int(self.steps[0])}."
            )
        return self.values[row]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A batch of runs.

    Attributes:
        series: the measured quantities by name.
        final: the state after the last step (of a diverged run: its last state before the bad step).
        first_bad_step: step at which a run stopped being finite, shape ``batch``, int64; -1 where it never did.
        dims: names of the batch axes, e.g. ``("schedule", "seed")``.
    """

    series: Mapping[str, Series]
    final: Any
    first_bad_step: Tensor
    dims: tuple[str, ...]

    def __getitem__(self, name: str) -> Series:
        if name not in self.series:
            raise ValueError(f"no series '{name}' was recorded: choose among {', '.join(self.series)}.")
        return self.series[name]

    @property
    def finite(self) -> Tensor:
        """Which runs stayed finite, shape ``batch``, bool."""
        return self.first_bad_step < 0


class Recorder:
    """Collects the probes' values while a run goes on; every integrator and training loop uses it."""

    def __init__(self, probes: Mapping[str, Probe], steps: int, first_step: int = 0) -> None:
        for name, probe in probes.items():
            at = probe.at.tolist()
            if not at or at != sorted(set(at)) or at[0] < 0 or at[-1] > steps:
                raise ValueError(f"the steps at which to measure '{name}' have to ascend between 0 and {steps}.")
            if probe.weights is not None and len(probe.weights) != len(at):
                raise ValueError(f"'{name}' has {len(probe.weights)} weights for {len(at)} steps: give one each.")
        self._probes = _remaining(probes, first_step)
        self._values: dict[str, list[Tensor]] = {name: [] for name in self._probes}
        self._counts = dict.fromkeys(self._probes, 0)
        self._due: dict[int, list[str]] = {}
        for name, probe in self._probes.items():
            for step in probe.at.tolist():
                self._due.setdefault(step, []).append(name)

    @property
    def stops(self) -> list[int]:
        """The steps at which something is measured, ascending."""
        return sorted(self._due)

    def record(self, step: int, state: Any) -> None:
        """Measure what is due after ``step`` steps."""
        for name in self._due.get(step, ()):
            self._keep(name, self._probes[name].function(state).unsqueeze(0))

    def record_several(self, steps: Sequence[int], states: Any) -> None:
        """The same for the states after each of ``steps``, stacked along a leading axis."""
        together = [name for name, probe in self._probes.items() if probe.at_once]
        for name in together:
            rows = [row for row, step in enumerate(steps) if name in self._due.get(step, ())]
            if rows:
                self._keep(name, self._probes[name].function(states if len(rows) == len(steps) else states[rows]))
        for row, step in enumerate(steps):
            alone = [name for name in self._due.get(step, ()) if name not in together]
            state = states[row] if alone else None
            for name in alone:
                self._keep(name, self._probes[name].function(state).unsqueeze(0))

    def _keep(self, name: str, values: Tensor) -> None:
        """Values of the next records, shape (records, ...), as they are or as a weighted sum."""
        weights, kept = self._probes[name].weights, self._values[name]
        if weights is None:
            kept.append(values)
            return
        weights = weights[self._counts[name] : self._counts[name] + len(values)].to(values)
        self._counts[name] += len(values)
        part = (values * weights.view(*weights.shape, *[1] * (values.ndim - weights.ndim))).sum(0, keepdim=True)
        if kept:
            kept[0] += part
        else:
            kept.append(part)

    def series(self, first_bad_step: Tensor) -> dict[str, Series]:
        """The recorded series, masked with NaN from each run's first bad step on."""
        result = {}
        for name, rows in self._values.items():
            values = torch.cat(rows)
            at = self._probes[name].at[-len(values) :]
            clock = at.to(first_bad_step.device).view(-1, *[1] * first_bad_step.ndim)
            late = (clock > first_bad_step) & (first_bad_step >= 0)
            late = late.view(*late.shape, *[1] * (values.ndim - late.ndim)).to(values.device)
            result[name] = Series(at, values.masked_fill(late, torch.nan))
        return result


def _remaining(probes: Mapping[str, Probe], first_step: int) -> dict[str, Probe]:
    """What is left to measure from ``first_step`` on."""
    left = {}
    for name, probe in probes.items():
        late = probe.at >= first_step
        if late.any():
            weights = None if probe.weights is None else probe.weights[late]
            left[name] = replace(probe, at=probe.at[late], weights=weights)
    return left


def linear_grid(steps: int, first: int = 100, points: int = 250) -> Tensor:
    """AVPF's evaluation grid: {0 … first-1} ∪ round(linspace(0, steps, points)) without its last point, int64."""
    spread = torch.linspace(0, steps, points, dtype=torch.float64).round()[:-1]
    return torch.cat([torch.arange(min(first, steps)).double(), spread]).unique().long()


def dense_grid(steps: int, every_until: int, stride: int) -> Tensor:
    """Every step up to ``every_until``, then every ``stride``-th below ``steps``: for sums over steps, int64."""
    return torch.cat([torch.arange(0, min(every_until, steps)), torch.arange(min(every_until, steps), steps, stride)])


def widening_grid(steps: int, share: float = 1 / 200, widest: int = 64) -> Tensor:
    """Steps below ``steps`` a ``share`` of the steps so far apart, at least 1 and at most ``widest``: for sums, int64.

    What decays over a run's course is summed to a fraction ``share`` of itself, and what fluctuates for ever is
    sampled evenly.
    """
    grid, k = [], 0
    while k < steps:
        grid.append(k)
        k += min(max(1, int(share * k)), widest)
    return torch.tensor(grid, dtype=torch.int64)


def step_weights(grid: Tensor, steps: int) -> Tensor:
    """Number of steps each record stands for: Σ_{k<steps} f(k) ≈ Σ_grid weight · f(grid), shape (T,)."""
    return torch.cat([grid, torch.tensor([steps])]).diff()
