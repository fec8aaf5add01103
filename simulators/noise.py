"""Brownian increments as a pure function of (seed, stream, step, path).

No global generator is read or written. The first P paths of a larger batch are the same numbers, whatever its size,
and a coarse increment is the sum of the fine ones it covers, bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from theory.streams import named_generator

BLOCK = 32  # steps drawn together


class BrownianIncrements:
    """Standard normal increments for steps 0, 1, 2, … in any order.

    Args:
        seed, stream: root seed and stream name.
        paths, channels: shape of one increment.
        refine: the increment of a step is the sum of ``refine`` consecutive fine increments over √refine, so runs
            with steps h (``refine=2m``) and h/2 (``refine=m``) see the same Brownian path.
        dtype, device: of the returned tensors. The numbers are drawn on the CPU in float64 and moved in blocks.
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
        self.paths, self.channels = paths, channels
        self._name, self._refine = (seed, stream), refine
        self._dtype, self._device = dtype, device
        self._block_index = -1
        self._block = torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """W(step+1) - W(step) in units of one step, shape (paths, channels)."""
        if self._refine == 1:
            return self._fine(step)
        first = step * self._refine
        total = self._fine(first).clone()
        for fine in range(first + 1, first + self._refine):
            total += self._fine(fine)
        return total / self._refine**0.5

    def _fine(self, step: int) -> Tensor:
        index, offset = divmod(step, BLOCK)
        if index != self._block_index:
            # Path-major, so that a smaller batch is a prefix of a larger one.
            draws = named_generator(*self._name, block=index).standard_normal((self.paths, BLOCK, self.channels))
            by_step = torch.from_numpy(np.ascontiguousarray(draws.transpose(1, 0, 2)))
            self._block, self._block_index = by_step.to(device=self._device, dtype=self._dtype), index
        return self._block[offset]
