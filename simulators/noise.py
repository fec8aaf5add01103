"""Brownian increments as a pure function of (seed, stream, step, path).

No global generator is read or written. The first P paths of a larger batch are the same numbers, whatever its size,
and a coarse increment is the sum of the fine ones it covers, bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simulators.normals_torch import normal_rows
from theory.normals import fill_rows, normals_key

TOGETHER, TOGETHER_ON_GPU = 1 << 18, 1 << 22  # normals held at once, which has no effect on their values


class BrownianIncrements:
    """Standard normal increments for steps 0, 1, 2, … in any order.

    Args:
        seed, stream: root seed and stream name.
        paths, channels: shape of one increment.
        refine: the increment of a step is the sum of ``refine`` consecutive fine increments over √refine, so runs
            with steps h (``refine=2m``) and h/2 (``refine=m``) see the same Brownian path.
        dtype, device: of the returned tensors. The numbers are drawn on the device in float64, from the same counters
            on every device, and rounded to the dtype; devices differ by the rounding of ln, sin and cos.

    Attributes:
        key: of the rows of :mod:`theory.normals`; fine step k of path p, channel c is number p·channels + c of
            row k, for loops that draw for themselves.
    """

    def __init__(
        self,
        seed: int,
        stream: str,
        paths: int,
        channels: int,
        refine: int = 1,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if paths < 1 or channels < 1 or refine < 1:
            raise ValueError(
                f"{paths} paths, {channels} channels and refinement {refine} do not make increments: give all >= 1."
            )
        self.seed, self.paths, self.channels, self.refine = seed, paths, channels, refine
        self.key = normals_key(seed, stream)
        self._dtype, self._device = dtype, torch.device(device)
        together = TOGETHER if self._device.type == "cpu" else TOGETHER_ON_GPU
        self._steps = max(together // (paths * channels), 1)
        self._first, self._block = 0, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """W(step+1) - W(step) in units of one step, shape (paths, channels)."""
        if self.refine == 1:
            return self._fine(step)
        first = step * self.refine
        total = self._fine(first).clone()
        for fine in range(first + 1, first + self.refine):
            total += self._fine(fine)
        return total / self.refine**0.5

    def _fine(self, step: int) -> Tensor:
        if not self._first <= step < self._first + len(self._block):
            block = self._rows(step).view(self._steps, self.paths, self.channels)
            self._first, self._block = step, block.to(self._dtype)
        return self._block[step - self._first]

    def _rows(self, step: int) -> Tensor:
        numbers = self.paths * self.channels
        if self._device.type != "cpu":
            return normal_rows(self.key, step, self._steps, numbers, self._device)
        drawn = np.empty((self._steps, numbers))
        fill_rows(self.key, step, drawn)
        return torch.from_numpy(drawn)
