"""Brownian increments as a pure function of (seed, stream, step, path).

No global generator is read or written. The first P paths of a larger batch are the same numbers, whatever its size,
and a coarse increment is the sum of the fine ones it covers, bit for bit.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from torch import Tensor

from theory.streams import seed_of

CHAIN = 256  # steps that one generator draws in turn
TOGETHER = 1 << 18  # normals held at once; how many steps that makes has no effect on their values

_WORKERS = ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="increments")


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
        self.seed, self.paths, self.channels = seed, paths, channels
        self._name, self._refine = (seed, stream), refine
        self._dtype, self._device = dtype, device
        # Paths that share a generator, whatever their number: a power of two of about 2560 normals a step.
        self._group = min(1 << max(2560 // channels, 1).bit_length() - 1, 256)
        self._groups = -(-paths // self._group)
        self._steps = min(max(TOGETHER // (self._groups * self._group * channels), 1), CHAIN)
        self._generators: list[np.random.Generator] = []
        self._position = -1  # the step that the generators draw next
        self._first, self._block = 0, torch.empty(0)
        self._ahead: tuple[int, np.ndarray, list[Future[None]]] | None = None

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
        if not self._first <= step < self._first + len(self._block):
            drawing = self._ahead
            if drawing is None or drawing[0] != step:
                wait(drawing[2] if drawing else [])
                drawing = self._draw(step)
            wait(drawing[2])
            self._first = step
            self._block = torch.from_numpy(drawing[1]).to(device=self._device, dtype=self._dtype)[:, : self.paths]
            self._ahead = self._draw(step + len(self._block))  # while the run goes on
        return self._block[step - self._first]

    def _draw(self, first: int) -> tuple[int, np.ndarray, list[Future[None]]]:
        """Start drawing from step ``first`` on, groups of paths spread over the workers."""
        chain, offset = divmod(first, CHAIN)
        skip = 0
        if first != self._position or offset == 0:
            # SFC64 makes normals faster than Philox does; the key does the work of its counter.
            seeds = (seed_of(*self._name, group, chain) for group in range(self._groups))
            self._generators, skip = [np.random.Generator(np.random.SFC64(seed)) for seed in seeds], offset
        count, size, generators = min(self._steps, CHAIN - offset), self._group, self._generators
        self._position = first + count
        block = np.empty((count, self._groups * size, self.channels))

        def fill(groups: range) -> None:
            for group in groups:
                if skip:
                    generators[group].standard_normal((skip, size, self.channels))
                drawn = generators[group].standard_normal((count, size, self.channels))
                block[:, group * size : (group + 1) * size] = drawn

        share = max(-(-self._groups // (2 * (os.cpu_count() or 1))), 1)
        shares = [range(at, min(at + share, self._groups)) for at in range(0, self._groups, share)]
        return first, block, [_WORKERS.submit(fill, groups) for groups in shares]
